"""What the training loop asks of a method, and what a method is built from."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from quarterview.data.loader import Batch
from quarterview.methods.config import MethodConfig
from quarterview.models.config import ViTConfig

Gather = Callable[[Tensor], Tensor]
"""Rows of all ranks, through which gradients flow, from this rank's."""


class Loss(NamedTuple):
    """What a method makes of a batch."""

    loss: Tensor
    """float32 scalar, to be minimised."""
    metrics: dict[str, Tensor]
    """Further scalars worth a column in the metrics."""


class Method(Protocol):
    """An `nn.Module` that holds the model it trains and says how well that does on a batch.

    Everything random in it is drawn through `quarterview.rng` from the batch's ids and epochs.
    """

    @property
    def model(self) -> nn.Module:
        """What is kept and exported; other parameters of the method only serve training."""
        ...

    def __call__(self, batch: Batch) -> Loss: ...


@dataclass(frozen=True)
class Setting:
    """What a method is built from, beside its own configuration."""

    encoder: ViTConfig
    """With the channel means and standard deviations."""
    seed: int
    steps: int
    """Updates of the whole run."""
    accum_iter: int = 1
    """Parts that a batch is cut into: training passes in an update."""
    gather: Gather = lambda rows: rows
    vocabulary: int | None = None
    """How many visual tokens the tokenizer has, where they are predicted."""
    classes: int = 0
    class_names: tuple[str, ...] | None = None
    """Of labelled images."""


def build(config: MethodConfig, setting: Setting) -> nn.Module:
    """A method (see `Method`) at its beginning, on the CPU, with the initial weights that belong to the seed.

    Raises:
        UserError: if a package that it needs is not installed.
    """
    return import_module(f"quarterview.methods.{config.module}").build(config, setting)
