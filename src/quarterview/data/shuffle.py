"""Creation of the sample stream and of the cache of remote shards, from the configuration."""

from typing import Literal

from quarterview.data.config import DataConfig
from quarterview.data.sampler import SampleStream, ShardedStream
from quarterview.data.sources.base import Source, get_shard_starts, is_remote
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.tar_index import get_cache_folder
from quarterview.errors import not_supported


def resolve_shuffle(config: DataConfig, source: Source) -> Literal["full", "shards"]:
    """Return the value of ``--shuffle``, with auto resolved: shards for remote data, otherwise full.

    Raises:
        UserError: if the value is shards and the data has no shards.
    """
    if config.shuffle == "auto":
        return "shards" if is_remote(source) else "full"
    if config.shuffle == "shards" and get_shard_starts(source) is None:
        raise not_supported(
            "--shuffle shards",
            f"{', '.join(config.data)}, which has no shards",
            "Use --shuffle full, or give tar shards, parquet or a packed store.",
        )
    return config.shuffle


def create_stream(
    config: DataConfig,
    source: Source,
    holdout: int,
    seed: int,
    shuffle: Literal["full", "shards"] | None = None,
) -> SampleStream:
    """Create the sample stream of a run.

    Args:
        shuffle: the resolved value of a resumed run, or None to resolve it.

    Raises:
        UserError: if --shuffle does not fit the data, or no image is left for training.
    """
    starts = get_shard_starts(source)
    if (shuffle or resolve_shuffle(config, source)) == "full" or starts is None:
        return SampleStream(len(source), holdout, seed)
    return ShardedStream(starts, holdout, seed, config.shuffle_shards)


def create_shard_cache(config: DataConfig) -> ShardCache | None:
    """Create the local cache of remote shards; None if it is disabled."""
    if not config.shard_cache_gib:
        return None
    return ShardCache(config.shard_cache_dir or get_cache_folder(), int(config.shard_cache_gib * 2**30))
