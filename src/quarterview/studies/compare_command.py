"""``quarterview compare``: compare pre-trained backbones with random weights and raw pixels."""

from collections.abc import Sequence

from quarterview.commands.config import RecipeOptions
from quarterview.errors import EXIT_CODES
from quarterview.studies.compare import compare
from quarterview.studies.compare_results import CompareStatistics
from quarterview.studies.config import CompareConfig
from quarterview.studies.verdict import Estimate, format_interval, format_signed_points
from quarterview.training.console import Console


def main(config: CompareConfig, argv: Sequence[str], _options: RecipeOptions) -> int:
    """Run the comparison, print its tables and verdicts, and return the exit code."""
    console = Console()
    result = compare(config, argv)
    if result.statistics is not None:
        print_tables(result.statistics, console)
        for verdict in result.statistics.verdicts:
            console.info(verdict.sentence)
        console.info(f"The report is {result.report}, and the results are in {result.results_file}.")
    return EXIT_CODES[result.status]


def print_tables(statistics: CompareStatistics, console: Console) -> None:
    """Print one table for each protocol.

    A table has a row for each arm and each difference, and a column for each number of labelled images.
    """
    for protocol, title in statistics.protocol_names.items():
        cells: dict[str, dict[int, str]] = {}
        for point in statistics.points:
            if point.protocol == protocol:
                cells.setdefault(point.arm, {})[point.labels] = _format_accuracy(point.accuracy)
        differences = [
            (arm, row.labels, contrast)
            for arm, rows in statistics.comparisons.items()
            for row in rows
            if row.protocol == protocol
            for contrast in row.contrasts
        ]
        differences += [
            (row.arm, row.labels, row.contrast)
            for row in statistics.arm_differences
            if row.protocol == protocol
        ]
        for arm, labels, contrast in differences:
            row = cells.setdefault(f"{arm} minus {contrast.baseline}", {})
            row[labels] = _format_difference(contrast.difference)
        counts = sorted({labels for row in cells.values() for labels in row})
        console.table(
            f"{title}: accuracies, and differences in percentage points, with 95% intervals",
            ["labelled images", *(f"{n:,}" for n in counts)],
            [(name, *(row[n] for n in counts)) for name, row in cells.items()],
        )


def _format_accuracy(estimate: Estimate) -> str:
    low, high = estimate.clipped_interval
    return f"{estimate.mean:.1%} ({low:.1%} to {high:.1%})"


def _format_difference(estimate: Estimate) -> str:
    return f"{format_signed_points(estimate.mean)} ({format_interval(estimate)})"
