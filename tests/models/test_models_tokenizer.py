"""Tests of the discrete VAE: shapes for any patch size, tokens of the logits, and renormalisation."""

import pytest
import torch

from quarterview.data.transforms.crop import normalize
from quarterview.errors import UserError
from quarterview.models.create import create_tokenizer
from quarterview.models.tokenizer import DiscreteVAE, RenormalizingTokenizer, TokenizerConfig, compute_strides

HALF = (0.5, 0.5, 0.5)


def config(**changes):
    values = {
        "patch_size": 4,
        "in_chans": 3,
        "codebook_size": 10,
        "width": 8,
        "depth": 1,
        "mean": HALF,
        "std": HALF,
    }
    return TokenizerConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("patch", "expected"),
    [(1, [1]), (2, [2]), (4, [2, 2]), (16, [2] * 4), (14, [2, 7]), (3, [3]), (6, [2, 3])],
)
def test_strides(patch, expected):
    assert compute_strides(patch) == expected


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 14])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_token_per_patch_and_a_reconstruction_of_the_same_size(patch, channels):
    model = create_tokenizer(
        config(patch_size=patch, in_chans=channels, mean=(0.5,) * channels, std=(0.5,) * channels), 0
    )
    images = torch.randn(2, channels, 2 * patch, 3 * patch)
    assert model.compute_logits(images).shape == (2, 2, 3, 10)
    tokens = model.tokenize(images)
    assert tokens.shape == (2, 6)
    assert torch.equal(tokens.view(2, 2, 3), model.compute_logits(images).argmax(3))
    for gumbel in (None, torch.randn(2, 2, 3, 10)):
        reconstruction, logits = model(images, gumbel, 0.5)
        assert reconstruction.shape == images.shape
        assert logits.shape == (2, 2, 3, 10)


def test_a_token_depends_only_on_pixels_near_its_patch():
    model = create_tokenizer(config(depth=0), 0)
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 60:, 60:] = 9.0
    one, two = (model.compute_logits(x) for x in (images, changed))
    assert torch.equal(one[:, :10, :10], two[:, :10, :10])
    assert not torch.equal(one[:, 15, 15], two[:, 15, 15])


def test_a_low_temperature_selects_the_most_probable_tokens():
    model = create_tokenizer(config(), 0)
    images = torch.randn(2, 3, 8, 8)
    hard, logits = model(images, None, 1.0)
    cold, _ = model(images, torch.zeros_like(logits), 1e-6)
    torch.testing.assert_close(hard, cold)


def test_tokens_do_not_depend_on_the_models_normalisation():
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 8, 8)
    its, ours = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    seen = []

    class Watching:
        codebook_size = 7

        def tokenize(self, images):
            seen.append(images)
            return torch.zeros(3, 4, dtype=torch.int64)

    adapted = RenormalizingTokenizer(Watching(), its, ours, torch.device("cpu"))
    assert adapted.codebook_size == 7
    adapted.tokenize(normalize(pixels, *ours))
    torch.testing.assert_close(seen[0], normalize(pixels, *its), rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_tokenizer():
    one, two, other = (create_tokenizer(config(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["words.weight"], other["words.weight"])
    assert isinstance(create_tokenizer(config(), 0), DiscreteVAE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 1}, "--codebook-size 1 is out of range. Give a whole number of at least 2"),
        ({"patch_size": 0}, "--patch-size 0 is out of range. Give a whole number of at least 1"),
        ({"width": 0}, "--width 0 is out of range. Give a whole number of at least 1"),
        ({"mean": (0.5,)}, r"tokenizer has mean \(0.5,\) .* Give 3 numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "tokenizer has mean .* and std .* Give 3 numbers"),
    ],
)
def test_invalid_tokenizer_configurations_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)
