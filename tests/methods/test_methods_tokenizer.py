"""Tests of the training of a tokenizer: temperature, loss, Gumbel noise, and learning."""

import math

import pytest
import torch
import torch.nn.functional as F

from quarterview.data.loader import Batch
from quarterview.data.sources.open import open_source
from quarterview.data.transforms.crop import normalize, to_float
from quarterview.errors import UserError
from quarterview.methods.config import TokenizerMethodConfig
from quarterview.methods.tokenizer import TokenizerTraining, compute_gumbel_noise
from quarterview.models.create import create_tokenizer
from quarterview.models.tokenizer import TokenizerConfig

HALF = (0.5, 0.5, 0.5)
CONFIG = TokenizerConfig(4, 3, 12, 16, 1, HALF, HALF)


@pytest.fixture
def batch():
    source = open_source("shapes:24:size=16", 3)
    images = torch.stack([source.image(i).pixels for i in range(24)])
    ids = torch.arange(24)
    return Batch(normalize(to_float(images), HALF, HALF), ids, ids * 0)


def make(kl_weight=0.0, passes=8):
    return TokenizerTraining(create_tokenizer(CONFIG, 0), 3, kl_weight, passes)


def test_the_temperature_falls_along_a_cosine(batch):
    method = make(passes=4)
    seen = []
    for _ in range(6):
        seen.append(float(method.compute_temperature()))
        method(batch)
    expected = [1 / 16 + 15 / 16 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3, 4, 4)]
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-7)
    method.eval()(batch)
    assert abs(float(method.progress) - 6 / 4) < 1e-12


def test_evaluation_uses_the_most_probable_tokens(batch):
    method = make(kl_weight=0.5).eval()
    model = method.model
    words = F.one_hot(model.tokenize(batch.images), 12).float().view(24, 4, 4, 12)
    expected = (model.decode(words) - batch.images).square().mean()
    out = method(batch)
    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(out.loss, out.metrics["reconstruction"])
    shares = F.one_hot(model.tokenize(batch.images).flatten(), 12).float().mean(0)
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p)
    torch.testing.assert_close(float(out.metrics["words_used"]), math.exp(entropy), rtol=1e-4, atol=0)


def test_the_kl_divergence_is_from_the_uniform_distribution(batch):
    plain, weighted = make(0.0), make(2.0)
    logits = plain.model.compute_logits(batch.images).double()
    p = logits.softmax(3)
    divergence = (p * (p * 12).log()).sum(3).mean()
    difference = weighted(batch).loss - plain(batch).loss
    torch.testing.assert_close(difference.item(), 2 * divergence.item(), rtol=1e-3, atol=1e-6)


def test_noise_depends_on_the_sample_only(batch):
    whole = make()(batch).metrics["reconstruction"]
    parts = [make()(part).metrics["reconstruction"] for part in batch.split(12)]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_the_noise_is_gumbel_noise_and_finite():
    ends = compute_gumbel_noise(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24]))
    torch.testing.assert_close(ends, torch.tensor([17.32868, 16.635532, -2.8115]), rtol=1e-4, atol=1e-4)
    noise = compute_gumbel_noise(torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)))
    assert abs(float(noise.mean()) - 0.577216) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02


def test_reconstructions_improve(batch):
    method = make(kl_weight=0.001, passes=150)
    before = method.eval()(batch).loss.item()
    optimizer = torch.optim.AdamW(method.train().parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        method(batch).loss.backward()
        optimizer.step()
    after = method.eval()(batch)
    assert after.loss.item() < 0.6 * before
    assert after.loss.item() < 0.7 * float(batch.images.var())
    assert float(after.metrics["words_used"]) > 3


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizer_width", 0), ("tokenizer_depth", -1), ("kl_weight", -0.1), ("codebook_size", 1)],
)
def test_invalid_settings_are_errors(name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} {value} is out of range"):
        TokenizerMethodConfig(**{name: value})
