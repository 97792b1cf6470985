"""Configuration of all tests: one thread, and reproducible hypothesis examples."""

import os
from collections.abc import Callable

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for what tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from torch import nn

torch.set_num_threads(1)

settings.register_profile("quarterview", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("quarterview")


@pytest.fixture
def disturbed() -> Callable[[nn.Module], nn.Module]:
    """A function that adds noise to a model's biases, norms and tokens, which start at 0, 1 and almost 0."""

    def disturb(model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim != 2:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model

    return disturb
