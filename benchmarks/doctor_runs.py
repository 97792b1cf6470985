"""Test of ``quarterview doctor`` on small runs with a known problem, and on runs without one.

Each run differs from a healthy one in at most one thing: the target, the length, a learning rate × 100, a
mask ratio of 0.99, shuffled pixels in every image, or images that are equal except for noise of one gray
level. The doctor must find the known problem, and no problem in healthy runs.

    uv run python benchmarks/doctor_runs.py --data shapes:3000:seed=5 --seed 5 --out runs/doctor
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from quarterview import rng
from quarterview.commands.config import PretrainConfig
from quarterview.commands.pretrain import pretrain
from quarterview.data.loader import resized_center_crop
from quarterview.data.reading import read_samples
from quarterview.data.sources.open import open_source
from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.run import Diagnosis, diagnose_run
from quarterview.errors import RunError
from quarterview.training.console import Console

IMAGE_SIZE = 32
"""Height and width of the generated images in pixels."""
BASE: dict[str, Any] = {
    "model": "mae_vit_64x3x4_patch4",
    "image_size": 40,  # 100 patches, so that one is visible at a mask ratio of 0.99
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "norm_pix_loss": False,
    "steps": 400,
    "batch_size": 32,
    "lr": 2e-3,
    "log_every": 10,
    "holdout": 64,
    "workers": 0,
    "device": "cpu",
}
"""Flags of all runs."""


class Case(NamedTuple):
    """A run and the problem that the doctor must find in it."""

    array_name: str
    """The images, by their name in `write_arrays`."""
    flags: dict[str, Any]
    """Flags that differ from `BASE`."""
    error: str | None
    """Name of the finding with severity ``error``; None if the run is healthy."""


CASES = {
    "healthy": Case("original", {}, None),
    "normalised": Case("original", {"norm_pix_loss": True}, None),
    "young": Case("original", {"steps": 120}, None),
    "rate": Case("original", {"lr": 100 * BASE["lr"]}, "learning rate"),
    "rate-normalised": Case("original", {"lr": 100 * BASE["lr"], "norm_pix_loss": True}, "learning rate"),
    "ratio": Case("original", {"mask_ratio": 0.99}, "mask ratio"),
    "shuffled": Case("shuffled", {}, "no structure"),
    "equal": Case("equal", {}, "equal images"),
}
"""The runs by name."""


def write_arrays(data: str, count: int, seed: int, folder: Path) -> None:
    """Write the original images and their modified copies, uint8 [N, 32, 32, 3] each, as .npy files.

    Args:
        data: a value of --data of ``quarterview pretrain``.
        count: maximum number of images.
        seed: seed of the shuffling and the noise.
    """
    source = open_source(data, 3)
    decoded = [
        image for _, image, _ in read_samples(source, range(min(count, len(source))), 1) if image is not None
    ]
    images = torch.stack([resized_center_crop(image.pixels, (IMAGE_SIZE, IMAGE_SIZE)) for image in decoded])
    arrays = {
        "original": images,
        "shuffled": shuffle_pixels(images, seed),
        "equal": make_nearly_equal(images, seed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.permute(0, 2, 3, 1).contiguous().numpy())


def shuffle_pixels(images: Tensor, seed: int) -> Tensor:
    """Shuffle the pixels of each image in another random order."""
    flat = images.flatten(2)
    order = rng.uniform(seed, "shuffled", 0, torch.arange(len(flat)), flat.shape[2]).argsort(dim=1)
    return flat.gather(2, order[:, None].expand(-1, flat.shape[1], -1)).view_as(images)


def make_nearly_equal(images: Tensor, seed: int) -> Tensor:
    """Return copies of the first image, each with noise of up to one gray level."""
    noise = rng.uniform(seed, "equal", 0, torch.arange(len(images)), images[0].numel())
    return (images[:1].int() + (noise * 3).int().view_as(images) - 1).clamp(0, 255).to(torch.uint8)


def train_case(case: Case, arrays: Path, out: Path, seed: int) -> None:
    """Train one of the runs; a run that stops with an error, such as divergence, is kept for the doctor."""
    shutil.rmtree(out, ignore_errors=True)
    values = {**BASE, **case.flags, "data": (str(arrays / f"{case.array_name}.npy"),), "out": str(out)}
    try:
        pretrain(PretrainConfig.from_flags(**values, seed=seed))
    except RunError as error:
        print(error)


def is_diagnosed_correctly(case: Case, diagnosis: Diagnosis) -> bool:
    """Return True if the doctor found the problem of the run, or none in a healthy run."""
    errors = [finding.name for finding in diagnosis.findings if finding.severity == "error"]
    return case.error in errors if case.error else not errors


def main(
    data: str = "shapes:3000:seed=5",
    seed: int = 5,
    out: Path = Path("runs/doctor"),
    count: int = 3000,
    only: Sequence[str] = tuple(CASES),
) -> None:
    """Train and diagnose the runs; the exit code is 1 if any diagnosis is wrong.

    Args:
        data: images of the healthy runs, a value of --data of quarterview pretrain.
        seed: seed of the runs, and of the modifications of the images.
        out: folder for the images and the runs.
        count: maximum number of images.
        only: names of the runs.
    """
    write_arrays(data, count, seed, out)
    rows, all_correct = [], True
    for name in only:
        train_case(CASES[name], out, out / name, seed)
        diagnosis = diagnose_run(DoctorConfig(run=str(out / name), device="cpu"))
        is_correct = is_diagnosed_correctly(CASES[name], diagnosis)
        all_correct &= is_correct
        findings = [f"{f.severity}: {f.name}" for f in diagnosis.findings if f.severity != "ok"]
        losses = " ".join(f"{value:.3f}" for value in diagnosis.metrics["losses"].values())
        expected = CASES[name].error or "healthy"
        rows.append((name, expected, ", ".join(findings) or "-", losses, "yes" if is_correct else "NO"))
        print(*rows[-1], sep=" | ", flush=True)
    title = f"{data}, seed {seed}; losses: zero, mean, nearest, interpolation, model"
    Console().table(title, ["run", "expected", "found", "losses", "correct"], rows)
    sys.exit(0 if all_correct else 1)


if __name__ == "__main__":
    tyro.cli(main)
