"""The report of a study: a page that opens without a network, a CSV file and a picture.

The paper's figures stand beside ours, and each of its findings is marked by the rule of `rule.py`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from quarterview.studies.plan import (
    TOKENIZER,
    Planned,
    StudyConfig,
    arm_config,
    base_of,
    flops_an_image,
    key_of,
    measures_of,
    read_budget,
)
from quarterview.studies.rule import Outcome, decide
from quarterview.studies.study import Arm, Study, Table, parts_of
from quarterview.studies.verdict import Estimate, estimate
from quarterview.training.logging import Journal, replace_text

Right = Mapping[tuple[str, str], Mapping[int, np.ndarray]]
"""By arm and measure: under each seed bool [M], which test images were told right."""
_NAMES = {
    **{"finetune": "fine-tuning", "corrupted": "fine-tuned, corrupted images"},
    **{"linear": "linear probe", "knn": "nearest neighbours"},
}
_CURVE = 4  # places that make a curve of measures
_MARKS = {"reproduced": "yes", "not reproduced": "no", "cannot tell": "maybe"}


class Progress(NamedTuple):
    """How far a study is."""

    done: int
    asked: int


class Found(NamedTuple):
    """One table of a study, as it came out."""

    table: Table
    measures: tuple[str, ...]
    figures: Mapping[tuple[str, str], Estimate]
    """By arm's name and measure."""
    seeds: Mapping[tuple[str, str], tuple[int, ...]]
    """Likewise, in the order of the estimate's figures by seed."""
    outcomes: tuple[Outcome, ...]
    waiting: tuple[str, ...]
    """Claims whose arms were not both measured yet."""
    rates: Mapping[str, float]
    """Images a second that training made, by arm's name: the median of all rows of all seeds."""
    operations: Mapping[str, float]
    """Of a training step on an image, by closed form, by arm's name."""


def name_of(measure: str) -> str:
    """A measure in words."""
    kind, blocks, visible = parts_of(measure)
    if not blocks:
        return _NAMES[kind] + (f", {visible}% visible" if visible else "")
    return f"{blocks} block{'' if blocks in ('1', '0.5') else 's'} tuned"


def tables_of(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    right: Right,
    rates: Mapping[str, float],
    tokenizer: str,
) -> list[Found]:
    """Every table with its figures and what they decide."""
    base = base_of(study, config)
    known = {one.key: one for one in arms}
    found = []
    for its in study.tables:
        keys = {arm.name: key_of(arm, arm_config(base, arm, tokenizer, config)) for arm in its.arms}
        assert set(keys.values()) <= known.keys()
        measures = measures_of(its, config)
        figures = {
            (arm, measure): estimate(_stack(right[key, measure], sorted(right[key, measure])))
            for arm, key in keys.items()
            for measure in measures
            if (key, measure) in right
        }
        outcomes, waiting = [], []
        for finding in its.findings:
            asked = (finding.measure, finding.second_measure or finding.measure)
            taken_off = asked if finding.over_measure is None else (finding.over_measure,) * 2
            if not {*asked, *(taken_off if finding.over else ())} <= set(measures):
                continue
            arms_and_measures = [*zip((finding.first, finding.second), asked, strict=True)]
            arms_and_measures += [*zip(finding.over or (), taken_off, strict=False)]
            figures_of = [right.get((keys[name], measure), {}) for name, measure in arms_and_measures]
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in figures_of)))
            if not seeds:
                waiting.append(finding.claim)
                continue
            one, two, *rest = (_stack(by_seed, seeds) for by_seed in figures_of)
            outcomes.append(decide(finding, one, two, (rest[0], rest[1]) if rest else None))
        trained = {arm: known[key] for arm, key in keys.items() if known[key].steps}
        found.append(
            Found(
                its,
                measures,
                figures,
                {(arm, m): tuple(sorted(right[keys[arm], m])) for arm, m in figures},
                tuple(outcomes),
                tuple(waiting),
                {arm: rates[one.key] for arm, one in trained.items() if one.key in rates},
                {arm: flops_an_image(one.config, config.vocabulary) for arm, one in trained.items()},
            )
        )
    return found


def _stack(by_seed: Mapping[int, np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """float [S, M]."""
    return np.stack([by_seed[seed] for seed in seeds]).astype(np.float64)


# ---------------------------------------------------------------------- writing


def write_report(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    right: Right,
    rates: Mapping[str, float],
    progress: Progress,
    facts: Mapping[str, Any],
    out: Path,
    journal: Journal | None,
) -> Path:
    """Write ``report.html``, ``study.csv``, ``study.json`` and ``study.png`` into a folder.

    Args:
        rates: images a second that training made, by arm.
        facts: where the figures come from.
        journal: if given, the tables and findings are said, too.

    Returns:
        The page.
    """
    found = tables_of(study, config, arms, right, rates, str(out / TOKENIZER))
    replace_text(out / "study.csv", as_csv(found))
    replace_text(
        out / "study.json", json.dumps(_as_json(study, found, arms, progress, facts), indent=1) + "\n"
    )
    draw(found, out / "study.png")
    replace_text(out / "report.html", render(study, config, arms, found, progress, facts))
    if journal is not None:
        say(found, journal)
        journal.say(f"See {out / 'report.html'}")
    return out / "report.html"


def as_csv(found: Sequence[Found]) -> str:
    """A row for each arm, measure and seed; the last columns are the paper's figure and the test images."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(["table", "arm", "measure", "seed", "accuracy", "paper", "test_images"])
    for its in found:
        for arm in its.table.arms:
            for measure in its.measures:
                figure = its.figures.get((arm.name, measure))
                if figure is None:
                    continue
                paper = f"{arm.paper[measure] / 100:.3f}" if measure in arm.paper else ""
                seeds = its.seeds[arm.name, measure]
                for seed, value in zip(seeds, figure.by_seed, strict=True):
                    said = (its.table.title, arm.name, measure, seed, f"{value:.5f}", paper, figure.images)
                    rows.writerow(said)
    return written.getvalue()


def _as_json(
    study: Study,
    found: Sequence[Found],
    arms: Sequence[Planned],
    progress: Progress,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "study": study.name,
        "done": progress._asdict(),
        "updates": {one.key: one.steps for one in arms},
        "tables": [
            {
                "title": its.table.title,
                "figures": [
                    {"arm": arm, "measure": measure, **asdict(figure)}
                    for (arm, measure), figure in its.figures.items()
                ],
                "findings": [asdict(outcome) for outcome in its.outcomes],
                "waiting": list(its.waiting),
                "images_per_s": dict(its.rates),
                "operations": dict(its.operations),
            }
            for its in found
        ],
        **facts,
    }


def say(found: Sequence[Found], journal: Journal) -> None:
    """The tables and the findings, on the console."""
    for its in found:
        rows = [
            [
                arm.name,
                *(_shown(its.figures.get((arm.name, m)), arm.paper.get(m)) for m in its.measures),
                *_costs(its, arm.name),
            ]
            for arm in its.table.arms
        ]
        heads = ["", *(f"{name_of(m)} (paper)" for m in its.measures), "images/s", "GFLOP/image"]
        journal.table(f"{its.table.title}, {its.table.source}".rstrip(", "), heads, rows)
        for outcome in its.outcomes:
            how = name_of(outcome.finding.measure)
            journal.say(f"{outcome.answer}: {outcome.finding.claim} ({how}): {outcome.sentence}")


def _shown(figure: Estimate | None, paper: float | None) -> str:
    ours = "–" if figure is None else f"{figure.mean:.1%} ± {(figure.high - figure.low) / 2:.1%}"
    return ours if paper is None else f"{ours} ({paper:.1f})"


# ---------------------------------------------------------------------- the page


def render(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    found: Sequence[Found],
    progress: Progress,
    facts: Mapping[str, Any],
) -> str:
    """The page as HTML. Nothing in it is loaded from elsewhere, and every text of a user is escaped."""
    counts = {answer: sum(o.answer == answer for its in found for o in its.outcomes) for answer in _MARKS}
    waiting = sum(len(its.waiting) for its in found)
    told = ", ".join(f"{number} {answer}" for answer, number in counts.items())
    state = (
        "" if progress.done == progress.asked else f" {progress.done} of {progress.asked} measures are done."
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Study: {escape(study.name)}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{escape(study.purpose or study.name)}</h1>",
            f"<p>{told}{f', {waiting} not measured yet' if waiting else ''}.{state}</p>",
            *(_section(its, number) for number, its in enumerate(found)),
            _reading(config, arms),
            _facts(study, config, arms, facts),
            "</main></body></html>\n",
        ]
    )


def _section(found: Found, number: int) -> str:
    its = found.table
    rows = [
        [
            escape(arm.name),
            *(f"{accuracy(found.figures.get((arm.name, m)))}{_paper(arm, m)}" for m in found.measures),
            *_costs(found, arm.name),
        ]
        for arm in its.arms
    ]
    boxes = "".join(
        f'<section class="verdict {_MARKS[o.answer]}"><p class="word">{o.answer.capitalize()}</p>'
        f"<p>{escape(o.finding.claim[:1].upper() + o.finding.claim[1:])}, by "
        f"{escape(name_of(o.finding.measure))}.</p>"
        f"<p><small>{escape(o.sentence)}</small></p></section>"
        for o in found.outcomes
    )
    draws = _drawing(found)
    drawn = (
        f"<figure>{curve(found, f'c{number}')}</figure>" if draws is not _draw_bars and found.figures else ""
    )
    source = f" <small>He et al. 2021, {escape(its.source)}</small>" if its.source else ""
    caption = "Accuracy in percent, its 95% interval, and the paper's figure (ViT-L/16, ImageNet)"
    heads = ["", *(name_of(measure) for measure in found.measures), "images/s", "GFLOP/image"]
    return (
        f"<section><h2>{escape(its.title)}{source}</h2>{drawn}{table(caption, heads, rows)}{boxes}</section>"
    )


def _costs(found: Found, arm: str) -> list[str]:
    """How fast an arm was trained, and its operations; dashes for what was not."""
    if arm not in found.rates:
        return ["–", "–"]
    return [f"{found.rates[arm]:,.0f}", f"{found.operations[arm] / 1e9:.3g}"]


def _paper(arm: Arm, measure: str) -> str:
    paper = arm.paper.get(measure)
    return "" if paper is None else f"<br><small>paper {paper:.1f}</small>"


def _reading(config: StudyConfig, arms: Sequence[Planned]) -> str:
    kind = read_budget(config.budget)[0]
    equal = (
        "Arms are compared at equal computation: the more a picture costs, the fewer an arm sees."
        if kind == "flops"
        else "Arms are compared at equal epochs: each sees as many pictures as any other, whatever they cost."
    )
    return f"""<section><h2>How to read this</h2>
<p>{equal} Each figure is a mean over {config.seeds} seeds, of which each draws other initial weights,
another order and other labelled images, the same for all arms. An interval counts how much the seeds
differ and how many test images there are.</p>
<p>The rule was fixed before the runs. A finding that one arm is ahead is
<span class="cell yes">reproduced</span> if the whole 95% interval of the paired difference lies above 0,
<span class="cell no">not reproduced</span> if it lies below, and cannot be told otherwise, or from a single
seed. A finding that one arm is as good as another is reproduced if the interval lies above −1 point. Of forty
findings of which none is so, one may be marked as reproduced by chance. The paper's figures are of another
model, other pictures and a thousand times the computation: compare directions, not numbers.</p></section>"""


def _facts(study: Study, config: StudyConfig, arms: Sequence[Planned], facts: Mapping[str, Any]) -> str:
    base = base_of(study, config)
    lengths = {
        f"{one.arm.name}": f"{one.steps:,} updates, {one.steps * one.config.batch_size:,} pictures"
        for one in arms
        if one.steps
    }
    what = {
        "command": " ".join(facts["argv"]) or "called from Python",
        "date": facts["date"],
        "network": f"{base.model}, images of {' × '.join(map(str, base.image_size))}",
        "base": f"{config.base}; budget {config.budget}; {config.seeds} seeds from {config.seed}",
        "judged": f"{config.labels:,} labelled images; {config.tune_steps:,} updates of fine-tuning",
        "time of the last start": facts["took"],
        "versions": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        "code": facts["git"] or "outside a repository",
        "hardware": ", ".join(f"{name} {value}" for name, value in facts["hardware"].items() if value),
    }
    return (
        f"<section><h2>What was run</h2><dl>{facts_list(what)}</dl>"
        f"<details><summary>Length of each arm</summary><dl>{facts_list(lengths)}</dl></details></section>"
    )


# ---------------------------------------------------------------------- drawings


def curve(found: Found, salt: str) -> str:
    """Accuracy over the table's axis, or its measures, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(drawing_style(salt)):
        figure = Figure(figsize=(7, 3.6))
        _drawing(found)(figure.subplots(), found)
        figure.tight_layout()
        return svg_of(figure)


def _drawing(found: Found) -> Callable[[Any, Found], None]:
    """How a table is drawn."""
    if found.table.axis is not None:
        return _draw_curve
    kinds = {parts_of(measure)[0] for measure in found.measures}
    alike = kinds == {"finetune"} or kinds <= {"linear", "knn"}
    return _draw_across if alike and len({*map(_place, found.measures)}) >= _CURVE else _draw_bars


def _draw_across(axes: Any, found: Found) -> None:
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
                label = arm if len(kinds) == 1 else f"{arm}, {_NAMES[kind]}"
                look = {"color": colour, "linestyle": style, "marker": "o", "markersize": 5, "capsize": 3}
                axes.errorbar(x, means, errors, label=label, linewidth=1.6, **look)
    axes.set_xticks(range(len(places)), places)
    axes.set_xlabel("blocks that are tuned" if kinds[0] == "finetune" else "patches that are visible")
    _finish(axes)


def _place(measure: str) -> str:
    """Of a measure on the axis of measures."""
    kind, blocks, visible = parts_of(measure)
    return (blocks or "all") if kind == "finetune" else f"{visible or 100}%"


def _draw_curve(axes: Any, found: Found) -> None:
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


def _draw_bars(axes: Any, found: Found) -> None:
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


def draw(found: Sequence[Found], path: Path) -> None:
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
