"""Evaluators that the training loop calls at every validation.

They use images that are not trained on, the same images and masks every time, and draw no random numbers. A
run is bit-identical with and without them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quarterview.data.loader import Batch, Loader, resized_center_crop, stack_images
from quarterview.data.reading import read_samples
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import FeaturePool, OnlineProbeConfig
from quarterview.evaluation.features import Backbone, Features, make_encoder
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import choose_labeled, open_split
from quarterview.evaluation.panel import draw_panel
from quarterview.methods.base import Method
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.training.trainer import Evaluator

_LOG = logging.getLogger("quarterview")
_PROBE_BATCH_SIZE = 256
_TOLERANCE = 1e-9  # of a quotient that is rounded down


# ---------------------------------------------------------------------- held-out images


def make_held_out_evaluators(
    method: Method, loader: Loader, folder: Path, micro_batch: int
) -> list[Evaluator]:
    """Return the evaluators on the held-out images: the validation loss and the reconstruction panel.

    Both use fixed masks. The panel is drawn for masked autoencoders that predict pixels.

    Args:
        folder: folder of the run; panels are written to ``samples``.
        micro_batch: images per forward pass.
    """
    held_out = loader.load_held_out()
    if held_out is None:
        return []

    def val_loss(step: int) -> dict[str, float]:
        losses = [method(batch).loss * len(batch.ids) for batch in held_out.split(micro_batch)]
        return {"val_loss": float(torch.stack(losses).sum() / len(held_out.ids))}

    def panel(step: int) -> dict[str, float]:
        assert isinstance(method, MaskedAutoencoding)
        batch = Batch(held_out.images[:8], held_out.ids[:8], held_out.epochs[:8])
        noise = method.draw_mask_noise(batch.epochs, batch.ids)[:, 0]
        path = folder / "samples" / f"step-{step:08d}.png"
        draw_panel(method.model, batch.images, noise, path, f"step {step}")
        return {}

    has_panel = isinstance(method, MaskedAutoencoding) and method.model.config.can_reconstruct
    return [val_loss, panel] if has_panel else [val_loss]


# ---------------------------------------------------------------------- labelled images


def make_probe_evaluators(
    model: Backbone,
    pool: FeaturePool,
    config: OnlineProbeConfig,
    seed: int,
    is_due: Callable[[int], bool],
    num_threads: int,
) -> list[Evaluator]:
    """Return the evaluator of the k-nearest-neighbour probe; none without --probe-train.

    Args:
        pool: kind of features, see `make_encoder`.
        seed: seed of the choice of labelled images.
        is_due: called with the step of a validation; returns True if the probe runs there.
        num_threads: number of threads that read the images, once, at the start.

    Raises:
        UserError: if the two sets have different classes or no labels (see `open_split`), have too few
            images, or are the same.
    """
    if not config.probe_train:
        return []
    device, size = next(model.parameters()).device, model.config.image_size
    set_names = ("--probe-train", "--probe-test")
    split = open_split(config.probe_train, config.probe_test, model.config.in_chans, set_names)
    train, test = (
        read_labeled_crops(source, labels, size, config.probe_labels, seed, num_threads, device)
        for source, labels in ((split.train, split.train_labels), (split.test, split.test_labels))
    )
    unreadable = train.unreadable + test.unreadable
    if unreadable:
        _LOG.warning("%d images of the probe cannot be read. They are left out.", unreadable)
    if len(train.labels) < config.probe_k or not len(test.labels):
        raise UserError(
            f"{len(train.labels)} images of --probe-train and {len(test.labels)} of --probe-test can be "
            f"read. Give at least {config.probe_k} images (--probe-k) with --probe-train, and 1 with "
            "--probe-test."
        )
    if torch.equal(train.images, test.images):  # fingerprints depend on names and sizes, which may be equal
        raise UserError(
            f"--probe-train and --probe-test have the same images, {' '.join(config.probe_test)}, so each "
            "image would be its own neighbour. Give two different sets."
        )
    encode, evaluator = make_encoder(model, pool), Knn(config.probe_k)

    def compute_features(images: Tensor) -> Tensor:
        batches = images.split(_PROBE_BATCH_SIZE)
        return torch.cat([encode(to_float(batch)).float().cpu() for batch in batches])

    def knn_accuracy(step: int) -> dict[str, float]:
        if not is_due(step):
            return {}
        train_features, test_features = compute_features(train.images), compute_features(test.images)
        features = Features(train_features, train.labels, test_features, test.labels)
        return {"knn_accuracy": dict(evaluator(features))["accuracy"]}

    return [knn_accuracy]


def is_probe_due(step: int, every: float | None, validation_every: int, last: int) -> bool:
    """Return True if the probe runs at the validation after `step`.

    It runs at the first validation after each multiple of `every` updates, and at the last validation. The
    result depends on the step alone, so a resumed run probes at the same steps as an uninterrupted one.

    Args:
        step: step of a validation.
        every: updates between probes, not necessarily an integer; None for every validation.
        validation_every: updates between validations.
        last: last step of the run.
    """
    if every is None or step == last:
        return True
    previous = (step - 1) // validation_every * validation_every
    periods, previous_periods = (math.floor(s / every + _TOLERANCE) for s in (step, previous))
    return periods > previous_periods


class LabeledCrops(NamedTuple):
    """Central crops in device memory, and their labels."""

    images: Tensor
    """uint8 [N, C, *image_size] on the device; float32 in [0, 1] where the files hold more than 8 bits."""
    labels: Tensor
    """int64 [N], on the CPU."""
    unreadable: int
    """Number of chosen images that cannot be read."""


def read_labeled_crops(
    source: Source,
    labels: Tensor,
    image_size: Sequence[int],
    max_images: int,
    seed: int,
    num_threads: int,
    device: torch.device,
) -> LabeledCrops:
    """Read central crops of a keyed choice of images of a labelled set, equally many per class.

    Args:
        labels: int64 [N], the labels of all images of the set.
        image_size: height and width of the crops in pixels.
        max_images: maximum number of images.
        seed: seed of the choice of images.
    """
    chosen = choose_labeled(labels, min(max_images, len(labels)), seed).tolist()
    read_ids, images = [], []
    for sample, image, _ in read_samples(source, chosen, num_threads):
        if image is not None:
            read_ids.append(sample)
            images.append(resized_center_crop(image.pixels, image_size))
    stacked = stack_images(images) if images else torch.empty(0, dtype=torch.uint8)
    return LabeledCrops(stacked.to(device), labels[read_ids], len(chosen) - len(read_ids))
