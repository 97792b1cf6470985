"""``quarterview export``: export a model to the format of another library."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import ExportConfig
from quarterview.weights.export.formats import export


def main(config: ExportConfig, argv: Sequence[str]) -> int:
    """Export the weights of a run, and print how much the export's outputs differ from those of our model.

    Raises:
        UserError, RunError: as `quarterview.weights.export.formats.export`.
    """
    console = Console()
    exported = export(config)
    for name, value in exported.differences.items():
        console.info(f"{name}: differs from our model's by at most {value:.1e} of the largest value")
    versions = ", ".join(f"{name} {version}" for name, version in exported.versions.items())
    console.info(f"Wrote {exported.path} for {config.to} ({versions}). See {exported.path / 'README.md'}.")
    return 0
