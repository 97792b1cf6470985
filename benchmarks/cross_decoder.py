"""What does the cross decoder save? A training step of ViT-B/16 at 224 pixels with each decoder.

The arms take turns in one process: the paper's decoder; the cross decoder that predicts every hidden
patch; and the one that predicts a third of them, a quarter of all patches, which is what CrossMAE's
authors do (Fu et al. 2024). Beside the ratio in time stands that in operations.

    uv run python benchmarks/cross_decoder.py --out docs/results/cross_decoder.json
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

from quarterview.benchmark.rate import timed
from quarterview.benchmark.update import update_of
from quarterview.models.config import MAEConfig
from quarterview.models.create import fresh_model
from quarterview.models.flops import flops
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.record import provenance

ARMS = {
    "standard": MAEConfig(),
    "cross": MAEConfig(decoder="cross"),
    "cross, a third of the hidden": MAEConfig(decoder="cross", predict_share=1 / 3),
}


def main(
    batch: int = 16,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 6,
    out: Path | None = None,
) -> None:
    """Time the arms.

    Args:
        batch: images of a step.
        rounds: how often the arms take turns; medians over rounds are reported.
        out: JSON file to write.
    """
    keep_freed_memory()
    where = torch.device(device)
    updates = {name: update_of(fresh_model(c, 0), batch, precision, where) for name, c in ARMS.items()}
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for turn in range(-2, rounds):  # the first two are not counted
        for name, update in updates.items():
            seconds = timed(update, where)
            if turn >= 0:
                times[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in times.items()}
    rows = {
        name: {
            "images_per_s": batch / medians[name],
            "ratio": medians["standard"] / medians[name],
            "operations": flops(ARMS["standard"]).step / flops(config).step,
        }
        for name, config in ARMS.items()
    }
    for name, row in rows.items():
        print(
            f"{name:30} {row['images_per_s']:7.2f} images/s  {row['ratio']:.2f} times as fast, "
            f"{row['operations']:.2f} in operations"
        )
    if out is not None:
        settings = {"batch": batch, "precision": precision, "device": device}
        record = {"settings": settings, "seconds": times, "arms": rows, **provenance(sys.argv)}
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
