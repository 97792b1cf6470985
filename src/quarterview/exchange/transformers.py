"""To Hugging Face transformers."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.model.mae import MaskedAutoencoder
from quarterview.model.vit import LAYER_NORM_EPS, MLP_RATIO

_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_STACKS = {"blocks": ("vit.layers", "vit.encoder.layer"), "decoder_blocks": ("decoder.decoder_layers",)}
_IN_A_BLOCK = {  # names since transformers 5, then those of transformers 4
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
    "attn.qkv": ("attention.{qkv}_proj", "attention.attention.{query_key_value}"),
    "attn.proj": ("attention.o_proj", "attention.output.dense"),
    "mlp.fc1": ("mlp.fc1", "intermediate.dense"),
    "mlp.fc2": ("mlp.fc2", "output.dense"),
}


def export_transformers(model: MaskedAutoencoder, folder: str | Path) -> None:
    """Write a folder that ``transformers.ViTMAEForPreTraining.from_pretrained`` opens.

    The position tables, which transformers leaves at zero in a model built from its configuration
    alone, are filled, and `mask_ratio`, `norm_pix_loss` and the LayerNorm epsilon of 1e-6 are set.

    Raises:
        UserError: if transformers cannot hold the model, or is not installed (the extra
            ``quarterview[transformers]``).
    """
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        raise UserError(
            "exporting to transformers needs it: pip install 'quarterview[transformers]'"
        ) from None
    _check_expressible(model)
    config, shape = model.config, model.config.shape
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            intermediate_size=MLP_RATIO * shape.width,
            image_size=config.image_size[0],
            patch_size=shape.patch_size,
            num_channels=config.in_chans,
            decoder_hidden_size=config.decoder_width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=MLP_RATIO * config.decoder_width,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss,
            layer_norm_eps=LAYER_NORM_EPS,
        )
    )
    accepted = theirs.state_dict().keys()
    renamed = dict(
        item for name, value in model.state_dict().items() for item in _rename(name, value, accepted)
    )
    theirs.load_state_dict(renamed)
    theirs.save_pretrained(folder)


def _check_expressible(model: MaskedAutoencoder) -> None:
    config = model.config
    limits: dict[str, Any] = {
        f"a {config.image_size} image (only squares)": config.image_size[0] != config.image_size[1],
        "mask tokens in the encoder": config.encoder_mask_tokens,
        "a decoder without blocks": config.decoder_depth == 0,
        "predictions of visible patches": config.predict_all,
        f"{config.mask} masks (only random ones)": config.mask != "random",
    }
    broken = [what for what, is_so in limits.items() if is_so]
    if broken:
        raise UserError(f"transformers' ViTMAE cannot hold {' or '.join(broken)}")


def _rename(name: str, value: Tensor, accepted: Any) -> Iterator[tuple[str, Tensor]]:
    """One of our tensors under the names that the installed transformers gives it."""
    block = re.fullmatch(r"(blocks|decoder_blocks)\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        stem, _, leaf = name.rpartition(".")
        yield (_NAMES[name], value) if name in _NAMES else (f"{_NAMES[stem]}.{leaf}", value)
        return
    stack, index, part, leaf = block.groups()
    candidates = [f"{s}.{index}.{p}.{leaf}" for s in _STACKS[stack] for p in _IN_A_BLOCK[part]]
    if part != "attn.qkv":
        yield next(key for key in candidates if key in accepted), value
        return
    for short, long, third in zip("qkv", ("query", "key", "value"), torch.chunk(value, 3), strict=True):
        keys = [c.replace("{qkv}", short).replace("{query_key_value}", long) for c in candidates]
        yield next(key for key in keys if key in accepted), third.contiguous()
