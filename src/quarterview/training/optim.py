"""AdamW, its parameter groups, and the learning rate schedule."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quarterview.training.sharding import shard_like

WARMUP_RATIO = 40 / 800
"""Ratio of the run that is warm-up by default: the paper's 40 of 800 epochs."""


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every update: linear warm-up from exactly 0, then half a cosine down to
    `min_lr`."""

    peak_lr: float
    warmup_steps: int
    total_steps: int
    min_lr: float = 0.0

    def lr(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def compute_warmup_steps(
    warmup_epochs: float | None, steps_per_epoch: float, total_steps: int
) -> tuple[int, str | None]:
    """Return the number of warm-up updates, and a warning if it differs from the requested number, else None.

    A warm-up that is as long as the run would never reach the peak learning rate. It is shortened to
    `WARMUP_RATIO` of the run.
    """
    default = round(total_steps * WARMUP_RATIO)
    if warmup_epochs is None:
        return default, None
    requested = round(warmup_epochs * steps_per_epoch)
    if requested < total_steps:
        return requested, None
    return default, (
        f"The warm-up of {warmup_epochs:g} epochs ({requested} updates) does not fit a run of {total_steps} "
        f"updates. It is shortened to {default} updates, 5% of the run as in the paper."
    )


def param_groups_weight_decay(module: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's parameter groups of pre-training, as in the official code: vectors and biases are not
    decayed.

    The cls and the mask token have three dimensions and are decayed. Frozen parameters are in no group. Each
    group has the `names` of its parameters.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [(name, p) for name, p in named if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [(name, p) for name, p in named if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [
        {"params": [p for _, p in group], "names": [name for name, _ in group], "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (plain, 0.0))
    ]


def get_layer_id(name: str, depth: int) -> int:
    """Return the layer index of a vision transformer's parameter, as in the official fine-tuning code.

    Tokens, positions and the patch embedding are layer 0, block i is layer i + 1, and everything
    after the blocks is layer depth + 1.
    """
    if name in ("cls_token", "pos_embed", "mask_token") or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def param_groups_layer_decay(
    module: nn.Module, weight_decay: float, layer_decay: float, depth: int, prefix: str = ""
) -> list[dict]:
    """Return parameter groups with layer-wise learning rate decay, as in the official fine-tuning code.

    A group's ``lr_scale`` is ``layer_decay ** (depth + 1 - id)`` (see `get_layer_id`). Vectors, biases, the
    cls token and the positions have no weight decay. Frozen parameters are in no group. Each group has the
    `names` of its parameters.

    Args:
        depth: number of blocks of the transformer.
        prefix: prefix of the transformer's parameter names in `module`, such as ``"model."``.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix(prefix)
        layer, plain = get_layer_id(own, depth), parameter.ndim <= 1 or own in ("cls_token", "pos_embed")
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


def create_adamw(
    module: nn.Module, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Create fused AdamW over `param_groups_weight_decay`. Its learning rate is 0 until it is set."""
    return create_adamw_from_groups(param_groups_weight_decay(module, weight_decay), betas)


def create_adamw_from_groups(groups: Sequence[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Create fused AdamW over parameter groups, which may have an ``lr_scale``."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def get_optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name: ``exp_avg/blocks.0.norm1.bias``, …"""
    return {
        f"{kind}/{name}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `get_optimizer_tensors` returned."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            mine = [key for key in tensors if key.partition("/")[2] == name]
            optimizer.state[parameter] = {
                key.partition("/")[0]: _move_to_parameter(tensors[key], parameter) for key in mine
            }


def _move_to_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move a state tensor to its parameter's device, and shard it like the parameter if the shapes are
    equal."""
    if tensor.shape == parameter.shape:
        tensor = shard_like(tensor, parameter)
    return tensor.to(parameter.device, copy=True)
