"""FSDP2: sharding of weights, gradients and optimizer state over ranks, for models that need it.

The weights alone must fit on one device: the model is created unsharded, and the main rank has an unsharded
copy for evaluation.

Checkpoints are unsharded: tensors are gathered when one is written and sharded when one is read, so a run can
be resumed with any number of ranks, sharded or not.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from quarterview.models.vit import CheckpointableBlock, enable_grad_checkpointing
from quarterview.training.config import ComputeConfig, Precision
from quarterview.training.distributed import World

Distributed = TypeVar("Distributed", bound=nn.Module)

_BYTES_PER_PARAMETER = 16
"""A float32 weight, its gradient and AdamW's two moments."""
_MEMORY_FRACTION = 0.25
"""--parallel auto shards a model whose training state needs more than this fraction of a GPU's memory; the
rest is for activations."""


def is_sharded_by_default(module: nn.Module, world: World) -> bool:
    """Return whether --parallel auto shards a module."""
    if world.size == 1 or world.device.type != "cuda":
        return False
    state = _BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in module.parameters())
    return state > _MEMORY_FRACTION * torch.cuda.get_device_properties(world.device).total_memory


def get_fsdp_units(block: nn.Module) -> list[nn.Module]:
    """Return the submodules of a block that FSDP gathers together: all but the norms, which are small."""
    return [part for part in block.children() if not isinstance(part, nn.LayerNorm)]


def apply_fsdp(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    ranks_per_copy: int | None,
    precision: Literal["bf16", "fp32"],
) -> None:
    """Shard a module's parameters over the ranks, before its optimizer is created.

    Each block's `get_fsdp_units` are gathered before and freed after their use; everything else stays
    gathered during a step. In bf16 the units are gathered as bf16, the precision of their matrix products,
    and norms, tokens and positions as float32. Gradients are reduced in float32.

    Args:
        module: the module to shard.
        blocks: its repeated blocks, with recomputation and compilation already set up.
        world: the ranks.
        ranks_per_copy: see `World.create_mesh`.
        precision: precision of the forward pass.
    """
    mesh = world.create_mesh(ranks_per_copy)
    kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(get_fsdp_units(block), mesh=mesh, mp_policy=halved if precision == "bf16" else kept)
    fully_shard(module, mesh=mesh, mp_policy=kept, reshard_after_forward=False)


def prepare_method(
    method: Distributed, config: ComputeConfig, precision: Precision, world: World, log: Callable[[str], None]
) -> Distributed:
    """Set up activation recomputation, compilation and sharding of a method, before its optimizer is created.

    Args:
        method: has the submodule `model`, whose blocks are `CheckpointableBlock`.
        config: which of these to set up.
        precision: precision of the forward pass.
        world: the ranks.
        log: called with a message if the model is sharded.

    Returns:
        The module for evaluations: the method, or the main rank's unsharded copy of a sharded one.
    """
    model = method.get_submodule("model")
    if config.grad_checkpointing:
        enable_grad_checkpointing(model)
    blocks = [module for module in method.modules() if isinstance(module, CheckpointableBlock)]
    sharded = world.size > 1 and (
        config.parallel == "fsdp" or (config.parallel == "auto" and is_sharded_by_default(model, world))
    )
    eval_module = copy.deepcopy(method).eval() if sharded and world.is_main else method
    if config.compile:
        # The hooks that gather weights cannot be compiled, so units are compiled and not the whole model.
        for module in [part for block in blocks for part in get_fsdp_units(block)] if sharded else [model]:
            module.compile()
    if sharded:
        apply_fsdp(method, blocks, world, config.ranks_per_copy, precision)
        log(f"Weights and optimizer state are sharded over the ranks (FSDP, {len(blocks)} blocks).")
    return eval_module


def is_sharded(module: nn.Module) -> bool:
    """Return whether `apply_fsdp` was called on this module."""
    return isinstance(module, FSDPModule)


@contextmanager
def sync_gradients_if_last(module: nn.Module, last: bool) -> Iterator[None]:
    """Context of forward and backward of one part of a batch: gradients are reduced at the last part only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif not last and callable(no_sync := getattr(module, "no_sync", None)):  # DDP
        with no_sync():
            yield
    else:
        yield


def copy_full_weights(module: nn.Module, full_module: nn.Module | None) -> None:
    """Copy a sharded module's weights into an unsharded one, where there is one; all ranks must call this."""
    copies = full_module.state_dict() if full_module is not None else {}
    for name, part in module.state_dict().items():
        full = gather_full(part)
        if name in copies:
            copies[name].copy_(full)


def gather_full(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load unsharded tensors, which every rank has, into a module that may be sharded."""
    parts = module.state_dict()
    module.load_state_dict(
        {name: shard_like(value, parts[name]) if name in parts else value for name, value in tensors.items()},
        strict=strict,
    )


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return an unsharded tensor, which every rank has, sharded like another tensor."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
