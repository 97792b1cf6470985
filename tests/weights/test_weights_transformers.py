"""Export to transformers; loss, predictions and gradients equal those of its implementation of the paper."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel
from weights_models import CLASSES, EVERY_SIZE, SIZES, autoencoder, classifier, random_images

from quarterview.errors import UserError
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.weights.export.transformers import export_transformers

SMALL_DECODER = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
MODELS = {
    "tiny/4 at 32": {"model": "mae_vit_tiny_patch4", "image_size": 32, **SMALL_DECODER},
    "base width/16 at 224": {"model": "mae_vit_768x2x12_patch16", "decoder_depth": 1},
    "one channel, 8 at 40": {
        "model": "mae_vit_48x3x4_patch8",
        "image_size": 40,
        "in_chans": 1,
        "mask_ratio": 0.6,
        **SMALL_DECODER,
    },
}
POSITION_EMBEDDINGS = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
TOLERANCE = {"rtol": 0, "atol": 1e-5}
SQUARE = [size for size in EVERY_SIZE if "96×160" not in str(size)]
TRANSFORMERS_5_NAMES = {
    "stacks": ("vit.layers", "decoder.decoder_layers"),
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
FILE_NAMES = {  # transformers 4, and the files that both versions read
    "stacks": ("vit.encoder.layer", "decoder.decoder_layers"),
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
MODEL_NAMES: dict[str, Any] = (
    TRANSFORMERS_5_NAMES if int(transformers.__version__.split(".")[0]) >= 5 else FILE_NAMES
)


def load_part(kind: Any, folder: Path, missing: set[str] = frozenset(), **options: Any) -> Any:
    """Load a folder with a transformers class, and check that no weights but `missing` are missing."""
    theirs, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert set(info["missing_keys"]) == missing
    for problem in ("unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    return theirs.eval()


def export_and_load(model: MaskedAutoencoder, folder: Path) -> ViTMAEForPreTraining:
    """Export a model, and load it with transformers."""
    export_transformers(model, folder)
    return load_part(ViTMAEForPreTraining, folder / "mae")


def get_transformers_names(name: str, names: dict[str, Any] = MODEL_NAMES) -> list[str]:
    """Return the names in transformers of one of our parameters; three for qkv."""
    stem, _, leaf = name.rpartition(".")
    others = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    if name in others:
        return [others[name]]
    if stem in others:
        return [f"{others[stem]}.{leaf}"]
    if not name.startswith(("blocks.", "decoder_blocks.")):
        return [f"decoder.{name}"]
    stack, index, part = stem.split(".", maxsplit=2)
    prefix = names["stacks"][stack == "decoder_blocks"]
    parts = (names[part],) if isinstance(names[part], str) else names[part]
    return [f"{prefix}.{index}.{theirs}.{leaf}" for theirs in parts]


def concatenate_tensors(tensors: dict[str, Tensor], name: str, names: dict[str, Any] = MODEL_NAMES) -> Tensor:
    return torch.cat([tensors[theirs] for theirs in get_transformers_names(name, names)])


def check_parity(model: MaskedAutoencoder, theirs: nn.Module, batch: int) -> None:
    """Compare the loss, the predictions and all gradients for one batch."""
    model.train()
    theirs.train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, model.config.in_chans, *model.config.image_size, generator=generator)
    noise = torch.rand(batch, model.config.num_patches, generator=generator)

    ours = model(images, noise=noise)
    out = theirs(images, noise=noise)
    assert torch.equal(ours.mask, out.mask.bool())
    assert float(ours.loss.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    predicted = out.logits[ours.mask].view_as(ours.pred)  # both in ascending patch order
    torch.testing.assert_close(ours.pred, predicted, rtol=1e-5, atol=1e-5)

    ours.loss.backward()
    out.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        expected = concatenate_tensors(gradients, name)
        compared.update(get_transformers_names(name))
        largest = float(expected.abs().max())
        assert largest > 0, name
        assert float((parameter.grad - expected).abs().max()) <= 1e-5 * largest, name
        if name.endswith("attn.qkv.bias"):  # the softmax cancels the bias of the keys
            for key_bias in (parameter.grad.chunk(3)[1], expected.chunk(3)[1]):
                assert float(key_bias.abs().max()) < 1e-7
    # transformers 5 makes the fixed position embeddings trainable when it loads a file
    assert compared == gradients.keys() - set(POSITION_EMBEDDINGS)


@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_predictions_and_gradients_equal_transformers(tmp_path, disturbed, name, norm_pix_loss):
    torch.manual_seed(0)
    model = disturbed(create_model(**MODELS[name], norm_pix_loss=norm_pix_loss))
    check_parity(model, export_and_load(model, tmp_path), batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_tiny_patch16"])
def test_full_models_at_224_equal_transformers(tmp_path, name, norm_pix_loss):
    torch.manual_seed(0)
    model = create_model(name, norm_pix_loss=norm_pix_loss)
    check_parity(model, export_and_load(model, tmp_path), batch=2)


def test_all_weights_and_both_position_embeddings_are_exported(tmp_path):
    torch.manual_seed(0)
    model = create_model(**MODELS["one channel, 8 at 40"])
    in_memory = export_and_load(model, tmp_path).state_dict()
    ours = model.state_dict()
    for theirs, names in (
        (in_memory, MODEL_NAMES),
        (load_file(tmp_path / "mae/model.safetensors"), FILE_NAMES),
    ):
        for name, value in ours.items():
            assert torch.equal(value, concatenate_tensors(theirs, name, names)), name
        assert {n for name in ours for n in get_transformers_names(name, names)} == theirs.keys()
    for table in POSITION_EMBEDDINGS:
        assert float(in_memory[table][0, 1:].abs().sum(dim=1).min()) > 0


@pytest.mark.parametrize("size", EVERY_SIZE)
@torch.no_grad()
def test_the_exported_encoder_lacks_only_the_pooler(tmp_path, size):
    model = autoencoder(**SIZES[size])
    result = export_transformers(model, tmp_path, parts=["vit"])
    assert result.max_difference < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "quarterview.json", "vit"]
    theirs, images = load_part(ViTModel, tmp_path / "vit", add_pooling_layer=False), random_images(model)
    torch.testing.assert_close(theirs(images).last_hidden_state, model.encode(images), **TOLERANCE)
    whole = load_part(ViTModel, tmp_path / "vit", {"pooler.dense.weight", "pooler.dense.bias"})
    assert whole.config.layer_norm_eps == 1e-6
    for name, value in model.state_dict().items():
        if not name.startswith(("decoder", "mask_token")):
            prefixed = {f"vit.{key}": tensor for key, tensor in theirs.state_dict().items()}
            assert torch.equal(value, concatenate_tensors(prefixed, name)), name


@pytest.mark.parametrize("size", SQUARE)
@torch.no_grad()
def test_the_exported_autoencoder_predicts_the_same_for_square_images(tmp_path, size):
    model = autoencoder(**SIZES[size])
    export_transformers(model, tmp_path)
    theirs, images = load_part(ViTMAEForPreTraining, tmp_path / "mae"), random_images(model)
    noise = torch.rand(len(images), model.config.num_patches)
    ours, out = model(images, noise=noise), theirs(images, noise=noise)
    torch.testing.assert_close(out.logits[ours.mask].view_as(ours.pred), ours.pred, **TOLERANCE)
    torch.testing.assert_close(out.loss, ours.loss, **TOLERANCE)


@pytest.mark.parametrize("image_size", [(16, 16), (16, 32)])
@torch.no_grad()
def test_a_classifier_with_cls_pooling_keeps_its_head(tmp_path, image_size):
    model = classifier(pool="cls", image_size=image_size)
    assert export_transformers(model, tmp_path).max_difference < 1e-5
    theirs, images = load_part(ViTForImageClassification, tmp_path / "classifier"), random_images(model)
    torch.testing.assert_close(theirs(images).logits, model(images), **TOLERANCE)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, concatenate_tensors(theirs.state_dict(), name)), name
    vit = load_part(ViTModel, tmp_path / "vit", add_pooling_layer=False)
    torch.testing.assert_close(vit(images).last_hidden_state, model.encode(images), **TOLERANCE)
    assert not (tmp_path / "mae").exists()


def test_classes_without_names_are_numbered(tmp_path):
    export_transformers(classifier(pool="cls", class_names=None), tmp_path, parts=["classifier"])
    config = json.loads((tmp_path / "classifier" / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"} or "id2label" not in config
    assert config["architectures"] == ["ViTForImageClassification"]


def test_the_configuration_is_exported(tmp_path):
    model = create_model(**MODELS["one channel, 8 at 40"], norm_pix_loss=False)
    config = export_and_load(model, tmp_path).config
    assert config.mask_ratio == 0.6
    assert config.norm_pix_loss is False
    assert config.layer_norm_eps == 1e-6
    assert (config.image_size, config.patch_size, config.num_channels) == (40, 8, 1)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 4)
    assert config.intermediate_size == 192
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (64, 2)
    assert (config.decoder_num_attention_heads, config.decoder_intermediate_size) == (4, 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": (32, 64)},
            r"does not support images of 32 × 64 pixels \(only square ones\)\. Use --parts vit",
        ),
        ({"encoder_mask_tokens": True}, "does not support mask tokens in the encoder"),
        ({"decoder_depth": 0}, "does not support a decoder without blocks"),
        ({"decoder": "cross"}, r"does not support a cross-attention decoder\. Use --parts vit, or --to timm"),
        ({"predict_all": True}, "does not support predictions of visible patches"),
        ({"target": "hog"}, r"predictions of oriented gradients \(HOG\) in cells of 8 × 8 pixels"),
        ({"mask": "grid"}, r"does not support grid masks \(only random ones\)"),
        ({"mask": "block", "predict_all": True}, "predictions of visible patches or block masks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_models_that_transformers_does_not_support_are_errors(tmp_path, changes, message):
    base = {"model": "mae_vit_32x1x2_patch8", "image_size": 32, **SMALL_DECODER}
    model = create_model(**{**base, **changes})
    with pytest.raises(UserError, match=message):
        export_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_transformers(model, tmp_path / "out", parts=["vit"])  # the encoder alone is supported


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (classifier(pool="mean"), None, r"reads the mean of the patch tokens .*\. Use --to timm, onnx"),
        (
            classifier(pool="mean"),
            ["vit"],
            "ViTModel of transformers does not support a head that reads the mean",
        ),
        (classifier(pool="cls"), ["mae"], r"no decoder\. Use --parts vit or classifier, or --to timm"),
        (autoencoder(), ["classifier"], r"no head\. Use --parts mae or vit"),
        (
            autoencoder(),
            ["vitt"],
            r"Unknown part 'vitt'\. Did you mean 'vit'\? Give one of: mae, vit, classifier",
        ),
        (autoencoder(), [], r"No part to export is given\. Give --parts mae vit\."),
    ],
)
def test_unsupported_and_unknown_parts_are_errors(tmp_path, model, parts, message):
    with pytest.raises(UserError, match=message):
        export_transformers(model, tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


def test_position_embeddings_are_trainable_in_transformers_5_as_the_card_says(tmp_path):
    theirs = export_and_load(autoencoder(), tmp_path)
    trainable = {table: dict(theirs.named_parameters())[table].requires_grad for table in POSITION_EMBEDDINGS}
    assert set(trainable.values()) == {MODEL_NAMES is TRANSFORMERS_5_NAMES}
    assert "trainable" in (tmp_path / "README.md").read_text("utf-8")
