"""The processes that decode: what is said when one dies, and that none outlives its work."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from signal import SIG_DFL, SIGCHLD, getsignal, signal
from types import FrameType
from typing import Any

from torch.utils.data._utils.signal_handling import _remove_worker_pids

from quarterview.errors import RunError


@contextmanager
def watched(batches: Any) -> Iterator[Any]:
    """The iterator of a DataLoader with workers, whose deaths are told as a RunError, and soon.

    torch raises a RuntimeError from a signal handler, wherever the main thread is when a worker dies; it is
    given our words there. On leaving, no worker is left.

    Args:
        batches: of `iter(DataLoader(…))`.

    Raises:
        RunError: if a worker dies, anywhere in the main thread until this is left.
    """
    torchs = getsignal(SIGCHLD)
    ours = threading.current_thread() is threading.main_thread() and callable(torchs)

    def told(number: int, frame: FrameType | None) -> None:
        try:
            torchs(number, frame)  # type: ignore[operator]
        except RuntimeError as error:
            raise _death(error) from None

    if ours:
        signal(SIGCHLD, told)
    try:
        yield batches
    except RunError:
        raise
    except (RuntimeError, OSError, EOFError) as error:  # OSError: what a dead one had sent cannot be fetched
        if not (str(error).startswith(_TORCH_SAYS) or _one_died(batches)):
            raise
        raise _death(error) from None
    finally:  # which another thread may run, where a generator is left to the garbage collector
        ours = ours and threading.current_thread() is threading.main_thread()
        if ours:
            signal(SIGCHLD, SIG_DFL)  # what dies now is meant to
        _end(batches)
        if ours:
            signal(SIGCHLD, torchs)


_TORCH_SAYS = "DataLoader worker"


def _one_died(batches: Any) -> bool:
    """Whether a worker was killed or failed; a second is given to one that is about to be gone."""
    workers = getattr(batches, "_workers", [])
    ended = wait([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # the sentinel is closed a moment before there is an exit code
    return any(worker.exitcode for worker in workers)


def _death(error: Exception) -> RunError:
    return RunError(
        f"a process that decodes images died ({' '.join(str(error).split())}); the same command goes on from "
        "what is saved, if anything is. If the system ended it for want of memory, give fewer --workers"
    )


def _end(batches: Any) -> None:
    """End the workers.

    torch asks them to, and waits. If one was killed, it may have held a lock for which that would wait for
    ever; then, and if one does not end, they are killed: they may ignore SIGTERM, and Python waits for them
    when it exits.
    """
    workers = getattr(batches, "_workers", [])
    if any(worker.exitcode for worker in workers):
        batches._shutdown = True  # there is nothing left for torch to do, but to forget them
        if batches._worker_pids_set:
            _remove_worker_pids(id(batches))
            batches._worker_pids_set = False
        for queue in batches._index_queues:
            queue.cancel_join_thread()
        if hasattr(batches, "_pin_memory_thread_done_event"):
            batches._pin_memory_thread_done_event.set()
    elif workers:
        batches._shutdown_workers()
    for worker in workers:
        worker.kill()
        worker.join()
