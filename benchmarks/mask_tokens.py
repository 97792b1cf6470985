"""How much does it save that the encoder never sees mask tokens? Table 2 of He et al. 2021, measured.

Each arm's training step takes turns with that of the reference: mask tokens in the encoder, and the
paper's decoder. Wall-clock ratio beside the ratio of operations. The paper (ViT-L, 128 TPU v3 cores):
2.8 times with 8 blocks in the decoder, 3.7 times with one; in operations 3.3 times (table 1c).

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

from quarterview.benchmark.rate import timed
from quarterview.benchmark.update import update_of
from quarterview.models.config import MAEConfig
from quarterview.models.create import fresh_model
from quarterview.models.flops import flops
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.record import provenance

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
"""What is compared: an arm, what it is compared with once that has mask tokens, and the paper's ratio."""


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
        batch: images of a step of ViT-L.
        tiny_batch: images of a step of ViT-tiny.
        rounds: how often the two take turns; medians over rounds are reported.
        out: JSON file to write.
    """
    keep_freed_memory()
    where = torch.device(device)
    rows = {}
    for name, (config, base, paper) in PAIRS.items():
        reference = replace(base, encoder_mask_tokens=True)
        size = tiny_batch if config is TINY else batch
        arms = [update_of(fresh_model(each, seed=0), size, precision, where) for each in (config, reference)]
        times: list[list[float]] = [[], []]
        for turn in range(-1, rounds):  # the first is not counted
            for arm, kept in zip(arms, times, strict=True):
                seconds = timed(arm, where)
                if turn >= 0:
                    kept.append(seconds)
        fast, slow = (statistics.median(each) for each in times)
        operations = flops(reference).step / flops(config).step
        rows[name] = {
            "seconds": fast,
            "reference_seconds": slow,
            "ratio": slow / fast,
            "operations": operations,
        }
        print(f"{name}: {slow / fast:.2f} times as fast (paper: {paper}); {operations:.2f} in operations")
        del arms
    if out is not None:
        record = {
            "settings": {"batch": batch, "tiny_batch": tiny_batch, "precision": precision},
            "pairs": rows,
            **provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
