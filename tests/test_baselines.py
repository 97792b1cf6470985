"""Tests of every method: exact resuming, probes, export and learning."""

from pathlib import Path

import pytest
import torch

import quarterview as qv
from quarterview.cli import parse, run
from quarterview.commands.config import LinearConfig
from quarterview.commands.linear import evaluate_linear
from quarterview.errors import UserError
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.training.metric_writers import read_metrics
from quarterview.weights.loading import load, load_autoencoder, load_tokenizer, read_config, read_weights

KINDS = ("mae", "pca", "hog", "denoising", "beit", "supervised", "simclr", "byol", "mocov3", "tokenizer")
COMPARING = ("simclr", "byol", "mocov3")


def config(out: Path, kind: str, words: Path | None = None, **changes) -> qv.PretrainConfig:
    values = {
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"lr": 1e-3, "batch_size": 16},
        **{"data": ("shapes:120:size=16",), "workers": 0, "holdout": 8, "steps": 6, "device": "cpu"},
        **{"log_every": 2, "eval_every": 3, "checkpoint_every": 3, "keep_checkpoints": 9},
    }
    if kind in ("mae", "pca", "hog", "denoising"):
        values |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    if kind == "pca":
        values |= {"target": "pca", "pca_components": 9}
    elif kind == "hog":
        values |= {"target": "hog"}
    else:
        values |= {"method": kind}
    if kind == "tokenizer":
        values |= {"codebook_size": 24, "tokenizer_width": 16, "tokenizer_depth": 1}
    if kind == "beit":
        values |= {"tokenizer": str(words)}
    if kind in COMPARING:
        values |= {"proj_hidden_dim": 48, "proj_output_dim": 16}
    return qv.PretrainConfig.from_flags(**{**values, **changes})


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """The run of a tokenizer."""
    out = tmp_path_factory.mktemp("words") / "run"
    qv.pretrain(config(out, "tokenizer"))
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words) -> Path:
    """A folder with a complete run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        qv.pretrain(config(folder / kind, kind, words))
    return folder


def tensors(path: Path) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(path)
    return {f"{kind}/{name}": t for kind, named in loaded.tensors.items() for name, t in named.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_run(runs, words, tmp_path, kind):
    half = runs / kind / "checkpoints" / "step-00000003"
    qv.pretrain(config(tmp_path / "run", kind, words, resume=str(half)))
    one, two = (tensors(path / "checkpoints" / "step-00000006") for path in (runs / kind, tmp_path / "run"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    rows = read_metrics(runs / kind)
    assert all(row["loss"] == row["loss"] and row["grad_norm"] > 0 for row in rows)
    assert any(row["val_loss"] is not None for row in rows) == (kind not in COMPARING)
    assert all(("feature_spread" in row) == (kind in COMPARING) for row in rows)
    assert any(name.startswith("objective/") for name in one) == (kind in (*COMPARING, "tokenizer"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_model_matches_its_header(runs, kind):
    out = runs / kind
    if kind == "tokenizer":
        assert load_tokenizer(out).codebook_size == 24
        with pytest.raises(UserError, match="a tokenizer, which has no features"):
            load(out)
        return
    weights = read_weights(out)
    model = load(out)
    assert weights.has_decoder == (kind in ("mae", "pca", "hog", "denoising", "beit"))
    assert isinstance(model, Classifier if kind == "supervised" else MaskedAutoencoder)
    features = model.encode(torch.zeros(2, 3, 16, 16))
    assert features.shape == (2, 17, 32)
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(out)
    if not weights.has_decoder:
        with pytest.raises(UserError, match="cannot reconstruct"):
            load_autoencoder(out)
    if kind == "supervised":
        assert read_config(out).class_names is not None


def test_the_patch_embedding_of_mocov3_is_frozen(runs):
    first, last = (tensors(runs / "mocov3" / "checkpoints" / f"step-{step:08d}") for step in (3, 6))
    name = "model/patch_embed.proj.weight"
    assert torch.equal(first[name], last[name])
    assert f"optimizer/exp_avg/{name.replace('/', '.')}" not in last
    assert not torch.equal(first["model/norm.weight"], last["model/norm.weight"])


@pytest.mark.parametrize("kind", ["pca", "hog", "beit", "simclr", "supervised"])
def test_the_encoder_is_fine_tuned_and_exported(runs, tmp_path, kind):
    images = "--train shapes:40:size=16 --test shapes:20:size=16:seed=1"
    flags = f"--out {tmp_path}/tuned --steps 2 --batch-size 8 --recipe small --workers 0 --device cpu"
    assert run(f"finetune {runs / kind} {images} {flags}".split()) == 0
    forms = ("timm", "transformers", "safetensors")
    for form in forms if kind != "supervised" else ("timm", "safetensors"):  # whose head reads the mean
        parts = ["--parts", "vit"] if form == "transformers" and kind != "simclr" else []
        assert run(["export", str(runs / kind), "--to", form, "--out", str(tmp_path / form), *parts]) == 0
        card = (tmp_path / form / "README.md").read_text()
        assert ("| decoder |" in card) == (kind in ("pca", "hog", "beit"))
    again = read_weights(tmp_path / "safetensors" / "model.safetensors")
    assert again.has_decoder == (kind in ("pca", "hog", "beit"))


def test_panels_are_drawn_for_methods_that_predict_images(runs, tmp_path):
    for kind, drawn in (("mae", True), ("pca", True), ("hog", False), ("beit", False), ("simclr", False)):
        assert any((runs / kind / "samples").glob("*.png")) == drawn
        code = run(["reconstruct", str(runs / kind), "shapes:8:size=16", "--out", str(tmp_path / "p.png")])
        assert code == (0 if drawn else 2)
        assert run(["look", str(runs / kind), "shapes:4:size=16", "--out", str(tmp_path / "l.png")]) == 0
    for kind in ("hog", "beit"):
        assert run(["doctor", str(runs / kind)]) == 2


def test_the_tokenizer_must_stay_the_same(runs, words, tmp_path):
    other = tmp_path / "other"
    qv.pretrain(config(other, "tokenizer", seed=1))
    half = runs / "beit" / "checkpoints" / "step-00000003"
    with pytest.raises(UserError, match="another tokenizer"):
        qv.pretrain(config(tmp_path / "run", "beit", other, resume=str(half)))
    coarse = tmp_path / "coarse"
    qv.pretrain(config(coarse, "tokenizer", model="mae_vit_32x2x2_patch8", steps=1))
    with pytest.raises(UserError, match="8 pixels"):
        qv.pretrain(config(tmp_path / "beit", "beit", coarse))


def test_pca_components_are_fitted_once(runs):
    three, six = (tensors(runs / "pca" / "checkpoints" / f"step-{step:08d}") for step in (3, 6))
    components = six["model/target.components"]
    assert torch.equal(three["model/target.components"], components)
    torch.testing.assert_close(components @ components.T, torch.eye(9), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "beit"}, "--method beit needs a tokenizer"),
        ({"target": "tokens"}, "--tokenizer RUN"),
        ({"tokenizer": "x"}, "--target tokens"),
        ({"method": "simclr", "accum_iter": 2}, "--method simclr, which compares the images of a batch"),
        ({"method": "byol", "parallel": "fsdp"}, "--method byol. Use --parallel ddp"),
        ({"uniformity": 0.01, "accum_iter": 2}, "--uniformity 0.01, which compares the images of a batch"),
        ({"method": "denoising", "uniformity": 0.01}, "--uniformity is not a flag of --method denoising"),
        (
            {"fused_blocks": (1,), "uniformity": 0.01},
            "--uniformity 0.01 is not supported with --fused-blocks",
        ),
        ({"method": "mocov3", "init_from": "x"}, "--init-from is not supported with --method mocov3"),
        ({"method": "supervised", "batch_size": 15}, "even number"),
        ({"method": "denoising", "compile": True}, "--compile is not supported with --method denoising"),
        (
            {"method": "denoising", "encoder_mask_tokens": True},
            "--encoder-mask-tokens is not a flag of --method denoising",
        ),
        ({"method": "denoising", "target": "hog"}, "--target: 'hog'. Give one of: pixels, pca"),
        ({"method": "beit", "target": "hog"}, "--target is not a flag of --method beit"),
        ({"method": "denoising", "masks_per_image": 2}, "--masks-per-image is not a flag"),
        ({"mixup": 0.5}, "--method supervised"),
        ({"noise_std": 0.5}, "--method denoising"),
        ({"temperature": 0.5}, "--method simclr or mocov3"),
        ({"momentum": 0.5}, "--method byol or mocov3"),
        ({"tokenizer_width": 5}, "--method tokenizer"),
        ({"method": "tokenizer", "probe_train": "a", "probe_test": "b"}, "no features"),
        ({"method": "dino"}, "Unknown method 'dino'"),
    ],
)
def test_flags_that_a_method_does_not_support_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        qv.PretrainConfig.from_flags(data="shapes", out="run", **changes).check_complete()


def test_a_method_sets_defaults_that_flags_override():
    def config(*words: str) -> qv.PretrainConfig:
        return parse(words)[1]

    found = config("pretrain", "--method", "beit", "--tokenizer", "words", "--mask-ratio", "0.5")
    model = found.autoencoder(codebook_size=9)
    assert (model.target, model.mask, model.decoder_depth) == ("tokens", "block", 0)
    assert found.method.mask_ratio == 0.5
    found = config("pretrain", "--recipe", "cifar", "--method", "mocov3", "--momentum", "0.9")
    assert (found.model.model, found.optim.weight_decay) == ("mae_vit_tiny_patch4", 0.1)
    assert found.method.momentum == 0.9
    found = config("tokenizer", "--recipe", "cifar", "--codebook-size", "99")
    assert (found.method.name, found.method.codebook_size, found.optim.lr) == ("tokenizer", 99, 1e-3)
    assert config("pretrain").method.name == "mae"
    assert config("pretrain", "--objective", "mocov3") == config("pretrain", "--method", "mocov3")


def test_supervised_pretraining_needs_labels(tmp_path):
    torch.manual_seed(0)
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="These images have no labels, which are needed"):
        qv.pretrain(config(tmp_path / "run", "supervised", data=(str(tmp_path / "x.npy"),)))


# ---------------------------------------------------------------------- what is learned


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("tokenizer", "beit", "hog", "byol")])
def test_a_linear_probe_beats_random_weights(tmp_path, kind):
    # BEiT, HOG and BYOL do not within minutes on a core: docs/log.md.
    long = {"data": ("shapes:2000:size=32",), "image_size": 32, "model": "mae_vit_64x3x4_patch4"}
    long |= {"batch_size": 64, "holdout": None, "log_every": 50, "eval_every": None, "checkpoint_every": None}
    if kind not in (*COMPARING, "supervised"):
        long |= {"norm_pix_loss": False}  # on smooth grounds, normalised patches are mostly noise
    if kind in COMPARING:
        long |= {"crop_min": 0.6, "weight_decay": 0.05}  # so that the shape is in both views
        long |= {"proj_hidden_dim": 256, "proj_output_dim": 64}  # 400 steps are few for heads of 4,096
    if kind == "mocov3":
        long |= {"momentum": 0.9}  # 0.99 averages over 100 steps, a quarter of these
    steps = {"supervised": 300}.get(kind, 400)
    qv.pretrain(config(tmp_path / "run", kind, **{**long, "steps": steps, "lr": 1.5e-3}))
    features = "cls" if kind in COMPARING else "mean"
    images = {"train": "shapes:800:size=32:seed=7", "test": "shapes:4000:size=32:seed=8"}
    probe = LinearConfig.from_flags(run=str(tmp_path / "run"), **images, features=features)
    accuracy = evaluate_linear(probe, Console(quiet=True))
    # Two standard errors of an accuracy of 0.2 on 4,000 images are 0.013.
    assert accuracy["this model"] > accuracy["random encoder"] + 0.013
