"""`quarterview pack`: make images small once, in few files that are read fast."""

from collections.abc import Sequence
from pathlib import Path

from quarterview.data.pack import pack, verify
from quarterview.data.pack_config import PackConfig
from quarterview.training.console import Console, Progress


def main(config: PackConfig, argv: Sequence[str]) -> int:
    """Write a packed store, or check one.

    Raises:
        UserError, RunError: as `quarterview.data.pack.pack` and `quarterview.data.pack.verify`.
    """
    console = Console()
    if config.verify:
        folder = Path(config.data[0])
        with Progress(console, unit="shard") as progress:
            found = verify(folder, progress)
        console.say(
            f"{folder} is sound: {found.images} images, {found.broken} of them broken when they were packed"
        )
        return 0
    with Progress(console, unit="shard") as progress:
        packed = pack(config, progress)
    if packed.complete:
        size = packed.size / 2**20
        console.say(f"{packed.images} images in {config.out}, {size:.0f} MiB; --data {config.out} reads them")
    else:
        of_all = f"{packed.shards} of {packed.all_shards}"
        console.say(f"{of_all} shards are in {config.out}; the last part completes it")
    return 0
