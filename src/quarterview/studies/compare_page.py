"""HTML report of a comparison: one file that loads nothing from a network."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from quarterview.files import write_text_atomic
from quarterview.studies.compare_results import RAW_PIXELS, CompareStatistics, Point
from quarterview.studies.config import CompareConfig
from quarterview.studies.page import (
    COLORS,
    CSS,
    GRAY,
    format_accuracy,
    get_matplotlib_settings,
    render_definition_list,
    render_svg,
    render_table,
)
from quarterview.studies.verdict import Estimate, Verdict, format_interval, format_signed_points

_DODGE_FRACTION = 0.03  # relative horizontal offset between arms with the same number of labelled images


def write_page(path: Path, statistics: CompareStatistics, results_file: Path) -> Path:
    """Write the HTML report atomically, and return its path.

    Args:
        results_file: ``results/compare.json``, from which command, settings and versions are read.
    """
    write_text_atomic(path, render_page(statistics, json.loads(results_file.read_text("utf-8"))))
    return path


def render_page(statistics: CompareStatistics, stored: Mapping[str, Any]) -> str:
    """Return the HTML report. It loads nothing from elsewhere, and all text from users is escaped.

    Args:
        stored: the content of ``results/compare.json``.
    """
    colors = assign_colors(statistics)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(statistics.verdicts[0].answer.capitalize())}: did pre-training help?</title>",
        f"<style>{CSS}</style></head><body><main>",
        "<h1>Did pre-training help?</h1>",
        *(_render_verdict(verdict) for verdict in statistics.verdicts),
        _render_legend(colors),
        *(_render_protocol(statistics, protocol, colors) for protocol in statistics.protocol_names),
        _EXPLANATION.replace("MIN_DIFFERENCE", f"{100 * statistics.min_difference:g}"),
        _render_settings(statistics, stored),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def assign_colors(statistics: CompareStatistics) -> dict[str, str]:
    """Return a colour for each arm and baseline; only raw pixels are gray."""
    names = [
        *statistics.arms,
        *dict.fromkeys(p.arm for p in statistics.points if p.arm not in statistics.arms),
    ]
    return {name: GRAY if name == RAW_PIXELS else COLORS[i % len(COLORS)] for i, name in enumerate(names)}


# ---------------------------------------------------------------------- parts of the page


_VERDICT_STYLES = {
    "helped": ("yes", "Helped"),
    "did not help": ("no", "Did not help"),
    "cannot tell": ("maybe", "Cannot tell"),
}


def _render_verdict(verdict: Verdict) -> str:
    css_class, heading = _VERDICT_STYLES[verdict.answer]
    return (
        f'<section class="verdict {css_class}"><p class="word">{heading}</p>'
        f"<p>{escape(verdict.sentence)}</p></section>"
    )


def _render_legend(colors: Mapping[str, str]) -> str:
    items = (
        f'<li><span class="swatch" style="background:{color}"></span>{escape(name)}</li>'
        for name, color in colors.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _render_protocol(statistics: CompareStatistics, protocol: str, colors: Mapping[str, str]) -> str:
    """Return the HTML of the plot and the tables of one protocol."""
    points = [p for p in statistics.points if p.protocol == protocol]
    counts = sorted({p.labels for p in points})
    by_arm = {(p.arm, p.labels): p.accuracy for p in points}
    name = statistics.protocol_names[protocol]
    rows = [
        [escape(arm), *(format_accuracy(by_arm.get((arm, n))) for n in counts)]
        for arm in colors
        if any(p.arm == arm for p in points)
    ]
    differences = []
    for arm, comparisons in statistics.comparisons.items():
        by_count = {c.labels: c for c in comparisons if c.protocol == protocol}
        baselines = [c.baseline for c in next(iter(by_count.values())).contrasts] if by_count else []
        for i, baseline in enumerate(baselines):
            cells = (
                _format_difference(by_count[n].contrasts[i].difference, statistics.min_difference)
                for n in counts
            )
            differences.append([f"{escape(arm)}<br><small>minus {escape(baseline)}</small>", *cells])
    arm_rows: dict[str, list[str]] = {}
    for row in sorted(
        (b for b in statistics.arm_differences if b.protocol == protocol), key=lambda b: b.labels
    ):
        title = f"{escape(row.arm)}<br><small>minus {escape(row.contrast.baseline)}</small>"
        arm_rows.setdefault(title, []).append(_format_difference(row.contrast.difference, None))
    differences += [[title, *cells] for title, cells in arm_rows.items()]
    column_names = ["labelled images", *(f"{n:,}" for n in counts)]
    return (
        f"<section><h2>{escape(name.capitalize())}</h2>"
        f'<figure aria-label="Accuracy over labelled images, {escape(name)}">'
        f"{plot_accuracies(points, colors, protocol)}</figure>"
        f"{render_table('Accuracy, %', column_names, rows)}"
        f"{render_table('Difference, percentage points', column_names, differences)}</section>"
    )


def _format_difference(estimate: Estimate, min_difference: float | None) -> str:
    """Return the HTML of a table cell with a difference and its interval.

    Args:
        min_difference: the smallest gain that matters, as a fraction, by which the cell is coloured; None for
            a cell without colour.
    """
    if min_difference is None:
        css_class = ""
    else:
        css_class = "yes" if estimate.low > 0 else "no" if estimate.high < min_difference else "maybe"
    return (
        f'<span class="cell {css_class}">{format_signed_points(estimate.mean)}</span>'
        f"<br><small>{format_interval(estimate)}</small>"
    )


_EXPLANATION = """<section><h2>How to read this</h2>
<p>Each point is a mean over seeds. Each seed draws other labelled images, another random encoder and another
order of training. With the same seed, all arms have the same images, and differences are paired by seed. A
95% interval contains the true value in at least 95% of such comparisons. It includes the variance over seeds
and over test images; with one seed, only that over test images. With all labels, the training images are the
same for all seeds.</p>
<p>A difference is <span class="cell yes">clear</span> if its whole interval is above 0,
<span class="cell no">ruled out</span> if its whole interval is below a gain of MIN_DIFFERENCE points, and
<span class="cell maybe">open</span> otherwise. Pre-training helped if more than half of all comparisons are
clear gains, more than half of the fine-tuning comparisons are as well, and random weights are clearly ahead
in none. Frozen features must be better than both the random encoder and raw pixels. Pre-training did not help
if a gain is ruled out in all comparisons. Otherwise the answer is: cannot tell. The test images are not used
to choose anything: fine-tuning is evaluated after its last step.</p></section>"""


def _render_settings(statistics: CompareStatistics, stored: Mapping[str, Any]) -> str:
    """Return the HTML of the command, images, arms, versions and settings of the comparison."""
    data, settings = stored["data"], CompareConfig.flatten(stored["settings"])
    images = {
        name: f"{data[f'{name}_images']:,}, fingerprint {data[name]}: {' '.join(settings[name])}"
        for name in ("train", "test")
    }
    values = {
        "command": " ".join(stored["argv"]) or "called from Python",
        "date": stored["date"],
        "training images": images["train"],
        "test images": images["test"],
        "seeds": f"{settings['seeds']}, from {settings['seed']}",
        "versions": ", ".join(f"{name} {version}" for name, version in stored["versions"].items()),
        "git commit": stored["git"] or "none",
        "hardware": ", ".join(f"{name} {value}" for name, value in stored["hardware"].items() if value),
    }
    for name, arm in statistics.arms.items():
        values[name] = (
            f"{arm['network']}, images of {' × '.join(map(str, arm['image_size']))}, weights {arm['weights']}"
        )
    values |= {f"note {i}": note for i, note in enumerate(stored["results"]["notes"], 1)}
    return (
        f"<section><h2>What was compared</h2><dl>{render_definition_list(values)}</dl>"
        "<details><summary>All settings, which are the same for all arms, except that random weights are "
        f"fine-tuned with a layer decay of {settings['scratch_layer_decay']:g}</summary>"
        f"<dl>{render_definition_list(settings)}</dl></details></section>"
    )


# ---------------------------------------------------------------------- plots


def plot_accuracies(points: Sequence[Point], colors: Mapping[str, str], hash_salt: str) -> str:
    """Return a plot of accuracy over the number of labelled images as SVG, with a line for each arm.

    The plot contains no text from users.

    Args:
        colors: name of each arm -> its colour.
        hash_salt: a text that differs between the plots of a page, so that the ids in their SVG differ.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    with rc_context(get_matplotlib_settings(hash_salt)):
        figure = Figure(figsize=(7, 3.6))
        axes = figure.subplots()
        arms = [arm for arm in colors if any(p.arm == arm for p in points)]
        for i, arm in enumerate(arms):
            arm_points = sorted((p for p in points if p.arm == arm), key=lambda p: p.labels)
            shift = (1 + _DODGE_FRACTION) ** (i - (len(arms) - 1) / 2)
            means = [100 * p.accuracy.mean for p in arm_points]
            errors = [
                [100 * (p.accuracy.mean - p.accuracy.clipped_interval[0]) for p in arm_points],
                [100 * (p.accuracy.clipped_interval[1] - p.accuracy.mean) for p in arm_points],
            ]
            axes.errorbar(
                [p.labels * shift for p in arm_points],
                means,
                errors,
                color=colors[arm],
                marker="o",
                markersize=5,
                linewidth=1.6,
                capsize=3,
                linestyle="--" if arm == RAW_PIXELS else "-",
            )
        counts = sorted({p.labels for p in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
        axes.set_xlabel("labelled images")
        axes.set_ylabel("accuracy, %")
        axes.grid(axis="y", color=GRAY, alpha=0.3, linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        return render_svg(figure)
