"""Ranks and devices. Nothing else touches process groups or asks which rank it is."""

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

from quarterview.data.loader import shares
from quarterview.errors import RunError, ToldElsewhereError, UserError

_TIMEOUT = datetime.timedelta(minutes=10)
"""So long a rank waits for the others before it gives up. One that is gone is noticed at once, with gloo."""
_LONG_TIMEOUT = datetime.timedelta(days=1)
"""Where the main rank alone works: judges a model, or writes to a slow disk."""
_DONE, _FAILED = "+", "-"


@dataclass(frozen=True)
class World:
    """The ranks that train together, and this one's place and device."""

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None
    """All ranks, with a timeout of a day."""

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.rank == 0

    def share(self, positions: range) -> range:
        """This rank's part of a batch of the sample stream."""
        return shares(positions, self.size)[self.rank]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average gradients over ranks in the backward pass, each having the whole module."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def mesh(self, ranks_per_copy: int | None) -> DeviceMesh:
        """The ranks in a grid: each row holds one copy of the model between its ranks.

        Args:
            ranks_per_copy: by default the ranks of one machine.

        Raises:
            UserError: if so many do not divide the ranks.
        """
        asked = ranks_per_copy or int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        if self.size % asked:
            raise UserError(f"{asked} ranks a copy do not divide {self.size} ranks; accepted: a divisor")
        shape, names = (self.size // asked, asked), ("copy", "part")
        if shape[0] == 1:
            shape, names = shape[1:], names[1:]
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    # ------------------------------------------------------------------ agreeing

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over ranks; no copy to the host."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [B, …] of all ranks, in their order. Gradients flow back to the rank whose row it is, of
        every rank's loss; all have the same number of rows."""
        return rows if self.size == 1 else _Gather.apply(rows)

    def wait(self) -> None:
        """Until every rank has come here, however long one of them works."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1), group=self.patient)

    def collect(self, text: str) -> list[str]:
        """What every rank says here, by rank."""
        if self.size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text.encode())]))
        room = torch.zeros(max(1, *(int(size) for size in sizes)), dtype=torch.uint8)
        room[: len(mine)] = mine
        rooms = [torch.zeros_like(room) for _ in range(self.size)]
        dist.all_gather(rooms, room)
        return [bytes(r[: int(s)].tolist()).decode() for r, s in zip(rooms, sizes, strict=True)]

    def from_main(self, act: Callable[[], str]) -> str:
        """What the main rank's `act` returns, on every rank, however long it takes.

        Raises:
            UserError, RunError, OSError: what `act` raises on the main rank.
            ToldElsewhereError: on the others, then.
        """
        if self.size == 1:
            return act()
        if not self.is_main:
            self.wait()
            said = self.collect("")[0]
            if said == _FAILED:
                raise ToldElsewhereError("the main rank says why")
            return said.removeprefix(_DONE)
        try:
            done = act()
        except (UserError, RunError, OSError):
            self.wait()
            self.collect(_FAILED)
            raise
        self.wait()
        return self.collect(_DONE + done)[0].removeprefix(_DONE)

    def all_same(self, text: str) -> bool:
        """Whether every rank says the same here."""
        return len(set(self.collect(text))) == 1


class _Gather(torch.autograd.Function):
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


class Vote:
    """What the ranks decide together at every step: yes if any of them says so.

    Nobody waits: a step's question is answered at the next step. A single rank has its answer at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Ask these, and answer those of the step before."""
        if self.world.size == 1:
            return list(flags)
        answer = self.finish() or [False] * len(flags)
        asked = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._asked = work, asked
        return answer

    def finish(self) -> list[bool]:
        """The answer to what was asked last; nothing if there was nothing."""
        if self._asked is None:
            return []
        work, flags = self._asked
        self._asked = None
        work.wait()
        return [bool(flag) for flag in flags.tolist()]


def join(device: str) -> World:
    """The world as torchrun's environment describes it, or this process alone.

    Args:
        device: ``cpu``, ``cuda``, ``mps`` (untested), or ``auto`` for a CUDA GPU where there is one.

    Raises:
        UserError: if the device is not there.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # FSDP2 and page-locked memory go by it
    if size == 1:
        return World(chosen, rank, size)
    if not dist.is_initialized():
        # What the hosts decide between them goes over gloo, without asking the device.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = _meet(rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    patient = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)
    assert isinstance(patient, dist.ProcessGroup)
    return World(chosen, rank, size, patient)


def _meet(rank: int, size: int) -> dist.Store:
    """A store that these ranks share and nobody else.

    torchrun's is that of all lives of a run: where it restarts the ranks, addresses of the dead are still in
    it. So each rank leaves a word of its own there, and the main one answers each with the name of this life.

    Raises:
        RunError: if a rank does not come.
    """
    store, *_ = next(rendezvous("env://", timeout=_TIMEOUT))
    word, until = uuid.uuid4().hex, time.monotonic() + _TIMEOUT.total_seconds()
    if rank:
        store.set(f"quarterview/hello/{rank}", word)
        try:
            life = store.get(f"quarterview/answer/{word}").decode()  # waits for it
        except dist.DistError as error:
            raise RunError("the main rank did not come; the same command tries again") from error
        store.set(f"quarterview/{life}/here/{rank}", "")
        return dist.PrefixStore(f"quarterview/{life}", store)
    answered: dict[int, str] = {}
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            hello = f"quarterview/hello/{other}"
            if store.check([f"quarterview/{word}/here/{other}"]):
                missing.remove(other)
            elif store.check([hello]) and (said := store.get(hello).decode()) != answered.get(other):
                answered[other] = said  # or what one of an earlier life had said
                store.set(f"quarterview/answer/{said}", word)
        if time.monotonic() > until:
            raise RunError(f"ranks {sorted(missing)} of {size} did not come; the same command tries again")
        time.sleep(0.01)
    return dist.PrefixStore(f"quarterview/{word}", store)


def ranks() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is the main rank, also where there is no `World` any more."""
    return int(os.environ.get("RANK", "0")) == 0


def may_replace_others() -> bool:
    """Whether these ranks may have been started in place of others that failed, by torchrun or Slurm."""
    names = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name, "0")) > 0 for name in names)


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def leave(world: World, failed: bool) -> None:
    """End this process's membership.

    Args:
        failed: because of an error: what is still under way on a GPU may never end, and is not waited for.
    """
    if world.size == 1 or not dist.is_initialized():
        return
    if failed and world.device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
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
    if device != "cuda":
        return torch.device(device)
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(f"a rank for GPU {local_rank} of {count}; accepted: at most {count} ranks a machine")
    return torch.device(device, local_rank)
