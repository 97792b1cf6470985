"""``quarterview demo``: pre-training and evaluation on generated images, in a few minutes, offline."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from quarterview.commands.config import DemoConfig, LinearConfig, PretrainConfig
from quarterview.commands.linear import evaluate_linear
from quarterview.commands.pretrain import pretrain
from quarterview.errors import EXIT_CODES, UserError
from quarterview.evaluation.panel import draw_loss_curve
from quarterview.training.checkpoint import find_newest
from quarterview.training.console import Console, format_duration
from quarterview.training.lock import lock_folder
from quarterview.training.metric_writers import read_metrics

COMMAND = ["quarterview", "demo"]
TRAIN_IMAGES = "shapes:20000"
PROBE_TRAIN_IMAGES, PROBE_TEST_IMAGES = "shapes:500:seed=1", "shapes:2000:seed=2"
"""Labelled images for the linear probe, generated from other seeds than the pre-training images."""
MIN_ACCURACY_RATIO = 2.0
"""Accuracy of pre-trained features, relative to raw pixels and to a random encoder, that the demo expects."""


def make_demo_config(out: str, seed: int) -> PretrainConfig:
    """Return the pre-training configuration of the demo, which takes about two minutes on two CPU cores."""
    return PretrainConfig.from_flags(
        data=(TRAIN_IMAGES,),
        out=out,
        model="mae_vit_128x4x4_patch4",
        image_size=(32, 32),
        decoder_width=64,
        decoder_depth=2,
        decoder_heads=2,
        norm_pix_loss=False,  # normalized patches of the smooth backgrounds are mostly noise
        crop_min=0.8,  # keeps the shape inside the crop
        steps=2300,
        batch_size=64,
        lr=3e-3,
        seed=seed,
        device="cpu",
    )


def remove_earlier_demo(folder: Path) -> None:
    """Remove the run of an earlier demo from the output folder.

    Raises:
        UserError: if the folder holds another run, or the earlier demo is still running.
    """
    record = folder / "run.json"
    if record.is_file() and json.loads(record.read_text("utf-8")).get("argv") == COMMAND:
        with lock_folder(folder):
            shutil.rmtree(folder)
    elif find_newest(folder / "checkpoints") is not None:
        raise UserError(f"--out {folder} holds a run that is not a demo. Give a new folder.")


def save_figures(folder: Path, step: int) -> None:
    """Write the loss curve ``curve.png`` and the last reconstructions ``panel.png`` into the run folder."""
    draw_loss_curve(read_metrics(folder), folder / "curve.png", "demo")
    shutil.copyfile(folder / "samples" / f"step-{step:08d}.png", folder / "panel.png")


class ProbeAccuracies(NamedTuple):
    """Test accuracies of linear probes on three kinds of features, from 0 to 1."""

    pretrained: float
    """Features of the pre-trained encoder."""
    pixels: float
    """Raw pixels."""
    untrained: float
    """Features of the same encoder with random weights."""

    @property
    def is_success(self) -> bool:
        """Return True if pre-training multiplies the accuracy of both baselines by `MIN_ACCURACY_RATIO`."""
        return self.pretrained >= MIN_ACCURACY_RATIO * max(self.pixels, self.untrained)


def evaluate_features(out: str, seed: int) -> ProbeAccuracies:
    """Evaluate the features of a run, and two baselines, by linear probes on labelled images."""
    probe = LinearConfig.from_flags(
        run=out, train=PROBE_TRAIN_IMAGES, test=PROBE_TEST_IMAGES, seed=seed, device="cpu"
    )
    accuracy = evaluate_linear(probe, Console())
    return ProbeAccuracies(accuracy["this model"], accuracy["raw pixels"], accuracy["random encoder"])


def main(config: DemoConfig, argv: Sequence[str]) -> int:
    """Pre-train on generated images, evaluate the features and print the result.

    Returns:
        The exit code: 0 if the features are as good as expected (`ProbeAccuracies.is_success`), 1 if not, or
        the code of the signal that stopped the run.

    Raises:
        UserError: if ``config.out`` holds a run that is not a demo.
    """
    console, start, folder = Console(), time.monotonic(), Path(config.out)
    remove_earlier_demo(folder)
    num_images = TRAIN_IMAGES.partition(":")[2]
    console.info(f"Pre-training a small masked autoencoder on {num_images} generated images.")
    run = pretrain(make_demo_config(config.out, config.seed), COMMAND)
    if run.status != "complete":
        return EXIT_CODES[run.status]
    save_figures(folder, run.step)

    console.info(
        "Evaluating the features by a linear probe: 500 labelled images of 10 classes, 2,000 test images."
    )
    accuracies = evaluate_features(config.out, config.seed)
    if accuracies.is_success:
        console.info(
            "The encoder was trained without labels. A linear probe on its features is "
            f"{accuracies.pretrained / accuracies.untrained:.1f} times as accurate as on those of a random "
            f"encoder, and {accuracies.pretrained / accuracies.pixels:.1f} times as on raw pixels."
        )
    else:
        console.warning(
            f"The linear probe is not {MIN_ACCURACY_RATIO:g} times as accurate as on raw pixels and on a "
            "random encoder, as the demo normally is. Please report this."
        )
    console.info(f"See {folder}/panel.png for reconstructions, and {folder}/curve.png for the loss.")
    console.info("Your own images: quarterview pretrain --recipe laptop --data FOLDER --out runs/mine")
    console.info(f"The demo took {format_duration(time.monotonic() - start)}.")
    return 0 if accuracies.is_success else 1
