"""``quarterview look``: draw attention maps, principal components and reconstructions of images."""

from collections.abc import Sequence

from quarterview.commands.config import LookCommandConfig
from quarterview.commands.required import require_flags
from quarterview.evaluation.look import look
from quarterview.training.console import Console


def main(config: LookCommandConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    del argv  # not recorded
    require_flags(config, "run", "images")
    file = look(config.look)
    Console().info(f"Wrote {file}.")
    return 0
