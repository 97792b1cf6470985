"""Several cls tokens and fused blocks on their way in and out."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from weights_models import autoencoder, classifier, pictures

import quarterview as qv
from quarterview import cli
from quarterview.commands.config import FinetuneConfig, PretrainConfig
from quarterview.commands.finetune import start_of
from quarterview.commands.start import flags_of_start
from quarterview.errors import UserError
from quarterview.models.positions import sincos_2d
from quarterview.training import checkpoint
from quarterview.weights import (
    export_onnx,
    export_safetensors,
    export_timm,
    export_torch_export,
    export_transformers,
)
from quarterview.weights.loading import (
    METADATA_KEY,
    load_encoder,
    load_into,
    metadata,
    read,
    read_header,
)

DEEP = {"model": "mae_vit_32x3x2_patch8"}
WITHIN = {"rtol": 0, "atol": 1e-5}


def saved(folder, model) -> str:
    tensors = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {"step": 1}, metadata(model.config))
    return str(folder)


def same(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def tampered(model):
    """With a table of positions as fine-tuning leaves one: nothing in it is as at the start."""
    with torch.no_grad():
        model.pos_embed.add_(torch.randn(model.pos_embed.shape, generator=torch.Generator().manual_seed(3)))
    return model


# ---------------------------------------------------------------------- ours


@pytest.mark.parametrize("changes", [{"cls_tokens": 4}, {"fused_blocks": (1, 2)}], ids=str)
def test_our_own_files_come_back_as_they_were(tmp_path, changes):
    model = autoencoder(**DEEP, **changes)
    export_safetensors(model, tmp_path / "x.safetensors")
    for given in (tmp_path / "x.safetensors", saved(tmp_path / "run", model)):
        again = qv.load(given)
        assert again.config == model.config
        assert same(model, again)


def test_a_file_from_before_has_one_cls_token_and_fuses_nothing(tmp_path):
    model = autoencoder()
    header = json.loads(metadata(model.config)[METADATA_KEY])
    del header["config"]["cls_tokens"], header["config"]["fused_blocks"]
    save_file(model.state_dict(), tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(header)})
    assert read_header(tmp_path / "x.safetensors") == model.config
    assert same(model, qv.load(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("changes", [{"cls_tokens": 4}, {"fused_blocks": (1, 2)}], ids=str)
def test_a_plain_state_dict_is_known_by_its_names(tmp_path, changes):
    model = autoencoder(**DEEP, **changes)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    found = read(tmp_path / "x.pt").config
    assert {name: getattr(found, name) for name in changes} == changes


def test_the_encoder_without_its_decoder_forgets_the_fusion(tmp_path):
    model = autoencoder(**DEEP, fused_blocks=(1, 2))
    assert export_timm(model, tmp_path / "timm").largest < 1e-5
    assert export_transformers(model, tmp_path / "hf", parts=["vit"]).largest < 1e-5
    for folder in (tmp_path / "timm", tmp_path / "hf" / "vit"):
        assert not any("fusion" in name for name in load_file(folder / "model.safetensors"))
        torch.testing.assert_close(
            qv.load(folder).encode(pictures(model)), model.encode(pictures(model)), **WITHIN
        )
    with pytest.raises(
        UserError, match="ViTMAEForPreTraining cannot hold a decoder that is given fused blocks"
    ):
        export_transformers(model, tmp_path / "out")


def test_a_start_brings_both(tmp_path):
    start = saved(tmp_path / "run", autoencoder(**DEEP, fused_blocks=(2,), cls_tokens=3))
    values = flags_of_start(start, "", (), PretrainConfig())
    assert (values["fused_blocks"], values["cls_tokens"]) == ((2,), 3)


def test_another_number_of_cls_tokens_is_another_architecture(tmp_path):
    given = saved(tmp_path / "run", autoencoder(cls_tokens=4))
    with pytest.raises(UserError, match="cls_tokens 4 there, 1 here"):
        load_into(autoencoder(), given)
    with pytest.raises(UserError, match="has 4 cls tokens; accepted: 1, the classifier's"):
        load_encoder(classifier(), given)


def test_another_fusion_takes_a_fresh_decoder(tmp_path):
    start, model = autoencoder(**DEEP), autoencoder(**DEEP, fused_blocks=(1, 2))
    with pytest.raises(UserError, match=r"fused_blocks \(\) there, \(1, 2\) here.*--allow-partial 'decoder"):
        load_into(model, saved(tmp_path / "run", start))
    load_into(model, saved(tmp_path / "run", start), ["decoder*"])
    assert torch.equal(model.encode(pictures(model)), start.encode(pictures(model)))


def test_another_grid_and_other_patches(tmp_path):
    start = tampered(classifier(cls_tokens=3))
    for changes in ({"image_size": 48}, {"image_size": 48, "model": "mae_vit_32x2x2_patch16"}):
        ours = autoencoder(cls_tokens=3, **changes)
        load_into(ours, saved(tmp_path / "run", start))
        assert torch.equal(ours.cls_token, start.cls_token)
        assert torch.equal(ours.pos_embed[:, 0], start.pos_embed[:, 0])
        assert ours.pos_embed.shape[1] == 1 + ours.config.patches
    fixed = autoencoder(cls_tokens=3, image_size=48)
    load_into(fixed, saved(tmp_path / "fixed", autoencoder(cls_tokens=3)))
    assert torch.equal(fixed.pos_embed, sincos_2d(32, (6, 6)))


# ---------------------------------------------------------------------- timm


@pytest.mark.parametrize("pool", ["", "avg"])
@torch.no_grad()
def test_timm_holds_several_cls_tokens_as_registers(tmp_path, pool):
    model = autoencoder(cls_tokens=4, image_size=(16, 32))
    assert export_timm(model, tmp_path).largest < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool=pool).eval()
    images, tokens = pictures(model), model.encode(pictures(model))
    assert tokens.shape[1] == theirs.num_prefix_tokens + model.config.patches
    torch.testing.assert_close(theirs.forward_features(images), tokens, **WITHIN)
    torch.testing.assert_close(theirs(images), tokens if pool == "" else tokens[:, 4:].mean(1), **WITHIN)
    assert "4 cls tokens" in (tmp_path / "README.md").read_text("utf-8")


@torch.no_grad()
def test_timm_holds_a_classifier_of_the_patches(tmp_path):
    model = tampered(classifier(pool="mean", cls_tokens=3))
    assert export_timm(model, tmp_path).largest < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(theirs(pictures(model)), model(pictures(model)), **WITHIN)


def test_timm_cannot_hold_a_head_that_reads_several(tmp_path):
    with pytest.raises(UserError, match=r"reads the mean of 3 cls tokens \(it reads the first\)"):
        export_timm(classifier(pool="cls", cls_tokens=3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [autoencoder, lambda **c: tampered(classifier(pool="mean", **c))])
def test_what_timm_holds_comes_back(tmp_path, make):
    model = make(cls_tokens=4)
    export_timm(model, tmp_path)
    again = qv.load(tmp_path)
    assert again.config.cls_tokens == 4
    mine = {n: t for n, t in model.state_dict().items() if not n.startswith(("decoder", "mask_token"))}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in mine.items())


@torch.no_grad()
def test_registers_that_timm_trained_apart_come_back_with_their_positions(tmp_path):
    export_timm(autoencoder(cls_tokens=3), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "pos_embed": tensors["pos_embed"] + torch.randn(1, 7, 32)}, file, {"format": "pt"})
    theirs, ours = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), qv.load(tmp_path)
    torch.testing.assert_close(theirs.forward_features(pictures(ours)), ours.encode(pictures(ours)), **WITHIN)


def test_registers_of_others_are_still_refused(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1, reg_tokens=3, num_classes=0
    )
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"registers|positions"):
        qv.load(tmp_path / "x.pt")
    export_timm(autoencoder(cls_tokens=3), tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quarterview_cls_tokens": 2}))
    with pytest.raises(UserError, match=r"registers|positions"):
        qv.load(tmp_path / "ours")


# ---------------------------------------------------------------------- others


@pytest.mark.parametrize("part", ["mae", "vit", "classifier"])
def test_transformers_cannot_hold_several(tmp_path, part):
    model = classifier(pool="cls", cls_tokens=4) if part == "classifier" else autoencoder(cls_tokens=4)
    timm_does = "" if part == "classifier" else "timm, "
    match = rf"cannot hold 4 cls tokens \(only one\).*accepted: {timm_does}onnx"
    with pytest.raises(UserError, match=match):
        export_transformers(model, tmp_path / "out", parts=[part])
    with pytest.raises(UserError, match="4 cls tokens"):
        export_transformers(model, tmp_path / "out")


@pytest.mark.parametrize("model", [autoencoder(cls_tokens=3), classifier(pool="cls", cls_tokens=3)])
def test_programs_hold_several(tmp_path, model):
    assert export_torch_export(model, tmp_path / "x.pt2").largest < 1e-5
    program = torch.export.load(tmp_path / "x.pt2").module()
    found = program(pictures(model, 3))
    if len(found) == 2:
        torch.testing.assert_close(found[1], model.encode(pictures(model, 3))[:, 3:].mean(1), **WITHIN)
    else:
        torch.testing.assert_close(found[0], model(pictures(model, 3)), **WITHIN)
    assert export_onnx(model, tmp_path / "x.onnx").largest < 1e-5


# ---------------------------------------------------------------------- from the command line


def test_a_run_from_the_command_line_to_its_uses(tmp_path, capsys):
    out, common = str(tmp_path / "run"), ["--device", "cpu", "--workers", "0"]
    words = ["--model", "mae_vit_32x3x2_patch4", "--image-size", "16", "--decoder-width", "32"]
    words += ["--decoder-heads", "2", "--decoder-depth", "1", "--data", "shapes:60:size=16"]
    words += ["--batch-size", "8", "--holdout", "8", "--precision", "fp32"]
    later = ["--cls-tokens", "4", "--fused-blocks", "1", "2", "--mask-unit", "2"]
    whole = ["pretrain", *words, *later, *common, "--steps", "4"]
    assert cli.run([*whole, "--out", out, "--checkpoint-every", "2", "--keep-checkpoints", "9"]) == 0
    model = qv.load(out)
    assert (model.config.cls_tokens, model.config.fused_blocks) == (4, (1, 2))
    # Resumed in the middle, it ends as one that was not stopped.
    middle = f"{out}/checkpoints/step-00000002"
    assert cli.run([*whole, "--out", str(tmp_path / "again"), "--resume", middle]) == 0
    assert same(model, qv.load(tmp_path / "again"))
    other = [word if word != "4" or whole[i - 1] != "--cls-tokens" else "2" for i, word in enumerate(whole)]
    assert cli.run([*other, "--out", out]) == 2
    assert "cls_tokens: was 4, now 2" in capsys.readouterr().err
    sets = ["--train", "shapes:60:size=16", "--test", "shapes:40:seed=1:size=16", "--device", "cpu"]
    assert cli.run(["knn", out, *sets, "--features", "cls"]) == 0
    tune = ["--batch-size", "8", "--randaugment", "none", "--workers", "0", "--steps", "1", *sets]
    for pool in ("mean", "cls"):
        assert cli.run(["finetune", out, *tune, "--pool", pool, "--out", str(tmp_path / pool)]) == 0
        tuned = qv.load(tmp_path / pool)
        assert tuned.config.cls_tokens == 4
        assert tuned.cls_token.shape == (1, 4, 32)
    scratch = FinetuneConfig.from_flags(
        run="scratch", model="mae_vit_32x3x2_patch4", image_size=16, cls_tokens=3
    )
    assert start_of(scratch).cls_tokens == 3
    tokens = ["--features", "tokens", "--device", "cpu", "--out", str(tmp_path / "tokens")]
    assert cli.run(["embed", out, "--data", "shapes:9:size=16", *tokens]) == 0
    assert "20 × 32 numbers" in capsys.readouterr().out
    assert cli.run(["look", out, "shapes:3:size=16", "--out", str(tmp_path / "look.png")]) == 0
    assert cli.run(["inspect", out]) == 0
    assert "4 cls tokens" in capsys.readouterr().out
