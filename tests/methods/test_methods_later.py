"""Several cls tokens and fused blocks under every objective of a vision transformer."""

import pytest
import torch
import torch.nn.functional as F

import quarterview as qv
from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods.registry import COMPARING, DEFAULTS, PREDICTING, fresh_objective, model_config_of
from quarterview.models.mae import MaskedAutoencoder

KINDS = ("mae", "denoising", "beit", "simclr", "byol", "mocov3", "supervised")


class Words:
    vocabulary = 32

    def tokens(self, images):
        return torch.arange(16).expand(len(images), -1)


def made(kind: str, **changes):
    values = {"objective": kind, **DEFAULTS.get(kind, {}), "cls_tokens": 4, **changes}
    values |= {"tokenizer": "words"} if kind == "beit" else {}
    values |= {"head_width": 40, "head_out": 24} if kind in COMPARING else {}
    config = qv.PretrainConfig(
        **{"model": "mae_vit_32x3x2_patch4", "image_size": 16, "decoder_width": 32, "decoder_heads": 2},
        **{"decoder_depth": 1, **values},
    )
    model = model_config_of(config, (0.0,) * 3, (1.0,) * 3, class_names=None, classes=5, vocabulary=32)
    objective = fresh_objective(config, model, 10, lambda rows: rows).train()
    if kind == "beit":
        objective.model.target.use(Words())
    return objective


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    ids = torch.arange(6)
    return Batch(torch.randn(6, 3, 16, 16), ids, ids * 0, ids % 5, torch.randn(6, 3, 16, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cls_token_goes_through_every_block_and_learns(batch, kind):
    objective = made(kind)
    if kind == "supervised":  # whose head starts almost at 0
        torch.nn.init.normal_(objective.model.head.weight)
    seen = []
    for block in objective.model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    objective(batch).loss.backward()
    assert set(seen) == {4 + (4 if kind == "mae" else 16)}
    learned = objective.model.cls_token.grad.abs().amax(dim=2)
    assert learned.shape == (1, 4)
    assert (learned > 0).all()


@pytest.mark.parametrize("kind", PREDICTING)
def test_every_projection_learns(batch, kind):
    objective = made(kind, fused_blocks=(1, 2))
    objective(batch).loss.backward()
    for name, parameter in objective.model.decoder_fusion.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in PREDICTING])
def test_fused_blocks_without_a_decoder_are_refused(kind):
    with pytest.raises(UserError, match=f"fused_blocks 1 2 with objective {kind}, which has no decoder"):
        made(kind, fused_blocks=(1, 2))


def test_what_is_compared_is_the_mean_of_the_cls_tokens(batch):
    objective = made("simclr")
    tokens = objective.model(batch.images)
    assert tokens.shape == (6, 4 + 16, 32)
    torch.testing.assert_close(objective.features(objective.model, batch.images), tokens[:, :4].mean(1))


def test_uniformity_is_about_patches_alone(batch):
    objective = made("mae", uniformity=0.01)
    assert isinstance(objective.model, MaskedAutoencoder)
    out = objective.model(batch.images, noise=objective.noise(batch.epochs, batch.ids))
    unit = F.normalize(out.latent[:, 4:].mean(1), dim=1)
    assert out.latent.shape[1] == 4 + 4
    cosines = (unit @ unit.T)[~torch.eye(6, dtype=torch.bool)]
    torch.testing.assert_close(objective(batch).metrics["likeness"], cosines.square().mean())
