"""Speed-up of an encoder without mask tokens (He et al. 2021, table 2).

Training steps of a model and of its reference, whose encoder processes mask tokens, alternate. The script
prints the speed-up in time and in floating-point operations. The paper (ViT-L, 128 TPU v3 cores) reports a
speed-up of 2.8 with 8 decoder blocks, of 3.7 with one, and 3.3 times fewer operations (table 1c).

    uv run python benchmarks/mask_tokens.py --out docs/results/mask_tokens_cpu.json
    uv run python benchmarks/mask_tokens.py --device cuda --batch 128 --tiny-batch 1024
"""

import json
import statistics
import sys
from dataclasses import replace
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

LARGE = MAEConfig(model="mae_vit_large_patch16")
TINY = MAEConfig(
    model="mae_vit_tiny_patch4", image_size=(32, 32), decoder_width=128, decoder_depth=2, decoder_heads=4
)
PAIRS = {
    "ViT-L/16, 8 blocks, against mask tokens with 8": (LARGE, LARGE, "2.8"),
    "ViT-L/16, 1 block, against mask tokens with 8": (replace(LARGE, decoder_depth=1), LARGE, "3.7"),
    "ViT-L/16, 1 block, against mask tokens with 1": (
        replace(LARGE, decoder_depth=1),
        replace(LARGE, decoder_depth=1),
        "–",
    ),
    "ViT-tiny/4, decoder 128×2, against mask tokens with the same": (TINY, TINY, "–"),
}
"""Comparisons by name: a model, its reference before mask tokens are added, and the paper's speed-up."""


def main(
    batch: int = 4,
    tiny_batch: int = 256,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 4,
    out: Path | None = None,
) -> None:
    """Time each pair.

    Args:
        batch: images per step of ViT-L.
        tiny_batch: images per step of ViT-tiny.
        rounds: number of timed steps of each model, of which the median is reported.
        out: JSON file to write.
    """
    keep_freed_memory()
    where = torch.device(device)
    rows = {}
    for name, (config, base, paper) in PAIRS.items():
        reference = replace(base, encoder_mask_tokens=True)
        size = tiny_batch if config is TINY else batch
        updates = [
            make_update(create_mae(each, seed=0), size, precision, where) for each in (config, reference)
        ]
        times: list[list[float]] = [[], []]
        for turn in range(-1, rounds):  # the first round warms up and is not counted
            for update, durations in zip(updates, times, strict=True):
                seconds = time_once(update, where)
                if turn >= 0:
                    durations.append(seconds)
        fast, slow = (statistics.median(each) for each in times)
        operations = count_flops(reference).step / count_flops(config).step
        rows[name] = {
            "seconds": fast,
            "reference_seconds": slow,
            "ratio": slow / fast,
            "operations": operations,
        }
        print(
            f"{name}: {slow / fast:.2f} times as fast (paper: {paper}); "
            f"{operations:.2f} times fewer operations"
        )
        del updates  # frees the memory of both models
    if out is not None:
        record = {
            "settings": {"batch": batch, "tiny_batch": tiny_batch, "precision": precision},
            "pairs": rows,
            **collect_provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
