"""Ranks and devices. Nothing else touches process groups or asks which rank it is."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quarterview.errors import UserError

_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """The ranks that train together, and this one's place and device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def share(self, positions: range) -> range:
        """This rank's part of a batch of the sample stream."""
        each = len(positions) // self.size
        return range(positions.start + self.rank * each, positions.start + (self.rank + 1) * each)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over ranks in the backward pass."""
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over ranks; no copy to the host."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: the one decision all take."""
        if self.size == 1:
            return flag
        vote = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(vote, dist.ReduceOp.MAX)
        return bool(vote.item())

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> World:
    """The world as torchrun's environment describes it, or this process alone.

    Args:
        device: ``cpu``, ``cuda``, ``mps`` (untested), or ``auto`` for a CUDA GPU where there is one.

    Raises:
        UserError: if the device is not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    return World(chosen, rank, size)


def ranks() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave(world: World) -> None:
    """End this process's membership."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device a name means on this machine. Raises UserError if it is not there."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if device == "auto":
        device = "cuda" if "cuda" in available else "cpu"
    if device not in available:
        raise UserError(f"device {device!r} is not on this machine; accepted: auto, {', '.join(available)}")
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)
