"""AdamW, its parameter groups, and the learning rate over a run."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quarterview.training.sharding import cut_like

WARMUP_SHARE = 40 / 800
"""The paper warms up for 40 of 800 epochs; shorter runs do in proportion."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from exactly 0, then half a cosine to the floor, a value for every update."""

    peak: float
    warmup_steps: int
    total_steps: int
    floor: float = 0.0

    def lr(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_steps(
    warmup_epochs: float | None, steps_per_epoch: float, total_steps: int
) -> tuple[int, str | None]:
    """The updates of warm-up, and what to say if it is not what was asked for.

    A warm-up as long as the run or longer would never reach the learning rate; it shrinks to the
    paper's proportion, 5% of the run.
    """
    proportion = round(total_steps * WARMUP_SHARE)
    if warmup_epochs is None:
        return proportion, None
    asked = round(warmup_epochs * steps_per_epoch)
    if asked < total_steps:
        return asked, None
    return proportion, (
        f"a warm-up of {warmup_epochs:g} epochs ({asked} updates) does not fit a run of {total_steps} "
        f"updates; it shrinks to {proportion}, the paper's proportion"
    )


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups as the official code makes them: vectors and biases are not decayed.

    So the cls and the mask token, which have three dimensions, are. Frozen parameters are in no
    group. Each group carries the `names` of its parameters.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [(name, p) for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [(name, p) for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [
        {"params": [p for _, p in group], "names": [name for name, _ in group], "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (plain, 0.0))
    ]


def layer_id(name: str, depth: int) -> int:
    """The layer that a parameter of a vision transformer counts to, as in the official fine-tuning.

    Tokens, positions and the patch embedding are layer 0, block i is layer i + 1, and everything
    after the blocks is layer depth + 1.
    """
    if name in ("cls_token", "pos_embed", "mask_token") or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def layer_decay_groups(
    module: nn.Module, weight_decay: float, layer_decay: float, depth: int, prefix: str = ""
) -> list[dict]:
    """Parameter groups whose learning rates fall by `layer_decay` with every layer from the head.

    As the official fine-tuning makes them: a group's ``lr_scale`` is ``layer_decay ** (depth + 1 - id)``
    (see `layer_id`); vectors, biases, the cls token and the positions are not decayed. Frozen
    parameters are in no group. Each group carries the `names` of its parameters.

    Args:
        depth: blocks of the transformer.
        prefix: what stands before the transformer's names in `module`, such as ``"model."``.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix(prefix)
        layer, plain = layer_id(own, depth), parameter.ndim <= 1 or own in ("cls_token", "pos_embed")
        group = groups.setdefault(
            (layer, plain),
            {
                "params": [],
                "names": [],
                "weight_decay": 0.0 if plain else weight_decay,
                "lr_scale": layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(
    module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW over `decay_groups`; its learning rate is set at every step."""
    return fused_adamw(decay_groups(module, weight_decay), betas)


def fused_adamw(groups: Sequence[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over groups of parameters, which may have an ``lr_scale``."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state under the names of its parameters: ``exp_avg/blocks.0.norm1.bias``, …"""
    return {
        f"{kind}/{name}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            mine = [key for key in tensors if key.partition("/")[2] == name]
            optimizer.state[parameter] = {
                key.partition("/")[0]: _placed(tensors[key], parameter) for key in mine
            }


def _placed(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the state where its parameter is: cut likewise if it has the parameter's shape."""
    if tensor.shape == parameter.shape:
        tensor = cut_like(tensor, parameter)
    return tensor.to(parameter.device, copy=True)
