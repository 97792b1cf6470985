"""The optimizer of the linear probe compared with the formula in NumPy."""

import numpy as np
import torch

from quarterview.evaluation.linear_paper import make_lars

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


def initial_parameters():
    generator = torch.Generator().manual_seed(9)
    return {"weight": 0.01 * torch.randn(10, 24, generator=generator), "bias": torch.zeros(10)}


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def train(seed):
    parameters = {name: value.clone().requires_grad_() for name, value in initial_parameters().items()}
    optimizer = make_lars(parameters.values())
    history = []
    for lr, grads in zip(RATES, gradients(seed), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        set_lr(optimizer, lr)
        optimizer.step()
        history.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return history


def test_steps_equal_the_formula():
    w = {name: value.double().numpy() for name, value in initial_parameters().items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for lr, grads, actual in zip(RATES, gradients(2), train(2), strict=True):
        g = {name: value.double().numpy() for name, value in grads.items()}
        g["weight"] = g["weight"] * 0.001 * np.linalg.norm(w["weight"]) / np.linalg.norm(g["weight"])
        for name, parameter in actual.items():
            v[name] = 0.9 * v[name] + g[name]
            w[name] = w[name] - lr * v[name]
            np.testing.assert_allclose(parameter.numpy(), w[name], atol=1e-6, rtol=1e-6)


def test_zero_norms_are_not_scaled_and_missing_gradients_change_nothing():
    weight, zero_gradient, no_gradient = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    torch.nn.init.ones_(zero_gradient)
    optimizer = make_lars([weight, zero_gradient, no_gradient])
    weight.grad, zero_gradient.grad = torch.ones(2, 3), torch.zeros(2, 3)
    set_lr(optimizer, 0.5)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 3), -0.5))
    assert torch.equal(zero_gradient.detach(), torch.ones(2, 3))
    assert torch.equal(no_gradient.detach(), torch.zeros(2, 3))
