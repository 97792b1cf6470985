"""``quarterview embed``: the embeddings of images as Parquet."""

from collections.abc import Sequence

from quarterview.commands.config import EmbedCommandConfig
from quarterview.commands.required import require
from quarterview.evaluation.embed import embed
from quarterview.training.console import Console, Progress

_SHOWN = 10
"""Unreadable images that are named."""


def main(config: EmbedCommandConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    del argv  # embed.json records the settings
    require(config, "run", "data", "out")
    console = Console()
    with Progress(console, unit="image") as progress:
        record = embed(config.embed, progress)
    for image in record["unreadable"][:_SHOWN]:
        console.warn(f"{image['name']} could not be read and was left out: {image['reason']}")
    shape = " × ".join(map(str, record["shape"]))
    console.say(f"{record['rows']} embeddings of {shape} numbers in {config.embed.out}")
    return 0
