"""The page of a study: one file that opens without a network, by light or dark, on a phone."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quarterview.studies.config import StudyConfig, read_budget
from quarterview.studies.page import STYLE, accuracy, facts_list, table
from quarterview.studies.plan import Planned, base_of
from quarterview.studies.report_drawings import curve, is_curve
from quarterview.studies.study import Arm, Study
from quarterview.studies.study_results import Progress, TableResults, costs, name_of

_MARKS = {"reproduced": "yes", "not reproduced": "no", "cannot tell": "maybe"}


def render(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    found: Sequence[TableResults],
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


def _section(found: TableResults, number: int) -> str:
    its = found.table
    rows = [
        [
            escape(arm.name),
            *(f"{accuracy(found.figures.get((arm.name, m)))}{_paper(arm, m)}" for m in found.measures),
            *costs(found, arm.name),
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
    drawn = f"<figure>{curve(found, f'c{number}')}</figure>" if is_curve(found) and found.figures else ""
    source = f" <small>He et al. 2021, {escape(its.source)}</small>" if its.source else ""
    caption = "Accuracy in percent, its 95% interval, and the paper's figure (ViT-L/16, ImageNet)"
    heads = ["", *(name_of(measure) for measure in found.measures), "images/s", "GFLOP/image"]
    return (
        f"<section><h2>{escape(its.title)}{source}</h2>{drawn}{table(caption, heads, rows)}{boxes}</section>"
    )


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
        f"{one.arm.name}": f"{one.steps:,} updates, {one.steps * one.config.loop.batch_size:,} pictures"
        for one in arms
        if one.steps
    }
    what = {
        "command": " ".join(facts["argv"]) or "called from Python",
        "date": facts["date"],
        "network": f"{base.model.model}, images of {' × '.join(map(str, base.model.image_size))}",
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
