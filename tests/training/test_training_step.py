"""Tests of the cost of a step in numbers without noise: operators, bytes, synchronizations and graph breaks.

The bounds are what the step takes today and a little for other versions of torch. A change that
lifts one has a reason, or is a mistake.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quarterview as qv
from quarterview.data.loader import Batch
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.training.distributed import World
from quarterview.training.optim import create_adamw
from quarterview.training.step import TrainStep
from quarterview.training.trainer import get_autocast_context

CPU = torch.device("cpu")
DEPTH, DECODER_DEPTH = 3, 2
WAITS = ("_local_scalar_dense", "nonzero", "_unique", "unique_", "masked_select", "equal", "is_nonzero")
"""Operators that make the host wait for the device, or whose results have a shape that it must ask for."""


class Counts(TorchDispatchMode):
    """Counts operators and allocated bytes in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.removeprefix("aten::"))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not _is_of(tensor, args):
                self.bytes += tensor.untyped_storage().nbytes()
        return out

    @property
    def waits(self) -> list[str]:
        return [name for name in self.names if name.startswith(WAITS)]


def _is_of(tensor: torch.Tensor, args) -> bool:
    """Whether a result shares memory with an argument, as of an in-place operator or a view."""
    pointer = tensor.untyped_storage().data_ptr()
    return any(
        isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == pointer
        for arg in tree_leaves(args)
    )


def step_and_batch(precision: str = "bf16", **options) -> tuple[TrainStep, Batch]:
    torch.manual_seed(0)
    model = qv.create_model(
        f"mae_vit_64x{DEPTH}x4_patch4",
        image_size=32,
        decoder_width=32,
        decoder_depth=DECODER_DEPTH,
        decoder_heads=2,
    )
    method = MaskedAutoencoding(model, seed=0)
    step = TrainStep(
        method, create_adamw(method, 0.05), World(CPU), get_autocast_context(precision, CPU), **options
    )
    ids = torch.arange(8)
    return step, Batch(torch.randn(8, 3, 32, 32), ids, torch.zeros_like(ids))


def count(step: TrainStep, batch: Batch) -> Counts:
    step.update_weights(
        step.accumulate_gradients(batch)[0]
    )  # the optimiser makes its state at the first step
    with Counts() as counts:
        step.update_weights(step.accumulate_gradients(batch)[0])
    return counts


@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0}, {"accum_iter": 2}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_synchronize_with_the_device(precision, options):
    assert count(*step_and_batch(precision, **options)).waits == []


def test_the_count_of_synchronizations_is_correct():
    with Counts() as counts:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert counts.waits == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize(("precision", "operators", "mebibytes"), [("fp32", 945, 15.5), ("bf16", 1085, 11.7)])
def test_operators_and_allocations_of_a_step_are_bounded(precision, operators, mebibytes):
    counts = count(*step_and_batch(precision))
    assert len(counts.names) <= operators
    assert counts.bytes <= mebibytes * 2**20


def test_the_compiled_model_is_one_graph():
    step, batch = step_and_batch()
    model: nn.Module = step.wrapped.model
    found = torch._dynamo.explain(model)(batch.images, noise=torch.rand(8, 64))
    assert found.graph_break_count == 0, found.break_reasons
    assert found.graph_count == 1
