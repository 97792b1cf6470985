"""Tests of the supervised method: comparison with closed forms and timm's losses."""

import pytest
import torch
from timm.layers import drop_path as timm_drop_path
from timm.loss import SoftTargetCrossEntropy

from quarterview.data.loader import Batch
from quarterview.data.transforms.mixing import mix_pairs
from quarterview.errors import UserError
from quarterview.methods.config import RegularizationConfig
from quarterview.methods.supervised import Supervised
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.vit import Block, compute_drop_path_scales

CONFIG = ClassifierConfig("mae_vit_16x4x2_patch4", (8, 8), classes=5)
PLAIN = RegularizationConfig(smoothing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.arange(12)
    return Batch(torch.randn(12, 3, 8, 8), ids, ids * 0, ids % 5)


@pytest.fixture
def model(disturbed):
    return disturbed(Classifier(CONFIG))


def test_without_regularisation_the_loss_is_cross_entropy(model, batch):
    loss = Supervised(model, PLAIN, 0)(batch).loss
    expected = -model(batch.images).log_softmax(1)[torch.arange(12), batch.labels].mean()
    torch.testing.assert_close(loss, expected)


def test_smoothed_and_mixed_targets_equal_timms(model, batch):
    loss = Supervised(model, RegularizationConfig(drop_path=0.0), 3)(batch).loss
    smooth = torch.full((12, 5), 0.1 / 5)
    smooth[torch.arange(12), batch.labels] += 0.9
    images, targets = mix_pairs(batch.images, smooth, batch.epochs, batch.ids, 3, 0.8, 1.0)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(model(images), targets))


def test_drop_path_drops_branches_at_linear_rates():
    uniforms = torch.rand(20_000, 4, 2, generator=torch.Generator().manual_seed(0))
    scales = compute_drop_path_scales(uniforms, 0.3)
    for i, rate in enumerate((0.0, 0.1, 0.2, 0.3)):
        assert abs(float((scales[:, i] == 0).float().mean()) - rate) < 0.01
        kept = scales[:, i][scales[:, i] > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))


def test_drop_path_equals_timms():
    torch.manual_seed(0)
    block, x = Block(16, 2), torch.randn(6, 5, 16)
    scale = torch.tensor([[0.0, 1.25]] * 3 + [[1.25, 0.0]] * 3)
    out = block(x, scale)
    middle = x + scale[:, :1, None] * block.attn(block.norm1(x))
    torch.testing.assert_close(out, middle + scale[:, 1:, None] * block.mlp(block.norm2(middle)))
    torch.testing.assert_close(out[:3], x[:3] + 1.25 * block.mlp(block.norm2(x[:3])))
    torch.testing.assert_close(block(x, torch.ones(6, 2)), block(x))
    survived = timm_drop_path(torch.ones(1000, 1), 0.2, True)
    assert set(survived.unique().tolist()) == {0.0, 1.25}


def test_drop_path_depends_on_the_sample_only(model, batch):
    method = Supervised(model, RegularizationConfig(smoothing=0.0, mixup=0.0, cutmix=0.0, drop_path=0.5), 0)
    whole = method(batch).loss
    parts = [method(part).loss for part in batch.chunk(3)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    assert not torch.equal(whole, method(batch._replace(epochs=batch.epochs + 1)).loss)


def test_invalid_batches_are_errors(model, batch):
    with pytest.raises(ValueError, match="has no labels"):
        Supervised(model, PLAIN, 0)(batch._replace(labels=None))
    odd = next(batch.split(5))
    with pytest.raises(ValueError, match="needs an even batch"):
        Supervised(model, RegularizationConfig(), 0)(odd)


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("smoothing", 1.0, "at least 0 and below 1"),
        ("mixup", -1.0, "at least 0"),
        ("drop_path", 1.0, "at least 0 and below 1"),
    ],
)
def test_invalid_settings_are_errors(name, wrong, expected):
    given = f"--{name.replace('_', '-')} {wrong}"
    with pytest.raises(UserError, match=f"{given} is out of range. Give a number of {expected}."):
        RegularizationConfig(**{name: wrong})
