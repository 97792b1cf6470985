"""A small discrete variational autoencoder (dVAE, Ramesh et al. 2021), used as the tokenizer of BEiT.

It maps each patch to a visual token of a codebook. ``quarterview tokenizer`` trains it on the user's own
images; a masked autoencoder predicts its tokens with ``--target tokens``. It is convolutional, so it takes
images of any size that is a multiple of the patch size.

Letters in shapes: B images, C channels, H×W pixels, L patches, S the size of the codebook, W the width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview.models.config import TokenizerConfig
from quarterview.models.targets import VisualTokenizer


class DiscreteVAE(nn.Module):
    """A convolutional encoder from an image to visual tokens, and a decoder from tokens to an image."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, strides = config.width, compute_strides(config.patch_size)
        in_channels = [config.in_chans, *[width] * len(strides)]
        self.encoder = nn.Sequential(
            *(_make_downsampling(c, width, stride) for c, stride in zip(in_channels, strides, strict=False)),
            *(ResidualBlock(width) for _ in range(config.depth)),
            nn.GELU(),
            nn.Conv2d(width if strides else config.in_chans, config.codebook_size, 1),
        )
        self.words = nn.Embedding(
            config.codebook_size, width
        )  # the codebook, under its name in saved weights
        self.decoder = nn.Sequential(
            *(ResidualBlock(width) for _ in range(config.depth)),
            *(_make_upsampling(width, stride) for stride in reversed(strides)),
            nn.GELU(),
            nn.Conv2d(width, config.in_chans, 3, padding=1),
        )

    @property
    def codebook_size(self) -> int:
        """The number of visual tokens."""
        return self.config.codebook_size

    def compute_logits(self, images: Tensor) -> Tensor:
        """Return the logits of the tokens, float [B, rows, columns, S], of normalised images [B, C, H, W]."""
        return self.encoder(images).movedim(1, 3)

    def decode(self, weights: Tensor) -> Tensor:
        """Return normalised images, float [B, C, H, W], of token weights, float [B, rows, columns, S]."""
        return self.decoder((weights @ self.words.weight.to(weights.dtype)).movedim(3, 1))

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return the most probable token of each patch, int64 [B, L] in row-major order.

        Args:
            images: float [B, C, H, W], normalised.
        """
        return self.compute_logits(images).argmax(dim=3).flatten(1)

    def forward(
        self, images: Tensor, gumbel_noise: Tensor | None, temperature: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Reconstruct images through a Gumbel-softmax relaxation of the tokens (Jang et al. 2017).

        Args:
            images: float [B, C, H, W], normalised.
            gumbel_noise: float [B, rows, columns, S]; None takes the most probable token of each patch.
            temperature: the temperature of the softmax; at a low one the weights are nearly one-hot.

        Returns:
            The reconstructed images, float [B, C, H, W], and the logits, float32 [B, rows, columns, S].
        """
        logits = self.compute_logits(images).float()
        if gumbel_noise is None:
            weights = F.one_hot(logits.argmax(dim=3), self.codebook_size).float()
        else:
            weights = ((logits + gumbel_noise) / temperature).softmax(dim=3)
        return self.decode(weights), logits


class ResidualBlock(nn.Module):
    """A residual block of a 3×3 and a 1×1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to float [B, W, rows, columns]."""
        return x + self.layers(x)


def compute_strides(patch_size: int) -> list[int]:
    """Return strides whose product is the patch size: as many twos as it contains, then the odd rest."""
    strides = []
    while patch_size % 2 == 0:
        strides.append(2)
        patch_size //= 2
    return [*strides, patch_size] if patch_size > 1 or not strides else strides


def _make_downsampling(in_channels: int, width: int, stride: int) -> nn.Module:
    if stride == 2:
        return nn.Sequential(nn.Conv2d(in_channels, width, 4, stride=2, padding=1), ResidualBlock(width))
    return nn.Sequential(nn.Conv2d(in_channels, width, stride, stride=stride), ResidualBlock(width))


def _make_upsampling(width: int, stride: int) -> nn.Module:
    return nn.Sequential(ResidualBlock(width), nn.ConvTranspose2d(width, width, stride, stride=stride))


class RenormalizingTokenizer:
    """A tokenizer that takes the model's normalised images, although its own normalisation differs."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        tokenizer_statistics: tuple[Sequence[float], Sequence[float]],
        model_statistics: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
    ) -> None:
        """
        Args:
            tokenizer: the tokenizer to wrap.
            tokenizer_statistics: the channel means and standard deviations of the tokenizer's normalisation.
            model_statistics: those of the model's normalisation.
            device: the device of the images.
        """
        self.tokenizer, self.codebook_size = tokenizer, tokenizer.codebook_size
        (mean, std), (model_mean, model_std) = (
            [torch.tensor(numbers, device=device).view(-1, 1, 1) for numbers in pair]
            for pair in (tokenizer_statistics, model_statistics)
        )
        self.scale, self.shift = model_std / std, (model_mean - mean) / std

    def tokenize(self, images: Tensor) -> Tensor:
        """Return the token of each patch, int64 [B, L], of images normalised as for the model."""
        with torch.autocast(
            images.device.type, enabled=False
        ):  # so that the tokens do not depend on precision
            return self.tokenizer.tokenize(images.float() * self.scale + self.shift)
