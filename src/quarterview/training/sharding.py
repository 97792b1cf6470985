"""Models cut into parts, each rank holding one: FSDP2, for models whose training does not fit a device whole.

Their weights do: the model is made whole, and the main rank looks at a whole copy of it.

A checkpoint knows nothing of this: tensors are gathered whole when one is written, and cut again when
one is read, so a run goes on under any number of ranks, sharded or not.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from quarterview.models.vit import Recomputable, recompute_blocks
from quarterview.training.config import ComputeConfig, Precision
from quarterview.training.distributed import World

Distributed = TypeVar("Distributed", bound=nn.Module)

_BYTES_A_PARAMETER = 16
"""float32: a weight, its gradient and AdamW's two moments."""
_MEMORY_SHARE = 0.25
"""A model whose training state takes more of a device than this is sharded: activations need the rest."""


def is_sharded_by_default(module: nn.Module, world: World) -> bool:
    """Whether a model is so large that each rank should hold only a part of it."""
    if world.size == 1 or world.device.type != "cuda":
        return False
    state = _BYTES_A_PARAMETER * sum(parameter.numel() for parameter in module.parameters())
    return state > _MEMORY_SHARE * torch.cuda.get_device_properties(world.device).total_memory


def units(block: nn.Module) -> list[nn.Module]:
    """What is gathered together when a block's turn comes: its parts but for the norms, which are small."""
    return [part for part in block.children() if not isinstance(part, nn.LayerNorm)]


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    ranks_per_copy: int | None,
    precision: Literal["bf16", "fp32"],
) -> None:
    """Cut a module's parameters among the ranks, before its optimiser is made.

    Each block's `units` are gathered when their turn comes and let go after; everything else stays
    gathered through a step. In bf16 the units travel as bf16, which is what their matrix products use of
    them, and norms, tokens and positions as float32; gradients are summed in float32.

    Args:
        blocks: the repeated modules in it, already recomputing and compiled if they are to be.
        ranks_per_copy: see `World.mesh`.
    """
    mesh = world.mesh(ranks_per_copy)
    kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    halved = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(units(block), mesh=mesh, mp_policy=halved if precision == "bf16" else kept)
    fully_shard(module, mesh=mesh, mp_policy=kept, reshard_after_forward=False)


def distribute(
    method: Distributed, config: ComputeConfig, precision: Precision, world: World, say: Callable[[str], None]
) -> Distributed:
    """Let a model recompute its blocks, compile it, shard it among the ranks, in this order, if asked for.

    Its optimizer is made after that.

    Args:
        method: holds the `model`, whose blocks are `Recomputable`.
        say: told that the model is sharded.

    Returns:
        What evaluations look at: the method, or the main rank's whole copy of a sharded one.
    """
    model = method.get_submodule("model")
    if config.grad_checkpointing:
        recompute_blocks(model)
    blocks = [module for module in method.modules() if isinstance(module, Recomputable)]
    sharded = world.size > 1 and (
        config.parallel == "fsdp" or (config.parallel == "auto" and is_sharded_by_default(model, world))
    )
    watched = copy.deepcopy(method).eval() if sharded and world.is_main else method
    if config.compile:
        # What gathers the weights of a unit cannot be compiled, so it must not lie within.
        for module in [part for block in blocks for part in units(block)] if sharded else [model]:
            module.compile()
    if sharded:
        shard(method, blocks, world, config.ranks_per_copy, precision)
        say(f"weights and optimizer are sharded among the ranks (fsdp, {len(blocks)} blocks)")
    return watched


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` cut this module."""
    return isinstance(module, FSDPModule)


@contextmanager
def adding_gradients(module: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one part of a batch: ranks exchange gradients at the last part alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif not last and callable(postponing := getattr(module, "no_sync", None)):  # DDP
        with postponing():
            yield
    else:
        yield


def copy_whole(module: nn.Module, twin: nn.Module | None) -> None:
    """Copy a sharded module's weights into a whole one, on the ranks that have such a copy; all call this."""
    places = twin.state_dict() if twin is not None else {}
    for name, part in module.state_dict().items():
        entire = whole(part)
        if name in places:
            places[name].copy_(entire)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which ranks hold parts; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_into(module: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load whole tensors that every rank has read into a module, sharded or not."""
    parts = module.state_dict()
    module.load_state_dict(
        {name: cut_like(value, parts[name]) if name in parts else value for name, value in tensors.items()},
        strict=strict,
    )


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has read, cut as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
