"""Learning a tokenizer: a discrete variational autoencoder of the images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods.base import Loss, Setting
from quarterview.methods.config import Tokenizer
from quarterview.models.config import TokenizerConfig
from quarterview.models.create import fresh_tokenizer
from quarterview.models.tokenizer import DiscreteVAE

COLDEST = 1 / 16
"""Temperature of the relaxed words at the end; it falls from 1 along a cosine (Ramesh et al. 2021)."""
_SMALLEST = 2.0**-25


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


def build(config: Tokenizer, setting: Setting) -> Tokenizing:
    """A tokenizer of the encoder's patches."""
    encoder = setting.encoder
    assert encoder.mean is not None
    assert encoder.std is not None
    model = TokenizerConfig(
        encoder.shape.patch_size,
        encoder.in_chans,
        config.vocabulary,
        config.tokenizer_width,
        config.tokenizer_depth,
        encoder.mean,
        encoder.std,
    )
    passes = setting.steps * setting.accum_iter
    return Tokenizing(fresh_tokenizer(model, setting.seed), setting.seed, config.kl_weight, passes)
