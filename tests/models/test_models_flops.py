"""The closed form agrees with what torch counts in the step as it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quarterview.models.config import MAEConfig
from quarterview.models.flops import block_flops, flops
from quarterview.models.mae import MaskedAutoencoder

TINY = {"model": "mae_vit_64x2x4_patch4", "image_size": 32, "decoder_width": 32, "decoder_heads": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_depth": 1},
        {"decoder_depth": 3},
        {"decoder_depth": 2, "mask_ratio": 0.5, "image_size": (32, 48), "in_chans": 5},
        {"decoder_depth": 2, "encoder_mask_tokens": True},
        {"decoder_depth": 2, "predict_all": True},
        {"decoder_depth": 0, "encoder_mask_tokens": True},
        {"decoder_depth": 2, "decoder": "cross"},
        {"decoder_depth": 3, "decoder": "cross", "predict_share": 0.3},
        {"decoder_depth": 2, "cls_tokens": 4},
        {"decoder_depth": 2, "cls_tokens": 4, "decoder": "cross"},
        {"decoder_depth": 2, "cls_tokens": 2, "fused_blocks": (1,)},
        {"decoder_depth": 0, "encoder_mask_tokens": True, "fused_blocks": (1,)},
    ],
    ids=str,
)
def test_the_closed_form_is_what_a_step_computes(options):
    config = MAEConfig(**{**TINY, **options})
    model = MaskedAutoencoder(config)
    images = torch.randn(2, config.in_chans, *config.image_size)
    with FlopCounterMode(display=False) as counter:
        loss = model(images).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == 2 * flops(config).forward
    assert counter.get_total_flops() == 2 * flops(config).step


def test_vit_large_with_mask_tokens_costs_what_the_paper_says():
    """Table 1c: 3.3 times the operations of the encoder without them."""
    large = MAEConfig(model="mae_vit_large_patch16")
    tokens = MAEConfig(model="mae_vit_large_patch16", encoder_mask_tokens=True)
    assert flops(tokens).forward / flops(large).forward == pytest.approx(3.3, abs=0.1)


def test_a_block_of_the_textbook():
    """12 d² multiply-adds a token, and 2 T d for attention."""
    assert block_flops(197, 768) == 2 * 197 * (12 * 768**2 + 2 * 197 * 768)
