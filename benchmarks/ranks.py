"""Cost of distributed training and of checkpoints: whole runs of one and of several ranks, one thread each.

Rates are taken from the metrics of the runs, from step 11 on; runs of one rank, DDP and FSDP2 alternate. For
a checkpoint, the script prints the time until training continues, and the time until the file is written.

    uv run python benchmarks/ranks.py --data train.parquet --out docs/results/ranks.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.training.metric_writers import read_metrics
from quarterview.training.optim import create_adamw, get_optimizer_tensors
from quarterview.training.record import collect_provenance
from quarterview.training.writer import CheckpointWriter


def main(
    data: str = "shapes:20000:size=32",
    device: Literal["cpu", "cuda"] = "cpu",
    model: str = "mae_vit_tiny_patch4",
    image_size: int = 32,
    batch: int = 256,
    ranks: int = 2,
    steps: int = 40,
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Time one rank, and several ranks with DDP and with FSDP2, on the same batches.

    Args:
        batch: images per step over all ranks.
        ranks: number of ranks with DDP and FSDP2, one thread each.
        rounds: number of runs of each kind, of which the median is reported.
        out: JSON file to write.
    """
    flags = ["--data", data, "--model", model, "--image-size", str(image_size), "--batch-size", str(batch)]
    flags += ["--decoder-width", "128", "--decoder-depth", "2", "--decoder-heads", "4", "--device", device]
    flags += ["--steps", str(steps), "--log-every", "10", "--eval-every", str(steps), "--workers", "0"]
    flags += ["--checkpoint-every", str(steps)]
    arms = {"1 rank": (1, "auto"), "ddp": (ranks, "ddp"), "fsdp": (ranks, "fsdp")}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (size, parallel) in arms.items():
            rates[name].append(measure_images_per_s([*flags, "--parallel", parallel], size))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, (size, _) in arms.items():
        ratio = medians[name] / medians["1 rank"]
        print(f"{name:8} {size} x 1 thread: {medians[name]:7.1f} images/s, {ratio:.2f} of one rank")
    pauses = {name: measure_checkpoint_pause(name, device) for name in (model, "mae_vit_base_patch16")}
    for name, pause in pauses.items():
        print(
            f"{name}: a checkpoint of {pause['bytes'] / 1e6:.0f} MB pauses training for "
            f"{pause['pause_s']:.3f} s and is on the disk after {pause['written_s']:.2f} s"
        )
    if out is not None:
        record = {**collect_provenance(sys.argv), "images_per_s": rates, "checkpoints": pauses}
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def measure_images_per_s(flags: list[str], size: int) -> float:
    """Run a pre-training and return the median of its logged rates, without the first row.

    Args:
        size: number of ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(size), "-m", "quarterview", "pretrain", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", f"{folder}/run"], env=environment, check=True, capture_output=True)
        return statistics.median(row["images_per_s"] for row in read_metrics(Path(folder) / "run")[1:])


def measure_checkpoint_pause(name: str, device: str) -> dict[str, float]:
    """Measure checkpoints of a model and its optimizer: bytes, pause of training, time until written."""
    model = create_mae(MAEConfig(model=name), seed=0).to(device)
    optimizer = create_adamw(model, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    tensors = {"model": model.state_dict(), "optimizer": get_optimizer_tensors(optimizer)}
    pauses, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 2, None, {})
        for step in range(4):
            began = time.perf_counter()
            writer.save(step, tensors, {})
            pauses.append(time.perf_counter() - began)
            writer.finish()
            written.append(time.perf_counter() - began)
    return {
        "bytes": sum(t.nbytes for named in tensors.values() for t in named.values()),
        "pause_s": statistics.median(pauses[1:]),
        "written_s": statistics.median(written[1:]),
    }


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
