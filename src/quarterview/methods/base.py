"""What the loop asks of an objective."""

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from quarterview.data.loader import Batch


class Loss(NamedTuple):
    """What an objective makes of a batch."""

    loss: Tensor
    """float32 scalar, to be minimised."""
    metrics: dict[str, Tensor]
    """Further scalars worth a column in the metrics."""


class Objective(Protocol):
    """An `nn.Module` that holds the model it trains and says how well that does on a batch.

    Everything random in it is drawn through `quarterview.rng` from the batch's ids and epochs.
    """

    @property
    def model(self) -> nn.Module:
        """What is kept and exported; other parameters of the objective only serve training."""
        ...

    def __call__(self, batch: Batch) -> Loss: ...
