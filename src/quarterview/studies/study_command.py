"""``quarterview study``: the paper's ablations and comparisons on anyone's images."""

from collections.abc import Sequence

from quarterview.errors import EXIT_CODES
from quarterview.studies.conduct import conduct
from quarterview.studies.config import StudyConfig
from quarterview.studies.study_results import TableResults, costs, name_of
from quarterview.studies.verdict import Estimate
from quarterview.training.console import Console


def main(config: StudyConfig, argv: Sequence[str]) -> int:
    """Run the study, and show its tables and findings; returns the exit code."""
    console = Console()
    studied = conduct(config, argv)
    if studied.status == "complete":
        show_tables(studied.tables, console)
        console.say(f"See {studied.report}")
    else:
        console.say(f"stopped by {studied.status}; the same command goes on from there")
    return EXIT_CODES[studied.status]


def show_tables(found: Sequence[TableResults], console: Console) -> None:
    """The tables, each with its findings."""
    for its in found:
        rows = [
            [
                arm.name,
                *(_shown(its.figures.get((arm.name, m)), arm.paper.get(m)) for m in its.measures),
                *costs(its, arm.name),
            ]
            for arm in its.table.arms
        ]
        heads = ["", *(f"{name_of(m)} (paper)" for m in its.measures), "images/s", "GFLOP/image"]
        console.table(f"{its.table.title}, {its.table.source}".rstrip(", "), heads, rows)
        for outcome in its.outcomes:
            how = name_of(outcome.finding.measure)
            console.say(f"{outcome.answer}: {outcome.finding.claim} ({how}): {outcome.sentence}")


def _shown(figure: Estimate | None, paper: float | None) -> str:
    ours = "–" if figure is None else f"{figure.mean:.1%} ± {(figure.high - figure.low) / 2:.1%}"
    return ours if paper is None else f"{ours} ({paper:.1f})"
