"""Tests of the FLOP counts: they equal the counts of torch's FlopCounterMode."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quarterview.models.config import MAEConfig
from quarterview.models.flops import count_block_flops, count_flops
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
        {"decoder_depth": 3, "decoder": "cross", "predict_ratio": 0.3},
        {"decoder_depth": 2, "cls_tokens": 4},
        {"decoder_depth": 2, "cls_tokens": 4, "decoder": "cross"},
        {"decoder_depth": 2, "cls_tokens": 2, "fused_blocks": (1,)},
        {"decoder_depth": 0, "encoder_mask_tokens": True, "fused_blocks": (1,)},
    ],
    ids=str,
)
def test_the_closed_form_equals_torchs_count_of_a_step(options):
    config = MAEConfig(**{**TINY, **options})
    model = MaskedAutoencoder(config)
    images = torch.randn(2, config.in_chans, *config.image_size)
    with FlopCounterMode(display=False) as counter:
        loss = model(images).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == 2 * count_flops(config).forward
    assert counter.get_total_flops() == 2 * count_flops(config).step


def test_mask_tokens_cost_3_3_times_as_in_the_paper():
    """Table 1c: 3.3 times the FLOPs of an encoder without mask tokens."""
    large = MAEConfig(model="mae_vit_large_patch16")
    tokens = MAEConfig(model="mae_vit_large_patch16", encoder_mask_tokens=True)
    assert count_flops(tokens).forward / count_flops(large).forward == pytest.approx(3.3, abs=0.1)


def test_a_block_has_the_textbook_flops():
    """12 d² multiply-adds per token, and 2 T d for attention."""
    assert count_block_flops(197, 768) == 2 * 197 * (12 * 768**2 + 2 * 197 * 768)
