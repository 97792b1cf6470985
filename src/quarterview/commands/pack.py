"""``quarterview pack``: resize images once and pack them into few files that are read fast."""

from collections.abc import Sequence
from pathlib import Path

from quarterview.data.pack import pack, verify
from quarterview.data.pack_config import PackConfig
from quarterview.training.console import Console, Progress


def main(config: PackConfig, argv: Sequence[str]) -> int:
    """Write a packed store, or verify one.

    Raises:
        UserError, RunError: as `quarterview.data.pack.pack` and `quarterview.data.pack.verify`.
    """
    console = Console()
    if config.verify:
        folder = Path(config.data[0])
        with Progress(console, unit="shard") as progress:
            store = verify(folder, progress)
        console.info(
            f"{folder} is undamaged: {store.num_images} images, {store.num_broken} of which were broken when "
            "packed."
        )
        return 0
    with Progress(console, unit="shard") as progress:
        packed = pack(config, progress)
    if packed.is_complete:
        size = packed.num_bytes / 2**20
        console.info(
            f"Packed {packed.num_images} images into {config.out}, {size:.0f} MiB. Use them by --data "
            f"{config.out}."
        )
    else:
        progress_so_far = f"{packed.num_written_shards} of {packed.num_shards}"
        console.info(f"{progress_so_far} shards are in {config.out}. The last part completes the store.")
    return 0
