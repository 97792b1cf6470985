"""What is watched while a run trains: hooks that the loop calls at every validation.

They look at images that are not trained on, at the same ones every time and with masks that never
change, and draw from no generator: a run is bit for bit the same with and without them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quarterview.data.loader import Batch, Loader, central, stack
from quarterview.data.reading import read_many
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.data.transforms.crop import to_float
from quarterview.errors import UserError, check_types
from quarterview.evaluation.features import Backbone, FeatureKind, choose_labelled, encoder_features
from quarterview.evaluation.knn import knn_predict
from quarterview.evaluation.panel import draw_panel
from quarterview.methods.base import Objective
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.training.logging import Journal
from quarterview.training.trainer import Hook

_PROBED_AT_ONCE = 256
_ROUNDING = 1e-9


# ---------------------------------------------------------------------- held-out images


def held_out_hooks(objective: Objective, loader: Loader, folder: Path, micro_batch: int) -> list[Hook]:
    """The validation loss and, of masked autoencoders whose target is a picture, the panel: both on the
    held-out images with masks that never change."""
    held_out = loader.held_out()
    if held_out is None:
        return []

    def val_loss(step: int) -> dict[str, float]:
        losses = [objective(part).loss * len(part.ids) for part in held_out.split(micro_batch)]
        return {"val_loss": float(torch.stack(losses).sum() / len(held_out.ids))}

    def panel(step: int) -> dict[str, float]:
        assert isinstance(objective, MaskedAutoencoding)
        few = Batch(held_out.images[:8], held_out.ids[:8], held_out.epochs[:8])
        noise = objective.noise(few.epochs, few.ids)[:, 0]
        path = folder / "samples" / f"step-{step:08d}.png"
        draw_panel(objective.model, few.images, noise, path, f"step {step}")
        return {}

    drawn = isinstance(objective, MaskedAutoencoding) and objective.model.config.predicts_pictures
    return [val_loss, panel] if drawn else [val_loss]


# ---------------------------------------------------------------------- labelled images


@dataclass(frozen=True)
class OnlineProbeConfig:
    """Labelled images that show, while a run trains, what its features are worth."""

    probe_train: tuple[str, ...] = ()
    """Labelled images, named as in --data, whose labels a k-nearest-neighbour probe reads at validations, for
    the column knn_accuracy; off by default. Nothing is trained on them."""
    probe_test: tuple[str, ...] = ()
    """Labelled images that this probe classifies: other ones."""
    probe_every: float | None = None
    """Epochs from one probe to the next, which waits for a validation; by default every validation."""
    probe_labels: int = 1000
    """At most so many images of probe_train, and of probe_test; equally many a class. They are held on the
    device."""
    probe_k: int = 20
    """How many neighbours vote in this probe, each by exp(cosine / 0.07)."""

    def __post_init__(self) -> None:
        for name in ("probe_train", "probe_test"):
            given = getattr(self, name)
            object.__setattr__(
                self, name, (given,) if isinstance(given, str) else tuple(str(spec) for spec in given)
            )
        check_types(self, OnlineProbeConfig)
        if bool(self.probe_train) != bool(self.probe_test):
            raise UserError(
                f"probe_train {self.probe_train} and probe_test {self.probe_test}; accepted: both or neither"
            )
        if self.probe_every is not None and not self.probe_every > 0:
            raise UserError(f"probe_every {self.probe_every}; accepted: a number above 0")
        if not 1 <= self.probe_k <= self.probe_labels:
            raise UserError(
                f"{self.probe_k} neighbours among {self.probe_labels} labels; accepted: 1 to that many"
            )


def probe_hooks(
    model: Backbone,
    kind: FeatureKind,
    config: OnlineProbeConfig,
    seed: int,
    due: Callable[[int], bool],
    threads: int,
    journal: Journal,
) -> list[Hook]:
    """The accuracy of a k-nearest-neighbour vote on features of a kind; nothing if it is not asked for.

    Args:
        seed: of the choice of labelled images.
        due: whether to probe at the validation after so many updates.
        threads: how many images are read at a time, once, at the start.
        journal: told how many could not be read.

    Raises:
        UserError: if the images have no labels, are too few for the vote, have other classes in
            probe_test than in probe_train, or are the same in both.
    """
    if not config.probe_train:
        return []
    device = next(model.parameters()).device
    train, test = (
        read_labelled(source, model.config.image_size, config.probe_labels, seed, threads, device)
        for source in _labelled_sources(config, model.config.in_chans)
    )
    unreadable = train.unreadable + test.unreadable
    if unreadable:
        journal.warn(f"{unreadable} images of the probe cannot be read and are left out of it")
    if len(train.labels) < config.probe_k or not len(test.labels):
        raise UserError(
            f"{len(train.labels)} images of probe_train and {len(test.labels)} of probe_test can be read; "
            f"accepted: at least the {config.probe_k} of probe_k, and 1"
        )
    if torch.equal(train.images, test.images):  # fingerprints go by names and sizes, which two sets may share
        raise UserError(
            f"probe_train and probe_test are the same images, {config.probe_test}, so that each would be its "
            "own neighbour; accepted: two sets"
        )
    encode = encoder_features(model, kind)

    def features(images: Tensor) -> Tensor:
        parts = images.split(_PROBED_AT_ONCE)
        return torch.cat([encode(to_float(part)).float().cpu() for part in parts])

    def knn_accuracy(step: int) -> dict[str, float]:
        if not due(step):
            return {}
        predicted = knn_predict(features(train.images), train.labels, features(test.images), config.probe_k)
        return {"knn_accuracy": float((predicted == test.labels).float().mean())}

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
    source: Source, image_size: Sequence[int], most: int, seed: int, threads: int, device: torch.device
) -> Labelled:
    """Central crops of at most so many images of a labelled set, equally many a class.

    Raises:
        UserError: if an image has no label.
    """
    labels = torch.tensor(labels_of(source))
    chosen = choose_labelled(labels, min(most, len(labels)), seed).tolist()
    kept, images = [], []
    for sample, picture, _ in read_many(source, chosen, threads):
        if picture is not None:
            kept.append(sample)
            images.append(central(picture.pixels, image_size))
    stacked = stack(images) if images else torch.empty(0, dtype=torch.uint8)
    return Labelled(stacked.to(device), labels[kept], len(chosen) - len(kept))


def _labelled_sources(config: OnlineProbeConfig, channels: int) -> tuple[Source, Source]:
    train, test = (open_sources(specs, channels) for specs in (config.probe_train, config.probe_test))
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError(
            f"probe_train {config.probe_train} and probe_test {config.probe_test} have different classes; "
            "accepted: the same"
        )
    return train, test
