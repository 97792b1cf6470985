"""What is watched while a run trains: called by the training loop at every evaluation.

They look at images that are not trained on, at the same ones every time and with masks that never
change, and draw from no generator: a run is bit for bit the same with and without them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quarterview.data.loader import Batch, Loader, central, stack
from quarterview.data.reading import read_many
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import FeatureKind, OnlineProbeConfig
from quarterview.evaluation.features import Backbone, Features, encoder_features
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import choose_labelled, open_split
from quarterview.evaluation.panel import draw_panel
from quarterview.methods.base import Method
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.training.trainer import Evaluator

_LOG = logging.getLogger("quarterview")
_PROBED_AT_ONCE = 256
_ROUNDING = 1e-9


# ---------------------------------------------------------------------- held-out images


def held_out_evaluators(method: Method, loader: Loader, folder: Path, micro_batch: int) -> list[Evaluator]:
    """The validation loss and, of masked autoencoders whose target is a picture, the panel: both on the
    held-out images with masks that never change."""
    held_out = loader.held_out()
    if held_out is None:
        return []

    def val_loss(step: int) -> dict[str, float]:
        losses = [method(part).loss * len(part.ids) for part in held_out.split(micro_batch)]
        return {"val_loss": float(torch.stack(losses).sum() / len(held_out.ids))}

    def panel(step: int) -> dict[str, float]:
        assert isinstance(method, MaskedAutoencoding)
        few = Batch(held_out.images[:8], held_out.ids[:8], held_out.epochs[:8])
        noise = method.noise(few.epochs, few.ids)[:, 0]
        path = folder / "samples" / f"step-{step:08d}.png"
        draw_panel(method.model, few.images, noise, path, f"step {step}")
        return {}

    drawn = isinstance(method, MaskedAutoencoding) and method.model.config.predicts_pictures
    return [val_loss, panel] if drawn else [val_loss]


# ---------------------------------------------------------------------- labelled images


def probe_evaluators(
    model: Backbone,
    kind: FeatureKind,
    config: OnlineProbeConfig,
    seed: int,
    due: Callable[[int], bool],
    threads: int,
) -> list[Evaluator]:
    """The accuracy of a k-nearest-neighbour vote on features of a kind; nothing if it is not asked for.

    Args:
        seed: of the choice of labelled images.
        due: whether to probe at the validation after so many updates.
        threads: how many images are read at a time, once, at the start.

    Raises:
        UserError: if the images cannot be compared (see `open_split`), are too few for the vote, or are the
            same in probe_train and probe_test.
    """
    if not config.probe_train:
        return []
    device, size, most = next(model.parameters()).device, model.config.image_size, config.probe_labels
    names = ("--probe-train", "--probe-test")
    split = open_split(config.probe_train, config.probe_test, model.config.in_chans, names)
    train, test = (
        read_labelled(source, labels, size, most, seed, threads, device)
        for source, labels in ((split.train, split.train_labels), (split.test, split.test_labels))
    )
    unreadable = train.unreadable + test.unreadable
    if unreadable:
        _LOG.warning("%d images of the probe cannot be read and are left out of it.", unreadable)
    if len(train.labels) < config.probe_k or not len(test.labels):
        raise UserError(
            f"{len(train.labels)} images of --probe-train and {len(test.labels)} of --probe-test can be "
            f"read, too few for --probe-k {config.probe_k}. Give at least so many to train, and one to test."
        )
    if torch.equal(train.images, test.images):  # fingerprints go by names and sizes, which two sets may share
        raise UserError(
            f"--probe-train and --probe-test are the same images, {' '.join(config.probe_test)}, so that "
            "each would be its own neighbour. Give two sets."
        )
    encode, evaluator = encoder_features(model, kind), Knn(config.probe_k)

    def features(images: Tensor) -> Tensor:
        parts = images.split(_PROBED_AT_ONCE)
        return torch.cat([encode(to_float(part)).float().cpu() for part in parts])

    def knn_accuracy(step: int) -> dict[str, float]:
        if not due(step):
            return {}
        found = Features(features(train.images), train.labels, features(test.images), test.labels)
        return {"knn_accuracy": dict(evaluator(found))["accuracy"]}

    return [knn_accuracy]


def probe_is_due(step: int, every: float | None, validation_every: int, last: int) -> bool:
    """Whether a validation is the first since the last multiple of `every` updates, or the last of all.

    It depends on the step alone, so a resumed run probes where an uninterrupted one does.

    Args:
        step: after which this validation is, one of those that the loop makes.
        every: updates, which need not be whole; None for every validation.
        validation_every: updates between validations.
        last: step of the run.
    """
    if every is None or step == last:
        return True
    before = (step - 1) // validation_every * validation_every
    passed, passed_before = (math.floor(at / every + _ROUNDING) for at in (step, before))
    return passed > passed_before


class Labelled(NamedTuple):
    """Images held on the device, and their labels."""

    images: Tensor
    """uint8 [N, C, *image_size] on the device; float32 in [0, 1] where the files hold more than 8 bits."""
    labels: Tensor
    """int64 [N], on the CPU."""
    unreadable: int
    """Chosen images that are not among them."""


def read_labelled(
    source: Source,
    labels: Tensor,
    image_size: Sequence[int],
    most: int,
    seed: int,
    threads: int,
    device: torch.device,
) -> Labelled:
    """Central crops of at most so many images of a labelled set, equally many per class.

    Args:
        labels: int64 [N], of all its images.
        image_size: height and width in pixels.
        most: how many images.
    """
    chosen = choose_labelled(labels, min(most, len(labels)), seed).tolist()
    kept, images = [], []
    for sample, picture, _ in read_many(source, chosen, threads):
        if picture is not None:
            kept.append(sample)
            images.append(central(picture.pixels, image_size))
    stacked = stack(images) if images else torch.empty(0, dtype=torch.uint8)
    return Labelled(stacked.to(device), labels[kept], len(chosen) - len(kept))
