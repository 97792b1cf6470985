"""The drawings of a study: curves over an axis or over the measures, and else points in rows."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from quarterview.studies.config import parts_of
from quarterview.studies.page import COLOURS, PLAIN, drawing_style, svg_of
from quarterview.studies.study_results import KINDS, TableResults, name_of
from quarterview.studies.verdict import Estimate

_CURVE = 4  # places that make a curve of measures


def curve(found: TableResults, salt: str) -> str:
    """Accuracy over the table's axis, or its measures, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(drawing_style(salt)):
        figure = Figure(figsize=(7, 3.6))
        _drawing(found)(figure.subplots(), found)
        figure.tight_layout()
        return svg_of(figure)


def is_curve(found: TableResults) -> bool:
    """Whether a table is drawn as a curve."""
    return _drawing(found) is not _draw_bars


def _drawing(found: TableResults) -> Callable[[Any, TableResults], None]:
    """How a table is drawn."""
    if found.table.axis is not None:
        return _draw_curve
    kinds = {parts_of(measure)[0] for measure in found.measures}
    alike = kinds == {"finetune"} or kinds <= {"linear", "knn"}
    return _draw_across if alike and len({*map(_place, found.measures)}) >= _CURVE else _draw_bars


def _draw_across(axes: Any, found: TableResults) -> None:
    """Over the measures, a line for each arm, and for each kind of measure where there are several."""
    kinds = list(dict.fromkeys(parts_of(measure)[0] for measure in found.measures))
    places = list(dict.fromkeys(_place(measure) for measure in found.measures))
    colours = dict(zip((arm.name for arm in found.table.arms), _colours(), strict=False))
    for style, kind in zip(("-", "--", ":", "-."), kinds, strict=False):
        mine = [measure for measure in found.measures if parts_of(measure)[0] == kind]
        for arm, colour in colours.items():
            points = [
                (places.index(_place(measure)), found.figures[arm, measure])
                for measure in mine
                if (arm, measure) in found.figures
            ]
            if points:
                x, figures = zip(*points, strict=True)
                means, errors = [100 * figure.mean for figure in figures], _errors(figures)
                label = arm if len(kinds) == 1 else f"{arm}, {KINDS[kind]}"
                look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 5, "capsize": 3}
                axes.errorbar(x, means, errors, label=label, linewidth=1.6, **look)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel("blocks that are tuned" if kinds[0] == "finetune" else "patches that are visible")
    _finish(axes)


def _place(measure: str) -> str:
    """Of a measure on the axis of measures."""
    kind, blocks, visible = parts_of(measure)
    return (blocks or "all") if kind == "finetune" else f"{visible or 100}%"


def _draw_curve(axes: Any, found: TableResults) -> None:
    for measure, colour in zip(found.measures, _colours(), strict=False):
        points = sorted(
            (arm.x if arm.x is not None else place, found.figures[arm.name, measure])
            for place, arm in enumerate(found.table.arms)
            if (arm.name, measure) in found.figures
        )
        if points:
            x, figures = zip(*points, strict=True)
            means = [100 * figure.mean for figure in figures]
            errors = _errors(figures)
            style = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 1.6, "capsize": 3}
            axes.errorbar(x, means, errors, label=name_of(measure), **style)
    axes.set_xlabel(found.table.axis)
    _finish(axes)


def _draw_bars(axes: Any, found: TableResults) -> None:
    arms = found.table.arms
    height = 0.8 / len(found.measures)
    for row, (measure, colour) in enumerate(zip(found.measures, _colours(), strict=False)):
        mine = [
            (i, found.figures[a.name, measure])
            for i, a in enumerate(arms)
            if (a.name, measure) in found.figures
        ]
        places = [len(arms) - 1 - i + (len(found.measures) / 2 - row - 0.5) * height for i, _ in mine]
        means = [100 * figure.mean for _, figure in mine]
        errors = _errors([figure for _, figure in mine])
        axes.errorbar(means, places, xerr=errors, fmt="o", color=colour, capsize=2, label=name_of(measure))
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel("accuracy, %")
    _legend(axes, 7)
    axes.grid(axis="x", color=PLAIN, alpha=0.3, linewidth=0.7)


def _errors(figures: Sequence[Estimate]) -> list[list[float]]:
    """How far down and up the intervals of accuracies reach, in percent."""
    return [
        [100 * (figure.mean - figure.as_share[0]) for figure in figures],
        [100 * (figure.as_share[1] - figure.mean) for figure in figures],
    ]


def _finish(axes: Any) -> None:
    axes.set_ylabel("accuracy, %")
    _legend(axes, 8)
    axes.grid(axis="y", color=PLAIN, alpha=0.3, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Any, size: int) -> None:
    """What the colours mean, if anything is drawn already."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=size, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _colours() -> Iterator[str]:
    yield from cycle(COLOURS)


def draw(found: Sequence[TableResults], path: Path) -> None:
    """Every table as a picture, one below the other."""
    from matplotlib.figure import Figure

    ways = [_drawing(its) for its in found]
    heights = [
        0.9 + 0.35 * len(its.table.arms) if way is _draw_bars else 3.0
        for way, its in zip(ways, found, strict=True)
    ]
    figure = Figure(figsize=(7, sum(heights)), dpi=100)
    rows = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, way, its in zip(rows, ways, found, strict=True):
        way(axes, its)
        axes.set_title(its.table.title, fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(path)
