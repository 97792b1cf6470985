"""Evaluators of the training loop, and that they do not change the run."""

import io
import os
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import quarterview as qv
from quarterview import cli
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import OnlineProbeConfig
from quarterview.evaluation.features import make_encoder
from quarterview.evaluation.knn import TEMPERATURE
from quarterview.evaluation.labelled import choose_labeled, read_labels
from quarterview.evaluation.online import is_probe_due, make_probe_evaluators, read_labeled_crops
from quarterview.models.create import create_model
from quarterview.recipes import read_pretrain_recipe
from quarterview.training import checkpoint
from quarterview.training.metric_writers import read_metrics
from quarterview.training.trainer import Trainer

CLOCK = ("images_per_s", "data_wait")
CPU = torch.device("cpu")
PROBE = {
    "probe_train": ("shapes:60:size=16:seed=1",),
    "probe_test": ("shapes:50:size=16:seed=2",),
    "probe_labels": 40,
    "probe_k": 5,
}


def tiny(out, **changes):
    values = {
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "lr": 1e-3, "batch_size": 8},
        **{"data": ("shapes:40:size=16",), "workers": 0, "holdout": 0, "steps": 12, "device": "cpu"},
        **{"log_every": 1, "eval_every": 2, "checkpoint_every": 100},
    }
    return qv.PretrainConfig.from_flags(**{**values, **changes})


def rows(folder, without=()):
    return [{k: v for k, v in row.items() if k not in (*CLOCK, *without)} for row in read_metrics(folder)]


def probed(folder):
    return [row["step"] for row in read_metrics(folder) if "knn_accuracy" in row]


def tensors(folder):
    named = checkpoint.load(checkpoint.find_newest(folder / "checkpoints")).tensors
    return {f"{kind} {name}": tensor for kind, many in named.items() for name, tensor in many.items()}


def test_a_run_with_a_probe_is_identical(tmp_path):
    changes = {"holdout": 8, "eval_every": 5}
    qv.pretrain(tiny(tmp_path / "plain", **changes))
    qv.pretrain(tiny(tmp_path / "probed", **changes, **PROBE))
    first, second = tensors(tmp_path / "plain"), tensors(tmp_path / "probed")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert rows(tmp_path / "plain") == rows(tmp_path / "probed", without=["knn_accuracy"])
    assert probed(tmp_path / "probed") == [5, 10, 12]
    assert probed(tmp_path / "plain") == []


def test_a_resumed_run_is_probed_at_the_same_steps(tmp_path, monkeypatch):
    changes = {**PROBE, "probe_every": 0.7}  # epochs of 5 updates: due at 3.5, 7 and 10.5
    qv.pretrain(tiny(tmp_path / "whole", **changes))
    assert probed(tmp_path / "whole") == [4, 8, 12]
    original, stops = Trainer._run_update, {3, 7}

    def update(self, batch):
        original(self, batch)
        if self.step in stops:
            stops.discard(self.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_run_update", update)
    for status in ("SIGTERM", "SIGTERM", "complete"):
        assert qv.pretrain(tiny(tmp_path / "parts", **changes)).status == status
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    first, second = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_a_probe_may_be_added_when_a_run_is_resumed(tmp_path, monkeypatch):
    original = Trainer._run_update

    def update(self, batch):
        original(self, batch)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_run_update", update)
    qv.pretrain(tiny(tmp_path))
    monkeypatch.undo()
    assert qv.pretrain(tiny(tmp_path, **PROBE)).status == "complete"
    assert probed(tmp_path) == [8, 10, 12]


def test_the_accuracy_equals_that_of_scikit_learn_on_the_final_model(tmp_path):
    qv.pretrain(tiny(tmp_path, **PROBE))
    encode = make_encoder(qv.load(tmp_path), "mean")
    features, labels = [], []
    for spec in (*PROBE["probe_train"], *PROBE["probe_test"]):
        source = open_source(spec, 3)
        all_labels = torch.tensor([source.label(i) for i in range(len(source))])
        chosen = choose_labeled(all_labels, 40, seed=0).tolist()
        images = to_float(torch.stack([source.image(i).pixels for i in chosen]))
        with torch.no_grad():
            features.append(encode(images).double().numpy())
        labels.append(all_labels[chosen].numpy())
    reference = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(features[0], labels[0])
    expected = reference.score(features[1], labels[1])
    assert read_metrics(tmp_path)[-1]["knn_accuracy"] == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 7), st.fractions(Fraction(1, 3), 30), st.integers(1, 90))
def test_a_probe_is_due_at_the_first_validation_of_each_period(validation, every, last):
    validations = sorted({*range(validation, last + 1, validation), last})
    for before, step in zip([0, *validations], validations, strict=False):
        periods = step // every - before // every  # exact
        expected = periods > 0 or step == last
        assert is_probe_due(step, float(every), validation, last) == expected
        assert is_probe_due(step, None, validation, last)


# ---------------------------------------------------------------------- labelled images


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def labelled_folder(folder, count, seed):
    """Write images of several sizes in two classes; the second image of each class is unreadable."""
    generator = np.random.default_rng(seed)
    for name in ("bright", "dark"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            low, high = (128, 256) if name == "bright" else (0, 128)
            data = png(generator.integers(low, high, (16 + i, 20, 3), np.uint8))
            (folder / name / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 1 else data)
    return folder


def test_crops_are_uint8_and_unreadable_images_are_left_out(tmp_path):
    source = open_source(str(labelled_folder(tmp_path / "x", 6, 0)), 3)
    labels = read_labels(source, "x")
    crops = read_labeled_crops(source, labels, (16, 16), 100, 0, 2, CPU)
    assert crops.images.shape == (10, 3, 16, 16)
    assert crops.images.dtype == torch.uint8
    assert crops.unreadable == 2
    bright = crops.images.float().flatten(1).mean(1) > 128
    assert torch.equal(crops.labels == 0, bright)  # labels stay with their images
    few = read_labeled_crops(source, labels, (16, 16), 4, 0, 2, CPU)
    assert len(few.labels) == len(few.images) == 4 - few.unreadable


def test_images_of_more_than_8_bits_stay_float(tmp_path):
    values = np.random.default_rng(0).random((12, 8, 8, 5), np.float32)
    np.savez(tmp_path / "x.npz", images=values, labels=np.arange(12) % 3)
    source = open_source(str(tmp_path / "x.npz"), 5)
    crops = read_labeled_crops(source, read_labels(source, "x"), (8, 8), 6, 0, 1, CPU)
    assert crops.images.shape == (6, 5, 8, 8)
    assert crops.images.dtype == torch.float32
    assert crops.labels.bincount().tolist() == [2, 2, 2]


def make_evaluators(train, test, k=3):
    config = OnlineProbeConfig(probe_train=(str(train),), probe_test=(str(test),), probe_k=k)
    model = create_model(
        "mae_vit_32x1x2_patch4", image_size=16, decoder_width=16, decoder_depth=1, decoder_heads=2
    ).eval()
    return make_probe_evaluators(model, "mean", config, 0, lambda step: step != 7, 1)


def test_unreadable_images_are_reported(tmp_path, caplog):
    labelled_folder(tmp_path / "a", 6, 0)
    labelled_folder(tmp_path / "b", 5, 1)
    (evaluator,) = make_evaluators(tmp_path / "a", tmp_path / "b")
    assert "4 images of the probe cannot be read. They are left out." in caplog.text
    with torch.no_grad():
        assert evaluator(step=1)["knn_accuracy"] == 1.0  # any encoder separates bright from dark images
        assert evaluator(step=7) == {}


def test_invalid_probe_images_are_refused(tmp_path):
    labelled_folder(tmp_path / "a", 4, 0)
    labelled_folder(tmp_path / "b", 4, 1)
    (tmp_path / "b" / "dark").rename(tmp_path / "b" / "night")
    np.save(tmp_path / "x.npy", np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="different classes"):
        make_evaluators(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="the same images"):
        make_evaluators("shapes:20:size=16", "shapes:20:size=16")
    with pytest.raises(UserError, match="no labels"):
        make_evaluators(tmp_path / "x.npy", "shapes:20:size=16")
    with pytest.raises(UserError, match="6 images of --probe-train"):
        make_evaluators(tmp_path / "a", labelled_folder(tmp_path / "c", 4, 2), k=7)


@pytest.mark.parametrize(
    "values",
    [
        {"probe_train": ("a",)},
        {"probe_test": ("a",)},
        {"probe_every": 0.0},
        {"probe_every": "often"},
        {"probe_k": 0},
        {"probe_k": 21, "probe_labels": 20},
        {"probe_labels": 2.5},
    ],
)
def test_invalid_settings_are_refused(values):
    with pytest.raises(UserError, match=f"--{next(iter(values)).replace('_', '-')}.* Give"):
        OnlineProbeConfig(**values)


def test_every_setting_is_a_flag_and_a_yaml_key(tmp_path):
    flags = ["--probe-train", "a", "b", "--probe-test", "c", "--probe-every", "2.5", "--probe-k", "7"]
    _, config, _ = cli.parse(["pretrain", "--data", "shapes", "--out", "x", *flags])
    expected = OnlineProbeConfig(probe_train=("a", "b"), probe_test=("c",), probe_every=2.5, probe_k=7)
    assert config.probe == expected
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert read_pretrain_recipe(str(tmp_path / "c.yaml")).probe == expected
    assert OnlineProbeConfig(probe_train="a", probe_test=["c"]).probe_train == ("a",)
