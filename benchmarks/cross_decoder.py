"""Speed of a training step of ViT-B/16 at 224 pixels with the cross decoder of CrossMAE.

Three decoders alternate in one process: the decoder of MAE; the cross decoder that predicts all masked
patches; and the cross decoder that predicts a third of them, a quarter of all patches, as CrossMAE does
(Fu et al. 2024). The script prints the speed-up in time and in floating-point operations.

    uv run python benchmarks/cross_decoder.py --out docs/results/cross_decoder.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

from quarterview.benchmark.rate import time_once
from quarterview.benchmark.update import make_update
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.models.flops import count_flops
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.record import collect_provenance

ARMS = {
    "standard": MAEConfig(),
    "cross": MAEConfig(decoder="cross"),
    "cross, a third of the hidden": MAEConfig(decoder="cross", predict_ratio=1 / 3),
}


def main(
    batch: int = 16,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 6,
    out: Path | None = None,
) -> None:
    """Time a training step with each decoder.

    Args:
        batch: images per step.
        rounds: number of timed steps of each decoder, of which the median is reported.
        out: JSON file to write.
    """
    keep_freed_memory()
    where = torch.device(device)
    updates = {name: make_update(create_mae(c, 0), batch, precision, where) for name, c in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(-2, rounds):  # the first two rounds warm up and are not counted
        for name, update in updates.items():
            seconds = time_once(update, where)
            if turn >= 0:
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    rows = {
        name: {
            "images_per_s": batch / medians[name],
            "ratio": medians["standard"] / medians[name],
            "operations": count_flops(ARMS["standard"]).step / count_flops(config).step,
        }
        for name, config in ARMS.items()
    }
    for name, row in rows.items():
        print(
            f"{name:30} {row['images_per_s']:7.2f} images/s  {row['ratio']:.2f} times as fast, "
            f"{row['operations']:.2f} times fewer operations"
        )
    if out is not None:
        settings = {"batch": batch, "precision": precision, "device": device}
        record = {"settings": settings, "seconds": times, "arms": rows, **collect_provenance(sys.argv)}
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
