"""Several arms at a time, each in a process with a device of its own."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from quarterview.errors import RunError, UserError
from quarterview.studies.arm import conduct_one
from quarterview.studies.measure import StoppedError, open_images
from quarterview.studies.plan import Planned, StudyConfig
from quarterview.train.journal import Journal
from quarterview.train.loop import stop_signals

_EXITS = {"SIGTERM": 75, "SIGINT": 130}


def jobs_of(config: StudyConfig) -> int:
    """How many arms run at a time: what was asked for, else one a GPU, or one."""
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return config.jobs or max(1, gpus)


def conduct_many(work: Sequence[tuple[int, Planned]], config: StudyConfig, out: Path) -> None:
    """Train and judge every arm under its seed, as many at a time as there are jobs.

    A signal is passed on to all of them, and each stops after its step.

    Args:
        work: seeds and arms.

    Raises:
        StoppedError: if a signal came.
        RunError: if an arm cannot go on; it says why itself.
    """
    jobs = jobs_of(config)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    gpus = visible_gpus()
    waiting, running = list(work), dict[int, BaseProcess]()
    failed: int | None = None
    with stop_signals() as asked:
        while running or (waiting and not asked and failed is None):
            for slot in range(jobs):
                if waiting and slot not in running and not asked and failed is None:
                    seed, one = waiting.pop(0)
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    process = context.Process(target=_job, args=(one, seed, config, out, gpu, threads))
                    process.start()
                    running[slot] = process
            wait([process.sentinel for process in running.values()], timeout=1)
            for slot, process in list(running.items()):
                if not process.is_alive():
                    process.join()
                    failed = failed or process.exitcode or None
                    del running[slot]
                elif asked or failed is not None:
                    process.terminate()
    if asked:
        raise StoppedError(asked[0])
    if failed in (75, 130, -15, -2):
        raise StoppedError("SIGINT" if failed in (130, -2) else "SIGTERM")
    if failed is not None:
        raise RunError(
            f"an arm of the study failed (exit code {failed}) and said why; the same command goes on"
        )


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(torch.cuda.device_count())] if named is None else named.split(",")


def _job(one: Planned, seed: int, config: StudyConfig, out: Path, gpu: str | None, threads: int) -> None:
    """One arm under one seed, in a process of its own."""
    if gpu is not None:  # before anything asks for one of them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    try:
        conduct_one(one, seed, config, open_images(config, one.config.in_chans), out)
    except StoppedError as stopped:
        sys.exit(_EXITS[stopped.signal])
    except (UserError, RunError, OSError) as error:
        Journal().fail(f"{one.arm.name}, seed {seed}: {error}")
        sys.exit(1)
