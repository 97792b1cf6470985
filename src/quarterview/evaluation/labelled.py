"""A training and a test set of labelled images: opened together, checked once, and recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError

_MAX_NAMES = 5  # in a message, for each set


@dataclass(frozen=True)
class LabelledSplit:
    """Labelled images to learn from and to be judged on, of the same classes. Made by `open_split`."""

    train: Source
    train_labels: Tensor
    """int64 [N], of every training image."""
    test: Source
    test_labels: Tensor
    """int64 [M], of every test image."""
    train_specs: tuple[str, ...] = ()
    """What the user named."""
    test_specs: tuple[str, ...] = ()
    names: tuple[str, str] = ("--train", "--test")
    """How messages call the two sets."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes 0, 1, …; None if the training set has none."""
        return tuple(self.train.classes) if self.train.classes else None

    @property
    def num_classes(self) -> int:
        """How many classes a classifier of these images tells apart: all that have a name or a number."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    @property
    def classes(self) -> int:
        """How many classes the training images have, by which chance is reckoned."""
        return len(self.train_labels.unique())

    def choose(self, count: int | None, seed: int) -> Tensor:
        """The training images whose labels may be used, see `choose_labelled`: int64 [count]."""
        return choose_labelled(self.train_labels, count, seed)

    def check_classifier(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        """Check that a classifier that exists already has the classes of these images.

        Args:
            num_classes: how many classes it tells apart.
            class_names: their names, if they have any.

        Raises:
            UserError: if a set has a label that it does not know, or classes of other names.
        """
        sets = zip(self.names, (self.train, self.test), (self.train_labels, self.test_labels), strict=True)
        for name, source, labels in sets:
            if class_names and source.classes:
                _check_same_names(name, source.classes, "the classifier", class_names)
            _check_below(name, labels, num_classes)

    def record(self, labelled: int | None = None) -> dict[str, Any]:
        """The images as results record them: specs, fingerprints and numbers of images.

        Args:
            labelled: how many of the training images have labels that may be used; by default all.
        """
        labelled = len(self.train) if labelled is None else labelled
        return {
            "train": {**describe_images(self.train_specs, self.train), "labelled": labelled},
            "test": describe_images(self.test_specs, self.test),
        }


def open_split(
    train: Sequence[str], test: Sequence[str], channels: int, names: tuple[str, str] = ("--train", "--test")
) -> LabelledSplit:
    """Open two sets of labelled images of the same classes.

    Args:
        train, test: anything that ``--data`` of pretrain takes.
        channels: how many channels the images shall have.
        names: how messages call the two sets.

    Raises:
        UserError: if an image has no label or one below 0, all training images are of one class, or the sets
            have different classes.
    """
    for name, specs in zip(names, (train, test), strict=True):
        if not specs:
            raise UserError(
                f"{name} is missing. Give labelled images: anything that --data of pretrain takes."
            )
    sources = [open_sources(specs, channels) for specs in (train, test)]
    shown = [f"{name} {' '.join(specs)}" for name, specs in zip(names, (train, test), strict=True)]
    if sources[0].classes and sources[1].classes:
        _check_same_names(shown[0], sources[0].classes, shown[1], sources[1].classes)
    labels = [read_labels(source, name) for source, name in zip(sources, shown, strict=True)]
    check_classes(labels[0], shown[0])
    split = LabelledSplit(sources[0], labels[0], sources[1], labels[1], tuple(train), tuple(test), names)
    _check_below(shown[1], split.test_labels, split.num_classes)
    return split


def read_labels(source: Source, name: str) -> Tensor:
    """The label of every image of a set: int64 [N].

    Args:
        name: the set, for messages.

    Raises:
        UserError: if an image has no label, or one below 0.
    """
    labels = torch.tensor(labels_of(source))
    if int(labels.min()) < 0:
        raise UserError(f"{name} has the label {int(labels.min())}. Give labels from 0 upward.")
    return labels


def check_classes(labels: Tensor, name: str = "the labelled images") -> None:
    """Raises UserError if all labels, int64 [N], are the same, so that there is nothing to tell apart."""
    if len(labels.unique()) < 2:
        raise UserError(f"{name} has images of one class only. Give images of two classes or more.")


def describe_images(specs: Sequence[str], source: Source) -> dict[str, Any]:
    """One set of images as results record it."""
    return {"specs": list(specs), "fingerprint": source.fingerprint(), "images": len(source)}


def choose_labelled(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Choose images whose labels may be used, equally many of each class as far as there are.

    More of them contain fewer of them, under the same seed.

    Args:
        labels: int64 [N].
        count: how many; None means all.

    Returns:
        int64 [count], the places of the chosen images, rising.

    Raises:
        UserError: if there are not so many.
    """
    if count is None:
        return torch.arange(len(labels))
    if count > len(labels):
        raise UserError(f"--labels {count} is more than there are. Give at most {len(labels)}.")
    order = rng.permute(seed, "labels", 0, torch.arange(len(labels)), len(labels))
    place = torch.empty(len(labels), dtype=torch.int64)  # of each image among those of its class
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)][:count].sort().values


def _check_below(name: str, labels: Tensor, num_classes: int) -> None:
    if int(labels.max()) >= num_classes:
        raise UserError(
            f"{name} has the label {int(labels.max())}, and there are {num_classes} classes. Give labels "
            f"from 0 to {num_classes - 1}."
        )


def _check_same_names(one: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> None:
    """Raises UserError, naming both sets and the classes that differ, unless label means the same in both."""
    if list(ours) == list(theirs):
        return
    alone = [
        f"{_brief(missing)} only in {name}"
        for name, has, lacks in ((one, ours, theirs), (other, theirs, ours))
        if (missing := [each for each in has if each not in set(lacks)])
    ]
    if not alone:  # equal names in another order, or one of them twice
        pairs = list(zip_longest(ours, theirs))
        place = next(i for i, (mine, its) in enumerate(pairs) if mine != its)
        alone = [f"class {place} is {pairs[place][0]!r} in {one} and {pairs[place][1]!r} in {other}"]
    raise UserError(
        f"{one} and {other} have different classes: {'; '.join(alone)}. Give two sets of the same classes."
    )


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MAX_NAMES]))
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
