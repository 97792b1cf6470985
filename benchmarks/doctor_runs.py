"""Does `quarterview doctor` name what ails runs that were made to be ill, and let healthy ones be?

Small runs on the same images, each with one thing changed: none, the target, the length, the learning
rate ×100, the mask ratio 0.99, the pixels of every image shuffled, all images equal but for noise of one
grey level. The doctor must name exactly that ailment among what it finds, and none in the healthy ones.

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
from quarterview.data.loader import central
from quarterview.data.reading import read_many
from quarterview.data.sources.open import open_source
from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.run import Diagnosis, doctor
from quarterview.errors import RunError
from quarterview.training.console import Console

SIDE = 32
"""Pixels of the images as they are written."""
BASE: dict[str, Any] = {
    "model": "mae_vit_64x3x4_patch4",
    "image_size": 40,  # 100 patches, so that a ratio of 0.99 keeps one
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


class Case(NamedTuple):
    """A run to make."""

    images: str
    """Which of the arrays of `write_arrays`."""
    changes: dict[str, Any]
    """What differs from `BASE`."""
    ailment: str | None
    """What the doctor must name; None if the run is healthy."""


CASES = {
    "healthy": Case("pictures", {}, None),
    "normalised": Case("pictures", {"norm_pix_loss": True}, None),
    "young": Case("pictures", {"steps": 120}, None),
    "rate": Case("pictures", {"lr": 100 * BASE["lr"]}, "learning rate"),
    "rate-normalised": Case("pictures", {"lr": 100 * BASE["lr"], "norm_pix_loss": True}, "learning rate"),
    "ratio": Case("pictures", {"mask_ratio": 0.99}, "mask ratio"),
    "shuffled": Case("shuffled", {}, "no structure"),
    "equal": Case("equal", {}, "equal images"),
}
"""Every run by its name."""


def write_arrays(data: str, count: int, seed: int, folder: Path) -> None:
    """Write the pictures and their ill copies, uint8 [N, 32, 32, 3] each.

    Args:
        data: anything that --data of pretrain takes.
    """
    source = open_source(data, 3)
    pictures = [p for _, p, _ in read_many(source, range(min(count, len(source))), 1) if p is not None]
    images = torch.stack([central(p.pixels, (SIDE, SIDE)) for p in pictures])  # uint8 [N, 3, 32, 32]
    arrays = {"pictures": images, "shuffled": shuffled(images, seed), "equal": equal(images, seed)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.permute(0, 2, 3, 1).contiguous().numpy())


def shuffled(images: Tensor, seed: int) -> Tensor:
    """The pixels of each image in an order of its own."""
    flat = images.flatten(2)
    order = rng.uniform(seed, "shuffled", 0, torch.arange(len(flat)), flat.shape[2]).argsort(dim=1)
    return flat.gather(2, order[:, None].expand(-1, flat.shape[1], -1)).view_as(images)


def equal(images: Tensor, seed: int) -> Tensor:
    """The first image again and again, each pixel up to one grey level off."""
    noise = rng.uniform(seed, "equal", 0, torch.arange(len(images)), images[0].numel())
    return (images[:1].int() + (noise * 3).int().view_as(images) - 1).clamp(0, 255).to(torch.uint8)


def make_run(case: Case, arrays: Path, out: Path, seed: int) -> None:
    """Train one of the runs; one that the loop itself gives up is as good a patient as any."""
    shutil.rmtree(out, ignore_errors=True)
    values = {**BASE, **case.changes, "data": (str(arrays / f"{case.images}.npy"),), "out": str(out)}
    try:
        pretrain(PretrainConfig.from_flags(**values, seed=seed))
    except RunError as error:
        print(error)


def judged_well(case: Case, diagnosis: Diagnosis) -> bool:
    """Whether the doctor said what it should."""
    ailments = [finding.name for finding in diagnosis.findings if finding.severity == "ailment"]
    return case.ailment in ailments if case.ailment else not ailments


def main(
    data: str = "shapes:3000:seed=5",
    seed: int = 5,
    out: Path = Path("runs/doctor"),
    count: int = 3000,
    only: Sequence[str] = tuple(CASES),
) -> None:
    """Make the runs and have them examined; exit code 1 if any is misjudged.

    Args:
        data: the images that the healthy runs learn from.
        seed: of the runs and of what is done to the images.
        out: where arrays and runs go.
        count: at most so many images.
        only: some of the runs.
    """
    write_arrays(data, count, seed, out)
    rows, good = [], True
    for name in only:
        make_run(CASES[name], out, out / name, seed)
        diagnosis = doctor(DoctorConfig(run=str(out / name), device="cpu"))
        well = judged_well(CASES[name], diagnosis)
        good &= well
        found = [f"{f.severity}: {f.name}" for f in diagnosis.findings if f.severity != "fine"]
        losses = " ".join(f"{value:.3f}" for value in diagnosis.figures["losses"].values())
        rows.append(
            (name, CASES[name].ailment or "healthy", ", ".join(found) or "-", losses, "yes" if well else "NO")
        )
        print(*rows[-1], sep=" | ", flush=True)
    title = f"{data}, seed {seed}; losses: zero, mean, nearest, interpolation, model"
    Console().table(title, ["run", "expected", "found", "losses", "well judged"], rows)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    tyro.cli(main)
