"""A small discrete variational autoencoder: a picture in words, one a patch (Ramesh et al. 2021, BEiT).

Trained on the user's own images by ``quarterview tokenizer``; the words are then what a masked
autoencoder predicts under ``--target tokens``. It is convolutional, so pictures of any size that
divides by the patch will do.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.models.config import TokenizerConfig
from quarterview.models.targets import Tokenizer


class DiscreteVAE(nn.Module):
    """Convolutions down to a grid of words, and back to the picture."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, factors = config.width, halvings(config.patch_size)
        into = [config.in_chans, *[width] * len(factors)]
        self.encoder = nn.Sequential(
            *(_down(a, width, factor) for a, factor in zip(into, factors, strict=False)),
            *(Residual(width) for _ in range(config.depth)),
            nn.GELU(),
            nn.Conv2d(width if factors else config.in_chans, config.vocabulary, 1),
        )
        self.words = nn.Embedding(config.vocabulary, width)
        self.decoder = nn.Sequential(
            *(Residual(width) for _ in range(config.depth)),
            *(_up(width, factor) for factor in reversed(factors)),
            nn.GELU(),
            nn.Conv2d(width, config.in_chans, 3, padding=1),
        )

    @property
    def vocabulary(self) -> int:
        """How many words there are."""
        return self.config.vocabulary

    def logits(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised -> float [B, rows, columns, V]."""
        return self.encoder(images).movedim(1, 3)

    def picture(self, weights: Tensor) -> Tensor:
        """Weights of the words, float [B, rows, columns, V] -> float [B, C, H, W], normalised."""
        return self.decoder((weights @ self.words.weight.to(weights.dtype)).movedim(3, 1))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The likeliest word of each patch: float [B, C, H, W], normalised -> int64 [B, L], by row."""
        return self.logits(images).argmax(dim=3).flatten(1)

    def forward(
        self, images: Tensor, gumbel: Tensor | None, temperature: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The picture through relaxed words (Jang et al. 2017), and the words' logits.

        Args:
            images: float [B, C, H, W], normalised.
            gumbel: float [B, rows, columns, V], Gumbel noise; None takes the likeliest words alone.
            temperature: of the relaxation; low ones are nearly words.
        """
        logits = self.logits(images).float()
        if gumbel is None:
            weights = F.one_hot(logits.argmax(dim=3), self.vocabulary).float()
        else:
            weights = ((logits + gumbel) / temperature).softmax(dim=3)
        return self.picture(weights), logits


class Residual(nn.Module):
    """A 3×3 and a 1×1 convolution, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """float [B, W, rows, columns] -> the same."""
        return x + self.layers(x)


def halvings(patch_size: int) -> list[int]:
    """What a patch's side is divided by, one after the other: twos while they go, then the rest."""
    factors = []
    while patch_size % 2 == 0:
        factors.append(2)
        patch_size //= 2
    return [*factors, patch_size] if patch_size > 1 or not factors else factors


def _down(into: int, width: int, factor: int) -> nn.Module:
    if factor == 2:
        return nn.Sequential(nn.Conv2d(into, width, 4, stride=2, padding=1), Residual(width))
    return nn.Sequential(nn.Conv2d(into, width, factor, stride=factor), Residual(width))


def _up(width: int, factor: int) -> nn.Module:
    return nn.Sequential(Residual(width), nn.ConvTranspose2d(width, width, factor, stride=factor))


class Renormalised:
    """A tokenizer whose images were normalised by other numbers than the model's."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        its: tuple[Sequence[float], Sequence[float]],
        ours: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
    ) -> None:
        """
        Args:
            its, ours: mean and standard deviation of the channels, by which the tokenizer's images and the
                model's are normalised.
        """
        self.tokenizer, self.vocabulary = tokenizer, tokenizer.vocabulary
        (mean, std), (our_mean, our_std) = (
            [torch.tensor(numbers, device=device).view(-1, 1, 1) for numbers in pair] for pair in (its, ours)
        )
        self.scale, self.shift = our_std / std, (our_mean - mean) / std

    def tokens(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised as the model's images are -> int64 [B, L], by row."""
        with torch.autocast(images.device.type, enabled=False):  # so that a picture has one reading
            return self.tokenizer.tokens(images.float() * self.scale + self.shift)
