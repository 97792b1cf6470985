"""Tests of several cls tokens and fused blocks with every method."""

import pytest
import torch
import torch.nn.functional as F

import quarterview as qv
from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods.base import MethodContext, build
from quarterview.models.mae import MaskedAutoencoder

PREDICTING, COMPARING = ("mae", "denoising", "beit"), ("simclr", "byol", "mocov3")
KINDS = (*PREDICTING, *COMPARING, "supervised")


class Words:
    codebook_size = 32

    def tokenize(self, images):
        return torch.arange(16).expand(len(images), -1)


def made(kind: str, **changes):
    values = {"model": "mae_vit_32x3x2_patch4", "image_size": 16, "cls_tokens": 4, "method": kind, **changes}
    values |= {"tokenizer": "words"} if kind == "beit" else {}
    values |= {"proj_hidden_dim": 40, "proj_output_dim": 24} if kind in COMPARING else {}
    if kind in ("mae", "denoising"):
        values |= {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1}
    config = qv.PretrainConfig.from_flags(**values, mean=(0.0,) * 3, std=(1.0,) * 3)
    words = 32 if kind == "beit" else None
    method = build(
        config.method, MethodContext(config.model, 0, 10, codebook_size=words, num_classes=5)
    ).train()
    if kind == "beit":
        method.model.target.set_tokenizer(Words())
    return method


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    ids = torch.arange(6)
    return Batch(torch.randn(6, 3, 16, 16), ids, ids * 0, ids % 5, torch.randn(6, 3, 16, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cls_token_gets_gradients(batch, kind):
    method = made(kind)
    if kind == "supervised":  # the initial weights of its head are almost 0
        torch.nn.init.normal_(method.model.head.weight)
    seen = []
    for block in method.model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    method(batch).loss.backward()
    assert set(seen) == {4 + (4 if kind == "mae" else 16)}
    learned = method.model.cls_token.grad.abs().amax(dim=2)
    assert learned.shape == (1, 4)
    assert (learned > 0).all()


@pytest.mark.parametrize("kind", PREDICTING)
def test_every_projection_gets_gradients(batch, kind):
    method = made(kind, fused_blocks=(1, 2))
    method(batch).loss.backward()
    for name, parameter in method.model.decoder_fusion.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PREDICTING])
def test_fused_blocks_without_a_decoder_are_an_error(kind):
    with pytest.raises(UserError, match=f"^--fused-blocks is not a flag of --method {kind}. Remove it"):
        made(kind, fused_blocks=(1, 2))


def test_contrastive_features_are_the_mean_of_the_cls_tokens(batch):
    method = made("simclr")
    tokens = method.model(batch.images)
    assert tokens.shape == (6, 4 + 16, 32)
    torch.testing.assert_close(method.compute_features(method.model, batch.images), tokens[:, :4].mean(1))


def test_uniformity_uses_patch_tokens_only(batch):
    method = made("mae", uniformity=0.01)
    assert isinstance(method.model, MaskedAutoencoder)
    out = method.model(batch.images, noise=method.draw_mask_noise(batch.epochs, batch.ids))
    unit = F.normalize(out.latent[:, 4:].mean(1), dim=1)
    assert out.latent.shape[1] == 4 + 4
    cosines = (unit @ unit.T)[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(method(batch).metrics["likeness"], cosines.square().mean())
