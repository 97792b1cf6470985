"""Process groups, ranks and devices. No other module uses process groups."""

import datetime
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from quarterview.data.loader import split_evenly
from quarterview.errors import ReportedElsewhereError, RunError, UserError, invalid

_TIMEOUT = datetime.timedelta(minutes=10)
"""Timeout of collectives. With gloo, a rank that ended is noticed at once."""
_LONG_TIMEOUT = datetime.timedelta(days=1)
"""Timeout while only the main rank works, such as evaluating a model or writing to a slow disk."""
_DONE, _FAILED = "+", "-"


@dataclass(frozen=True)
class World:
    """The ranks that train together, and this rank's index and device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    long_timeout_group: dist.ProcessGroup | None = None
    """Process group of all ranks with `_LONG_TIMEOUT`; None for a single rank."""

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files."""
        return self.rank == 0

    def shard_positions(self, positions: range) -> range:
        """Return this rank's part of a batch, as positions of the sample stream."""
        return split_evenly(positions, self.size)[self.rank]

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """Wrap a module in DistributedDataParallel if there are several ranks."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def create_mesh(self, ranks_per_copy: int | None) -> DeviceMesh:
        """Return a device mesh for hybrid sharding: (replicate, shard), or (shard,) for a single replica.

        Args:
            ranks_per_copy: number of ranks that one replica is sharded over; by default those of one machine.

        Raises:
            UserError: if the number of ranks is not a multiple of it.
        """
        shards = ranks_per_copy or int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if self.size % shards:
            raise invalid("--ranks-per-copy", shards, f"a divisor of the number of ranks, {self.size}")
        shape, names = (self.size // shards, shards), ("replicate", "shard")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    # ------------------------------------------------------------------ communication

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over ranks, without a copy to the host."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def all_gather(self, rows: Tensor) -> Tensor:
        """Return the rows [B, …] of all ranks, in rank order; every rank has the same number of rows.

        The gradient of each rank's rows is the sum over the losses of all ranks.
        """
        return rows if self.size == 1 else _AllGather.apply(rows)

    def barrier(self) -> None:
        """Wait until every rank calls this, up to `_LONG_TIMEOUT`."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.long_timeout_group)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all ranks, in rank order."""
        if self.size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text.encode())]))
        padded = torch.zeros(max(1, *(int(size) for size in sizes)), dtype=torch.uint8)
        padded[: len(mine)] = mine
        buffers = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(buffers, padded)
        return [bytes(b[: int(s)].tolist()).decode() for b, s in zip(buffers, sizes, strict=True)]

    def run_on_main(self, act: Callable[[], str]) -> str:
        """Call a function on the main rank and return its result on every rank.

        Raises:
            UserError, RunError, OSError: on the main rank, if `act` raises it.
            ReportedElsewhereError: on the other ranks, if `act` raises one of these.
        """
        if self.size == 1:
            return act()
        if not self.is_main:
            self.barrier()
            answer = self.all_gather_text("")[0]
            if answer == _FAILED:
                raise ReportedElsewhereError("The main rank failed and reports why.")
            return answer.removeprefix(_DONE)
        try:
            result = act()
        except (UserError, RunError, OSError):
            self.barrier()
            self.all_gather_text(_FAILED)
            raise
        self.barrier()
        return self.all_gather_text(_DONE + result)[0].removeprefix(_DONE)

    def is_same_on_all_ranks(self, text: str) -> bool:
        """Return whether all ranks have the same text."""
        return len(set(self.all_gather_text(text))) == 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.rows
        return summed[first : first + ctx.rows]


class RankVote:
    """An asynchronous logical OR of flags over all ranks, once per step.

    To avoid waiting, the result of a step's flags is returned at the next step; for a single rank, at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Send the flags of this step, and return the result of the previous step."""
        if self.world.size == 1:
            return list(flags)
        previous = self.finish() or [False] * len(flags)
        votes = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = work, votes
        return previous

    def finish(self) -> list[bool]:
        """Wait for the result of the last flags and return it; empty if there is none."""
        if self._pending is None:
            return []
        work, flags = self._pending
        self._pending = None
        work.wait()
        return [bool(flag) for flag in flags.tolist()]


def init_world(device: str) -> World:
    """Connect the ranks that torchrun's environment variables describe; without them, a single rank.

    Args:
        device: ``cpu``, ``cuda``, ``mps`` (untested), or ``auto`` for a CUDA GPU if there is one.

    Raises:
        UserError: if this machine does not have the device.
        RunError: if not all ranks connect in time.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # FSDP2 and pinned memory use the current device
    if size == 1:
        return World(chosen, rank, size)
    if not dist.is_initialized():
        # Tensors on the CPU go over gloo, so that agreements need no synchronization with the GPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = _rendezvous(rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    patient = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)
    assert isinstance(patient, dist.ProcessGroup)
    return World(chosen, rank, size, patient)


def _rendezvous(rank: int, size: int) -> dist.Store:
    """Return a key-value store that only these ranks share.

    torchrun keeps one store over all restarts of the ranks, and addresses of ended ranks are still in it. So
    each rank writes a random token, and rank 0 answers each with its own token, which is the prefix of the
    keys of this start.

    Raises:
        RunError: if a rank does not connect in time.
    """
    try:  # rank 0 may create the store, and then waits here for the others
        store, *_ = next(rendezvous("env://", timeout=_TIMEOUT))
    except dist.DistError as error:
        waited = f"{_TIMEOUT.total_seconds():.0f} s"
        raise RunError(
            f"Not all of the {size} ranks connected within {waited}. Run the same command again."
        ) from error
    token, until = uuid.uuid4().hex, time.monotonic() + _TIMEOUT.total_seconds()
    if rank:
        store.set(f"quarterview/hello/{rank}", token)
        try:
            prefix = store.get(f"quarterview/answer/{token}").decode()  # waits for the answer
        except dist.DistError as error:
            raise RunError("Rank 0 did not connect. Run the same command again.") from error
        store.set(f"quarterview/{prefix}/here/{rank}", "")
        return dist.PrefixStore(f"quarterview/{prefix}", store)
    last_tokens: dict[int, str] = {}
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            hello = f"quarterview/hello/{other}"
            if store.check([f"quarterview/{token}/here/{other}"]):
                missing.remove(other)
            elif store.check([hello]) and (theirs := store.get(hello).decode()) != last_tokens.get(other):
                last_tokens[other] = theirs  # may be the token of an earlier start, which is replaced later
                store.set(f"quarterview/answer/{theirs}", token)
        if time.monotonic() > until:
            raise RunError(f"Ranks {sorted(missing)} of {size} did not connect. Run the same command again.")
        time.sleep(0.01)
    return dist.PrefixStore(f"quarterview/{token}", store)


def get_world_size() -> int:
    """Return the number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process is rank 0, also after its `World` was shut down."""
    return int(os.environ.get("RANK", "0")) == 0


def may_be_restarted() -> bool:
    """Return whether torchrun or Slurm may have started these ranks to replace ranks that failed."""
    names = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in names)


def is_rank_failure(error: Exception) -> bool:
    """Return whether an error means that another rank ended or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def shut_down(world: World, failed: bool) -> None:
    """End the process group.

    Args:
        world: the ranks.
        failed: whether this is because of an error. Then pending GPU collectives are aborted, because they
            may never finish.
    """
    if world.size == 1 or not dist.is_initialized():
        return
    if failed and world.device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Return the device of a name. Raises UserError if this machine does not have it."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if device == "auto":
        device = "cuda" if "cuda" in available else "cpu"
    if device not in available:
        raise UserError(
            f"--device {device} is not available on this machine. Give one of: auto, {', '.join(available)}."
        )
    if device != "cuda":
        return torch.device(device)
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(
            f"Rank {local_rank} of this machine has no GPU: there are {count}. Start at most {count} ranks."
        )
    return torch.device(device, local_rank)
