"""`quarterview push`: upload an export to the Hugging Face Hub."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import HubConfig
from quarterview.weights.hub import push


def main(config: HubConfig, argv: Sequence[str]) -> int:
    """Upload what `quarterview export` wrote, and say which files those were.

    Raises:
        UserError, OSError: as `quarterview.weights.hub.push`.
    """
    files = push(config.folder, config.name, config.private)
    Console().say(f"uploaded {', '.join(files)} to {config.name}")
    return 0
