"""Supervision of the worker processes of a DataLoader."""

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
def watch_workers(loader_iter: Any) -> Iterator[Any]:
    """Raise a RunError as soon as a worker of a DataLoader dies, and stop all workers at the end.

    torch raises a RuntimeError from its SIGCHLD handler, anywhere in the main thread; this context manager
    wraps the handler, to raise a RunError instead.

    Args:
        loader_iter: from `iter(DataLoader(…))`.

    Raises:
        RunError: if a worker dies, anywhere in the main thread within the context.
    """
    torch_handler = getsignal(SIGCHLD)
    is_handling = threading.current_thread() is threading.main_thread() and callable(torch_handler)

    def handle(signal_number: int, frame: FrameType | None) -> None:
        try:
            torch_handler(signal_number, frame)  # type: ignore[operator]
        except RuntimeError as error:
            raise _make_worker_error(error) from None

    if is_handling:
        signal(SIGCHLD, handle)
    try:
        yield loader_iter
    except RunError:
        raise
    except (RuntimeError, OSError, EOFError) as error:  # OSError: memory shared by a dead worker is gone
        if not (str(error).startswith(_TORCH_MESSAGE_PREFIX) or _has_failed_worker(loader_iter)):
            raise
        raise _make_worker_error(error) from None
    finally:  # in another thread, if the garbage collector closes the generator there
        is_handling = is_handling and threading.current_thread() is threading.main_thread()
        if is_handling:
            signal(SIGCHLD, SIG_DFL)  # the workers are stopped on purpose now
        _stop_workers(loader_iter)
        if is_handling:
            signal(SIGCHLD, torch_handler)


_TORCH_MESSAGE_PREFIX = "DataLoader worker"


def _has_failed_worker(loader_iter: Any) -> bool:
    """Return True if a worker was killed or failed. Wait up to a second for one that is about to exit."""
    workers = getattr(loader_iter, "_workers", [])
    ended = wait([worker.sentinel for worker in workers], timeout=1)
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # the sentinel closes shortly before the exit code is available
    return any(worker.exitcode for worker in workers)


def _make_worker_error(error: Exception) -> RunError:
    return RunError(
        f"A process that decodes images died ({' '.join(str(error).split())}). Repeat the command "
        "to continue from what was saved. If the system was out of memory, give fewer --workers."
    )


def _stop_workers(loader_iter: Any) -> None:
    """Stop the workers.

    torch normally asks the workers to exit, and waits. After a worker was killed this could wait forever for
    a lock that the worker had acquired, so that step is skipped. Remaining workers are killed, because they
    may ignore SIGTERM and Python waits for them at exit.
    """
    workers = getattr(loader_iter, "_workers", [])
    if any(worker.exitcode for worker in workers):
        loader_iter._shutdown = True  # tells torch that the shutdown is done
        if loader_iter._worker_pids_set:
            _remove_worker_pids(id(loader_iter))
            loader_iter._worker_pids_set = False
        for queue in loader_iter._index_queues:
            queue.cancel_join_thread()
        if hasattr(loader_iter, "_pin_memory_thread_done_event"):
            loader_iter._pin_memory_thread_done_event.set()
    elif workers:
        loader_iter._shutdown_workers()
    for worker in workers:
        worker.kill()
        worker.join()
