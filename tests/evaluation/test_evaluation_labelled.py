"""Labelled training and test sets: checks, choice of images, and description."""

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.errors import UserError
from quarterview.evaluation.labelled import choose_labeled, open_split, read_labels


def folder(path, *classes):
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path / name / f"{i}.png")
    return (str(path),)


def arrays(path, labels):
    np.savez(path, images=np.zeros((len(labels), 8, 8, 3), np.uint8), labels=np.array(labels))
    return (str(path),)


def test_a_split_has_classes_and_a_description(tmp_path):
    train, test = folder(tmp_path / "a", "cat", "dog"), folder(tmp_path / "b", "cat", "dog")
    split = open_split(train, test, 3)
    assert (split.num_classes, split.num_train_classes, split.class_names) == (2, 2, ("cat", "dog"))
    assert split.train_labels.tolist() == split.test_labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(split.choose_labeled(2, 5), choose_labeled(split.train_labels, 2, 5))
    fingerprints = [source.fingerprint() for source in (split.train, split.test)]
    assert split.describe(3) == {
        "train": {"specs": list(train), "fingerprint": fingerprints[0], "images": 4, "labelled": 3},
        "test": {"specs": list(test), "fingerprint": fingerprints[1], "images": 4},
    }
    assert split.describe()["train"]["labelled"] == 4


def test_classes_without_names_are_counted_by_label(tmp_path):
    split = open_split(arrays(tmp_path / "a.npz", [0, 3, 3]), arrays(tmp_path / "b.npz", [1, 5]), 3)
    assert (split.num_classes, split.num_train_classes, split.class_names) == (6, 2, None)


def test_different_classes_are_refused_with_their_names_and_sets(tmp_path):
    cats = folder(tmp_path / "cats", "cat", "dog", "fox")
    for other, message in (
        (("cat", "emu"), r"'dog', 'fox' only in --train .*cats; 'emu' only in --test .*other"),
        (("cat", "dog"), r"'fox' only in --train .*cats\."),
        (tuple("abcdefgh"), r"'a', 'b', 'c', 'd', 'e' and 3 more only in --test"),
    ):
        test = folder(tmp_path / f"other{len(other)}{other[1]}", *other)
        with pytest.raises(UserError, match=f"have different classes: .*{message}"):
            open_split(cats, test, 3)
    with pytest.raises(UserError, match=r"--probe-train .* and --probe-test .* have different classes"):
        open_split(cats, test, 3, ("--probe-train", "--probe-test"))


def test_labels_that_do_not_fit_a_classifier_are_refused(tmp_path):
    good = arrays(tmp_path / "good.npz", [0, 1, 2])
    with pytest.raises(UserError, match=r"--train .*one.npz has images of one class only"):
        open_split(arrays(tmp_path / "one.npz", [3, 3]), good, 3)
    for train, test, message in (
        (
            folder(tmp_path / "named", "cat", "dog"),
            good,
            r"--test .* has the label 2, but there are 2 classes",
        ),
        ((), good, "--train is missing"),
        (good, (), "--test is missing"),
    ):
        with pytest.raises(UserError, match=message):
            open_split(train, test, 3)
    np.save(tmp_path / "none.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="no labels"):
        open_split(good, (str(tmp_path / "none.npy"),), 3)


def test_negative_labels_are_refused():
    class Negative:
        classes, __len__, label = None, lambda self: 3, lambda self, i: i - 1

    with pytest.raises(UserError, match="--train a has the label -1"):
        read_labels(Negative(), "--train a")


def test_an_existing_classifier_must_have_the_same_classes(tmp_path):
    train, test = folder(tmp_path / "a", "cat", "dog"), folder(tmp_path / "b", "cat", "dog")
    named = open_split(train, test, 3)
    named.check_classifier(2, ("cat", "dog"))
    named.check_classifier(3)
    with pytest.raises(UserError, match=r"'dog' only in --train; 'emu' only in the classifier"):
        named.check_classifier(2, ("cat", "emu"))
    with pytest.raises(UserError, match=r"class 0 is 'cat' in --train and 'dog' in the classifier"):
        named.check_classifier(2, ("dog", "cat"))
    numbered = open_split(arrays(tmp_path / "a.npz", [0, 1]), arrays(tmp_path / "b.npz", [0, 4]), 3)
    with pytest.raises(UserError, match=r"--test has the label 4, but there are 3 classes"):
        numbered.check_classifier(3)
    numbered.check_classifier(5, tuple("abcde"))


@pytest.mark.parametrize("count", [10, 25, 60, None])
def test_labelled_images_are_balanced_and_keyed(count):
    labels = torch.arange(100) % 5
    chosen = choose_labeled(labels, count, seed=3)
    assert len(chosen.unique()) == len(chosen) == (count or 100)
    per_class = labels[chosen].bincount()
    assert per_class.max() - per_class.min() <= 1
    assert torch.equal(chosen, choose_labeled(labels, count, seed=3))
    if count is not None:
        assert not torch.equal(chosen, choose_labeled(labels, count, seed=4))
        larger = choose_labeled(labels, count + 10, seed=3)
        assert set(chosen.tolist()) < set(larger.tolist())  # a larger choice contains a smaller one


def test_more_labels_than_images_is_an_error():
    with pytest.raises(UserError, match=r"--labels 5 is more than the 4 images\. Give at most 4"):
        choose_labeled(torch.zeros(4, dtype=torch.int64), 5, 0)
