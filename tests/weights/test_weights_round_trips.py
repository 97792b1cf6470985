"""Export to another library and load again: bit-equal weights and equal outputs."""

import pytest
import torch

import quarterview as qv
from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.weights import export_safetensors, export_timm, export_transformers

DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 16}
MODELS = {
    "tiny/4 at 32": {"model": "mae_vit_tiny_patch4", "image_size": 32, **DECODER},
    "tiny/8 at 96 × 160": {"model": "mae_vit_tiny_patch8", "image_size": (96, 160), **DECODER},
    "five channels": {"model": "mae_vit_tiny_patch4", "image_size": 32, "in_chans": 5, **DECODER},
    "base/16 at 224": {"model": "mae_vit_base_patch16"},
    "huge width/14 at 224": {"model": "mae_vit_1280x2x16_patch14", **DECODER},
}
LARGE = ("base/16 at 224", "huge width/14 at 224")
CASES = [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in MODELS]
TOLERANCE = 1e-5


def make_model(name: str) -> MaskedAutoencoder:
    torch.manual_seed(0)
    channels = MODELS[name].get("in_chans", 3)
    return create_model(**MODELS[name], mean=(0.4,) * channels, std=(0.2,) * channels).eval()


def has_equal_weights(one: torch.nn.Module, other: torch.nn.Module, excluded: tuple[str, ...] = ()) -> bool:
    theirs = other.state_dict()
    names = [name for name in one.state_dict() if not name.startswith(excluded or ("-",))]
    return all(torch.equal(one.state_dict()[name], theirs[name]) for name in names)


@pytest.mark.parametrize("name", CASES)
def test_export_to_transformers_and_back(name, tmp_path):
    model = make_model(name)
    height, width = model.config.image_size
    parts = ("mae", "vit") if height == width else ("vit",)
    if height != width:
        with pytest.raises(UserError, match="only square ones"):
            export_transformers(model, tmp_path / "refused")
    result = export_transformers(model, tmp_path / "x", parts=parts)
    assert result.max_difference <= TOLERANCE
    for part in parts:
        back = qv.load(tmp_path / "x" / part)
        assert isinstance(back, MaskedAutoencoder)
        assert has_equal_weights(model, back, () if part == "mae" else ("decoder", "mask_token"))
        assert back.config.image_size == model.config.image_size
        assert (back.config.mean, back.config.std) == (model.config.mean, model.config.std)
        if part == "mae":
            assert back.config == model.config


@pytest.mark.parametrize("name", CASES)
def test_export_to_timm_and_back(name, tmp_path):
    model = make_model(name)
    assert export_timm(model, tmp_path / "x").max_difference <= TOLERANCE
    folder = tmp_path / "x"
    # Without config.json, the number of heads of the tiny models follows from their width and depth.
    others = (folder / "model.safetensors", f"timm:local-dir:{folder}")
    for source in (folder, *(() if name in LARGE else others)):
        back = qv.load(source)
        assert has_equal_weights(model, back, ("decoder", "mask_token"))
        assert (back.config.model, back.config.image_size, back.config.in_chans) == (
            model.config.model,
            model.config.image_size,
            model.config.in_chans,
        )
    assert qv.load(folder).config.mean == model.config.mean


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_export_classifiers_and_back(pool, tmp_path):
    torch.manual_seed(0)
    names = ("cat", "dog", "emu")
    config = ClassifierConfig("mae_vit_tiny_patch4", (32, 32), classes=3, pool=pool, class_names=names)
    model = Classifier(config)
    torch.nn.init.normal_(model.head.weight)
    export_timm(model, tmp_path / "timm")
    folders = [tmp_path / "timm"]
    if pool == "cls":
        export_transformers(model, tmp_path / "hf")
        folders.append(tmp_path / "hf" / "classifier")
    else:
        with pytest.raises(UserError, match="reads the mean"):
            export_transformers(model, tmp_path / "hf")
    for folder in folders:
        back = qv.load(folder)
        assert isinstance(back, Classifier)
        assert has_equal_weights(model, back)
        assert (back.config.pool, back.config.class_names) == (pool, names)


def test_exports_contain_the_license(tmp_path):
    from quarterview.weights import ModelInfo, read_model_info

    model = make_model("tiny/4 at 32")
    export_timm(model, tmp_path / "timm", ModelInfo(license="CC-BY-NC-4.0"))
    export_safetensors(model, tmp_path / "x.safetensors", ModelInfo(license="CC-BY-NC-4.0"))
    for source in (tmp_path / "timm", tmp_path / "x.safetensors"):
        assert read_model_info(source).license.lower() == "cc-by-nc-4.0"


def test_the_license_reaches_the_card_of_a_fine_tuned_model(tmp_path):
    from quarterview import cli
    from quarterview.weights import ModelInfo

    model = make_model("tiny/4 at 32")
    start = tmp_path / "start.safetensors"
    export_safetensors(model, start, ModelInfo(license="CC-BY-NC-4.0"))
    flags = ["--steps", "1", "--batch-size", "4", "--device", "cpu", "--workers", "0"]
    run, tuned = str(tmp_path / "run"), str(tmp_path / "tuned")
    words = ["--data", "shapes:40:size=32", "--init-from", str(start), "--out", run]
    assert cli.run(["pretrain", *words, *flags]) == 0
    start.unlink()  # the run has recorded the license
    sets = ["--train", "shapes:40:size=32", "--test", "shapes:20:seed=1:size=32", "--randaugment", "none"]
    assert cli.run(["finetune", run, *sets, *flags, "--out", tuned]) == 0
    assert cli.run(["export", tuned, "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "CC-BY-NC-4.0." in card
