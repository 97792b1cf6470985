"""Processes for the fault tests: ranks that train together, forked from a process that imported everything.

The setup of docs/reliability.md: width 64, depth 2, 256 generated images, float32, one thread, gloo.
"""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import quarterview as qv
from quarterview.errors import RunError, UserError
from quarterview.training import checkpoint

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quarterview.commands.pretrain", "torch.utils.tensorboard"])

IMAGES, BATCH, STEPS = 256, 16, 20


def config(out: Path, **changes: object) -> qv.PretrainConfig:
    """A run of 20 steps, a little more than one epoch of 16 steps."""
    values = {
        **{"model": "mae_vit_64x2x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "lr": 1e-3, "batch_size": BATCH},
        **{"data": (f"shapes:{IMAGES}:size=16",), "workers": 0, "holdout": 8, "steps": STEPS},
        **{"log_every": 1, "eval_every": 10, "checkpoint_every": 5, "device": "cpu"},
    }
    return qv.PretrainConfig.from_flags(**values).with_flags(**changes)


Prepare = Callable[[int, Path], None]
"""Called in each rank's process before it trains, with its rank and the log that it may write."""


def _rank(
    rank: int, size: int, port: int, given: qv.PretrainConfig, log: Path, prepare: Prepare | None
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of its workers: as usual, not as this test's
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)})
    with (log / f"rank{rank}.out").open("a") as said, contextlib.redirect_stdout(said):
        if prepare is not None:
            prepare(rank, log)
        try:
            run = qv.pretrain(given)
        except (UserError, RunError) as error:
            said.write(f"{type(error).__name__}: {error}\n")
            said.flush()
            os._exit(2 if isinstance(error, UserError) else 1)
        except BaseException:
            said.write(traceback.format_exc())
            said.flush()
            os._exit(99)
        said.flush()
    os._exit({"complete": 0, "SIGTERM": 75, "SIGINT": 130}[run.status])


def begin(
    given: qv.PretrainConfig, size: int, log: Path, prepare: Prepare | None = None
) -> list[BaseProcess]:
    """Start `size` ranks of a run, with their output in ``log/rank0.out``, …"""
    log.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, given, log, prepare)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def end(processes: list[BaseProcess], seconds: float = 300.0) -> list[int | None]:
    """Wait for processes and return their exit codes; fail after `seconds`."""
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def train(given: qv.PretrainConfig, size: int, log: Path, prepare: Prepare | None = None) -> list[int | None]:
    """Train on `size` ranks and return their exit codes."""
    return end(begin(given, size, log, prepare))


def said(log: Path, rank: int = 0) -> str:
    """Return the output of a rank, with the error that it ended with."""
    path = log / f"rank{rank}.out"
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def killing(processes: list[BaseProcess]) -> Iterator[None]:
    """Kill the processes at the end of this context."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's newest checkpoint: weights, optimizer state, moving average."""
    newest = checkpoint.find_newest(folder / "checkpoints")
    assert newest is not None
    loaded = checkpoint.load(newest)
    return {f"{kind}/{name}": t for kind, named in loaded.tensors.items() for name, t in named.items()}


def different(one: Path, two: Path) -> list[str]:
    """Return the names of tensors that are not bit-equal in the newest checkpoints of two runs."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
