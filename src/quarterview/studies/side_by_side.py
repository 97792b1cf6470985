"""Executors that run the tasks of a study: in this process, or in worker processes with a GPU each.

A worker process runs many tasks one after another, so that imports and opened images are reused.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, NamedTuple

import torch

from quarterview.errors import RunError, UserError
from quarterview.studies.measure import StoppedError
from quarterview.training.trainer import collect_stop_signals

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Task(NamedTuple):
    """A function call that a worker process can run."""

    name: str
    """Name in messages."""
    function: Callable[..., Any]
    """A function at module level, since it is sent to another process."""
    args: tuple[Any, ...]


class TaskResult(NamedTuple):
    """A finished task and the value that its function returned."""

    task: Task
    result: Any


class SerialExecutor:
    """Executor that runs the tasks one after another in this process."""

    num_jobs = 1

    def __enter__(self) -> "SerialExecutor":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def run(
        self, tasks: Sequence[Task], on_start: Callable[[Task], None] = lambda _: None
    ) -> Iterator[TaskResult]:
        """Run the tasks in order, and yield the result of each.

        Args:
            on_start: called with each task before the task starts.

        Raises:
            StoppedError: if a signal came. A task that does not react to signals is finished first.
        """
        with collect_stop_signals() as stop_signals:
            for task in tasks:
                on_start(task)
                result = TaskResult(task, task.function(*task.args))
                _free_memory()
                if stop_signals:
                    raise StoppedError(stop_signals[0])
                yield result


class ProcessExecutor:
    """Executor that runs tasks in parallel worker processes.

    The processes are started by the first `run` that has tasks, and end with the context manager.

    Args:
        num_jobs: number of worker processes.
    """

    def __init__(self, num_jobs: int) -> None:
        self.num_jobs = num_jobs
        self._pipes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "ProcessExecutor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends an idle process
        alive = list(self._pipes.values())
        while alive:
            for process in alive if kind is not None else ():
                process.terminate()  # repeated, since a run does not notice a signal during its last step
            alive[0].join(0.5)
            alive = [process for process in alive if process.is_alive()]
        self._pipes.clear()

    def run(
        self, tasks: Sequence[Task], on_start: Callable[[Task], None] = lambda _: None
    ) -> Iterator[TaskResult]:
        """Run all tasks, each as soon as a process is free, and yield results in the order of completion.

        Signals are forwarded to the processes: a training run stops after its step, other tasks at once.

        Args:
            on_start: called with each task before the task is sent to a process.

        Raises:
            StoppedError: if a signal came.
            UserError, RunError: if a task failed; the message names the task.
        """
        waiting = list(tasks)
        busy: dict[Connection, Task] = {}
        results: list[TaskResult] = []
        failure: Exception | None = None
        if waiting:
            self._start_processes()
        with collect_stop_signals() as stop_signals:
            while True:
                if stop_signals or failure is not None:
                    for pipe in busy:  # repeated, as in __exit__
                        self._pipes[pipe].terminate()
                else:
                    for pipe in [pipe for pipe in self._pipes if pipe not in busy][: len(waiting)]:
                        busy[pipe] = waiting.pop(0)
                        on_start(busy[pipe])
                        with suppress(OSError):  # the process died while idle; _receive reports its exit code
                            pipe.send(busy[pipe])
                # Yield only now that the free processes have new tasks: the caller may take a while.
                yield from results
                results.clear()
                if not busy:
                    break
                for pipe in wait(list(busy), timeout=0.5):
                    assert isinstance(pipe, Connection)
                    task = busy.pop(pipe)
                    answer = self._receive(pipe, task)
                    if not isinstance(answer, Exception):
                        results.append(TaskResult(task, answer))
                    elif not stop_signals:
                        failure = failure or answer
        if stop_signals:
            raise StoppedError(stop_signals[0])
        if failure is not None:
            raise failure

    def _start_processes(self) -> None:
        """Start the processes that are not running, with an even share of the GPUs and CPU threads."""
        context = multiprocessing.get_context("spawn")
        gpus = list_visible_gpus()
        threads = max(1, torch.get_num_threads() // self.num_jobs)
        for slot in range(len(self._pipes), self.num_jobs):
            parent_pipe, child_pipe = context.Pipe()
            gpu = gpus[slot % len(gpus)] if gpus else None
            process = context.Process(target=_run_worker, args=(child_pipe, gpu, threads))
            # Numerical libraries read these variables when they are loaded.
            with _set_environment(dict.fromkeys(_THREAD_VARIABLES, str(threads))):
                process.start()
            child_pipe.close()
            self._pipes[parent_pipe] = process

    def _receive(self, pipe: Connection, task: Task) -> Any:
        """Return the value that a process sent, or the exception with which its task failed."""
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._pipes.pop(pipe)
            pipe.close()
            process.join()
            return RunError(
                f"{task.name}: the process ended with exit code {process.exitcode}. Run the same command to "
                "resume the study."
            )


@contextmanager
def _set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the context, for processes that are started there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def list_visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, in the notation of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")


def _run_worker(pipe: Connection, gpu: str | None, threads: int) -> None:
    """Run tasks in a worker process until the parent closes the pipe; standard output is discarded."""
    # A terminal sends SIGINT to all processes. The parent handles it, and stops the workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # may be ignored in the parent, and would be so here
    if gpu is not None:  # must be set before CUDA is initialized
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    Thread(target=_exit_with_parent, daemon=True).start()
    with Path(os.devnull).open("w") as devnull:
        sys.stdout = devnull
        while True:
            try:
                task = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                answer = task.function(*task.args)
            except StoppedError as stopped:
                answer = stopped
            except UserError as error:
                answer = UserError(f"{task.name}: {error}")
            except (RunError, OSError, torch.OutOfMemoryError) as error:
                reason = str(error).rstrip(".")
                answer = RunError(f"{task.name}: {reason}. Run the same command to resume the study.")
            _free_memory()
            try:
                pipe.send(answer)
            except OSError:  # the parent has closed the pipe
                return


def _exit_with_parent() -> None:
    """Wait until the parent has ended, then send SIGTERM to this process until it ends.

    This covers a parent that was killed by SIGKILL, which it cannot forward.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def _free_memory() -> None:
    """Return the GPU memory of a finished task to the device, so that the next task can use all of it."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
