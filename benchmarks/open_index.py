"""Time to open an indexed set of tar shards with a hundred million images.

The shards are empty files of realistic sizes, and their index has random entries. A new process opens the
set like ``--data 'shards/*.tar'``, verifies all checksums, and reads the entries of batches in both sample
orders. Peak resident memory, as reported by the system, includes torch.

    python benchmarks/open_index.py --out docs/results/open_index.json
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro

from quarterview.data.sampler import SampleStream, ShardedStream
from quarterview.data.sources.open import open_source
from quarterview.data.sources.shards import find_shards
from quarterview.data.sources.tar import TarSource
from quarterview.data.sources.tar_index import SAMPLE_DTYPE, ShardIndex, get_index_folder, write_index
from quarterview.training.record import collect_provenance

BLOCKS_PER_IMAGE = 200  # tar blocks of 512 bytes; about 100 kB
BATCH_SIZE = 4096
NUM_BATCHES = 5


def create_shards(folder: Path, shards: int, samples: int) -> None:
    """Write empty shards of realistic sizes, and an index with random entries."""
    folder.mkdir()
    for shard_index in range(shards):
        with (folder / f"train-{shard_index:06d}.tar").open("wb") as file:
            file.truncate(samples * (BLOCKS_PER_IMAGE + 1) * 512)
    found = find_shards(str(folder / "*.tar"))
    generator = np.random.default_rng(0)
    none = np.zeros(0, "<i8")

    def iter_shard_indexes() -> Iterator[ShardIndex]:
        for shard in found:
            rows = np.empty(samples, SAMPLE_DTYPE)
            rows["block"] = 1 + np.arange(samples) * (BLOCKS_PER_IMAGE + 1)
            rows["bytes"] = generator.integers(50_000, 100_000, samples)
            labels = generator.integers(0, 1000, samples).astype("<i4")
            yield ShardIndex(rows, labels, none, none, np.zeros(0, "u1"), {}, shard.name)

    target = get_index_folder(found)
    target.parent.mkdir(parents=True)
    write_index(target, [shard.name for shard in found], iter_shard_indexes)


def measure(folder: Path) -> dict[str, float]:
    """Measure the opening of the set and the reading of entries in this process."""
    before = _get_peak_memory_mib()
    began = time.perf_counter()
    source = open_source(str(folder / "*.tar"), 3)
    opened = time.perf_counter()
    assert isinstance(source, TarSource)
    found = {
        "images": len(source),
        "open_s": opened - began,
        "mib_before": before,
        "mib_opened": _get_peak_memory_mib(),
    }
    orders = {
        "full": SampleStream(len(source), 512, 0),
        "shards": ShardedStream(source.shard_starts(), 512, 0, 16),
    }
    for name, stream in orders.items():
        began = time.perf_counter()
        for batch in range(NUM_BATCHES):
            start = batch * len(source) // 3
            _, ids = stream.get_samples(torch.arange(start, start + BATCH_SIZE))
            for index in ids.tolist():
                source._locate(index)
                source.label(index)
        found[f"{name}_us_an_image"] = (time.perf_counter() - began) / (BATCH_SIZE * NUM_BATCHES) * 1e6
    began = time.perf_counter()
    source.fingerprint()
    return {**found, "fingerprint_s": time.perf_counter() - began, "mib_at_the_end": _get_peak_memory_mib()}


def _get_peak_memory_mib() -> float:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def _drop_from_page_cache(folder: Path) -> None:
    """Ask the system to drop the index files of a folder from the page cache."""
    for path in folder.rglob("*.npy"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main(
    shards: int = 10_000, samples: int = 10_000, out: Path | None = None, inside: Path | None = None
) -> None:
    """Measure in new processes, with the index on disk and in the page cache, and print the results.

    Args:
        shards: number of shards.
        samples: images per shard.
        out: JSON file to write.
        inside: measure the shards in this folder, in this process, and print only JSON.
    """
    if inside is not None:
        print(json.dumps(measure(inside)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        create_shards(folder, shards, samples)
        index_bytes = sum(path.stat().st_size for path in (Path(name) / "cache").rglob("*") if path.is_file())
        measured = {}
        for state in ("from disk", "in the page cache"):
            if state == "from disk":
                _drop_from_page_cache(Path(name) / "cache")
            command = [sys.executable, __file__, "--inside", str(folder)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[state] = json.loads(result.stdout)
    record = {
        **collect_provenance(sys.argv),
        "shards": shards,
        "index_bytes": index_bytes,
        "measured": measured,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    tyro.cli(main)
