"""Load, export and start from masked autoencoders with a cross-attention decoder."""

import pytest
import torch
from safetensors.torch import save_file
from weights_models import autoencoder, random_images

import quarterview as qv
from quarterview import cli
from quarterview.commands.config import PretrainConfig
from quarterview.commands.start import read_initial_flags
from quarterview.errors import UserError
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training import checkpoint
from quarterview.weights import export_safetensors, export_timm, export_transformers
from quarterview.weights.config import ExportConfig
from quarterview.weights.export.formats import export
from quarterview.weights.inspect import inspect_weights
from quarterview.weights.loading import load_into, make_metadata, read_weights

CROSS = {"decoder": "cross", "decoder_depth": 2}
ENCODER = ("decoder", "mask_token")


@pytest.fixture
def model() -> MaskedAutoencoder:
    return autoencoder(**CROSS, predict_ratio=0.25)


def save_run(folder, model) -> str:
    tensors = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {"step": 1}, make_metadata(model.config))
    return str(folder)


def have_equal_weights(one, other, excluded=("-",)) -> bool:
    theirs = other.state_dict()
    return all(
        torch.equal(t, theirs[name]) for name, t in one.state_dict().items() if not name.startswith(excluded)
    )


def test_own_files_are_loaded_unchanged(model, tmp_path):
    export_safetensors(model, tmp_path / "x.safetensors")
    for source in (tmp_path / "x.safetensors", save_run(tmp_path / "run", model)):
        again = qv.load(source)
        assert again.config == model.config
        assert have_equal_weights(model, again)
        images = random_images(model)
        mask = torch.tensor([[True, True, False, True]]).expand(2, -1)
        assert torch.equal(again.reconstruct(images, mask), model.reconstruct(images, mask))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_plain_state_dict_is_recognised_by_its_tensor_names(tmp_path, prefix, kind):
    model = autoencoder(**CROSS, decoder_width=64, decoder_heads=16, in_chans=3)
    tensors = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"x.{kind}"
    torch.save(tensors, path) if kind == "pt" else save_file(tensors, path)
    found = read_weights(path)
    assert found.has_decoder
    assert "masked autoencoder" in found.kind
    assert (found.config.decoder, found.config.decoder_width, found.config.decoder_depth) == ("cross", 64, 2)
    assert found.config.decoder_heads == 16
    assert any("number of heads is not recorded" in note for note in found.notes)
    assert have_equal_weights(model, qv.load(path))


def test_a_missing_decoder_tensor_is_an_error(model, tmp_path):
    tensors = {name: value for name, value in model.state_dict().items() if name != "decoder_blocks.mix"}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"decoder_blocks\.mix is missing"):
        qv.load(tmp_path / "x.pt")


def test_the_encoder_is_exported_to_timm_and_transformers(model, tmp_path):
    assert export_timm(model, tmp_path / "timm").max_difference < 1e-5
    assert export_transformers(model, tmp_path / "hf", parts=["vit"]).max_difference < 1e-5
    for source in (tmp_path / "timm", tmp_path / "hf" / "vit"):
        assert have_equal_weights(model, qv.load(source), ENCODER)


def test_export_to_transformers_without_parts_is_an_error(model, tmp_path):
    config = ExportConfig(save_run(tmp_path / "run", model), "transformers", str(tmp_path / "out"))
    with pytest.raises(
        UserError, match="ViTMAEForPreTraining of transformers does not support a cross-attention decoder"
    ):
        export(config)
    assert not (tmp_path / "out").exists()


def test_inspect_and_model_card_describe_the_decoder(model, tmp_path):
    shown = " ".join(value for _, value in inspect_weights(save_run(tmp_path / "run", model)))
    assert "cross, 32 wide, 2 blocks, 2 heads" in shown
    assert "25% of the masked predicted" in shown
    export_timm(model, tmp_path / "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "| decoder | cross, 32 wide, 2 blocks, 2 heads |" in card
    assert "75% masked, 25% of those predicted" in card


@pytest.mark.parametrize(("theirs", "ours"), [("cross", "standard"), ("standard", "cross")])
def test_a_different_decoder_needs_allow_partial_and_is_not_loaded(tmp_path, theirs, ours):
    start, model = autoencoder(decoder=theirs), autoencoder(decoder=ours)
    source, before = save_run(tmp_path / "run", start), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f"decoder is {theirs}, not {ours}.*--allow-partial 'decoder"):
        load_into(model, source)
    notes = load_into(model, source, ["decoder*"])
    assert any("the decoder is randomly initialised, not loaded" in note for note in notes)
    assert have_equal_weights(start, model, ENCODER)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items() if n.startswith(ENCODER))


def test_load_into_another_grid_and_patch_size(model, tmp_path):
    other = autoencoder(
        **CROSS, image_size=48, model="mae_vit_32x2x2_patch16", in_chans=1, mean=None, std=None
    )
    load_into(other, save_run(tmp_path / "run", model))
    assert torch.equal(other.decoder_blocks.mix, model.decoder_blocks.mix)
    assert other.reconstruct(random_images(other)).isfinite().all()


def test_init_from_sets_the_decoder(model, tmp_path):
    values = read_initial_flags(save_run(tmp_path / "run", model), "", (), PretrainConfig())
    assert (values["decoder"], values["decoder_depth"]) == ("cross", 2)
    assert "predict_ratio" not in values  # a setting of training, not of the architecture


def test_commands_with_a_cross_decoder(tmp_path, capsys):
    out, common = str(tmp_path / "run"), ["--device", "cpu", "--workers", "0", "--steps", "2"]
    words = [
        "--model",
        "mae_vit_32x2x2_patch4",
        "--image-size",
        "16",
        "--decoder-width",
        "32",
        "--decoder-heads",
        "2",
    ]
    words += ["--decoder-depth", "1", "--data", "shapes:60:size=16", "--batch-size", "8", "--holdout", "8"]
    cross = ["--decoder", "cross", "--predict-ratio", "0.5", "--masks-per-image", "3"]
    assert cli.run(["pretrain", *words, *cross, *common, "--out", out]) == 0
    assert cli.run(["pretrain", *words, *cross, *common, "--out", out]) == 0  # the run is complete
    assert cli.run(["pretrain", *words, *cross[:-1], "2", *common, "--out", out]) == 2
    assert "masks_per_image: was 3, now 2" in capsys.readouterr().err
    further = ["pretrain", "--init-from", out, "--data", "shapes:60:size=16", "--batch-size", "8", *common]
    assert cli.run([*further, "--out", str(tmp_path / "further")]) == 0
    assert qv.load(tmp_path / "further").config.decoder == "cross"
    sets = ["--train", "shapes:60:size=16", "--test", "shapes:40:seed=1:size=16", "--device", "cpu"]
    assert cli.run(["knn", out, *sets, "--no-baselines"]) == 0
    tune = ["--batch-size", "8", "--randaugment", "none", "--workers", "0", "--steps", "1"]
    assert cli.run(["finetune", out, *sets, *tune, "--out", str(tmp_path / "ft")]) == 0
    assert cli.run(["look", out, "shapes:3:size=16", "--out", str(tmp_path / "look.png")]) == 0
    assert cli.run(["doctor", out]) in (0, 1)
