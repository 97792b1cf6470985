"""Load weights of other libraries: infer the architecture, account for all tensors, and run no code."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

import quarterview as qv
from quarterview import cli
from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.weights.convert.architecture import IMAGENET_MEAN
from quarterview.weights.export.transformers import export_transformers
from quarterview.weights.loading import load, load_autoencoder, make_metadata, read_weights

TINY = {"model": "mae_vit_tiny_patch4", "image_size": 32, "decoder_width": 64, "decoder_depth": 2}
SMALL = {"model": "mae_vit_32x2x4_patch4", "image_size": 16, "decoder_width": 32, "decoder_depth": 1}


def disturbed(model: nn.Module) -> nn.Module:
    """Add noise to all parameters of a model, norms and biases too, except the fixed positions."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return disturbed(create_model(**TINY, decoder_heads=16))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def has_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def save_official_checkpoint(path: Path, tensors: dict[str, torch.Tensor], **args: object) -> Path:
    """Save a checkpoint as the training script of the official repository does."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.ones(3)
    optimizer.step()
    content = {
        "model": tensors,
        "optimizer": optimizer.state_dict(),
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "args": argparse.Namespace(batch_size=64, model="mae_vit_tiny", device="cuda", **args),
    }
    torch.save(content, path)
    return path


# ---------------------------------------------------------------------- official checkpoints


def test_official_checkpoint_with_decoder(model, images, tmp_path, capsys, caplog):
    args = {"norm_pix_loss": False, "mask_ratio": 0.6, "input_size": 32}
    path = save_official_checkpoint(tmp_path / "mae_visualize_vit_tiny.pth", model.state_dict(), **args)
    with caplog.at_level("INFO", "quarterview"):
        opened = qv.load(path)
    assert isinstance(opened, MaskedAutoencoder)
    assert has_equal_weights(model, opened)
    assert (opened.config.norm_pix_loss, opened.config.mask_ratio) == (False, 0.6)
    assert opened.config.mean == IMAGENET_MEAN
    assert capsys.readouterr() == ("", "")
    assert opened.notes == tuple(record.getMessage() for record in caplog.records)
    assert [record.levelname for record in caplog.records] == ["INFO", *["WARNING"] * (len(opened.notes) - 1)]
    assert "masked autoencoder of timm or the official code, mae_vit_tiny_patch4" in opened.notes[0]
    assert any("ImageNet's are assumed" in note for note in opened.notes)

    export_transformers(model, tmp_path / "theirs")
    folder = next(iter(sorted((tmp_path / "theirs").rglob("config.json")))).parent
    folder = tmp_path / "theirs" / "mae" if (tmp_path / "theirs" / "mae").exists() else folder
    theirs = ViTMAEForPreTraining.from_pretrained(folder).eval()
    noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(3))
    theirs.config.norm_pix_loss, theirs.config.mask_ratio = False, 0.6
    theirs.vit.embeddings.config.mask_ratio = 0.6
    with torch.no_grad():
        loss, expected = opened(images, noise=noise).loss, theirs(images, noise=noise).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_official_encoder_gets_a_new_decoder_and_a_note(model, images, tmp_path):
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    path = save_official_checkpoint(tmp_path / "mae_pretrain_vit_tiny.pth", encoder)
    opened = load(path)
    assert isinstance(opened, MaskedAutoencoder)
    assert (opened.config.decoder_width, opened.config.decoder_depth) == (512, 8)
    assert any("there is no decoder: it is randomly initialised" in note for note in opened.notes)
    theirs = ViTModel(
        ViTConfig(
            hidden_size=192,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=32,
            patch_size=4,
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    ).eval()
    renamed = {}
    for name, tensor in encoder.items():
        old = "encoder.layer.0.output.dense.bias" in theirs.state_dict()
        for key, part in transformers_names(name, tensor, old).items():
            renamed[key.removeprefix("vit.")] = part
    theirs.load_state_dict(renamed)
    with torch.no_grad():
        torch.testing.assert_close(
            opened.encode(images), theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_official_fine_tuned_model_is_a_classifier(images, tmp_path, pool):
    torch.manual_seed(0)
    ours = disturbed(Classifier(ClassifierConfig("mae_vit_tiny_patch4", (32, 32), classes=7, pool=pool)))
    path = save_official_checkpoint(tmp_path / "mae_finetuned_vit_tiny.pth", ours.state_dict(), nb_classes=7)
    opened = qv.load(path)
    assert isinstance(opened, Classifier)
    assert opened.config.pool == pool
    with torch.no_grad():
        assert torch.equal(opened(images), ours(images))


# ---------------------------------------------------------------------- transformers


def transformers_names(name: str, tensor: torch.Tensor, old: bool = False) -> dict[str, torch.Tensor]:
    """Return one of our tensors under its names in transformers 5, or 4 if `old`."""
    plain = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
        "mask_token": "decoder.mask_token",
    }
    if name in plain:
        return {plain[name]: tensor}
    if name.startswith("decoder_blocks."):
        _, index, part = name.split(".", 2)
        prefix = f"decoder.decoder_layers.{index}"
    elif name.startswith("decoder"):
        return {f"decoder.{name}": tensor}
    else:
        _, index, part = name.split(".", 2)
        prefix = f"vit.encoder.layer.{index}" if old else f"vit.layers.{index}"
    stem, leaf = part.rsplit(".", 1)
    if stem == "attn.qkv":
        letters = ("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj")
        where = "attention.attention" if old else "attention"
        return {f"{prefix}.{where}.{x}.{leaf}": t for x, t in zip(letters, tensor.chunk(3), strict=True)}
    new = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    before = {**new, "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense"}
    before["mlp.fc2"] = "output.dense"
    return {f"{prefix}.{(before if old else new).get(stem, stem)}.{leaf}": tensor}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_tensor_names_of_transformers_4_and_5(model, tmp_path, old, kind):
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors |= transformers_names(name, tensor, old)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert ("vit.encoder.layer.3.attention.attention.query.weight" in tensors) == old
    if kind == "model.safetensors":
        save_file(tensors, tmp_path / kind)
    else:
        torch.save(tensors, tmp_path / kind)
    config = ViTMAEConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=16,
        decoder_intermediate_size=256,
        norm_pix_loss=True,
    )
    (tmp_path / "config.json").write_text(config.to_json_string())
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = read_weights(tmp_path)
    assert weights.kind == "masked autoencoder of transformers"
    assert weights.config.mean == (0.1, 0.2, 0.3)
    assert "LayerNorm's eps was 1e-12 in training, but 1e-06 is used here" in weights.notes
    assert has_equal_weights(model, load_autoencoder(tmp_path))


def test_classifier_saved_by_transformers(tmp_path, images):
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        num_labels=3,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = disturbed(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours = qv.load(tmp_path)
    assert isinstance(ours, Classifier)
    assert ours.config.model == "mae_vit_48x2x4_patch8"
    assert ours.config.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-5, atol=1e-5)


def test_autoencoder_saved_by_transformers(tmp_path, images):
    """transformers 5 saves a decoder's blocks under names that no other version reads."""
    config = ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
    )
    torch.manual_seed(0)
    theirs = disturbed(ViTMAEForPreTraining(config))
    with torch.no_grad():  # transformers initialises them with zeros
        theirs.vit.embeddings.position_embeddings.copy_(get_2d_sincos_pos_embed(48, (4, 4)))
        theirs.decoder.decoder_pos_embed.copy_(get_2d_sincos_pos_embed(32, (4, 4)))
    theirs.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert (ours.config.model, ours.config.decoder_heads) == ("mae_vit_48x2x4_patch8", 2)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss, expected = ours(images, noise=noise).loss, theirs(images, noise=noise).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_sharded_weights_with_an_index(model, tmp_path):
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors |= {k: v.contiguous() for k, v in transformers_names(name, tensor).items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, tmp_path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 16}))
    assert has_equal_weights(model, load_autoencoder(tmp_path))
    assert len(read_weights(tmp_path).digest) == 16


# ---------------------------------------------------------------------- timm and plain state dicts


def test_timm_has_the_same_tensor_names(tmp_path, images):
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=0)
    theirs = disturbed(theirs)
    save_file(dict(theirs.state_dict()), tmp_path / "vit.safetensors")
    ours = qv.load(tmp_path / "vit.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    assert ours.config.model == "mae_vit_tiny_patch4"
    assert not torch.equal(ours.pos_embed, get_2d_sincos_pos_embed(192, (8, 8)))  # learned positions are kept


def test_timm_classifier_from_a_folder_and_by_name(tmp_path, images):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4}
    theirs = disturbed(timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments))
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    about = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": arguments,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32]},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    for source in (str(tmp_path), f"timm:local-dir:{tmp_path}"):
        ours = qv.load(source)
        assert isinstance(ours, Classifier)
        assert (ours.config.model, ours.config.mean) == ("mae_vit_48x2x4_patch4", (0.5,) * 3)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_a_head_with_unsupported_pooling_is_dropped_with_a_note(tmp_path):
    arguments = {"img_size": 32, "patch_size": 4, "global_pool": "avg", "fc_norm": False, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", **arguments)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": {}})
    )
    for source in (str(tmp_path), f"timm:local-dir:{tmp_path}"):
        weights = read_weights(source)
        assert set(weights.dropped_keys) == {"head.weight", "head.bias"}
        assert any(
            "the head is not used, because its pooling is not supported" in line
            for line in weights.summary_lines
        )


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_safetensors_file_that_begins_like_a_pickle(tmp_path, start):
    """The length of the header, at the start of a safetensors file, may look like a pickle."""
    small = create_model("mae_vit_64x1x1_patch4", image_size=16, decoder_width=32, decoder_depth=1)
    path = tmp_path / "x.safetensors"
    save_file(small.state_dict(), path, {"pad": ""})
    header, wanted, step = (
        int.from_bytes(path.read_bytes()[:8], "little"),
        int.from_bytes(start, "little"),
        256 ** len(start),
    )
    save_file(small.state_dict(), path, {"pad": " " * ((wanted - header) % step)})
    assert path.read_bytes().startswith(start)
    assert has_equal_weights(small, load_autoencoder(path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("container", [None, "model", "state_dict"])
def test_plain_state_dicts_with_prefixes_and_containers(model, tmp_path, prefix, container):
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(tensors if container is None else {container: tensors, "epoch": 3}, tmp_path / "x.pt")
    assert has_equal_weights(model, load_autoencoder(tmp_path / "x.pt"))


def test_a_rectangular_grid_is_inferred_from_sincos_positions(tmp_path):
    torch.manual_seed(0)
    ours = create_model(**{**TINY, "image_size": (16, 48)}, decoder_heads=16)
    torch.save(ours.state_dict(), tmp_path / "x.pt")
    assert qv.load(tmp_path / "x.pt").config.image_size == (16, 48)


def test_hub_models_are_read_from_the_cache(model, tmp_path, monkeypatch):
    """The folder has the layout of the Hub's cache; nothing is downloaded."""
    import huggingface_hub.constants

    folder = tmp_path / "models--someone--mae-tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors", make_metadata(model.config))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert has_equal_weights(model, load_autoencoder("hf:someone/mae-tiny"))
    with pytest.raises(UserError, match=r"Cannot read hf:someone/else: .*Check the name"):
        qv.load("hf:someone/else")


@pytest.mark.parametrize("source", ["mae_pretrain_vit_tiny.pth", "folder"])
def test_knn_and_finetune_accept_foreign_weights(model, tmp_path, capsys, source):
    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    if source == "folder":
        (tmp_path / "folder").mkdir()
        save_file(encoder, tmp_path / "folder" / "model.safetensors")
        (tmp_path / "folder" / "config.json").write_text('{"num_classes": 0}')
    else:
        save_official_checkpoint(tmp_path / source, encoder)
    sets = ["--train", "shapes:60:size=32", "--test", "shapes:40:seed=1:size=32", "--device", "cpu"]
    path = str(tmp_path / source)
    assert cli.run(["knn", path, *sets, "--no-baselines"]) == 0
    tune = ["--steps", "1", "--batch-size", "4", "--randaugment", "none", "--workers", "0"]
    assert cli.run(["finetune", path, *sets, *tune, "--out", str(tmp_path / "ft")]) == 0
    assert "encoder of timm or the official code" in capsys.readouterr().out
    found = qv.load(tmp_path / "ft").state_dict()
    moved = (found["blocks.0.mlp.fc1.weight"] - model.state_dict()["blocks.0.mlp.fc1.weight"]).abs().max()
    assert moved < 0.01  # fine-tuning started from these weights, not from random ones


# ---------------------------------------------------------------------- errors


def test_missing_and_unexpected_tensors_are_errors_unless_allowed(model, tmp_path):
    tensors = dict(model.state_dict())
    del tensors["blocks.3.attn.qkv.bias"]
    torch.save(tensors, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"blocks\.3\.attn\.qkv\.bias is missing.*--allow-partial"):
        qv.load(tmp_path / "less.pt")
    opened = read_weights(tmp_path / "less.pt", allow_partial=["blocks.3.attn.*"])
    assert opened.missing_keys == ("blocks.3.attn.qkv.bias",)
    assert any("randomly initialised: blocks.3.attn.qkv.bias" in line for line in opened.summary_lines)

    torch.save({**model.state_dict(), "blocks.0.extra": torch.zeros(2)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=r"blocks\.0\.extra is unexpected"):
        qv.load(tmp_path / "more.pt")
    opened = read_weights(tmp_path / "more.pt", allow_partial=["blocks.0.extra"])
    assert opened.dropped_keys == ("blocks.0.extra",)
    assert "not used: blocks.0.extra" in opened.summary_lines

    tensors = {**model.state_dict(), "norm.weight": torch.zeros(100)}
    torch.save(tensors, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"norm\.weight has shape \(100,\), not \(192,\)"):
        qv.load(tmp_path / "other.pt")


class MaliciousPickle:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle 2", "pickle 4"])
def test_a_malicious_pickle_is_never_executed(model, tmp_path, how):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": model.state_dict(), "args": MaliciousPickle(trace)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2 if how == "pickle 2" else 4))
    refused = (
        r"its pickle (would run (posix\.mkdir|torch\.storage\._load_from_bytes)|has more than tensors); only"
    )
    with pytest.raises(UserError, match=refused):
        qv.load(path)
    assert not trace.exists()
    with path.open("rb") as file:  # without weights_only, the code runs
        torch.load(file, weights_only=False) if how == "torch" else pickle.load(file)
    assert trace.exists()


def make_wrong_files(folder: Path, model: MaskedAutoencoder) -> dict[str, tuple[Path, str]]:
    """Create eight files without supported weights; return them with the expected error messages."""
    import torchvision

    save_file(model.state_dict(), folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:5000])
    (folder / "empty.pth").touch()
    (folder / "config.json").write_text('{"a": 1}')
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet.pth")
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), folder / "optimizer.pth")
    clip = {
        "visual.class_embedding": torch.zeros(8),
        "visual.conv1.weight": torch.zeros(8, 3, 4, 4),
        "visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
    }
    save_file(clip, folder / "clip.safetensors")
    timms = dict(timm.create_model("vit_tiny_patch16_224", pre_norm=True, num_classes=0).state_dict())
    save_file(timms, folder / "timm_clip.safetensors")
    (folder / "plain").mkdir()
    save_file(model.state_dict(), folder / "plain" / "model.safetensors")
    return {
        "empty": (folder / "empty.pth", "the file is empty"),
        "truncated": (folder / "cut.safetensors", "or truncated"),
        "JSON": (folder / "config.json", "the file is JSON and has no weights"),
        "ResNet": (folder / "resnet.pth", "it looks like a ResNet"),
        "optimizer": (folder / "optimizer.pth", "the state of an optimizer and no model"),
        "CLIP": (folder / "clip.safetensors", "it looks like CLIP"),
        "CLIP of timm": (folder / "timm_clip.safetensors", "it looks like CLIP's vision transformer"),
        "no config": (folder / "plain", "it has no config.json"),
    }


def test_wrong_files_get_a_clear_error_in_one_line(model, tmp_path):
    for name, (path, message) in make_wrong_files(tmp_path, model).items():
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            qv.load(path)
        assert "\n" not in str(raised.value), name
        assert re.search(r"\. (Give|For a plain vision transformer, give) ", str(raised.value)), name


def test_load_into_rejects_another_depth(model, tmp_path):
    from quarterview.weights import load_into

    torch.save(model.state_dict(), tmp_path / "x.pt")
    other = create_model(**{**TINY, "model": "mae_vit_192x6x3_patch4"}, decoder_heads=16)
    with pytest.raises(UserError, match="depth is 12, not 6"):
        load_into(other, tmp_path / "x.pt")
