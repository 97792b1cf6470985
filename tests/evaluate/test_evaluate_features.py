"""Features, k-NN and the linear probe against scikit-learn, timm and closed forms."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from quarterview.data.open import open_source
from quarterview.errors import UserError
from quarterview.evaluate import features
from quarterview.evaluate.features import ProbeConfig, ProbeData, choose_labelled, extract, pixel_features
from quarterview.evaluate.knn import TEMPERATURE, knn, knn_predict
from quarterview.evaluate.linear import choose_strength, linear, linear_accuracy
from quarterview.exchange.weights import metadata
from quarterview.model.mae import create_model
from quarterview.train import checkpoint
from quarterview.train.journal import Journal


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(
        "mae_vit_32x2x2_patch4",
        image_size=16,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.25),
    ).eval()


@pytest.fixture
def run(model, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, metadata(model.config))
    return tmp_path / "run"


def test_features_equal_timms_forward_with_the_same_weights(model):
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0, norm_layer=None
    )
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    vit.load_state_dict(own)
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    images = torch.rand(5, 3, 16, 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.config.mean, model.config.std))
    with torch.no_grad():
        tokens = vit.eval().forward_features((images - mean) / std)
        torch.testing.assert_close(
            features.encoder_features(model, "cls")(images), tokens[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            features.encoder_features(model, "mean")(images), tokens[:, 1:].mean(1), atol=1e-5, rtol=0
        )


def test_the_encoder_is_untouched_by_feature_extraction(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_source("shapes:40", 3)
    encoders = {"ours": features.encoder_features(model, "mean")}
    first, ids = extract(encoders, source, range(40), model.config, torch.device("cpu"))
    second, _ = extract(encoders, source, range(40), model.config, torch.device("cpu"), batch_size=7)
    assert ids == list(range(40))
    torch.testing.assert_close(first["ours"], second["ours"], atol=2e-2, rtol=0)  # bf16, other batches
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_broken_images_are_left_out(model, tmp_path):
    for i in range(6):
        image = Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        data = stream.getvalue()
        (tmp_path / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 3 else data)
    source = open_source(str(tmp_path), 3)
    found, kept = extract({"raw": pixel_features}, source, range(6), model.config, torch.device("cpu"))
    assert kept == [0, 1, 2, 4, 5]
    torch.testing.assert_close(found["raw"][:, 0] * 255, torch.tensor([0.0, 40, 80, 160, 200]))


def test_pixels_are_shrunk_to_the_stated_side():
    assert pixel_features(torch.rand(2, 3, 16, 16)).shape == (2, 3 * 16 * 16)
    assert pixel_features(torch.rand(2, 3, 64, 128)).shape == (2, 3 * 16 * 32)


@pytest.mark.parametrize("count", [10, 25, 60, None])
def test_labelled_images_are_balanced_and_keyed(count):
    labels = torch.arange(100) % 5
    chosen = choose_labelled(labels, count, seed=3)
    assert len(chosen.unique()) == len(chosen) == (count or 100)
    per_class = labels[chosen].bincount()
    assert per_class.max() - per_class.min() <= 1
    assert torch.equal(chosen, choose_labelled(labels, count, seed=3))
    if count is not None:
        assert not torch.equal(chosen, choose_labelled(labels, count, seed=4))
        larger = choose_labelled(labels, count + 10, seed=3)
        assert set(chosen.tolist()) < set(larger.tolist())  # more labels contain fewer


def test_more_labels_than_images_is_an_error():
    with pytest.raises(UserError, match="there are 4"):
        choose_labelled(torch.zeros(4, dtype=torch.int64), 5, 0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_scikit_learns(k):
    generator = torch.Generator().manual_seed(k)
    train, test = torch.randn(300, 16, generator=generator), torch.randn(2100, 16, generator=generator)
    labels = torch.randint(0, 7, (300,), generator=generator)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train.double().numpy(), labels.numpy())
    expected = reference.predict(test.double().numpy())
    agreement = (knn_predict(train, labels, test, k).numpy() == expected).mean()
    assert agreement > 0.999  # float32 against float64 may break a tie otherwise


def test_linear_probe_separates_what_can_be_separated():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    separable = torch.nn.functional.one_hot(labels, 4) * 3.0 + 0.3 * torch.randn(400, 4, generator=generator)
    noise = torch.randn(400, 4, generator=generator)
    data = ProbeData(
        {"good": separable[:200], "noise": noise[:200]},
        labels[:200],
        {"good": separable[200:], "noise": noise[200:]},
        labels[200:],
        4,
        0,
    )
    assert linear_accuracy(data, "good", 0) > 0.99
    assert linear_accuracy(data, "noise", 0) < 0.4


def test_strength_is_chosen_even_from_few_labels():
    features_, labels = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
    assert choose_strength(features_, labels, 0) > 0
    many = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    assert choose_strength(many, np.array([0] * 29 + [1]), 0) > 0  # a class of one cannot be stratified


def test_probes_show_a_table_with_baselines(run, capsys):
    config = ProbeConfig(run=str(run), train=("shapes:120:seed=1",), test=("shapes:60:seed=2",), device="cpu")
    found = knn(config, 5, Journal())
    assert list(found) == ["raw pixels", "random encoder", "this model"]
    assert all(0 <= accuracy <= 1 for accuracy in found.values())
    assert linear(config, Journal()).keys() == found.keys()
    shown = capsys.readouterr().out
    assert "random encoder" in shown
    assert "60 test images" in shown


def test_probes_refuse_what_cannot_be_compared(run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="no labels"):
        knn(ProbeConfig(str(run), (str(tmp_path / "x.npy"),), ("shapes:20",)), 3, Journal(quiet=True))
    with pytest.raises(UserError, match="neighbours"):
        knn(ProbeConfig(str(run), ("shapes:20",), ("shapes:20",)), 21, Journal(quiet=True))
    with pytest.raises(UserError, match="no moving average"):
        knn(ProbeConfig(str(run), ("shapes:20",), ("shapes:20",), ema=True), 3, Journal(quiet=True))
