"""The discrete autoencoder: shapes for any patch, words that are those of the logits, other statistics."""

import pytest
import torch

from quarterview.data.transforms.crop import normalise
from quarterview.errors import UserError
from quarterview.models.create import fresh_tokenizer
from quarterview.models.tokenizer import DiscreteVAE, Renormalised, TokenizerConfig, halvings

HALF = (0.5, 0.5, 0.5)


def config(**changes):
    values = {
        "patch_size": 4,
        "in_chans": 3,
        "vocabulary": 10,
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
def test_halvings(patch, expected):
    assert halvings(patch) == expected


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 14])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_word_a_patch_and_a_picture_of_the_same_size(patch, channels):
    model = fresh_tokenizer(
        config(patch_size=patch, in_chans=channels, mean=(0.5,) * channels, std=(0.5,) * channels), 0
    )
    images = torch.randn(2, channels, 2 * patch, 3 * patch)
    assert model.logits(images).shape == (2, 2, 3, 10)
    tokens = model.tokens(images)
    assert tokens.shape == (2, 6)
    assert torch.equal(tokens.view(2, 2, 3), model.logits(images).argmax(3))
    for gumbel in (None, torch.randn(2, 2, 3, 10)):
        picture, logits = model(images, gumbel, 0.5)
        assert picture.shape == images.shape
        assert logits.shape == (2, 2, 3, 10)


def test_a_patch_is_told_by_what_is_around_it_alone():
    model = fresh_tokenizer(config(depth=0), 0)
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 60:, 60:] = 9.0
    one, two = (model.logits(x) for x in (images, changed))
    assert torch.equal(one[:, :10, :10], two[:, :10, :10])
    assert not torch.equal(one[:, 15, 15], two[:, 15, 15])


def test_cold_words_are_the_likeliest():
    model = fresh_tokenizer(config(), 0)
    images = torch.randn(2, 3, 8, 8)
    hard, logits = model(images, None, 1.0)
    cold, _ = model(images, torch.zeros_like(logits), 1e-6)
    torch.testing.assert_close(hard, cold)


def test_another_normalisation_makes_no_difference():
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 8, 8)
    its, ours = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    seen = []

    class Watching:
        vocabulary = 7

        def tokens(self, images):
            seen.append(images)
            return torch.zeros(3, 4, dtype=torch.int64)

    adapted = Renormalised(Watching(), its, ours, torch.device("cpu"))
    assert adapted.vocabulary == 7
    adapted.tokens(normalise(pixels, *ours))
    torch.testing.assert_close(seen[0], normalise(pixels, *its), rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_tokenizer():
    one, two, other = (fresh_tokenizer(config(), seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["words.weight"], other["words.weight"])
    assert isinstance(fresh_tokenizer(config(), 0), DiscreteVAE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocabulary": 1}, "--vocabulary 1 is out of range. Give a whole number of at least 2"),
        ({"patch_size": 0}, "--patch-size 0 is out of range. Give a whole number of at least 1"),
        ({"width": 0}, "--width 0 is out of range. Give a whole number of at least 1"),
        ({"mean": (0.5,)}, r"a tokenizer with mean \(0.5,\) .* accepted: 3 numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "a tokenizer with mean .* and std .* accepted: 3 numbers"),
    ],
)
def test_impossible_tokenizers_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        config(**changes)
