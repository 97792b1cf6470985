"""Which order a set is trained in, and where copies of its shards are kept, by the configuration."""

from typing import Literal

from quarterview.data.config import DataConfig
from quarterview.data.sampler import SampleStream, ShardedStream
from quarterview.data.sources.base import Source, is_remote, shard_starts
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.tar_index import cache_folder
from quarterview.errors import UserError


def chosen_shuffle(config: DataConfig, source: Source) -> Literal["full", "shards"]:
    """What ``--shuffle auto`` comes to: shards for remote data, else full.

    Raises:
        UserError: if shards are asked for, and the data has none.
    """
    if config.shuffle == "auto":
        return "shards" if is_remote(source) else "full"
    if config.shuffle == "shards" and shard_starts(source) is None:
        raise UserError(
            f"--shuffle shards, but {', '.join(config.data)} has no shards; accepted: full, or tar shards, "
            "parquet or packed stores"
        )
    return config.shuffle


def stream_of(
    config: DataConfig,
    source: Source,
    holdout: int,
    seed: int,
    shuffle: Literal["full", "shards"] | None = None,
) -> SampleStream:
    """The order of a run.

    Args:
        shuffle: what was chosen before, if it was.

    Raises:
        UserError: as of `chosen_shuffle`, or if the holdout leaves nothing.
    """
    starts = shard_starts(source)
    if (shuffle or chosen_shuffle(config, source)) == "full" or starts is None:
        return SampleStream(len(source), holdout, seed)
    return ShardedStream(starts, holdout, seed, config.shuffle_shards)


def shard_cache(config: DataConfig) -> ShardCache | None:
    """Where copies of remote shards are kept; None if none are."""
    if not config.shard_cache_gib:
        return None
    return ShardCache(config.shard_cache_dir or cache_folder(), int(config.shard_cache_gib * 2**30))
