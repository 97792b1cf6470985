"""Load, export and start from models with several cls tokens and fused blocks."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from weights_models import autoencoder, classifier, random_images

import quarterview as qv
from quarterview import cli
from quarterview.commands.config import FinetuneConfig, PretrainConfig
from quarterview.commands.finetune_start import get_initial_config
from quarterview.commands.start import read_initial_flags
from quarterview.errors import UserError
from quarterview.models.positions import get_2d_sincos_pos_embed
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
    load_encoder_into,
    load_into,
    make_metadata,
    read_header_config,
    read_weights,
)

DEEP = {"model": "mae_vit_32x3x2_patch8"}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def save_run(folder, model) -> str:
    tensors = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {"step": 1}, make_metadata(model.config))
    return str(folder)


def have_equal_weights(one, other) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())


def disturb_positions(model):
    """Add noise to the position embedding of a model, as fine-tuning changes it."""
    with torch.no_grad():
        model.pos_embed.add_(torch.randn(model.pos_embed.shape, generator=torch.Generator().manual_seed(3)))
    return model


# ---------------------------------------------------------------------- own files


@pytest.mark.parametrize("changes", [{"cls_tokens": 4}, {"fused_blocks": (1, 2)}], ids=str)
def test_own_files_are_loaded_unchanged(tmp_path, changes):
    model = autoencoder(**DEEP, **changes)
    export_safetensors(model, tmp_path / "x.safetensors")
    for source in (tmp_path / "x.safetensors", save_run(tmp_path / "run", model)):
        again = qv.load(source)
        assert again.config == model.config
        assert have_equal_weights(model, again)


def test_files_of_older_versions_have_one_cls_token_and_no_fused_blocks(tmp_path):
    model = autoencoder()
    header = json.loads(make_metadata(model.config)[METADATA_KEY])
    del header["config"]["cls_tokens"], header["config"]["fused_blocks"]
    save_file(model.state_dict(), tmp_path / "x.safetensors", {METADATA_KEY: json.dumps(header)})
    assert read_header_config(tmp_path / "x.safetensors") == model.config
    assert have_equal_weights(model, qv.load(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("changes", [{"cls_tokens": 4}, {"fused_blocks": (1, 2)}], ids=str)
def test_a_plain_state_dict_is_recognised_by_its_tensor_names(tmp_path, changes):
    model = autoencoder(**DEEP, **changes)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt").config
    assert {name: getattr(found, name) for name in changes} == changes


def test_exports_of_the_encoder_have_no_fused_blocks(tmp_path):
    model = autoencoder(**DEEP, fused_blocks=(1, 2))
    assert export_timm(model, tmp_path / "timm").max_difference < 1e-5
    assert export_transformers(model, tmp_path / "hf", parts=["vit"]).max_difference < 1e-5
    for folder in (tmp_path / "timm", tmp_path / "hf" / "vit"):
        assert not any("fusion" in name for name in load_file(folder / "model.safetensors"))
        torch.testing.assert_close(
            qv.load(folder).encode(random_images(model)), model.encode(random_images(model)), **TOLERANCE
        )
    with pytest.raises(
        UserError, match="ViTMAEForPreTraining of transformers does not support a decoder with fused blocks"
    ):
        export_transformers(model, tmp_path / "out")


def test_init_from_sets_cls_tokens_and_fused_blocks(tmp_path):
    start = save_run(tmp_path / "run", autoencoder(**DEEP, fused_blocks=(2,), cls_tokens=3))
    values = read_initial_flags(start, "", (), PretrainConfig())
    assert (values["fused_blocks"], values["cls_tokens"]) == ((2,), 3)


def test_another_number_of_cls_tokens_is_rejected(tmp_path):
    source = save_run(tmp_path / "run", autoencoder(cls_tokens=4))
    with pytest.raises(UserError, match="cls_tokens is 4, not 1"):
        load_into(autoencoder(), source)
    with pytest.raises(UserError, match=r"has 4 cls tokens, but the classifier has 1\."):
        load_encoder_into(classifier(), source)


def test_other_fused_blocks_need_allow_partial(tmp_path):
    start, model = autoencoder(**DEEP), autoencoder(**DEEP, fused_blocks=(1, 2))
    with pytest.raises(UserError, match=r"fused_blocks is \(\), not \(1, 2\).*--allow-partial 'decoder"):
        load_into(model, save_run(tmp_path / "run", start))
    load_into(model, save_run(tmp_path / "run", start), ["decoder*"])
    assert torch.equal(model.encode(random_images(model)), start.encode(random_images(model)))


def test_load_into_another_grid_and_patch_size(tmp_path):
    start = disturb_positions(classifier(cls_tokens=3))
    for changes in ({"image_size": 48}, {"image_size": 48, "model": "mae_vit_32x2x2_patch16"}):
        ours = autoencoder(cls_tokens=3, **changes)
        load_into(ours, save_run(tmp_path / "run", start))
        assert torch.equal(ours.cls_token, start.cls_token)
        assert torch.equal(ours.pos_embed[:, 0], start.pos_embed[:, 0])
        assert ours.pos_embed.shape[1] == 1 + ours.config.num_patches
    fixed = autoencoder(cls_tokens=3, image_size=48)
    load_into(fixed, save_run(tmp_path / "fixed", autoencoder(cls_tokens=3)))
    assert torch.equal(fixed.pos_embed, get_2d_sincos_pos_embed(32, (6, 6)))


# ---------------------------------------------------------------------- timm


@pytest.mark.parametrize("pool", ["", "avg"])
@torch.no_grad()
def test_timm_stores_several_cls_tokens_as_registers(tmp_path, pool):
    model = autoencoder(cls_tokens=4, image_size=(16, 32))
    assert export_timm(model, tmp_path).max_difference < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, global_pool=pool).eval()
    images, tokens = random_images(model), model.encode(random_images(model))
    assert tokens.shape[1] == theirs.num_prefix_tokens + model.config.num_patches
    torch.testing.assert_close(theirs.forward_features(images), tokens, **TOLERANCE)
    torch.testing.assert_close(theirs(images), tokens if pool == "" else tokens[:, 4:].mean(1), **TOLERANCE)
    assert "4 cls tokens" in (tmp_path / "README.md").read_text("utf-8")


@torch.no_grad()
def test_timm_supports_a_classifier_with_mean_pooling(tmp_path):
    model = disturb_positions(classifier(pool="mean", cls_tokens=3))
    assert export_timm(model, tmp_path).max_difference < 1e-5
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(theirs(random_images(model)), model(random_images(model)), **TOLERANCE)


def test_timm_does_not_support_a_head_on_several_cls_tokens(tmp_path):
    with pytest.raises(UserError, match="reads the mean of 3 cls tokens is not supported with --to timm"):
        export_timm(classifier(pool="cls", cls_tokens=3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [autoencoder, lambda **c: disturb_positions(classifier(pool="mean", **c))])
def test_export_to_timm_and_back(tmp_path, make):
    model = make(cls_tokens=4)
    export_timm(model, tmp_path)
    again = qv.load(tmp_path)
    assert again.config.cls_tokens == 4
    mine = {n: t for n, t in model.state_dict().items() if not n.startswith(("decoder", "mask_token"))}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in mine.items())


@torch.no_grad()
def test_different_positions_of_registers_are_merged_into_the_tokens(tmp_path):
    export_timm(autoencoder(cls_tokens=3), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "pos_embed": tensors["pos_embed"] + torch.randn(1, 7, 32)}, file, {"format": "pt"})
    theirs, ours = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), qv.load(tmp_path)
    torch.testing.assert_close(
        theirs.forward_features(random_images(ours)), ours.encode(random_images(ours)), **TOLERANCE
    )


def test_register_tokens_of_other_models_are_rejected(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1, reg_tokens=3, num_classes=0
    )
    torch.save(theirs.state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"registers|patch positions, not a square number"):
        qv.load(tmp_path / "x.pt")
    export_timm(autoencoder(cls_tokens=3), tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quarterview_cls_tokens": 2}))
    with pytest.raises(UserError, match=r"registers|patch positions, not a square number"):
        qv.load(tmp_path / "ours")


# ---------------------------------------------------------------------- other formats


@pytest.mark.parametrize("part", ["mae", "vit", "classifier"])
def test_transformers_does_not_support_several_cls_tokens(tmp_path, part):
    model = classifier(pool="cls", cls_tokens=4) if part == "classifier" else autoencoder(cls_tokens=4)
    timm_too = "" if part == "classifier" else "timm, "
    match = rf"does not support 4 cls tokens \(only one\)\. Use --to {timm_too}onnx"
    with pytest.raises(UserError, match=match):
        export_transformers(model, tmp_path / "out", parts=[part])
    with pytest.raises(UserError, match="4 cls tokens"):
        export_transformers(model, tmp_path / "out")


@pytest.mark.parametrize("model", [autoencoder(cls_tokens=3), classifier(pool="cls", cls_tokens=3)])
def test_onnx_and_torch_export_support_several_cls_tokens(tmp_path, model):
    assert export_torch_export(model, tmp_path / "x.pt2").max_difference < 1e-5
    program = torch.export.load(tmp_path / "x.pt2").module()
    found = program(random_images(model, 3))
    if len(found) == 2:
        torch.testing.assert_close(
            found[1], model.encode(random_images(model, 3))[:, 3:].mean(1), **TOLERANCE
        )
    else:
        torch.testing.assert_close(found[0], model(random_images(model, 3)), **TOLERANCE)
    assert export_onnx(model, tmp_path / "x.onnx").max_difference < 1e-5


# ---------------------------------------------------------------------- from the command line


def test_commands_with_several_cls_tokens_and_fused_blocks(tmp_path, capsys):
    out, common = str(tmp_path / "run"), ["--device", "cpu", "--workers", "0"]
    words = ["--model", "mae_vit_32x3x2_patch4", "--image-size", "16", "--decoder-width", "32"]
    words += ["--decoder-heads", "2", "--decoder-depth", "1", "--data", "shapes:60:size=16"]
    words += ["--batch-size", "8", "--holdout", "8", "--precision", "fp32"]
    later = ["--cls-tokens", "4", "--fused-blocks", "1", "2", "--mask-unit", "2"]
    whole = ["pretrain", *words, *later, *common, "--steps", "4"]
    assert cli.run([*whole, "--out", out, "--checkpoint-every", "2", "--keep-checkpoints", "9"]) == 0
    model = qv.load(out)
    assert (model.config.cls_tokens, model.config.fused_blocks) == (4, (1, 2))
    # A run resumed from its second step ends with the same weights.
    middle = f"{out}/checkpoints/step-00000002"
    assert cli.run([*whole, "--out", str(tmp_path / "again"), "--resume", middle]) == 0
    assert have_equal_weights(model, qv.load(tmp_path / "again"))
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
    assert get_initial_config(scratch).cls_tokens == 3
    tokens = ["--features", "tokens", "--device", "cpu", "--out", str(tmp_path / "tokens")]
    assert cli.run(["embed", out, "--data", "shapes:9:size=16", *tokens]) == 0
    assert "of shape 20 × 32" in capsys.readouterr().out
    assert cli.run(["look", out, "shapes:3:size=16", "--out", str(tmp_path / "look.png")]) == 0
    assert cli.run(["inspect", out]) == 0
    assert "4 cls tokens" in capsys.readouterr().out
