"""HTML report of a study: one file that loads nothing from a network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from quarterview.studies.config import StudyConfig, parse_budget
from quarterview.studies.page import CSS, format_accuracy, render_definition_list, render_table
from quarterview.studies.plan import PlannedArm, make_base_config
from quarterview.studies.report_drawings import draw_curve_svg, is_drawn_as_curve
from quarterview.studies.rule import FindingResult
from quarterview.studies.study import Arm, Study
from quarterview.studies.study_results import StudyProgress, TableResults, format_costs, format_measure

_ANSWER_CLASSES = {"reproduced": "yes", "not reproduced": "no", "cannot tell": "maybe"}


def render_page(
    study: Study,
    config: StudyConfig,
    arms: Sequence[PlannedArm],
    tables: Sequence[TableResults],
    progress: StudyProgress,
    provenance: Mapping[str, Any],
) -> str:
    """Return the HTML report. It loads nothing from elsewhere, and all text from users is escaped."""
    counts = {
        answer: sum(result.answer == answer for results in tables for result in results.finding_results)
        for answer in _ANSWER_CLASSES
    }
    num_pending = sum(len(results.pending_claims) for results in tables)
    summary = ", ".join(f"{count} {answer}" for answer, count in counts.items())
    if num_pending:
        summary += f", {num_pending} not evaluated yet"
    state = (
        ""
        if progress.num_done == progress.num_total
        else f" {progress.num_done} of {progress.num_total} evaluations are done."
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Study: {escape(study.name)}</title>",
            f"<style>{CSS}</style></head><body><main>",
            f"<h1>{escape(study.purpose or study.name)}</h1>",
            f"<p>Findings: {summary}.{state}</p>",
            *(_render_table_section(results, index) for index, results in enumerate(tables)),
            _render_explanation(config, arms),
            _render_settings(study, config, arms, provenance),
            "</main></body></html>\n",
        ]
    )


def _render_table_section(results: TableResults, index: int) -> str:
    table = results.table
    rows = [
        [
            escape(arm.name),
            *(
                f"{format_accuracy(results.estimates.get((arm.name, m)))}{_format_paper_accuracy(arm, m)}"
                for m in results.measures
            ),
            *format_costs(results, arm.name),
        ]
        for arm in table.arms
    ]
    findings = "".join(_render_finding(result) for result in results.finding_results)
    plot = (
        f"<figure>{draw_curve_svg(results, f'c{index}')}</figure>"
        if is_drawn_as_curve(results) and results.estimates
        else ""
    )
    source = f" <small>He et al. 2021, {escape(table.source)}</small>" if table.source else ""
    caption = "Accuracy in percent, its 95% interval, and the accuracy in the paper (ViT-L/16, ImageNet)"
    column_names = ["", *(format_measure(measure) for measure in results.measures), "images/s", "GFLOP/image"]
    return (
        f"<section><h2>{escape(table.title)}{source}</h2>{plot}"
        f"{render_table(caption, column_names, rows)}{findings}</section>"
    )


def _render_finding(result: FindingResult) -> str:
    claim = result.finding.claim[:1].upper() + result.finding.claim[1:]
    return (
        f'<section class="verdict {_ANSWER_CLASSES[result.answer]}">'
        f'<p class="word">{result.answer.capitalize()}</p>'
        f"<p>{escape(claim)}, by {escape(format_measure(result.finding.measure))}.</p>"
        f"<p><small>{escape(result.sentence)}</small></p></section>"
    )


def _format_paper_accuracy(arm: Arm, measure: str) -> str:
    accuracy = arm.paper.get(measure)
    return "" if accuracy is None else f"<br><small>paper {accuracy:.1f}</small>"


def _render_explanation(config: StudyConfig, arms: Sequence[PlannedArm]) -> str:
    kind = parse_budget(config.budget)[0]
    budget = (
        "Arms are compared at equal computation: arms with more operations per image see fewer images."
        if kind == "flops"
        else "Arms are compared at equal epochs: all are trained on the same number of images."
    )
    return f"""<section><h2>How to read this</h2>
<p>{budget} Each accuracy is a mean over {config.seeds} seeds. Each seed draws other initial weights, another
order of the images and other labelled images, which are the same for all arms. A 95% interval includes the
variance over seeds and over test images.</p>
<p>The rule was fixed before the runs. A finding that one arm is ahead is
<span class="cell yes">reproduced</span> if the whole 95% interval of the paired difference is above 0,
<span class="cell no">not reproduced</span> if the whole interval is below 0, and
<span class="cell maybe">cannot tell</span> otherwise or with a single seed. A finding that one arm is as good
as another is reproduced if the whole interval is above −1 point. If none of forty findings were true, one
would be expected to be marked as reproduced by chance. The accuracies in the paper are of a larger model, of
ImageNet and of about a thousand times the computation: compare directions, not values.</p></section>"""


def _render_settings(
    study: Study, config: StudyConfig, arms: Sequence[PlannedArm], provenance: Mapping[str, Any]
) -> str:
    base = make_base_config(study, config)
    lengths = {
        planned.arm.name: f"{planned.steps:,} updates, "
        f"{planned.steps * planned.config.loop.batch_size:,} images"
        for planned in arms
        if planned.steps
    }
    values = {
        "command": " ".join(provenance["argv"]) or "called from Python",
        "date": provenance["date"],
        "network": f"{base.model.model}, images of {' × '.join(map(str, base.model.image_size))}",
        "base": f"{config.base}; budget {config.budget}; {config.seeds} seeds from {config.seed}",
        "evaluation": f"{config.labels:,} labelled images; {config.tune_steps:,} updates of fine-tuning",
        "duration since the last start": provenance["took"],
        "versions": ", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
        "git commit": provenance["git"] or "none",
        "hardware": ", ".join(f"{name} {value}" for name, value in provenance["hardware"].items() if value),
    }
    return (
        f"<section><h2>What was run</h2><dl>{render_definition_list(values)}</dl>"
        "<details><summary>Training length of each arm</summary>"
        f"<dl>{render_definition_list(lengths)}</dl></details></section>"
    )
