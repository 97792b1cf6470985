"""LARS against timm's and against the formula, written out again in NumPy."""

import numpy as np
import pytest
import torch
from timm.optim import Lars as TimmLars

from quarterview.evaluation.lars import Lars

STEPS = 12
RATES = [0.0, 0.3, 6.4, 6.4, 5.0, 3.0, 1.0, 0.5, 0.1, 0.1, 0.05, 0.01]


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (10, 24), "bias": (10,)}
    return [
        {
            name: torch.randn(shape, generator=generator) * 10.0 ** (i % 4 - 3)
            for name, shape in shapes.items()
        }
        for i in range(STEPS)
    ]


def start():
    generator = torch.Generator().manual_seed(9)
    return {"weight": 0.01 * torch.randn(10, 24, generator=generator), "bias": torch.zeros(10)}


def ours(seed):
    parameters = {name: value.clone().requires_grad_() for name, value in start().items()}
    optimizer = Lars(parameters.values())
    path = []
    for lr, some in zip(RATES, gradients(seed), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = some[name].clone()
        optimizer.step(lr)
        assert all(parameter.grad is None for parameter in parameters.values())
        path.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_equal_timms(seed):
    parameters = {name: value.clone().requires_grad_() for name, value in start().items()}
    groups = [
        {"params": [parameters["weight"]], "always_adapt": True},
        {"params": [parameters["bias"]], "always_adapt": False},
    ]
    optimizer = TimmLars(groups, momentum=0.9, trust_coeff=0.001, eps=0.0)
    for lr, some, mine in zip(RATES, gradients(seed), ours(seed), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in parameters.items():
            parameter.grad = some[name].clone()
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(mine[name], parameter.detach(), atol=1e-6, rtol=0)


def test_steps_equal_the_formula():
    w = {name: value.double().numpy() for name, value in start().items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for lr, some, mine in zip(RATES, gradients(2), ours(2), strict=True):
        g = {name: value.double().numpy() for name, value in some.items()}
        g["weight"] = g["weight"] * 0.001 * np.linalg.norm(w["weight"]) / np.linalg.norm(g["weight"])
        for name, moved in mine.items():
            v[name] = 0.9 * v[name] + g[name]
            w[name] = w[name] - lr * v[name]
            np.testing.assert_allclose(moved.numpy(), w[name], atol=1e-6, rtol=1e-6)


def test_a_matrix_of_zeros_follows_its_gradient_and_no_gradient_moves_nothing():
    weight, still, idle = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    torch.nn.init.ones_(still)
    optimizer = Lars([weight, still, idle])
    weight.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    optimizer.step(0.5)
    assert torch.equal(weight.detach(), torch.full((2, 3), -0.5))
    assert torch.equal(still.detach(), torch.ones(2, 3))
    assert torch.equal(idle.detach(), torch.zeros(2, 3))
