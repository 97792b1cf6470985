"""`quarterview demo`: the whole idea in a few minutes, without data and without a network."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quarterview.commands.config import DemoConfig, LinearConfig, PretrainConfig
from quarterview.commands.linear import linear
from quarterview.commands.pretrain import pretrain
from quarterview.errors import EXIT_CODES, UserError
from quarterview.evaluation.panel import draw_curve
from quarterview.training.checkpoint import newest
from quarterview.training.console import Console, duration
from quarterview.training.lock import lock
from quarterview.training.metric_writers import read_metrics

COMMAND = ["quarterview", "demo"]
PICTURES = "shapes:20000"
LABELLED, TEST = "shapes:500:seed=1", "shapes:2000:seed=2"
"""Pictures of other seeds than those that are learned from."""
MARGIN = 2.0
"""How many times the accuracy of raw pixels, and of a random encoder, ours must reach."""


def demo_config(out: str, seed: int) -> PretrainConfig:
    """A model that two cores pre-train in about two minutes."""
    return PretrainConfig.from_flags(
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
        raise UserError(f"--out {folder} holds a run that is not a demo. Give a new folder.")


def draw_pictures(folder: Path, step: int) -> None:
    """Put the losses' curve, ``curve.png``, and the last panel, ``panel.png``, into the run's folder."""
    draw_curve(read_metrics(folder), folder / "curve.png", "demo")
    shutil.copyfile(folder / "samples" / f"step-{step:08d}.png", folder / "panel.png")


class Judged(NamedTuple):
    """Accuracies of linear classifiers on three kinds of features."""

    ours: float
    pixels: float
    random: float

    @property
    def helped(self) -> bool:
        """Whether ours are `MARGIN` times as good as raw pixels and a random encoder's."""
        return self.ours >= MARGIN * max(self.pixels, self.random)


def judge(out: str, seed: int) -> Judged:
    """How well a linear classifier tells labelled pictures apart by our features and by others."""
    probe = LinearConfig.from_flags(run=out, train=LABELLED, test=TEST, seed=seed, device="cpu")
    found = linear(probe, Console())
    return Judged(found["this model"], found["raw pixels"], found["random encoder"])


def main(config: DemoConfig, argv: Sequence[str]) -> int:
    """Generate pictures, pre-train on them, and say what was learned.

    Returns:
        0 if our features are `MARGIN` times as good as others, 1 if not, and the code of a signal that
        stopped it.

    Raises:
        UserError: if `config.out` holds something else than an earlier demo.
    """
    console, began, folder = Console(), time.monotonic(), Path(config.out)
    remove_earlier_demo(folder)
    pictures = PICTURES.partition(":")[2]
    console.say(f"Pre-training a small masked autoencoder on {pictures} generated pictures.")
    run = pretrain(demo_config(config.out, config.seed), COMMAND)
    if run.status != "complete":
        return EXIT_CODES[run.status]
    draw_pictures(folder, run.step)

    console.say(
        "Ten kinds of shapes, 500 labelled pictures: how well does a linear classifier tell them apart?"
    )
    found = judge(config.out, config.seed)
    if found.helped:
        console.say(
            "Without a single label, the encoder learned features with which a linear classifier is "
            f"{found.ours / found.random:.1f} times as accurate as with a random encoder's, and "
            f"{found.ours / found.pixels:.1f} times as with raw pixels."
        )
    else:
        console.warn(
            f"these features are not {MARGIN:g} times as good as raw pixels and a random encoder, as they "
            "should be: something is wrong, please report it."
        )
    console.say(f"See {folder}/panel.png for what it imagines behind hidden patches, and {folder}/curve.png.")
    console.say("Your own images: quarterview pretrain --recipe laptop --data FOLDER --out runs/mine")
    console.say(f"That took {duration(time.monotonic() - began)}.")
    return 0 if found.helped else 1
