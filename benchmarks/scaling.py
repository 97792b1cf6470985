"""Scaling of time and memory with image size, mask ratio, batch size, model size and number of images.

A training step of ViT-tiny/16 with a decoder of width 128 and 2 blocks is measured over the first four;
embedding and k-NN over the number of images. Each curve is fitted by a power law over its upper half, and
drawn on log-log axes. Memory is that of activations saved for the backward pass, counted by tracing.

    uv run python benchmarks/scaling.py --out docs/results/scaling.json --png docs/images/scaling.png
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro

from quarterview.benchmark.rate import median, time_repeatedly
from quarterview.benchmark.update import make_update
from quarterview.commands.config import PretrainConfig
from quarterview.commands.dry_run import estimate_memory
from quarterview.data.sources.shapes import ShapesSource
from quarterview.evaluation.features import extract_features, make_encoder
from quarterview.evaluation.knn import Knn
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.models.flops import count_flops
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.record import collect_provenance

BASE = MAEConfig(
    model="mae_vit_tiny_patch16", image_size=(224, 224), decoder_width=128, decoder_depth=2, decoder_heads=4
)
SIZES = (64, 96, 128, 192, 256, 320, 384, 448)
RATIOS = (0.9, 0.8, 0.75, 0.6, 0.5, 0.25)
BATCHES = (2, 4, 8, 16, 32, 64)
MODELS = ("96x12x3", "tiny", "288x12x6", "small", "576x12x9", "base")
IMAGES = (256, 512, 1024, 2048, 4096)
FEATURES = (2_000, 4_000, 8_000, 16_000, 32_000)


@dataclass(frozen=True)
class Curve:
    """Measured cost as a function of the amount of work."""

    title: str
    work: str
    """Label of the x axis."""
    x: list[float]
    """Amounts of work."""
    seconds: list[float]
    mebibytes: list[float] | None = None
    operations: list[float] | None = None

    def fit_exponent(self, y: Sequence[float]) -> float:
        """Fit the exponent of a power law to the upper half of the points, where fixed costs matter least."""
        half = len(self.x) // 2
        return float(np.polyfit(np.log(self.x[half:]), np.log(y[half:]), 1)[0])


def measure_step(
    config: MAEConfig, batch: int, precision: str, device: torch.device
) -> tuple[float, float, float]:
    """Measure the seconds, MiB of activations and floating-point operations of a training step."""
    seconds = median(
        time_repeatedly(make_update(create_mae(config, 0), batch, precision, device), device, 2.0)
    )
    names = ("model", "image_size", "decoder_width", "decoder_depth", "decoder_heads", "mask_ratio")
    run = PretrainConfig.from_flags(batch_size=batch, **{name: getattr(config, name) for name in names})
    return seconds, estimate_memory(run, precision)[2] / 2**20, count_flops(config).step * batch


def measure_step_curve(
    title: str,
    work: str,
    x: list[float],
    cases: list[tuple[MAEConfig, int]],
    precision: str,
    device: torch.device,
) -> Curve:
    """Measure a training step for each configuration and batch size."""
    seconds, memory, operations = zip(
        *(measure_step(config, batch, precision, device) for config, batch in cases), strict=True
    )
    return Curve(title, work, x, list(seconds), list(memory), list(operations))


def measure_curves(batch: int, precision: Literal["bf16", "fp32"], device: torch.device) -> list[Curve]:
    """Measure all curves."""

    def steps(title: str, work: str, x: list[float], cases: list[tuple[MAEConfig, int]]) -> Curve:
        curve = measure_step_curve(title, work, x, cases, precision, device)
        print_exponent(curve)
        return curve

    sizes = [replace(BASE, image_size=(side, side)) for side in SIZES]
    ratios = [replace(BASE, mask_ratio=ratio) for ratio in RATIOS]
    models = [replace(BASE, model=f"mae_vit_{name}_patch16") for name in MODELS]
    found = [
        steps("image size", "number of patches", [c.num_patches for c in sizes], [(c, batch) for c in sizes]),
        steps(
            "mask ratio",
            "visible patches",
            [c.num_patches * (1 - c.mask_ratio) for c in ratios],
            [(c, batch) for c in ratios],
        ),
        steps("batch", "number of images", list(BATCHES), [(BASE, size) for size in BATCHES]),
        steps(
            "model",
            "operations of the step",
            [count_flops(c).step for c in models],
            [(c, batch) for c in models],
        ),
    ]
    return [*found, measure_embedding_curve(precision, device), measure_knn_curve(device)]


def measure_embedding_curve(precision: Literal["bf16", "fp32"], device: torch.device) -> Curve:
    """Measure feature extraction at 64 pixels over the number of images."""
    config = replace(BASE, image_size=(64, 64))
    model = create_mae(config, 0).to(device).eval()
    source = ShapesSource(count=max(IMAGES), seed=0, size=64, channels=3)
    encoders = {"mean": make_encoder(model, "mean")}

    def embed(count: int) -> Callable[[], object]:
        return lambda: extract_features(encoders, source, range(count), config, device, precision=precision)

    return measure_curve("embedding", "number of images", IMAGES, embed, device)


def measure_knn_curve(device: torch.device) -> Curve:
    """Measure k-NN classification over the number of labelled images."""
    train, test = torch.randn(max(FEATURES), 192, device=device), torch.randn(4000, 192, device=device)
    labels, evaluator = torch.randint(10, (len(train),)), Knn(20, device=device)

    def classify(count: int) -> Callable[[], object]:
        return lambda: evaluator.predict(train[:count], labels[:count], test)

    return measure_curve("k-NN, 4,000 queries", "number of labelled images", FEATURES, classify, device)


def measure_curve(
    title: str, work: str, x: Sequence[int], case: Callable[[int], Callable[[], object]], device: torch.device
) -> Curve:
    """Measure the durations of functions that ``case`` returns for each amount of work."""
    curve = Curve(title, work, list(x), [median(time_repeatedly(case(count), device, 1.0)) for count in x])
    print_exponent(curve)
    return curve


def print_exponent(curve: Curve) -> None:
    """Print the exponent of the durations of a curve."""
    exponent = curve.fit_exponent(curve.seconds)
    print(f"{curve.title}: time grows with the {curve.work} to the power of {exponent:.2f}", flush=True)


def draw_curves(found: list[Curve], path: Path) -> None:
    """Draw a figure with one plot per curve."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axis, curve in zip(axes.flat, found, strict=True):
        axis.loglog(
            curve.x,
            curve.seconds,
            "o-",
            color="C0",
            label=f"seconds, power {curve.fit_exponent(curve.seconds):.2f}",
        )
        if curve.mebibytes is not None:
            label = f"GiB, power {curve.fit_exponent(curve.mebibytes):.2f}"
            axis.loglog(curve.x, [each / 1024 for each in curve.mebibytes], "s--", color="C1", label=label)
        if curve.operations is not None:
            label = f"operations, power {curve.fit_exponent(curve.operations):.2f}, scaled"
            scale = curve.seconds[-1] / curve.operations[-1]
            axis.loglog(curve.x, [each * scale for each in curve.operations], ":", color="0.6", label=label)
        axis.set(title=curve.title, xlabel=curve.work)
        axis.legend(frameon=False, fontsize=8)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.savefig(path, dpi=110)


def main(
    batch: int = 16,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
    png: Path | None = None,
) -> None:
    """Measure, fit and draw.

    Args:
        batch: images per step, where the batch size is not varied.
        out: JSON file to write.
        png: figure to write.
    """
    keep_freed_memory()
    found = measure_curves(batch, precision, torch.device(device))
    if png is not None:
        draw_curves(found, png)
    if out is not None:
        rows = [
            {
                **vars(curve),
                "exponents": {
                    name: curve.fit_exponent(values)
                    for name, values in (
                        ("seconds", curve.seconds),
                        ("mebibytes", curve.mebibytes),
                        ("operations", curve.operations),
                    )
                    if values is not None and all(map(math.isfinite, values))
                },
            }
            for curve in found
        ]
        record = {
            "settings": {"batch": batch, "precision": precision, "device": device},
            "curves": rows,
            **collect_provenance(sys.argv),
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    tyro.cli(main)
