"""Learning a tokenizer: a discrete variational autoencoder of the images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.errors import UserError, check_types
from quarterview.methods.base import Loss
from quarterview.models.tokenizer import DiscreteVAE

COLDEST = 1 / 16
"""Temperature of the relaxed words at the end; it falls from 1 along a cosine (Ramesh et al. 2021)."""
_SMALLEST = 2.0**-25


@dataclass(frozen=True)
class TokenizingConfig:
    """How a tokenizer is made."""

    tokenizer_width: int = 128
    """Of --objective tokenizer: channels of its layers."""
    tokenizer_depth: int = 2
    """Of --objective tokenizer: residual blocks between the patches and the words, and back."""
    kl_weight: float = 0.01
    """Of --objective tokenizer: what a nat costs by which a patch's words are not equally likely."""

    def __post_init__(self) -> None:
        check_types(self, TokenizingConfig)
        if not 1 <= self.tokenizer_width <= 1 << 14 or not 0 <= self.tokenizer_depth < 1000:
            raise UserError(
                f"a tokenizer of width {self.tokenizer_width} and depth {self.tokenizer_depth}; accepted: "
                f"1 to {1 << 14}, and 0 to 999"
            )
        if self.kl_weight < 0:
            raise UserError(f"a kl_weight of {self.kl_weight}; accepted: 0 or more")


class Tokenizing(nn.Module):
    """Reconstruct pictures through relaxed words that become colder.

    In evaluation the likeliest words alone are used, as they will be.

    Args:
        passes: training passes of the whole run, over which words become cold.
    """

    progress: Tensor
    """Of the run, from 0 to 1: a run that is resumed may have more passes an update."""

    def __init__(self, model: DiscreteVAE, seed: int, kl_weight: float, passes: int) -> None:
        super().__init__()
        self.model, self.seed, self.kl_weight, self.passes = model, seed, kl_weight, passes
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Batch) -> Loss:
        gumbel = None
        if self.training:
            rows, columns = (side // self.model.config.patch_size for side in batch.images.shape[2:])
            count = rows * columns * self.model.vocabulary
            u = rng.uniform(self.seed, "words", batch.epochs, batch.ids, count)
            gumbel = gumbel_of(u).view(-1, rows, columns, self.model.vocabulary)
        picture, logits = self.model(batch.images, gumbel, self.temperature())
        if self.training:
            self.progress += 1 / self.passes
        with torch.autocast(batch.images.device.type, enabled=False):
            error = F.mse_loss(picture.float(), batch.images)
            shares = logits.log_softmax(dim=3)
            divergence = (shares.exp() * (shares + math.log(self.model.vocabulary))).sum(dim=3).mean()
            used = F.one_hot(logits.argmax(dim=3).flatten(), self.model.vocabulary).float().mean(dim=0)
            perplexity = (-(used * used.clamp(min=_SMALLEST).log()).sum()).exp()
        loss = error + self.kl_weight * divergence if self.training else error
        return Loss(loss, {"reconstruction": error, "words_used": perplexity})

    def temperature(self) -> Tensor:
        """Of the words at the present pass."""
        progress = self.progress.float().clamp(max=1)
        return COLDEST + (1 - COLDEST) * 0.5 * (1 + (math.pi * progress).cos())


def gumbel_of(uniforms: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in [0, 1), of which 0 would give infinity."""
    return -(-(-uniforms).log1p()).clamp(min=_SMALLEST).log()
