"""How long does a set of a hundred million images in tar shards take to open, once it is indexed?

The shards are empty files of the right sizes, the index is written by the package with made-up rows, and
a fresh process opens the set as `--data 'shards/*.tar'` does, every checksum compared, and draws batches in
both orders. Peak resident memory is what the system reports of that process, torch included.

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
from quarterview.data.sources.tar_index import SAMPLE, ShardIndex, index_folder, write_index
from quarterview.training.record import provenance

IMAGE_BLOCKS = 200  # of 512 bytes: a hundred kilobytes
BATCH = 4096
BATCHES = 5


def make(folder: Path, shards: int, samples: int) -> None:
    """Write shards that hold nothing, and the index of what they could hold."""
    folder.mkdir()
    for number in range(shards):
        with (folder / f"train-{number:06d}.tar").open("wb") as file:
            file.truncate(samples * (IMAGE_BLOCKS + 1) * 512)
    found = find_shards(str(folder / "*.tar"))
    generator = np.random.default_rng(0)
    none = np.zeros(0, "<i8")

    def each_part() -> Iterator[ShardIndex]:
        for shard in found:
            rows = np.empty(samples, SAMPLE)
            rows["block"] = 1 + np.arange(samples) * (IMAGE_BLOCKS + 1)
            rows["bytes"] = generator.integers(50_000, 100_000, samples)
            labels = generator.integers(0, 1000, samples).astype("<i4")
            yield ShardIndex(rows, labels, none, none, np.zeros(0, "u1"), {}, shard.name)

    target = index_folder(found)
    target.parent.mkdir(parents=True)
    write_index(target, [shard.name for shard in found], each_part)


def measure(folder: Path) -> dict[str, float]:
    """Open the set and draw batches, in this process."""
    before = _peak()
    began = time.perf_counter()
    source = open_source(str(folder / "*.tar"), 3)
    opened = time.perf_counter()
    assert isinstance(source, TarSource)
    found = {"images": len(source), "open_s": opened - began, "mib_before": before, "mib_opened": _peak()}
    orders = {
        "full": SampleStream(len(source), 512, 0),
        "shards": ShardedStream(source.shard_starts(), 512, 0, 16),
    }
    for name, stream in orders.items():
        began = time.perf_counter()
        for batch in range(BATCHES):
            start = batch * len(source) // 3
            _, ids = stream.at(torch.arange(start, start + BATCH))
            for index in ids.tolist():
                source._place(index)
                source.label(index)
        found[f"{name}_us_an_image"] = (time.perf_counter() - began) / (BATCH * BATCHES) * 1e6
    began = time.perf_counter()
    source.fingerprint()
    return {**found, "fingerprint_s": time.perf_counter() - began, "mib_at_the_end": _peak()}


def _peak() -> float:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def _forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its memory."""
    for path in folder.rglob("*.npy"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main(
    shards: int = 10_000, samples: int = 10_000, out: Path | None = None, inside: Path | None = None
) -> None:
    """Measure.

    Args:
        shards: how many.
        samples: images in each.
        out: JSON file to write.
        inside: measure with the shards in this folder, in this process, and print JSON alone.
    """
    if inside is not None:
        print(json.dumps(measure(inside)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        make(folder, shards, samples)
        index_bytes = sum(path.stat().st_size for path in (Path(name) / "cache").rglob("*") if path.is_file())
        measured = {}
        for state in ("from disk", "in the page cache"):
            if state == "from disk":
                _forget(Path(name) / "cache")
            command = [sys.executable, __file__, "--inside", str(folder)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[state] = json.loads(result.stdout)
    record = {
        **provenance(sys.argv),
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
