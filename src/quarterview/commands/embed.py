"""``quarterview embed``: write embeddings of images to Parquet files."""

from collections.abc import Sequence

from quarterview.commands.config import EmbedCommandConfig
from quarterview.commands.required import require_flags
from quarterview.evaluation.embed import embed
from quarterview.training.console import Console, Progress

_MAX_SHOWN = 10
"""Maximum number of unreadable images to name."""


def main(config: EmbedCommandConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    del argv  # embed.json records the settings
    require_flags(config, "run", "data", "out")
    console = Console()
    with Progress(console, unit="image") as progress:
        record = embed(config.embed, progress)
    for image in record["unreadable"][:_MAX_SHOWN]:
        console.warning(f"{image['name']} could not be read and was skipped: {image['reason']}")
    shape = " × ".join(map(str, record["shape"]))
    console.info(f"Wrote {record['rows']} embeddings of shape {shape} to {config.embed.out}.")
    return 0
