"""Measurements of a run, and the comparison of its losses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quarterview.doctor.collapse import FeatureStatistics
from quarterview.doctor.history import TrainingHistory
from quarterview.doctor.inpainters import INPAINTERS, MEAN, ZERO
from quarterview.evaluation.pictures import ImageStatistics
from quarterview.models.config import MAEConfig
from quarterview.training.config import LoopConfig, OptimConfig

MODEL = "this model"
"""Name of the model among the inpainters."""
MIN_IMPROVEMENT = 0.03
"""Minimum relative improvement over the best constant for a model that has learned something."""
MIN_STANDARD_ERRORS = 2.0
"""Minimum size of a significant difference, in standard errors."""


@dataclass(frozen=True)
class RunMeasurements:
    """All measurements of a run; None where something could not be measured."""

    model: MAEConfig
    optim: OptimConfig
    loop: LoopConfig
    num_steps: int
    """Number of steps of the whole run."""
    warmup_steps: int
    """Number of warm-up steps."""
    history: TrainingHistory
    num_images: int | None
    """Number of images of the whole dataset."""
    num_broken: int
    """Number of images that could not be read so far."""
    is_held_out: bool
    """True if `losses` are of held-out images, False if they are of training images."""
    losses: Mapping[str, Tensor] | None
    """Losses float [N] of each inpainter and, if there is a checkpoint, of `MODEL`."""
    train_losses: Tensor | None
    """Losses float [M] of the model on training images, without augmentation."""
    image_statistics: ImageStatistics | None
    is_eight_bit: bool
    encoder_statistics: FeatureStatistics | None
    random_encoder_statistics: FeatureStatistics | None
    """Statistics of a random encoder: the initial weights of the same seed."""
    pixel_statistics: FeatureStatistics | None

    @property
    def is_finished(self) -> bool:
        """True if the run has completed all steps."""
        return self.history.step >= self.num_steps

    @property
    def relative_lr(self) -> float:
        """The peak learning rate divided by the reference learning rate."""
        return self.optim.peak_lr(self.loop.batch_size) / compute_reference_lr(
            self.loop.batch_size, self.model.shape.width
        )

    def get_mean_loss(self, name: str) -> float | None:
        """Return the mean loss of an inpainter or of `MODEL`; None if it was not measured."""
        return float(self.losses[name].mean()) if self.losses and name in self.losses else None

    def compute_improvement(self, baseline: str) -> tuple[float, float] | None:
        """Compute the improvement of the model over a baseline; None if the model was not evaluated.

        Returns:
            The difference of the losses, relative to the baseline's loss and in standard errors.
        """
        if self.losses is None or MODEL not in self.losses:
            return None
        baseline_losses, model_losses = self.losses[baseline].double(), self.losses[MODEL].double()
        return compute_mean_difference(baseline_losses - model_losses, float(baseline_losses.mean()))

    @property
    def best_constant(self) -> str:
        """The better of the two inpainters that predict the same color for all patches."""
        return min((ZERO, MEAN), key=lambda name: self.get_mean_loss(name) or 0.0)

    @property
    def best_inpainter(self) -> str:
        """The best trivial inpainter."""
        return min(INPAINTERS, key=lambda name: self.get_mean_loss(name) or 0.0)

    @property
    def has_learned(self) -> bool | None:
        """True if the model is significantly better than the best constant; None if it was not evaluated."""
        improvement = self.compute_improvement(self.best_constant) if self.losses else None
        return (
            None
            if improvement is None
            else improvement[0] > MIN_IMPROVEMENT and improvement[1] > MIN_STANDARD_ERRORS
        )

    @property
    def beats_all_inpainters(self) -> bool | None:
        """True if the model is better than every inpainter; None if it was not evaluated."""
        improvement = self.compute_improvement(self.best_inpainter) if self.losses else None
        return None if improvement is None else bool(self.has_learned) and improvement[0] > 0


def compute_reference_lr(batch_size: int, width: int) -> float:
    """Compute the reference peak learning rate: the paper's 2.4e-3 for ViT-B at batch size 4096, rescaled.

    The paper does not test its linear rule below a batch size of 4096. With Adam, the learning rate scales
    with the square root of the batch size (Malladi et al. 2022) and the inverse of the width (Yang et al.
    2022), so small models with small batches need a much higher learning rate than the linear rule gives.
    """
    return OptimConfig().peak_lr(4096) * math.sqrt(batch_size / 4096) * 768 / width


def compute_mean_difference(differences: Tensor, reference: float) -> tuple[float, float]:
    """Return the mean of differences float [N], divided by a reference loss and by its standard error."""
    mean, count = float(differences.mean()), len(differences)
    error = float(differences.std()) / math.sqrt(count) if count > 1 else math.inf
    return (mean / reference if reference > 0 else 0.0), (
        mean / error if error > 0 else math.copysign(math.inf, mean)
    )
