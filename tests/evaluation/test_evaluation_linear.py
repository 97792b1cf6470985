"""The linear probes: the fast protocol on separable and random features, and the protocol of the paper."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from quarterview.commands.config import LinearConfig
from quarterview.commands.linear import evaluate_linear
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import crop_resize, draw_random_crops, normalize, to_float
from quarterview.errors import UserError
from quarterview.evaluation import linear_paper, probe
from quarterview.evaluation.config import LinearClassifierConfig
from quarterview.evaluation.features import Features, compute_pixel_features, extract_features
from quarterview.evaluation.labelled import LabeledSplit
from quarterview.evaluation.linear import C_VALUES, LogisticRegression, choose_c
from quarterview.evaluation.linear_paper import (
    TrainingImages,
    encode_random_crops,
    make_head,
    make_schedule,
    predict_with_head,
    train_heads,
)
from quarterview.evaluation.probe import Probe, open_probe
from quarterview.models.create import create_model
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import load, make_metadata

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": SIZE}
    model = create_model("mae_vit_32x2x2_patch8", **small, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config))
    return tmp_path / "run"


def config(run, **changes):
    data = {"train": ("shapes:100:seed=1:size=16",), "test": ("shapes:50:seed=2:size=16",)}
    return LinearConfig.from_flags(**{"run": str(run), **data, "device": "cpu", **changes})


def opened(run, **changes):
    settings = config(run, **changes)
    return open_probe(settings.images, settings.probe, default_pool="cls")


# ---------------------------------------------------------------------- fast protocol


def test_the_linear_probe_separates_separable_features_only():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    separable = nn.functional.one_hot(labels, 4) * 3.0 + 0.3 * torch.randn(400, 4, generator=generator)
    noise = torch.randn(400, 4, generator=generator)
    good, bad = (Features(x[:200], labels[:200], x[200:], labels[200:]) for x in (separable, noise))
    evaluate = LogisticRegression(0)
    assert dict(evaluate(good))["accuracy"] > 0.99
    metrics = dict(evaluate(bad))
    accuracy = metrics["accuracy"]
    assert accuracy < 0.4
    assert metrics["strength"] in C_VALUES
    assert metrics["standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200))
    predicted = evaluate.predict(bad.train, bad.train_labels, bad.test)
    assert accuracy == float((predicted == bad.test_labels).double().mean())
    with pytest.raises(UserError, match="one class"):
        evaluate.predict(bad.train, torch.zeros(200, dtype=torch.int64), bad.test)


def test_c_is_chosen_even_from_few_labels():
    few, labels = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    assert choose_c(few, labels, 0) > 0
    many = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    assert choose_c(many, np.array([0] * 29 + [1]), 0) > 0  # a class of one image cannot be stratified


def test_the_fast_probe_shows_a_table_and_records_the_result(run, capsys):
    accuracies = evaluate_linear(config(run), Console(), ["quarterview", "linear"])
    assert list(accuracies) == ["raw pixels", "random encoder", "this model"]
    assert "50 test images" in " ".join(capsys.readouterr().out.split())
    record = json.loads((run / "results" / "linear.json").read_text())
    assert record["settings"]["features"] == "mean"
    assert record["settings"]["seed"] == 0
    rows = record["results"]["accuracies"]
    assert {name: row["accuracy"] for name, row in rows.items()} == accuracies
    assert all(row["strength"] in C_VALUES for row in rows.values())


def test_images_of_one_class_are_refused(run, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 16, 16, 3), np.uint8), labels=np.zeros(20, np.int64))
    one_class = config(run, train=(str(tmp_path / "x.npz"),))
    one_label = config(run, labels=1)  # one class, although the images have ten
    for settings in (one_class, one_label):
        for protocol in ("fast", "paper"):
            with pytest.raises(UserError, match="one class"):
                evaluate_linear(settings.with_flags(protocol=protocol), Console())


# ---------------------------------------------------------------------- protocol of the paper


def test_the_defaults_are_those_of_the_paper():
    schedule, batch = make_schedule(LinearClassifierConfig(), 1_281_167)
    assert batch == 16384
    assert schedule.peak_lr == pytest.approx(6.4)
    assert schedule.total_steps == math.ceil(90 * 1_281_167 / 16384)
    assert schedule.warmup_steps == round(10 * 1_281_167 / 16384)
    assert schedule.lr(0) == 0
    assert schedule.lr(schedule.warmup_steps) == pytest.approx(6.4)
    assert schedule.lr(schedule.total_steps - 1) < 1e-4


def test_a_batch_larger_than_the_set_is_reduced_with_a_warning(caplog):
    schedule, batch = make_schedule(LinearClassifierConfig(), 1000)
    assert (batch, schedule.total_steps, schedule.warmup_steps) == (1000, 90, 10)
    assert schedule.peak_lr == pytest.approx(0.1 * 1000 / 256)
    assert "--batch-size 16384 is more than the 1000 labelled images" in caplog.text
    assert "0.390625" in caplog.text


@pytest.mark.parametrize(
    "flags", [{"epochs": 0}, {"warmup_epochs": -1.0}, {"batch_size": 1}, {"blr": 0.0}, {"blr": "much"}]
)
def test_invalid_settings_are_refused(flags):
    with pytest.raises(UserError, match=f"--{next(iter(flags)).replace('_', '-')}"):
        LinearClassifierConfig(**flags)


def test_the_head_is_that_of_the_paper():
    head = make_head(32, 10, seed=0)
    norm, last = head
    assert isinstance(norm, nn.BatchNorm1d)
    assert not norm.affine
    assert norm.eps == 1e-6
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]
    assert abs(float(make_head(512, 100, 1)[1].weight.detach().std()) - 0.01) < 2e-4
    assert not last.bias.any()
    assert torch.equal(last.weight, make_head(32, 10, seed=0)[1].weight)
    assert not torch.equal(last.weight, make_head(32, 10, seed=1)[1].weight)
    x = 5 + 3 * torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    centred = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(head(x), centred @ last.weight.T, atol=1e-5, rtol=0)


def test_training_equals_the_formula_step_by_step(run):
    """BatchNorm, softmax regression and LARS in NumPy give the same weights on the same features."""
    probe = opened(run, baselines=False)
    images = TrainingImages(probe.split.train, range(100), CPU)
    labels = probe.split.train_labels
    paper = LinearClassifierConfig(epochs=3, warmup_epochs=1.0, batch_size=40, blr=20.0)
    schedule, batch = make_schedule(paper, 100)
    logged = []
    head = train_heads(probe, images, labels, schedule, batch, logged.append)["this model"]
    assert [row["step"] for row in logged] == list(range(1, schedule.total_steps + 1))
    assert [row["lr"] for row in logged] == [schedule.lr(step) for step in range(schedule.total_steps)]
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert schedule.total_steps == math.ceil(3 * 100 / 40)
    stream, initial = SampleStream(100, 0, 0), make_head(32, 10, 0)
    w, b = initial[1].weight.detach().double().numpy().copy(), np.zeros(10)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for step in range(schedule.total_steps):
        epochs, indices = stream.get_samples(torch.arange(step * batch, (step + 1) * batch))
        encoded = encode_random_crops(probe.encoders, images, epochs, indices, (SIZE, SIZE), 0)
        x = encoded["this model"].double().numpy()
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
        logits = x @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(batch), labels[indices].numpy()] -= 1
        gw, gb = p.T @ x / batch, p.mean(0)
        vw = 0.9 * vw + gw * 0.001 * np.linalg.norm(w) / np.linalg.norm(gw)
        vb = 0.9 * vb + gb
        w, b = w - schedule.lr(step) * vw, b - schedule.lr(step) * vb
    moved = np.abs(w - initial[1].weight.detach().numpy()).max()
    assert moved > 3e-4  # of weights with an initial std of 0.01
    np.testing.assert_allclose(head[1].weight.detach().numpy(), w, atol=1e-4 * moved + 1e-6)
    np.testing.assert_allclose(head[1].bias.detach().numpy(), b, atol=1e-4)
    assert not head.training


def test_crops_are_keyed_by_seed_epoch_and_image(run):
    source = opened(run, baselines=False).split.train
    images = TrainingImages(source, [7, 3, 50, 51, 52], CPU)
    indices, epochs = torch.tensor([1, 0, 4]), torch.tensor([2, 0, 2])
    encoders = {"raw": lambda images: images.flatten(1)}
    crops = encode_random_crops(encoders, images, epochs, indices, (SIZE, SIZE), 11)["raw"]
    ids = torch.tensor([3, 7, 52])
    boxes, flips = draw_random_crops(
        11, epochs, ids, torch.full((3, 2), 16), (0.08, 1.0), single_draw=True, purpose="probe crop"
    )
    for crop, sample, box, flip in zip(crops, ids.tolist(), boxes.tolist(), flips.tolist(), strict=True):
        expected = to_float(crop_resize(source.image(sample).pixels, box, (SIZE, SIZE), flip))
        assert (crop - expected.flatten()).abs().max() < 0.03  # 8-bit values, rounded twice
    other = encode_random_crops(encoders, images, epochs + 1, indices, (SIZE, SIZE), 11)["raw"]
    assert (other != crops).any(dim=1).all()


def test_the_probe_of_the_paper_freezes_the_encoder_and_uses_the_cls_token(run, monkeypatch):
    models = []

    def recording_load(*args, **kwargs):
        models.append(load(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(probe, "load", recording_load)
    settings = config(run, labels=60, protocol="paper", epochs=4, warmup_epochs=1.0)
    accuracies = evaluate_linear(settings, Console(quiet=True), ["quarterview", "linear"])
    assert list(accuracies) == ["raw pixels", "random encoder", "this model"]
    before = load(run).state_dict()
    after = models[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in models[0].parameters())
    record = json.loads((run / "results" / "linear-paper-60.json").read_text())
    assert record["settings"]["features"] == "cls"
    assert record["settings"]["batch_size"] == 16384
    assert record["settings"]["batch_size_used"] == 60
    assert {name: row["accuracy"] for name, row in record["results"]["accuracies"].items()} == accuracies
    assert evaluate_linear(settings, Console(quiet=True)) == accuracies

    encoders = opened(run).encoders
    images = torch.rand(3, 3, SIZE, SIZE)
    tokens = models[0].encode(normalize(images, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    torch.testing.assert_close(encoders["this model"](images), tokens[:, 0])


def test_ctrl_c_stops_the_probe_without_a_result(run, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(linear_paper, "encode_random_crops", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(config(run, baselines=False, protocol="paper", epochs=2), Console(quiet=True))
    assert not (run / "results").exists()


def test_images_of_different_sizes_are_decoded_for_every_crop(run, tmp_path):
    generator = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (20 + i, 30 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (tmp_path / "photos" / "a" / "00.png").write_bytes(b"broken")
    source = open_source(str(tmp_path / "photos"), 3)
    images = TrainingImages(source, range(12), CPU)
    assert images.images is None
    assert images.ids.tolist() == list(range(1, 12))
    boxes, flips = draw_random_crops(0, 0 * images.ids, images.ids, images.sizes, single_draw=True)
    crops = images.crop(torch.tensor([4, 2]), boxes[[4, 2]], flips[[4, 2]], (8, 8))
    expected = crop_resize(source.image(5).pixels, boxes[4].tolist(), (8, 8), bool(flips[4]))
    assert torch.equal(crops[0], to_float(expected))
    photos = (str(tmp_path / "photos"),)
    settings = config(run, train=photos, test=photos, protocol="paper", epochs=1)
    accuracies = evaluate_linear(settings, Console(quiet=True))
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
    record = json.loads((run / "results" / "linear-paper.json").read_text())
    assert record["data"]["unreadable"] == 2


def test_the_probe_of_the_paper_learns():
    """Two colours, which raw pixels separate, in fewer epochs than the default."""
    source = open_source("shapes:64:size=16", 3)

    class ColoredShapes:
        classes, __len__, name = None, lambda self: 64, lambda self, i: str(i)

        def label(self, i):
            return i % 2

        def image(self, i):
            image = source.image(i)
            shift = torch.tensor([90, 0, 0] if i % 2 else [0, 0, 90], dtype=torch.uint8)[:, None, None]
            return image._replace(pixels=image.pixels // 2 + shift)

        def fingerprint(self):
            return "0" * 16

    labels = torch.arange(64) % 2
    backbone = create_model(
        "mae_vit_32x2x2_patch8", image_size=SIZE, decoder_width=16, decoder_heads=2
    ).config
    encoders = {"raw pixels": compute_pixel_features}
    split = LabeledSplit(ColoredShapes(), labels, ColoredShapes(), labels)
    probe = Probe(encoders, backbone, CPU, "cls", split, torch.arange(64))
    schedule, batch = make_schedule(LinearClassifierConfig(epochs=20, warmup_epochs=2.0, blr=10.0), 64)
    head = train_heads(probe, TrainingImages(ColoredShapes(), range(64), CPU), labels, schedule, batch)
    test, _ = extract_features(encoders, ColoredShapes(), range(64), backbone, CPU)
    predicted = predict_with_head(head["raw pixels"], test["raw pixels"])
    assert float((predicted == labels).double().mean()) > 0.9
