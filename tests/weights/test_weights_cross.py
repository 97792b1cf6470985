"""A cross decoder on its way in and out: it is known by its names, and its encoder is everyone's."""

import pytest
import torch
from safetensors.torch import save_file
from weights_models import autoencoder, pictures

import quarterview as qv
from quarterview import cli
from quarterview.commands.config import PretrainConfig
from quarterview.commands.start import flags_of_start
from quarterview.errors import UserError
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training import checkpoint
from quarterview.weights import export_safetensors, export_timm, export_transformers
from quarterview.weights.config import ExportConfig
from quarterview.weights.export.formats import export
from quarterview.weights.inspect import inspect
from quarterview.weights.loading import load_into, metadata, read

CROSS = {"decoder": "cross", "decoder_depth": 2}
ENCODER = ("decoder", "mask_token")


@pytest.fixture
def model() -> MaskedAutoencoder:
    return autoencoder(**CROSS, predict_share=0.25)


def saved(folder, model) -> str:
    tensors = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {"step": 1}, metadata(model.config))
    return str(folder)


def same(one, other, but=("-",)) -> bool:
    theirs = other.state_dict()
    return all(
        torch.equal(t, theirs[name]) for name, t in one.state_dict().items() if not name.startswith(but)
    )


def test_our_own_files_come_back_as_they_were(model, tmp_path):
    export_safetensors(model, tmp_path / "x.safetensors")
    for given in (tmp_path / "x.safetensors", saved(tmp_path / "run", model)):
        again = qv.load(given)
        assert again.config == model.config
        assert same(model, again)
        images = pictures(model)
        mask = torch.tensor([[True, True, False, True]]).expand(2, -1)
        assert torch.equal(again.reconstruct(images, mask), model.reconstruct(images, mask))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_plain_state_dict_is_known_by_its_names(tmp_path, prefix, kind):
    model = autoencoder(**CROSS, decoder_width=64, decoder_heads=16, in_chans=3)
    tensors = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"x.{kind}"
    torch.save(tensors, path) if kind == "pt" else save_file(tensors, path)
    found = read(path)
    assert found.has_decoder
    assert "masked autoencoder" in found.kind
    assert (found.config.decoder, found.config.decoder_width, found.config.decoder_depth) == ("cross", 64, 2)
    assert found.config.decoder_heads == 16
    assert any("heads are not recorded" in note for note in found.notes)
    assert same(model, qv.load(path))


def test_a_part_of_it_is_missing(model, tmp_path):
    tensors = {name: value for name, value in model.state_dict().items() if name != "decoder_blocks.mix"}
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"decoder_blocks\.mix is missing"):
        qv.load(tmp_path / "x.pt")


def test_the_encoder_goes_everywhere(model, tmp_path):
    assert export_timm(model, tmp_path / "timm").largest < 1e-5
    assert export_transformers(model, tmp_path / "hf", parts=["vit"]).largest < 1e-5
    for given in (tmp_path / "timm", tmp_path / "hf" / "vit"):
        assert same(model, qv.load(given), ENCODER)


def test_transformers_without_parts_is_an_error(model, tmp_path):
    config = ExportConfig(saved(tmp_path / "run", model), "transformers", str(tmp_path / "out"))
    with pytest.raises(UserError, match="ViTMAEForPreTraining cannot hold a cross-attention decoder"):
        export(config)
    assert not (tmp_path / "out").exists()


def test_it_is_said(model, tmp_path):
    shown = " ".join(value for _, value in inspect(saved(tmp_path / "run", model)))
    assert "cross, 32 wide, 2 blocks, 2 heads" in shown
    assert "25% of the hidden predicted" in shown
    export_timm(model, tmp_path / "timm")
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "| decoder | cross, 32 wide, 2 blocks, 2 heads |" in card
    assert "75% hidden, 25% of those predicted" in card


@pytest.mark.parametrize(("theirs", "ours"), [("cross", "standard"), ("standard", "cross")])
def test_the_other_decoder_is_fresh_and_only_if_that_is_asked(tmp_path, theirs, ours):
    start, model = autoencoder(decoder=theirs), autoencoder(decoder=ours)
    given, before = saved(tmp_path / "run", start), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f"decoder {theirs} there, {ours} here.*--allow-partial 'decoder"):
        load_into(model, given)
    notes = load_into(model, given, ["decoder*"])
    assert any("the decoder is freshly initialised" in note for note in notes)
    assert same(start, model, ENCODER)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items() if n.startswith(ENCODER))


def test_another_grid_and_other_patches(model, tmp_path):
    other = autoencoder(
        **CROSS, image_size=48, model="mae_vit_32x2x2_patch16", in_chans=1, mean=None, std=None
    )
    load_into(other, saved(tmp_path / "run", model))
    assert torch.equal(other.decoder_blocks.mix, model.decoder_blocks.mix)
    assert other.reconstruct(pictures(other)).isfinite().all()


def test_a_start_brings_its_decoder(model, tmp_path):
    values = flags_of_start(saved(tmp_path / "run", model), "", (), PretrainConfig())
    assert (values["decoder"], values["decoder_depth"]) == ("cross", 2)
    assert "predict_share" not in values  # how it was trained, not what it is


def test_a_run_from_the_command_line_to_its_uses(tmp_path, capsys):
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
    cross = ["--decoder", "cross", "--predict-share", "0.5", "--masks-per-image", "3"]
    assert cli.run(["pretrain", *words, *cross, *common, "--out", out]) == 0
    assert cli.run(["pretrain", *words, *cross, *common, "--out", out]) == 0  # is complete
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
