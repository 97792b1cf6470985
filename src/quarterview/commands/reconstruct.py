"""``quarterview reconstruct``: what a model makes of images of which it sees a quarter."""

from collections.abc import Sequence

from quarterview.commands.config import ReconstructCommandConfig
from quarterview.commands.required import require
from quarterview.evaluation.panel import reconstruct
from quarterview.training.console import Console


def main(config: ReconstructCommandConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    del argv  # nothing is recorded
    require(config, "run", "images")
    file = reconstruct(config.reconstruct)
    Console().say(f"wrote {file}")
    return 0
