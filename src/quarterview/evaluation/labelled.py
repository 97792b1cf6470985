"""Labelled training and test sets: opening, checking and describing them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.sources.base import Source, read_all_labels
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError

_MAX_NAMES = 5  # class names per set that an error message lists


@dataclass(frozen=True)
class LabeledSplit:
    """A training and a test set of labelled images with the same classes. Created by `open_split`."""

    train: Source
    train_labels: Tensor
    """int64 [N], the labels of all training images."""
    test: Source
    test_labels: Tensor
    """int64 [M], the labels of all test images."""
    train_specs: tuple[str, ...] = ()
    """The user's specification of the training images."""
    test_specs: tuple[str, ...] = ()
    set_names: tuple[str, str] = ("--train", "--test")
    """Names of the training and the test set in messages."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of classes 0, 1, …; None if the training set has no class names."""
        return tuple(self.train.classes) if self.train.classes else None

    @property
    def num_classes(self) -> int:
        """The number of classes of a classifier: of class names or, without names, the highest label plus
        1."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1

    @property
    def num_train_classes(self) -> int:
        """The number of classes that occur in the training images; the accuracy of chance is its
        reciprocal."""
        return len(self.train_labels.unique())

    def choose_labeled(self, count: int | None, seed: int) -> Tensor:
        """Choose training images whose labels may be used, see function `choose_labeled`: int64 [count]."""
        return choose_labeled(self.train_labels, count, seed)

    def check_classifier(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        """Check that an existing classifier has the classes of these images.

        Args:
            num_classes: number of classes of the classifier.
            class_names: names of its classes, if they have names.

        Raises:
            UserError: if a set has a label that the classifier does not have, or other class names.
        """
        sets = zip(
            self.set_names, (self.train, self.test), (self.train_labels, self.test_labels), strict=True
        )
        for name, source, labels in sets:
            if class_names and source.classes:
                _check_same_classes(name, source.classes, "the classifier", class_names)
            _check_label_range(name, labels, num_classes)

    def describe(self, num_labeled: int | None = None) -> dict[str, Any]:
        """Describe both sets for a results file: specifications, fingerprints and numbers of images.

        Args:
            num_labeled: number of training images whose labels may be used; by default all.
        """
        num_labeled = len(self.train) if num_labeled is None else num_labeled
        return {
            "train": {**describe_images(self.train_specs, self.train), "labelled": num_labeled},
            "test": describe_images(self.test_specs, self.test),
        }


def open_split(
    train: Sequence[str],
    test: Sequence[str],
    channels: int,
    set_names: tuple[str, str] = ("--train", "--test"),
) -> LabeledSplit:
    """Open two sets of labelled images of the same classes.

    Args:
        train, test: anything that ``--data`` of pretrain takes.
        channels: number of channels to which the images are converted.
        set_names: names of the two sets in messages.

    Raises:
        UserError: if an image has no label or a negative label, all training images have one class, or the
            sets have different classes.
    """
    for name, specs in zip(set_names, (train, test), strict=True):
        if not specs:
            raise UserError(
                f"{name} is missing. Give labelled images: anything that --data of pretrain takes."
            )
    sources = [open_sources(specs, channels) for specs in (train, test)]
    full_names = [f"{name} {' '.join(specs)}" for name, specs in zip(set_names, (train, test), strict=True)]
    if sources[0].classes and sources[1].classes:
        _check_same_classes(full_names[0], sources[0].classes, full_names[1], sources[1].classes)
    labels = [read_labels(source, name) for source, name in zip(sources, full_names, strict=True)]
    check_classes(labels[0], full_names[0])
    split = LabeledSplit(sources[0], labels[0], sources[1], labels[1], tuple(train), tuple(test), set_names)
    _check_label_range(full_names[1], split.test_labels, split.num_classes)
    return split


def read_labels(source: Source, name: str) -> Tensor:
    """Return the label of every image of a set: int64 [N].

    Args:
        name: name of the set in messages.

    Raises:
        UserError: if an image has no label or a negative label.
    """
    labels = torch.tensor(read_all_labels(source))
    if int(labels.min()) < 0:
        raise UserError(f"{name} has the label {int(labels.min())}. Give labels from 0 upward.")
    return labels


def check_classes(labels: Tensor, name: str = "the labelled images") -> None:
    """Raise UserError if all labels, int64 [N], are the same."""
    if len(labels.unique()) < 2:
        raise UserError(f"{name} has images of one class only. Give images of two classes or more.")


def describe_images(specs: Sequence[str], source: Source) -> dict[str, Any]:
    """Describe a set of images for a results file: specifications, fingerprint and number of images."""
    return {"specs": list(specs), "fingerprint": source.fingerprint(), "images": len(source)}


def choose_labeled(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Choose images whose labels may be used, equally many per class as far as possible.

    With the same seed, a larger choice contains every smaller one.

    Args:
        labels: int64 [N].
        count: number of images; None for all.

    Returns:
        int64 [count], the indices of the chosen images, in ascending order.

    Raises:
        UserError: if there are fewer than `count` images.
    """
    if count is None:
        return torch.arange(len(labels))
    if count > len(labels):
        raise UserError(
            f"--labels {count} is more than the {len(labels)} images. Give at most {len(labels)}."
        )
    order = rng.permute(seed, "labels", 0, torch.arange(len(labels)), len(labels))
    rank = torch.empty(len(labels), dtype=torch.int64)  # position of each image within its class
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = torch.arange(len(members))
    return order[rank[order].argsort(stable=True)][:count].sort().values


def _check_label_range(name: str, labels: Tensor, num_classes: int) -> None:
    if int(labels.max()) >= num_classes:
        raise UserError(
            f"{name} has the label {int(labels.max())}, but there are {num_classes} classes. Give labels "
            f"from 0 to {num_classes - 1}."
        )


def _check_same_classes(name: str, classes: Sequence[str], other_name: str, others: Sequence[str]) -> None:
    """Raise UserError, with the classes that differ, unless both sets have the same classes in order."""
    if list(classes) == list(others):
        return
    differences = [
        f"{_shorten(missing)} only in {owner}"
        for owner, own, lacking in ((name, classes, others), (other_name, others, classes))
        if (missing := [each for each in own if each not in set(lacking)])
    ]
    if not differences:  # the same names in another order, or one of them twice
        pairs = list(zip_longest(classes, others))
        i = next(i for i, (one, other) in enumerate(pairs) if one != other)
        differences = [f"class {i} is {pairs[i][0]!r} in {name} and {pairs[i][1]!r} in {other_name}"]
    raise UserError(
        f"{name} and {other_name} have different classes: {'; '.join(differences)}. Give two sets with the "
        "same classes."
    )


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MAX_NAMES]))
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"
