"""The whole idea in a few minutes, without data and without a network."""

import json
import shutil
import time
from pathlib import Path
from typing import Literal

from quarterview.commands.pretrain import PretrainConfig, pretrain
from quarterview.errors import UserError
from quarterview.evaluation.features import ProbeConfig
from quarterview.evaluation.linear import linear
from quarterview.evaluation.panel import draw_curve
from quarterview.training.checkpoint import newest
from quarterview.training.lock import lock
from quarterview.training.logging import Journal, duration, metrics

COMMAND = ["quarterview", "demo"]
PICTURES = "shapes:20000"
LABELLED, TEST = "shapes:500:seed=1", "shapes:2000:seed=2"
"""Pictures of other seeds than those that are learned from."""
MARGIN = 2.0
"""How many times the accuracy of raw pixels, and of a random encoder, ours must reach."""


def demo_config(out: str, seed: int) -> PretrainConfig:
    """A model that two cores pre-train in about two minutes."""
    return PretrainConfig(
        data=(PICTURES,),
        out=out,
        model="mae_vit_128x4x4_patch4",
        image_size=(32, 32),
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=2,
        norm_pix_loss=False,  # on smooth grounds, normalised patches are mostly noise
        crop_min=0.8,  # so that the shape is in it
        steps=2300,
        batch_size=64,
        lr=3e-3,
        seed=seed,
        device="cpu",
    )


def remove_earlier_demo(folder: Path) -> None:
    """Make room for a demo where an earlier one was.

    Raises:
        UserError: if the folder holds any other run, or the earlier demo still runs.
    """
    record = folder / "run.json"
    if record.is_file() and json.loads(record.read_text("utf-8")).get("argv") == COMMAND:
        with lock(folder):
            shutil.rmtree(folder)
    elif newest(folder / "checkpoints") is not None:
        raise UserError(f"--out {folder} holds a run that is no demo; accepted: a new folder")


def demo(out: str, seed: int, journal: Journal) -> Literal["helped", "did not help", "SIGTERM", "SIGINT"]:
    """Generate pictures, pre-train on them, and say what was learned.

    Returns:
        ``helped`` if a linear classifier on our features is at least twice as accurate as one on
        raw pixels and one on a random encoder's features; the signal, if one stopped it.

    Raises:
        UserError: if `out` holds something else than a run.
    """
    began = time.monotonic()
    folder = Path(out)
    remove_earlier_demo(folder)
    journal.say(
        f"Pre-training a small masked autoencoder on {PICTURES.partition(':')[2]} generated pictures."
    )
    run = pretrain(demo_config(out, seed), COMMAND)
    if run.status != "complete":
        return run.status
    draw_curve(metrics(folder), folder / "curve.png", "demo")
    panel = folder / "samples" / f"step-{run.step:08d}.png"
    shutil.copyfile(panel, folder / "panel.png")

    journal.say(
        "Ten kinds of shapes, 500 labelled pictures: how well does a linear classifier tell them apart?"
    )
    accuracies = linear(
        ProbeConfig(run=out, train=(LABELLED,), test=(TEST,), seed=seed, device="cpu"), journal
    )
    ours, pixels, random = (accuracies[name] for name in ("this model", "raw pixels", "random encoder"))
    helped = ours >= MARGIN * max(pixels, random)
    if helped:
        journal.say(
            "Without a single label, the encoder learned features with which a linear classifier is "
            f"{ours / random:.1f} times as accurate as with a random encoder's, and {ours / pixels:.1f} "
            "times as with raw pixels."
        )
    else:
        journal.warn(
            f"these features are not {MARGIN:g} times as good as raw pixels and a random encoder, as they "
            "should be: something is wrong, please report it."
        )
    journal.say(f"See {folder}/panel.png for what it imagines behind hidden patches, and {folder}/curve.png.")
    journal.say("Your own images: quarterview pretrain --recipe laptop --data FOLDER --out runs/mine")
    journal.say(f"That took {duration(time.monotonic() - began)}.")
    return "helped" if helped else "did not help"
