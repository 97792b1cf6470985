"""``quarterview study``: run the ablations of the MAE paper, or other studies, on the user's images."""

from collections.abc import Sequence

from quarterview.errors import EXIT_CODES
from quarterview.studies.conduct import run_study
from quarterview.studies.config import StudyConfig
from quarterview.studies.study_results import TableResults, format_costs, format_measure
from quarterview.studies.verdict import Estimate
from quarterview.training.console import Console


def main(config: StudyConfig, argv: Sequence[str]) -> int:
    """Run the study, print its tables and findings, and return the exit code."""
    console = Console()
    result = run_study(config, argv)
    if result.status == "complete":
        print_tables(result.tables, console)
        console.info(f"The report is {result.report}.")
    else:
        console.info(f"The study was stopped by {result.status}. Run the same command to resume it.")
    return EXIT_CODES[result.status]


def print_tables(tables: Sequence[TableResults], console: Console) -> None:
    """Print all tables, each followed by its findings."""
    for results in tables:
        rows = [
            [
                arm.name,
                *(
                    _format_accuracy(results.estimates.get((arm.name, m)), arm.paper.get(m))
                    for m in results.measures
                ),
                *format_costs(results, arm.name),
            ]
            for arm in results.table.arms
        ]
        measure_names = [f"{format_measure(m)} (paper)" for m in results.measures]
        column_names = ["", *measure_names, "images/s", "GFLOP/image"]
        console.table(f"{results.table.title}, {results.table.source}".rstrip(", "), column_names, rows)
        for result in results.finding_results:
            measure = format_measure(result.finding.measure)
            console.info(f"{result.answer}: {result.finding.claim} ({measure}): {result.sentence}")


def _format_accuracy(estimate: Estimate | None, paper_accuracy: float | None) -> str:
    ours = "–" if estimate is None else f"{estimate.mean:.1%} ± {(estimate.high - estimate.low) / 2:.1%}"
    return ours if paper_accuracy is None else f"{ours} ({paper_accuracy:.1f})"
