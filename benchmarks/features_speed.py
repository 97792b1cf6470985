"""Speed of feature extraction compared with timm: the encoder of ViT-B/16 at 224 pixels.

Both use the same weights, inference mode and bf16, eager and with compiled blocks. The script first checks in
float32 that the features are equal, and then times all variants in turn.

    uv run python benchmarks/features_speed.py --out docs/results/features_speed.json
"""

import copy
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from timm.models.vision_transformer import VisionTransformer

from quarterview.benchmark.rate import time_once
from quarterview.evaluation.features import compile_blocks, make_encoder
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.record import collect_provenance
from quarterview.training.trainer import get_autocast_context


@torch.inference_mode()
def main(
    batch: int = 32,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    rounds: int = 10,
    out: Path | None = None,
) -> None:
    """Time the variants.

    Args:
        batch: images per forward pass.
        rounds: number of timed forward passes of each variant, of which the median is reported.
        out: JSON file to write.
    """
    keep_freed_memory()
    where = torch.device(device)
    ours = create_mae(MAEConfig(), seed=0).to(where).eval()
    theirs = VisionTransformer(num_classes=0).to(where).eval()
    weights = {name: value for name, value in ours.state_dict().items() if name in theirs.state_dict()}
    theirs.load_state_dict(weights)
    images = torch.rand(batch, 3, 224, 224, device=where)
    features = make_encoder(ours, "cls")
    torch.testing.assert_close(
        features(images[:2]), theirs.forward_features(images[:2])[:, 0], atol=1e-4, rtol=0
    )
    ours_compiled, theirs_compiled = copy.deepcopy(ours), copy.deepcopy(theirs)
    compile_blocks(ours_compiled)
    for block in theirs_compiled.blocks:
        block.compile()
    features_compiled = make_encoder(ours_compiled, "cls")
    arms = {
        "quarterview": lambda: features(images),
        "quarterview, compiled": lambda: features_compiled(images),
        "timm": lambda: theirs.forward_features(images)[:, 0],
        "timm, compiled": lambda: theirs_compiled.forward_features(images)[:, 0],
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, rounds):  # the first round warms up and is not counted
        for name, arm in arms.items():
            with get_autocast_context(precision, where)():
                seconds = time_once(arm, where)
            if turn >= 0:
                times[name].append(seconds)
    rates = {name: batch / statistics.median(each) for name, each in times.items()}
    for name, rate in rates.items():
        print(
            f"{name:22} {rate:8.2f} images/s; quarterview is {rates['quarterview'] / rate:.2f} times as fast"
        )
    if out is not None:
        record = {
            "settings": {"batch": batch, "precision": precision, "device": device},
            "images_per_s": rates,
            "seconds": times,
            "timm": version("timm"),
            **collect_provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
