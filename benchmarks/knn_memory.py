"""Time and memory of an exact k-NN search over many features.

Random features are searched and their neighbours vote in a separate process. Its peak resident memory, as
reported by the system, includes torch and the features.

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

from quarterview.evaluation.knn import find_nearest_neighbors, vote
from quarterview.training.record import collect_provenance

NUM_CLASSES = 1000


def measure(train: int, test: int, width: int, k: int, device: str) -> dict[str, float]:
    """Measure the seconds of the search and of the votes, and the peak memory of this process in MiB."""
    generator = torch.Generator().manual_seed(0)
    train_features = torch.randn(train, width, generator=generator)
    test_features = torch.randn(test, width, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (train,), generator=generator)
    before = _get_peak_memory_mib()
    start = time.perf_counter()
    similarity, index = find_nearest_neighbors(train_features, test_features, k, torch.device(device))
    searched = time.perf_counter()
    for method in ("majority", "weighted"):
        vote(similarity, labels[index], method)
    end = time.perf_counter()
    return {
        "neighbours_s": searched - start,
        "votes_s": end - searched,
        "features_mib": (train_features.nbytes + test_features.nbytes) / 2**20,
        "peak_before_mib": before,
        "peak_mib": _get_peak_memory_mib(),
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0,
    }


def _get_peak_memory_mib() -> float:
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
    """Measure in a new process and print the results.

    Args:
        train: number of features that are searched.
        test: number of features whose neighbours are searched for.
        width: dimension of a feature.
        k: number of neighbours.
        device: cpu or cuda.
        out: JSON file to write.
        inside: measure in this process, and print only JSON.
    """
    if inside:
        print(json.dumps(measure(train, test, width, k, device)))
        return
    sizes = {"train": train, "test": test, "width": width, "k": k}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, *flags, "--device", device, "--inside"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(process.stdout)
    for name, value in measured.items():
        print(f"{name:16} {value:10.1f}")
    if out is not None:
        record = {**collect_provenance(sys.argv), **sizes, "device": device, "measured": measured}
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
