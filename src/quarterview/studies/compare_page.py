"""The page of a comparison: one file that opens without a network, by light or dark, on a phone."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from quarterview.files import replace_text
from quarterview.studies.compare_results import PIXELS, Point, Results
from quarterview.studies.config import CompareConfig
from quarterview.studies.page import (
    COLOURS,
    PLAIN,
    STYLE,
    accuracy,
    drawing_style,
    facts_list,
    svg_of,
    table,
)
from quarterview.studies.verdict import Estimate, Verdict, signed

_DODGE = 0.03  # arms at the same count stand beside each other, by this share of the count's size


def write_page(path: Path, results: Results, record: Path) -> Path:
    """Write the page whole or not at all, and return its path.

    Args:
        record: the results as JSON, with where they come from.
    """
    replace_text(path, render(results, json.loads(record.read_text("utf-8"))))
    return path


def render(results: Results, record: Mapping[str, Any]) -> str:
    """The page as HTML. Nothing in it is loaded from elsewhere, and every text of a user is escaped.

    Args:
        record: what ``results/compare.json`` holds.
    """
    colours = colours_of(results)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(results.verdicts[0].answer.capitalize())}: did pre-training help?</title>",
        f"<style>{STYLE}</style></head><body><main>",
        "<h1>Did pre-training help?</h1>",
        *(_verdict(verdict) for verdict in results.verdicts),
        _legend(colours),
        *(_section(results, protocol, colours) for protocol in results.protocols),
        _READING.replace("WORTHWHILE", f"{100 * results.worthwhile:g}"),
        _compared(results, record),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def colours_of(results: Results) -> dict[str, str]:
    """A colour for each arm: greys would do for the baselines, but they are what everything hangs on."""
    names = [*results.arms, *dict.fromkeys(p.arm for p in results.points if p.arm not in results.arms)]
    return {name: PLAIN if name == PIXELS else COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


# ---------------------------------------------------------------------- parts of the page


_MARKS = {
    "helped": ("yes", "Helped"),
    "did not help": ("no", "Did not help"),
    "cannot tell": ("maybe", "Cannot tell"),
}


def _verdict(verdict: Verdict) -> str:
    kind, word = _MARKS[verdict.answer]
    return (
        f'<section class="verdict {kind}"><p class="word">{word}</p>'
        f"<p>{escape(verdict.sentence)}</p></section>"
    )


def _legend(colours: Mapping[str, str]) -> str:
    items = (
        f'<li><span class="swatch" style="background:{colour}"></span>{escape(name)}</li>'
        for name, colour in colours.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _section(results: Results, protocol: str, colours: Mapping[str, str]) -> str:
    """A protocol's plot and its tables."""
    points = [p for p in results.points if p.protocol == protocol]
    counts = sorted({p.labels for p in points})
    by_arm = {(p.arm, p.labels): p.accuracy for p in points}
    name = results.protocols[protocol]
    rows = [
        [escape(arm), *(accuracy(by_arm.get((arm, n))) for n in counts)]
        for arm in colours
        if any(p.arm == arm for p in points)
    ]
    differences = []
    for arm, comparisons in results.comparisons.items():
        mine = {c.labels: c for c in comparisons if c.protocol == protocol}
        baselines = [c.baseline for c in next(iter(mine.values())).contrasts] if mine else []
        for i, baseline in enumerate(baselines):
            cells = (_difference(mine[n].contrasts[i].difference, results.worthwhile) for n in counts)
            differences.append([f"{escape(arm)}<br><small>less {escape(baseline)}</small>", *cells])
    rivals: dict[str, list[str]] = {}
    for row in sorted((b for b in results.between if b.protocol == protocol), key=lambda b: b.labels):
        title = f"{escape(row.arm)}<br><small>less {escape(row.contrast.baseline)}</small>"
        rivals.setdefault(title, []).append(_difference(row.contrast.difference, None))
    differences += [[title, *cells] for title, cells in rivals.items()]
    heads = ["labelled images", *(f"{n:,}" for n in counts)]
    return (
        f"<section><h2>{escape(name.capitalize())}</h2>"
        f'<figure aria-label="Accuracy over labelled images, {escape(name)}">'
        f"{plot(points, colours, protocol)}</figure>"
        f"{table('Accuracy, %', heads, rows)}{table('Difference, points', heads, differences)}</section>"
    )


def _difference(found: Estimate, worthwhile: float | None) -> str:
    """A difference, coloured by what it says of the help of pre-training, where it does."""
    if worthwhile is None:
        kind = ""
    else:
        kind = "yes" if found.low > 0 else "no" if found.high < worthwhile else "maybe"
    return (
        f'<span class="cell {kind}">{signed(found.mean)}</span>'
        f"<br><small>{signed(found.low)} to {signed(found.high)}</small>"
    )


_READING = """<section><h2>How to read this</h2>
<p>Each point is a mean over seeds. A seed draws which images have labels, another random encoder and another
order of training; within a seed every row sees the same images, so differences are taken within seeds. An
interval holds the true figure in at least 95% of such comparisons: it counts both how much the seeds differ
and how many test images there are. With one seed only the test images are in it. With all labels no other
training images can be drawn, and the set is taken as it is.</p>
<p>A difference is <span class="cell yes">clear</span> if its whole interval lies above 0,
<span class="cell no">ruled out</span> if a gain of WORTHWHILE points or more does, and
<span class="cell maybe">open</span> otherwise. Pre-training helped if more than half of all comparisons are
clear, and more than half of those by fine-tuning, and random weights are ahead in none; frozen features must
beat both the random encoder and raw pixels. It did not help if a gain is ruled out everywhere. Anything else
cannot be told. The test images chose nothing: fine-tuning is judged after its last step.</p></section>"""


def _compared(results: Results, record: Mapping[str, Any]) -> str:
    """What was compared, by which command, on what."""
    data, settings = record["data"], CompareConfig.flat(record["settings"])
    images = {
        name: f"{data[f'{name}_images']:,}, fingerprint {data[name]}: {' '.join(settings[name])}"
        for name in ("train", "test")
    }
    facts = {
        "command": " ".join(record["argv"]) or "called from Python",
        "date": record["date"],
        "training images": images["train"],
        "test images": images["test"],
        "seeds": f"{settings['seeds']}, from {settings['seed']}",
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        "code": record["git"] or "outside a repository",
        "hardware": ", ".join(f"{name} {value}" for name, value in record["hardware"].items() if value),
    }
    for name, arm in results.arms.items():
        facts[name] = (
            f"{arm['network']}, images of {' × '.join(map(str, arm['image_size']))}, weights {arm['weights']}"
        )
    facts |= {f"note {i}": note for i, note in enumerate(record["results"]["notes"], 1)}
    return (
        f"<section><h2>What was compared</h2><dl>{facts_list(facts)}</dl>"
        "<details><summary>The whole recipe: the same for all, but that random weights have the layer decay "
        f"{settings['scratch_layer_decay']:g}</summary><dl>{facts_list(settings)}</dl></details></section>"
    )


# ---------------------------------------------------------------------- plots


def plot(points: Sequence[Point], colours: Mapping[str, str], salt: str) -> str:
    """Accuracy over labelled images, a line for each arm, as SVG without any text of a user.

    Args:
        salt: makes the names inside the drawing differ from those of others on the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    with rc_context(drawing_style(salt)):
        figure = Figure(figsize=(7, 3.6))
        axes = figure.subplots()
        arms = [arm for arm in colours if any(p.arm == arm for p in points)]
        for i, arm in enumerate(arms):
            mine = sorted((p for p in points if p.arm == arm), key=lambda p: p.labels)
            shift = (1 + _DODGE) ** (i - (len(arms) - 1) / 2)
            means = [100 * p.accuracy.mean for p in mine]
            errors = [
                [100 * (p.accuracy.mean - p.accuracy.as_share[0]) for p in mine],
                [100 * (p.accuracy.as_share[1] - p.accuracy.mean) for p in mine],
            ]
            axes.errorbar(
                [p.labels * shift for p in mine],
                means,
                errors,
                color=colours[arm],
                marker="o",
                markersize=5,
                linewidth=1.6,
                capsize=3,
                linestyle="--" if arm == PIXELS else "-",
            )
        counts = sorted({p.labels for p in points})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
        axes.set_xlabel("labelled images")
        axes.set_ylabel("accuracy, %")
        axes.grid(axis="y", color=PLAIN, alpha=0.3, linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        return svg_of(figure)
