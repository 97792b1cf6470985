"""Promise 1 of the design: the official arithmetic, through transformers' implementation of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining

from quarterview.errors import UserError
from quarterview.exchange.transformers import export_transformers
from quarterview.model.mae import MaskedAutoencoder, create_model

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


def opened(model: MaskedAutoencoder, folder: Path) -> ViTMAEForPreTraining:
    """The model as transformers opens our export of it."""
    export_transformers(model, folder)
    theirs, info = ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], kind
    return theirs


def their_name(name: str) -> list[str]:
    """Our name of a parameter -> those that transformers 5 has for it; three for qkv."""
    stem, _, leaf = name.rpartition(".")
    encoder = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
    }
    if name in encoder:
        return [encoder[name]]
    if stem in encoder:
        return [f"{encoder[stem]}.{leaf}"]
    if not name.startswith(("blocks.", "decoder_blocks.")):
        return [f"decoder.{name}"]
    stack, index, part = stem.split(".", maxsplit=2)
    prefix = f"vit.layers.{index}" if stack == "blocks" else f"decoder.decoder_layers.{index}"
    parts = {
        "norm1": ["layernorm_before"],
        "norm2": ["layernorm_after"],
        "attn.qkv": [f"attention.{letter}_proj" for letter in "qkv"],
        "attn.proj": ["attention.o_proj"],
    }
    return [f"{prefix}.{theirs}.{leaf}" for theirs in parts.get(part, [part])]


def gathered(tensors: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([tensors[theirs] for theirs in their_name(name)])


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
    theirs = opened(model, tmp_path).state_dict()
    ours = model.state_dict()
    for name, value in ours.items():
        assert torch.equal(value, gathered(theirs, name)), name
    assert {n for name in ours for n in their_name(name)} == theirs.keys()
    for table in TABLES:
        assert float(theirs[table][0, 1:].abs().sum(dim=1).min()) > 0


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
        ({"image_size": (32, 64)}, r"cannot hold a \(32, 64\) image \(only squares\)"),
        ({"encoder_mask_tokens": True}, "cannot hold mask tokens in the encoder"),
        ({"decoder_depth": 0}, "cannot hold a decoder without blocks"),
        ({"predict_all": True}, "cannot hold predictions of visible patches"),
        ({"mask": "grid"}, r"cannot hold grid masks \(only random ones\)"),
        ({"mask": "block", "predict_all": True}, "predictions of visible patches or block masks"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_transformers_cannot_hold_is_an_error(tmp_path, changes, message):
    base = {"model": "mae_vit_32x1x2_patch8", "image_size": 32, **SMALL_DECODER}
    with pytest.raises(UserError, match=message):
        export_transformers(create_model(**{**base, **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
