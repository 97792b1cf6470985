"""Train a tokenizer: a discrete variational autoencoder of the images (Ramesh et al. 2021)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.methods.base import MethodContext, MethodOutput
from quarterview.methods.config import TokenizerMethodConfig
from quarterview.models.config import TokenizerConfig
from quarterview.models.create import create_tokenizer
from quarterview.models.tokenizer import DiscreteVAE

MIN_TEMPERATURE = 1 / 16
"""Final temperature of the Gumbel-softmax; it falls from 1 along a cosine (Ramesh et al. 2021)."""
_EPS = 2.0**-25


class TokenizerTraining(nn.Module):
    """Reconstruct images through a Gumbel-softmax relaxation of the tokens, at a falling temperature.

    In evaluation mode the most probable tokens are used without relaxation, as a masked autoencoder will use
    them.

    Args:
        model: the tokenizer.
        seed: the seed of the Gumbel noise.
        kl_weight: the weight of the KL divergence between the token distribution and the uniform one.
        num_passes: the number of training passes of the whole run, over which the temperature falls.
    """

    progress: Tensor
    """float64 scalar, the fraction of the run that is done. A count would be wrong after a resume with
    another number of passes per update."""

    def __init__(self, model: DiscreteVAE, seed: int, kl_weight: float, num_passes: int) -> None:
        super().__init__()
        self.model, self.seed, self.kl_weight, self.num_passes = model, seed, kl_weight, num_passes
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def forward(self, batch: Batch) -> MethodOutput:
        gumbel_noise = None
        if self.training:
            rows, columns = (side // self.model.config.patch_size for side in batch.images.shape[2:])
            count = rows * columns * self.model.codebook_size
            uniforms = rng.uniform(self.seed, "words", batch.epochs, batch.ids, count)
            gumbel_noise = compute_gumbel_noise(uniforms).view(-1, rows, columns, self.model.codebook_size)
        reconstruction, logits = self.model(batch.images, gumbel_noise, self.compute_temperature())
        if self.training:
            self.progress += 1 / self.num_passes
        with torch.autocast(batch.images.device.type, enabled=False):
            error = F.mse_loss(reconstruction.float(), batch.images)
            log_probs = logits.log_softmax(dim=3)
            divergence = (
                (log_probs.exp() * (log_probs + math.log(self.model.codebook_size))).sum(dim=3).mean()
            )
            frequencies = (
                F.one_hot(logits.argmax(dim=3).flatten(), self.model.codebook_size).float().mean(dim=0)
            )
            perplexity = (-(frequencies * frequencies.clamp(min=_EPS).log()).sum()).exp()
        loss = error + self.kl_weight * divergence if self.training else error
        return MethodOutput(loss, {"reconstruction": error, "words_used": perplexity})

    def compute_temperature(self) -> Tensor:
        """Return the temperature of the Gumbel-softmax at the current pass."""
        progress = self.progress.float().clamp(max=1)
        return MIN_TEMPERATURE + (1 - MIN_TEMPERATURE) * 0.5 * (1 + (math.pi * progress).cos())


def compute_gumbel_noise(uniforms: Tensor) -> Tensor:
    """Return Gumbel noise from uniform numbers in [0, 1)."""
    return -(-(-uniforms).log1p()).clamp(min=_EPS).log()  # 0 would give infinity


def build(config: TokenizerMethodConfig, context: MethodContext) -> TokenizerTraining:
    """Build the training of a tokenizer for the encoder's patch size."""
    encoder = context.encoder
    assert encoder.mean is not None
    assert encoder.std is not None
    model = TokenizerConfig(
        encoder.shape.patch_size,
        encoder.in_chans,
        config.codebook_size,
        config.tokenizer_width,
        config.tokenizer_depth,
        encoder.mean,
        encoder.std,
    )
    passes = context.num_steps * context.accum_iter
    return TokenizerTraining(create_tokenizer(model, context.seed), context.seed, config.kl_weight, passes)
