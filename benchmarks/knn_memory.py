"""How long do the exact nearest neighbours of many features take, and how much memory?

Random features are made, compared and voted on in a process of its own, whose peak resident memory
the system reports; importing torch and the features themselves are included.

    uv run python benchmarks/knn_memory.py --train 200000 --test 50000 --out docs/results/knn_memory.json
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from quarterview.evaluation.knn import nearest, vote
from quarterview.training.record import provenance

CLASSES = 1000


def measure(train: int, test: int, width: int, k: int, device: str) -> dict[str, float]:
    """Seconds for neighbours and votes, and the peak memory of this process in MiB."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(train, width, generator=generator)
    asked = torch.randn(test, width, generator=generator)
    labels = torch.randint(0, CLASSES, (train,), generator=generator)
    before = _peak()
    began = time.perf_counter()
    similarity, index = nearest(known, asked, k, torch.device(device))
    found = time.perf_counter()
    for kind in ("majority", "weighted"):
        vote(similarity, labels[index], kind)
    done = time.perf_counter()
    return {
        "neighbours_s": found - began,
        "votes_s": done - found,
        "features_mib": (known.nbytes + asked.nbytes) / 2**20,
        "peak_before_mib": before,
        "peak_mib": _peak(),
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0,
    }


def _peak() -> float:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def main(
    train: int = 200_000,
    test: int = 50_000,
    width: int = 192,
    k: int = 20,
    device: str = "cpu",
    out: Path | None = None,
    inside: bool = False,
) -> None:
    """Measure.

    Args:
        train: features to search.
        test: features whose neighbours are searched.
        width: numbers in a feature.
        k: how many neighbours.
        device: cpu or cuda.
        out: JSON file to write.
        inside: measure in this process, and print JSON alone.
    """
    if inside:
        print(json.dumps(measure(train, test, width, k, device)))
        return
    sizes = {"train": train, "test": test, "width": width, "k": k}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags, "--device", device, "--inside"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    for name, value in measured.items():
        print(f"{name:16} {value:10.1f}")
    if out is not None:
        record = {**provenance(sys.argv), **sizes, "device": device, "measured": measured}
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
