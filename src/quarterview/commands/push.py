"""``quarterview push``: upload an export to the Hugging Face Hub."""

from collections.abc import Sequence

from quarterview.training.console import Console
from quarterview.weights.config import HubConfig
from quarterview.weights.hub import push


def main(config: HubConfig, argv: Sequence[str]) -> int:
    """Upload the output of `quarterview export`, and print the names of the files.

    Raises:
        UserError, OSError: as `quarterview.weights.hub.push`.
    """
    files = push(config.folder, config.name, config.private)
    Console().info(f"Uploaded {', '.join(files)} to {config.name}.")
    return 0
