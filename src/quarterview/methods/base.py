"""The interface between the training loop and the pre-training methods."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from quarterview.data.loader import Batch
from quarterview.methods.config import MethodConfig
from quarterview.models.config import ViTConfig

GatherFn = Callable[[Tensor], Tensor]
"""Gathers the rows of all ranks, [B, ...], from those of this rank. Gradients flow through it."""


class MethodOutput(NamedTuple):
    """The output of a method for a batch."""

    loss: Tensor
    """float32 scalar, the quantity to minimise."""
    metrics: dict[str, Tensor]
    """Further scalars, each logged as a metric of its own."""


class Method(Protocol):
    """The interface of a method: an `nn.Module` that holds the model and computes its loss on a batch.

    All random numbers come from `quarterview.rng` and depend on the ids and epochs of the samples.
    """

    @property
    def model(self) -> nn.Module:
        """The model that is saved and exported. All other parameters of the method serve training only."""
        ...

    def __call__(self, batch: Batch) -> MethodOutput: ...


@dataclass(frozen=True)
class MethodContext:
    """The properties of a run that a method is built from, beside its own configuration."""

    encoder: ViTConfig
    """The configuration of the encoder, with channel means and standard deviations set."""
    seed: int
    num_steps: int
    """Number of updates in the whole run."""
    accum_iter: int = 1
    """Number of forward passes per update, for gradient accumulation."""
    gather: GatherFn = lambda rows: rows
    codebook_size: int | None = None
    """Number of visual tokens of the tokenizer, for methods that predict them."""
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    """Names of the classes, for methods that use labels."""


def build(config: MethodConfig, context: MethodContext) -> nn.Module:
    """Build a method (see `Method`) on the CPU, with the initial weights of the seed.

    Raises:
        UserError: if the method needs a package that is not installed.
    """
    return import_module(f"quarterview.methods.{config.module_name}").build(config, context)
