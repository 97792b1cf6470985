"""``quarterview reconstruct``: draw reconstructions of masked images."""

from collections.abc import Sequence

from quarterview.commands.config import ReconstructCommandConfig
from quarterview.commands.required import require_flags
from quarterview.evaluation.panel import reconstruct
from quarterview.training.console import Console


def main(config: ReconstructCommandConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    del argv  # not recorded
    require_flags(config, "run", "images")
    file = reconstruct(config.reconstruct)
    Console().info(f"Wrote {file}.")
    return 0
