"""``quarterview compare``: did pre-training help?"""

from collections.abc import Sequence

from quarterview.commands.config import RecipeOptions
from quarterview.errors import EXIT_CODES
from quarterview.studies.compare import compare
from quarterview.studies.compare_results import Results
from quarterview.studies.config import CompareConfig
from quarterview.studies.verdict import Estimate, signed
from quarterview.training.console import Console


def main(config: CompareConfig, argv: Sequence[str], _options: RecipeOptions) -> int:
    """Compare, and show the figures and the verdicts; returns the exit code."""
    console = Console()
    compared = compare(config, argv)
    if compared.results is not None:
        show_tables(compared.results, console)
        for verdict in compared.results.verdicts:
            console.say(verdict.sentence)
        console.say(f"See {compared.report}; the figures are in {compared.record}")
    return EXIT_CODES[compared.status]


def show_tables(results: Results, console: Console) -> None:
    """A table for each protocol: a row for each arm and each difference, a column for each count."""
    for protocol, title in results.protocols.items():
        cells: dict[str, dict[int, str]] = {}
        for point in results.points:
            if point.protocol == protocol:
                cells.setdefault(point.arm, {})[point.labels] = _accuracy(point.accuracy)
        differences = [
            (arm, row.labels, contrast)
            for arm, rows in results.comparisons.items()
            for row in rows
            if row.protocol == protocol
            for contrast in row.contrasts
        ]
        differences += [
            (row.arm, row.labels, row.contrast) for row in results.between if row.protocol == protocol
        ]
        for arm, labels, contrast in differences:
            row = cells.setdefault(f"{arm} less {contrast.baseline}", {})
            row[labels] = _in_points(contrast.difference)
        counts = sorted({labels for row in cells.values() for labels in row})
        console.table(
            f"{title}: accuracy and points of difference, with 95% intervals",
            ["labelled images", *(f"{n:,}" for n in counts)],
            [(name, *(row[n] for n in counts)) for name, row in cells.items()],
        )


def _accuracy(found: Estimate) -> str:
    low, high = found.as_share
    return f"{found.mean:.1%} ({low:.1%} to {high:.1%})"


def _in_points(found: Estimate) -> str:
    return f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})"
