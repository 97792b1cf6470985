"""To transformers; and promise 1 of the design: the official arithmetic, through its implementation of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel
from weights_models import CLASSES, EVERY_SIZE, SIZES, autoencoder, classifier, pictures

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
TABLES = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
WITHIN = {"rtol": 0, "atol": 1e-5}
SQUARE = [size for size in EVERY_SIZE if "96×160" not in str(size)]
SINCE_5 = {
    "stacks": ("vit.layers", "decoder.decoder_layers"),
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ON_THE_HUB = {  # transformers 4, and the files of both
    "stacks": ("vit.encoder.layer", "decoder.decoder_layers"),
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
IN_MEMORY: dict[str, Any] = SINCE_5 if int(transformers.__version__.split(".")[0]) >= 5 else ON_THE_HUB


def read(kind: Any, folder: Path, missing: set[str] = frozenset(), **options: Any) -> Any:
    """What a class of transformers makes of a folder; nothing but `missing` may be out of place."""
    theirs, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert set(info["missing_keys"]) == missing
    for problem in ("unexpected_keys", "mismatched_keys"):
        assert not info[problem], problem
    return theirs.eval()


def opened(model: MaskedAutoencoder, folder: Path) -> ViTMAEForPreTraining:
    """The model as transformers opens our export of it."""
    export_transformers(model, folder)
    return read(ViTMAEForPreTraining, folder / "mae")


def their_name(name: str, names: dict[str, Any] = IN_MEMORY) -> list[str]:
    """Our name of a parameter -> those that transformers has for it; three for qkv."""
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


def gathered(tensors: dict[str, Tensor], name: str, names: dict[str, Any] = IN_MEMORY) -> Tensor:
    return torch.cat([tensors[theirs] for theirs in their_name(name, names)])


def check_parity(model: MaskedAutoencoder, theirs: nn.Module, batch: int) -> None:
    """Loss, predictions and every gradient of one batch."""
    model.train()
    theirs.train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, model.config.in_chans, *model.config.image_size, generator=generator)
    noise = torch.rand(batch, model.config.patches, generator=generator)

    ours = model(images, noise=noise)
    out = theirs(images, noise=noise)
    assert torch.equal(ours.mask, out.mask.bool())
    assert float(ours.loss.detach()) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    predicted = out.logits[ours.mask].view_as(ours.pred)  # ascending, as ours
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
        expected = gathered(gradients, name)
        compared.update(their_name(name))
        largest = float(expected.abs().max())
        assert largest > 0, name
        assert float((parameter.grad - expected).abs().max()) <= 1e-5 * largest, name
        if name.endswith("attn.qkv.bias"):  # a bias of the keys moves every logit of a row alike
            for key_bias in (parameter.grad.chunk(3)[1], expected.chunk(3)[1]):
                assert float(key_bias.abs().max()) < 1e-7
    # transformers 5 makes the fixed tables trainable whenever it opens a file
    assert compared == gradients.keys() - set(TABLES)


@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_predictions_and_gradients_equal_transformers(tmp_path, disturbed, name, norm_pix_loss):
    torch.manual_seed(0)
    model = disturbed(create_model(**MODELS[name], norm_pix_loss=norm_pix_loss))
    check_parity(model, opened(model, tmp_path), batch=3)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_tiny_patch16"])
def test_full_models_at_224_equal_transformers(tmp_path, name, norm_pix_loss):
    torch.manual_seed(0)
    model = create_model(name, norm_pix_loss=norm_pix_loss)
    check_parity(model, opened(model, tmp_path), batch=2)


def test_every_weight_and_both_position_tables_arrive(tmp_path):
    torch.manual_seed(0)
    model = create_model(**MODELS["one channel, 8 at 40"])
    in_memory = opened(model, tmp_path).state_dict()
    ours = model.state_dict()
    for theirs, names in (
        (in_memory, IN_MEMORY),
        (load_file(tmp_path / "mae/model.safetensors"), ON_THE_HUB),
    ):
        for name, value in ours.items():
            assert torch.equal(value, gathered(theirs, name, names)), name
        assert {n for name in ours for n in their_name(name, names)} == theirs.keys()
    for table in TABLES:
        assert float(in_memory[table][0, 1:].abs().sum(dim=1).min()) > 0


@pytest.mark.parametrize("size", EVERY_SIZE)
@torch.no_grad()
def test_the_encoder_alone_lacks_nothing_but_the_pooler(tmp_path, size):
    model = autoencoder(**SIZES[size])
    done = export_transformers(model, tmp_path, parts=["vit"])
    assert done.largest < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "quarterview.json", "vit"]
    theirs, images = read(ViTModel, tmp_path / "vit", add_pooling_layer=False), pictures(model)
    torch.testing.assert_close(theirs(images).last_hidden_state, model.encode(images), **WITHIN)
    whole = read(ViTModel, tmp_path / "vit", {"pooler.dense.weight", "pooler.dense.bias"})
    assert whole.config.layer_norm_eps == 1e-6
    for name, value in model.state_dict().items():
        if not name.startswith(("decoder", "mask_token")):
            prefixed = {f"vit.{key}": tensor for key, tensor in theirs.state_dict().items()}
            assert torch.equal(value, gathered(prefixed, name)), name


@pytest.mark.parametrize("size", SQUARE)
@torch.no_grad()
def test_the_autoencoder_predicts_the_same_at_every_square_size(tmp_path, size):
    model = autoencoder(**SIZES[size])
    export_transformers(model, tmp_path)
    theirs, images = read(ViTMAEForPreTraining, tmp_path / "mae"), pictures(model)
    noise = torch.rand(len(images), model.config.patches)
    ours, out = model(images, noise=noise), theirs(images, noise=noise)
    torch.testing.assert_close(out.logits[ours.mask].view_as(ours.pred), ours.pred, **WITHIN)
    torch.testing.assert_close(out.loss, ours.loss, **WITHIN)


@pytest.mark.parametrize("image_size", [(16, 16), (16, 32)])
@torch.no_grad()
def test_a_classifier_that_reads_cls_keeps_its_head(tmp_path, image_size):
    model = classifier(pool="cls", image_size=image_size)
    assert export_transformers(model, tmp_path).largest < 1e-5
    theirs, images = read(ViTForImageClassification, tmp_path / "classifier"), pictures(model)
    torch.testing.assert_close(theirs(images).logits, model(images), **WITHIN)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, gathered(theirs.state_dict(), name)), name
    vit = read(ViTModel, tmp_path / "vit", add_pooling_layer=False)
    torch.testing.assert_close(vit(images).last_hidden_state, model.encode(images), **WITHIN)
    assert not (tmp_path / "mae").exists()


def test_classes_without_names_are_numbered(tmp_path):
    export_transformers(classifier(pool="cls", class_names=None), tmp_path, parts=["classifier"])
    config = json.loads((tmp_path / "classifier" / "config.json").read_text("utf-8"))
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"} or "id2label" not in config
    assert config["architectures"] == ["ViTForImageClassification"]


def test_the_configuration_arrives(tmp_path):
    model = create_model(**MODELS["one channel, 8 at 40"], norm_pix_loss=False)
    config = opened(model, tmp_path).config
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
        ({"image_size": (32, 64)}, r"cannot hold a \(32, 64\) image \(only squares\); .* the part vit"),
        ({"encoder_mask_tokens": True}, "cannot hold mask tokens in the encoder"),
        ({"decoder_depth": 0}, "cannot hold a decoder without blocks"),
        ({"decoder": "cross"}, "cannot hold a cross-attention decoder; accepted: the part vit, or timm"),
        ({"predict_all": True}, "cannot hold predictions of visible patches"),
        ({"target": "hog"}, r"predictions of oriented gradients \(HOG\) in cells of 8 × 8 pixels"),
        ({"mask": "grid"}, r"cannot hold grid masks \(only random ones\)"),
        ({"mask": "block", "predict_all": True}, "predictions of visible patches or block masks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_transformers_cannot_hold_is_an_error(tmp_path, changes, message):
    base = {"model": "mae_vit_32x1x2_patch8", "image_size": 32, **SMALL_DECODER}
    model = create_model(**{**base, **changes})
    with pytest.raises(UserError, match=message):
        export_transformers(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_transformers(model, tmp_path / "out", parts=["vit"])  # the encoder it holds


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (classifier(pool="mean"), None, "reads the mean of the patch tokens .* accepted: timm, onnx"),
        (classifier(pool="mean"), ["vit"], "ViTModel cannot hold a head that reads the mean"),
        (classifier(pool="cls"), ["mae"], "no decoder; accepted: the part vit or classifier, or timm"),
        (autoencoder(), ["classifier"], "no head; accepted: the part mae or vit"),
        (autoencoder(), ["vitt"], "unknown part 'vitt'; accepted: mae, vit, classifier. Did you mean 'vit'"),
        (autoencoder(), [], "no part to export; accepted: mae vit"),
    ],
)
def test_a_part_that_is_not_there_is_an_error(tmp_path, model, parts, message):
    with pytest.raises(UserError, match=message):
        export_transformers(model, tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


def test_the_tables_are_trainable_when_transformers_5_opens_them_as_the_card_says(tmp_path):
    theirs = opened(autoencoder(), tmp_path)
    trainable = {table: dict(theirs.named_parameters())[table].requires_grad for table in TABLES}
    assert set(trainable.values()) == {IN_MEMORY is SINCE_5}
    assert "trainable" in (tmp_path / "README.md").read_text("utf-8")
