"""Plots of a study: curves over the axis of a table or over its measures, or points in a row for each arm."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from quarterview.studies.config import parse_measure
from quarterview.studies.page import COLORS, GRAY, get_matplotlib_settings, render_svg
from quarterview.studies.study_results import MEASURE_NAMES, TableResults, format_measure
from quarterview.studies.verdict import Estimate

_MIN_CURVE_POINTS = 4  # a curve over measures is drawn from this number of positions on its x axis


def draw_curve_svg(results: TableResults, hash_salt: str) -> str:
    """Return a plot of one table as SVG.

    Args:
        hash_salt: a text that differs between the plots of a page, so that the ids in their SVG differ.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(get_matplotlib_settings(hash_salt)):
        figure = Figure(figsize=(7, 3.6))
        _choose_draw_function(results)(figure.subplots(), results)
        figure.tight_layout()
        return render_svg(figure)


def is_drawn_as_curve(results: TableResults) -> bool:
    """Return True if a table is drawn as curves, not as points in rows."""
    return _choose_draw_function(results) is not _draw_rows


def _choose_draw_function(results: TableResults) -> Callable[[Any, TableResults], None]:
    """Return the function that draws a table: over its axis, over its measures, or in rows."""
    if results.table.axis is not None:
        return _draw_over_axis
    kinds = {parse_measure(measure)[0] for measure in results.measures}
    has_common_axis = kinds == {"finetune"} or kinds <= {"linear", "knn"}
    num_ticks = len({*map(_get_tick_label, results.measures)})
    return _draw_over_measures if has_common_axis and num_ticks >= _MIN_CURVE_POINTS else _draw_rows


def _draw_over_measures(axes: Any, results: TableResults) -> None:
    """Draw accuracy over the measures, with a line for each arm and kind of measure."""
    kinds = list(dict.fromkeys(parse_measure(measure)[0] for measure in results.measures))
    tick_labels = list(dict.fromkeys(_get_tick_label(measure) for measure in results.measures))
    colors = dict(zip((arm.name for arm in results.table.arms), _cycle_colors(), strict=False))
    for style, kind in zip(("-", "--", ":", "-."), kinds, strict=False):
        measures = [measure for measure in results.measures if parse_measure(measure)[0] == kind]
        for arm, color in colors.items():
            points = [
                (tick_labels.index(_get_tick_label(measure)), results.estimates[arm, measure])
                for measure in measures
                if (arm, measure) in results.estimates
            ]
            if points:
                x, estimates = zip(*points, strict=True)
                means = [100 * estimate.mean for estimate in estimates]
                errors = _compute_error_bars(estimates)
                label = arm if len(kinds) == 1 else f"{arm}, {MEASURE_NAMES[kind]}"
                line = {"color": color, "linestyle": style, "marker": "o", "markersize": 5, "capsize": 3}
                axes.errorbar(x, means, errors, label=label, linewidth=1.6, **line)
    axes.set_xticks(range(len(tick_labels)), tick_labels)
    axes.set_xlabel("fine-tuned blocks" if kinds[0] == "finetune" else "visible patches")
    _format_axes(axes)


def _get_tick_label(measure: str) -> str:
    """Return the label of a measure on the x axis: the tuned blocks, or the percentage of visible patches."""
    kind, blocks, visible = parse_measure(measure)
    return (blocks or "all") if kind == "finetune" else f"{visible or 100}%"


def _draw_over_axis(axes: Any, results: TableResults) -> None:
    """Draw accuracy over the axis of the table, with a line for each measure."""
    for measure, color in zip(results.measures, _cycle_colors(), strict=False):
        points = sorted(
            (arm.x if arm.x is not None else index, results.estimates[arm.name, measure])
            for index, arm in enumerate(results.table.arms)
            if (arm.name, measure) in results.estimates
        )
        if points:
            x, estimates = zip(*points, strict=True)
            means = [100 * estimate.mean for estimate in estimates]
            errors = _compute_error_bars(estimates)
            line = {"color": color, "marker": "o", "markersize": 5, "linewidth": 1.6, "capsize": 3}
            axes.errorbar(x, means, errors, label=format_measure(measure), **line)
    axes.set_xlabel(results.table.axis)
    _format_axes(axes)


def _draw_rows(axes: Any, results: TableResults) -> None:
    """Draw a row for each arm, from top to bottom, with a point for each measure."""
    arms = results.table.arms
    spacing = 0.8 / len(results.measures)
    for row, (measure, color) in enumerate(zip(results.measures, _cycle_colors(), strict=False)):
        points = [
            (i, results.estimates[arm.name, measure])
            for i, arm in enumerate(arms)
            if (arm.name, measure) in results.estimates
        ]
        y = [len(arms) - 1 - i + (len(results.measures) / 2 - row - 0.5) * spacing for i, _ in points]
        means = [100 * estimate.mean for _, estimate in points]
        errors = _compute_error_bars([estimate for _, estimate in points])
        axes.errorbar(means, y, xerr=errors, fmt="o", color=color, capsize=2, label=format_measure(measure))
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel("accuracy, %")
    _add_legend(axes, 7)
    axes.grid(axis="x", color=GRAY, alpha=0.3, linewidth=0.7)


def _compute_error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the lengths of the lower and the upper error bars, in percent."""
    return [
        [100 * (estimate.mean - estimate.clipped_interval[0]) for estimate in estimates],
        [100 * (estimate.clipped_interval[1] - estimate.mean) for estimate in estimates],
    ]


def _format_axes(axes: Any) -> None:
    axes.set_ylabel("accuracy, %")
    _add_legend(axes, 8)
    axes.grid(axis="y", color=GRAY, alpha=0.3, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _add_legend(axes: Any, font_size: int) -> None:
    """Add a legend at the right, unless nothing is drawn yet."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=font_size, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _cycle_colors() -> Iterator[str]:
    yield from cycle(COLORS)


def draw_tables(tables: Sequence[TableResults], path: Path) -> None:
    """Draw all tables, one below the other, and save the figure as an image file."""
    from matplotlib.figure import Figure

    functions = [_choose_draw_function(results) for results in tables]
    heights = [
        0.9 + 0.35 * len(results.table.arms) if function is _draw_rows else 3.0
        for function, results in zip(functions, tables, strict=True)
    ]
    figure = Figure(figsize=(7, sum(heights)), dpi=100)
    rows = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, function, results in zip(rows, functions, tables, strict=True):
        function(axes, results)
        axes.set_title(results.table.title, fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(path)
