"""LARS, the optimiser of the paper's linear probe."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Lars:
    """Layer-wise adaptive rate scaling (You et al. 2017) without weight decay, as in the official code.

    The gradient g of a matrix w is scaled by ``trust * |w| / |g|`` (by 1 where either norm is 0), and
    that of a vector is taken as it is. Then ``v = momentum * v + g`` and ``w = w - lr * v``.

    Args:
        parameters: what to train.
        momentum: of v, which starts at 0.
        trust: how far a step of rate 1 moves a matrix, as a share of its norm.
    """

    def __init__(self, parameters: Iterable[Tensor], momentum: float = 0.9, trust: float = 0.001) -> None:
        self.parameters, self.momentum, self.trust = list(parameters), momentum, trust
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter along its gradient, and forget the gradient."""
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter.ndim > 1:
                norm, gradient_norm = parameter.norm(), gradient.norm()
                ratio = self.trust * norm / gradient_norm
                gradient = gradient * torch.where((norm > 0) & (gradient_norm > 0), ratio, 1.0)
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(velocity, alpha=lr)
            parameter.grad = None
