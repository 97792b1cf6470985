"""What is measured of a run, and how two losses are compared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quarterview.doctor.collapse import Spread
from quarterview.doctor.history import History
from quarterview.doctor.inpainters import INPAINTERS, MEAN, ZERO
from quarterview.evaluation.pictures import Pictures
from quarterview.models.config import MAEConfig
from quarterview.training.config import LoopConfig, OptimConfig

MODEL = "this model"
"""The name that the model has beside the inpainters."""
LEAST_GAIN = 0.03
"""By what share, at least, the loss must be below that of the mean for anything to be learned."""
CERTAIN = 2.0
"""Standard errors that a difference must exceed to be one."""


@dataclass(frozen=True)
class Examined:
    """All that was measured of a run; None where something could not be."""

    model: MAEConfig
    optim: OptimConfig
    loop: LoopConfig
    steps: int
    """Updates of the whole run."""
    warmup: int
    """Updates of warm-up."""
    history: History
    images: int | None
    """In the whole set."""
    broken: int
    """Of them that could not be read so far."""
    held_out: bool
    """Whether the losses are of images that were never trained on."""
    losses: Mapping[str, Tensor] | None
    """float [N] for each inpainter and, if there is a checkpoint, `MODEL`."""
    trained_losses: Tensor | None
    """float [M], the model's on images that were trained on, seen in the same way."""
    pictures: Pictures | None
    eight_bit: bool
    encoder: Spread | None
    fresh: Spread | None
    """Of an encoder with the initial weights of the same seed."""
    pixels: Spread | None

    @property
    def done(self) -> bool:
        """Whether the run has made all its updates."""
        return self.history.step >= self.steps

    @property
    def rate(self) -> float:
        """The peak learning rate over the usual one."""
        return self.optim.peak_lr(self.loop.batch_size) / usual_rate(
            self.loop.batch_size, self.model.shape.width
        )

    def loss(self, name: str) -> float | None:
        """The mean of one row of the table."""
        return float(self.losses[name].mean()) if self.losses and name in self.losses else None

    def gain(self, over: str) -> tuple[float, float] | None:
        """By what share the model's loss is below another's, and by how many standard errors."""
        if self.losses is None or MODEL not in self.losses:
            return None
        theirs, ours = self.losses[over].double(), self.losses[MODEL].double()
        return standardised(theirs - ours, float(theirs.mean()))

    @property
    def floor(self) -> str:
        """The better of those two that know nothing of where things are."""
        return min((ZERO, MEAN), key=lambda name: self.loss(name) or 0.0)

    @property
    def best(self) -> str:
        """The best trivial inpainter."""
        return min(INPAINTERS, key=lambda name: self.loss(name) or 0.0)

    @property
    def learned(self) -> bool | None:
        """Whether the model is certainly better than a constant; None if that is unknown."""
        gain = self.gain(self.floor) if self.losses else None
        return None if gain is None else gain[0] > LEAST_GAIN and gain[1] > CERTAIN

    @property
    def beats_all(self) -> bool | None:
        """Whether the model is better than every trivial inpainter."""
        gain = self.gain(self.best) if self.losses else None
        return None if gain is None else bool(self.learned) and gain[0] > 0


def usual_rate(batch_size: int, width: int) -> float:
    """The paper's peak rate, 2.4e-3 at a batch of 4096 for ViT-B, carried to other batches and widths.

    The paper scales with the batch size, from 4096 down to nothing smaller. Adam's rate goes with its
    square root (Malladi et al. 2022) and with the inverse of the width (Yang et al. 2022): small models
    on small batches take, and need, much more than the linear rule gives.
    """
    return OptimConfig().peak_lr(4096) * math.sqrt(batch_size / 4096) * 768 / width


def standardised(differences: Tensor, of: float) -> tuple[float, float]:
    """The mean of float [N] as a share of a loss, and over its standard error."""
    mean, count = float(differences.mean()), len(differences)
    error = float(differences.std()) / math.sqrt(count) if count > 1 else math.inf
    return (mean / of if of > 0 else 0.0), (mean / error if error > 0 else math.copysign(math.inf, mean))
