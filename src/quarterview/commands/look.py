"""``quarterview look``: what a model sees in images."""

from collections.abc import Sequence

from quarterview.commands.config import LookCommandConfig
from quarterview.commands.required import require
from quarterview.evaluation.look import look
from quarterview.training.console import Console


def main(config: LookCommandConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    del argv  # nothing is recorded
    require(config, "run", "images")
    file = look(config.look)
    Console().say(f"wrote {file}")
    return 0
