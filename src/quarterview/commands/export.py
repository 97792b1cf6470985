"""`quarterview export`: write a model as others open it."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import ExportConfig
from quarterview.weights.export.formats import export


def main(config: ExportConfig, argv: Sequence[str]) -> int:
    """Export the weights of a run, and say how near the export's forward is to ours.

    Raises:
        UserError, RunError: as `quarterview.weights.export.formats.export`.
    """
    console = Console()
    done = export(config)
    for name, value in done.differences.items():
        console.say(f"{name}: differs from our forward by at most {value:.1e} of the largest number")
    used = ", ".join(f"{name} {number}" for name, number in done.versions.items())
    console.say(f"wrote {done.path} for {config.to} ({used}); see {done.path / 'README.md'}")
    return 0
