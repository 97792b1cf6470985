"""Tests of denoising: the noise, the input without masks, and the clean image as the target."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods import config as configs
from quarterview.methods.denoising import Denoising, draw_normal
from quarterview.models.create import create_model


def make(**options):
    torch.manual_seed(0)
    values = {"image_size": 8, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return create_model("mae_vit_16x2x2_patch4", **{**values, **options})


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.arange(5)
    return Batch(torch.randn(5, 3, 8, 8), ids, ids * 0)


def test_the_noise_is_standard_normal():
    ids = torch.arange(400)
    x = draw_normal(0, "noise", ids * 0, ids, 501)
    assert x.shape == (400, 501)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    torch.testing.assert_close(
        (x.double().T @ x.double() / 400).diagonal().mean().item(), 1.0, rtol=0.02, atol=0
    )
    correlations = torch.corrcoef(x[:, ::50].T) - torch.eye(11)
    assert correlations.abs().max() < 0.2


@given(st.integers(0, 2**31), st.integers(0, 50), st.lists(st.integers(0, 10**9), min_size=1, unique=True))
def test_the_noise_depends_on_the_sample_only(seed, epoch, ids):
    ids = torch.tensor(ids)
    together = draw_normal(seed, "noise", torch.full_like(ids, epoch), ids, 12)
    for row, one in zip(together, ids, strict=True):
        assert torch.equal(draw_normal(seed, "noise", torch.tensor([epoch]), one[None], 12)[0], row)
    assert together.isfinite().all()


def test_the_loss_is_the_error_against_the_clean_image(batch):
    model = make(norm_pix_loss=False)
    method = Denoising(model, 3, 0.7)
    noisy = batch.images + 0.7 * draw_normal(3, "noise", batch.epochs, batch.ids, 192).view_as(batch.images)
    tokens = model.encode(noisy)  # all patches are visible
    x = model.decoder_embed(tokens) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    pred = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    expected = (pred - model.patchify(batch.images)).square().mean()
    torch.testing.assert_close(method(batch).loss, expected)


def test_the_mask_token_is_not_used(batch):
    model = make()
    Denoising(model, 0, 1.0)(batch).loss.backward()
    assert model.mask_token.grad is None or not model.mask_token.grad.any()
    assert model.patch_embed.proj.weight.grad.any()


def test_more_noise_gives_a_higher_loss(batch):
    losses = [Denoising(make(norm_pix_loss=False), 0, d)(batch).loss.item() for d in (0.01, 30.0)]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("noise", [0.0, -1.0, 101.0])
def test_invalid_noise_is_an_error(noise):
    with pytest.raises(UserError, match=f"^--noise-std {noise} is out of range. Give a number above 0 and"):
        configs.DenoisingConfig(noise_std=noise)
