"""Work that is done piece by piece, several at a time, each in a process with a device of its own.

A process takes one piece after another, so that what it imported and opened serves the next one.
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
from quarterview.training.trainer import stop_signals

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Piece(NamedTuple):
    """A function of a module, and what it is given."""

    name: str
    """In messages."""
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Done(NamedTuple):
    """A piece that is done."""

    piece: Piece
    result: Any


class Here:
    """One piece after another in this process."""

    at_a_time = 1

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def each(
        self, pieces: Sequence[Piece], begun: Callable[[Piece], None] = lambda _: None
    ) -> Iterator[Done]:
        """Do them in order.

        Raises:
            StoppedError: if a signal came, after the piece unless it stops by itself.
        """
        with stop_signals() as asked:
            for piece in pieces:
                begun(piece)
                done = Done(piece, piece.function(*piece.arguments))
                _free_memory()
                if asked:
                    raise StoppedError(asked[0])
                yield done


class Workers:
    """Processes that are started when there is work, and end with this.

    Args:
        at_a_time: how many.
    """

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time = at_a_time
        self._pipes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # a process without work ends by this
        left = list(self._pipes.values())
        while left:
            for process in left if kind is not None else ():
                process.terminate()  # again and again: a run does not notice one in its last step
            left[0].join(0.5)
            left = [process for process in left if process.is_alive()]
        self._pipes.clear()

    def each(
        self, pieces: Sequence[Piece], begun: Callable[[Piece], None] = lambda _: None
    ) -> Iterator[Done]:
        """Do them all, each as soon as a process is free; yield what is done in the order in which it is.

        A signal is passed on, upon which a run stops after its step and anything else at once.

        Args:
            begun: told of each piece that is given out.

        Raises:
            StoppedError: if a signal came.
            UserError, RunError: if a piece failed, with its reason.
        """
        waiting = list(pieces)
        busy: dict[Connection, Piece] = {}
        done: list[Done] = []
        failure: Exception | None = None
        if waiting:
            self._start()
        with stop_signals() as asked:
            while True:
                if asked or failure is not None:
                    for pipe in busy:  # again and again, as above
                        self._pipes[pipe].terminate()
                else:
                    for pipe in [pipe for pipe in self._pipes if pipe not in busy][: len(waiting)]:
                        busy[pipe] = waiting.pop(0)
                        begun(busy[pipe])
                        with suppress(OSError):  # of a process that died idle, of which its answer tells
                            pipe.send(busy[pipe])
                yield from done  # now that nobody waits for the next piece
                done.clear()
                if not busy:
                    break
                for pipe in wait(list(busy), timeout=0.5):
                    assert isinstance(pipe, Connection)
                    piece = busy.pop(pipe)
                    answer = self._answer(pipe, piece)
                    if not isinstance(answer, Exception):
                        done.append(Done(piece, answer))
                    elif not asked:
                        failure = failure or answer
        if asked:
            raise StoppedError(asked[0])
        if failure is not None:
            raise failure

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        gpus = visible_gpus()
        threads = max(1, torch.get_num_threads() // self.at_a_time)
        for slot in range(len(self._pipes), self.at_a_time):
            ours, theirs = context.Pipe()
            gpu = gpus[slot % len(gpus)] if gpus else None
            process = context.Process(target=_serve, args=(theirs, gpu, threads))
            with _environment(dict.fromkeys(_THREADS, str(threads))):  # which libraries read when they load
                process.start()
            theirs.close()
            self._pipes[ours] = process

    def _answer(self, pipe: Connection, piece: Piece) -> Any:
        """What a process found; an exception if it failed."""
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._pipes.pop(pipe)
            pipe.close()
            process.join()
            return RunError(f"{piece.name}: its process ended with exit code {process.exitcode}")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for processes that are started meanwhile."""
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


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else named.split(",")


def _serve(pipe: Connection, gpu: str | None, threads: int) -> None:
    """Do pieces until there are no more. What runs say is in their folders, not on the console."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent passes it on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which it does, and which may have come here ignored
    if gpu is not None:  # before anything asks for one of them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()
    with Path(os.devnull).open("w") as nothing:
        sys.stdout = nothing
        while True:
            try:
                piece = pipe.recv()
            except (EOFError, OSError):
                return
            try:
                answer = piece.function(*piece.arguments)
            except StoppedError as stopped:
                answer = stopped
            except UserError as error:
                answer = UserError(f"{piece.name}: {error}")
            except (RunError, OSError, torch.OutOfMemoryError) as error:
                answer = RunError(f"{piece.name}: {error}; the same command goes on")
            _free_memory()
            try:
                pipe.send(answer)
            except OSError:  # nobody waits for it any more
                return


def _end_with_parent() -> None:
    """Stop as upon a signal when the parent was killed without any: nobody would pass one on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def _free_memory() -> None:
    """Give back what a piece took of a GPU's memory, so that the next one may take as much."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
