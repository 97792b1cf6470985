"""Runs: the folder, the checkpoint to resume from, and the record, for pre-training and fine-tuning.

``with open_run(config, data) as run`` locks the folder and finds the checkpoint to resume from. Then
`OpenRun.attach_data` checks that images and configuration are those of the checkpoint, and `OpenRun.train`
trains.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quarterview.data.bad_samples import BadSampleLog
from quarterview.data.cache import MAX_CACHE_BYTES, CachedDataset, load_cached_dataset
from quarterview.data.config import LoaderConfig
from quarterview.data.loader import split_evenly
from quarterview.data.sources.base import Source
from quarterview.errors import RunError, UserError
from quarterview.training import checkpoint, distributed, run_folder
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.checkpoint import Checkpoint
from quarterview.training.config import ComputeConfig, LoopConfig, Precision
from quarterview.training.distributed import World
from quarterview.training.lock import lock_folder
from quarterview.training.logging import RunLogger
from quarterview.training.metric_writers import read_metrics
from quarterview.training.trainer import Trainer, get_supported_precision

_LOCK_TIMEOUT = 120.0
"""Seconds that a restarted run waits for the lock of the run that it replaces: a network file system may take
90 to release the lock of a machine that failed."""


@dataclass(frozen=True)
class Run:
    """The result of a run that ended or was stopped."""

    folder: Path
    status: Literal["complete", "SIGTERM", "SIGINT"]
    """complete, or the signal that stopped the run. The same call resumes a stopped run."""
    step: int
    """Number of updates so far."""
    metrics: dict[str, Any]
    """The last row of ``metrics.jsonl``."""


class OpenRun:
    """A run whose folder is locked. Made by `open_run`.

    Attributes:
        folder: the run's folder.
        world: the ranks that train together.
        log: shows messages and records metrics.
        resumed: the checkpoint to resume from; None for a new run.
        resolved: decisions of the first start that a resumed run keeps; empty for a new run.
        fingerprint: of the training images, after `attach_data`.
        bad_samples: the record of broken images, after `attach_data`.
    """

    fingerprint: str
    bad_samples: BadSampleLog

    def __init__(
        self, config: Any, folder: Path, world: World, log: RunLogger, resumed: Checkpoint | None
    ) -> None:
        self.config, self.folder, self.world, self.log, self.resumed = config, folder, world, log, resumed
        self.resolved: dict[str, Any] = resumed.state["resolved"] if resumed else {}
        self.resumes_other_run = resumed is not None and resumed.path.parent != folder / "checkpoints"
        """True if the checkpoint to resume from is in another run's folder."""

    @property
    def is_complete(self) -> bool:
        """Return whether all steps are trained already."""
        return self.resumed is not None and self.resumed.state["step"] >= self.resolved["steps"]

    def attach_data(
        self,
        source: Source,
        max_bad_samples: float,
        argv: Sequence[str] = (),
        may_change: Collection[str] = (),
    ) -> None:
        """Set the training images, and check that they and the configuration are those of the checkpoint.

        Args:
            source: the training images.
            max_bad_samples: fraction of broken images above which the run stops.
            argv: the command line, for the record.
            may_change: flags that may change when a run is resumed, in addition to those marked MAY_CHANGE.

        Raises:
            UserError: if the ranks have different images, or the checkpoint has other images or flags.
        """
        self.fingerprint = source.fingerprint()
        if not self.world.is_same_on_all_ranks(self.fingerprint):
            raise UserError(
                f"Rank {self.world.rank} has other images than another rank. Give every rank the same images."
            )
        if self.resumed is not None:
            run_folder.check_same_run(self.config, self.fingerprint, self.resumed, may_change)
            step, total = self.resumed.state["step"], self.resolved["steps"]
            if self.is_complete and self.resumes_other_run:
                raise UserError(
                    f"--resume {self.resumed.path} is the last checkpoint of a run of {total} steps. Give an "
                    "earlier one."
                )
            if self.is_complete:
                self.log.info(f"The run {self.folder} is complete: {total} steps.")
                return
            self.log.info(f"Resuming from {self.resumed.path}, step {step} of {total}.")
        if self.world.is_main and (self.resumed is None or self.resumes_other_run):
            run_folder.remove_leftovers(self.folder)
        record = self.folder / "bad_samples.jsonl" if self.world.is_main else None
        collect = self.world.all_gather_text if self.world.size > 1 else None
        self.bad_samples = BadSampleLog(record, len(source), max_bad_samples, collect)
        self._record = (self.fingerprint, len(source), argv)

    def checkpoint_state(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """Return the part of ``state.json`` that is the same in every checkpoint of a run.

        Args:
            resolved: decisions of the first start that a resumed run keeps.
        """
        return {
            "config": self.config.to_dict(),
            "resolved": {"fingerprint": self.fingerprint, **resolved},
            "origin": run_folder.get_origin(self.config.resume.resume, self.resumed),
        }

    def train(self, trainer: Trainer) -> Run:
        """Train to the last step, or until a stop signal.

        Raises:
            RunError: if the run diverges, too many images are broken, or another rank fails.
        """
        trainer.sync_hook = self.bad_samples.synchronize
        if self.resumed is not None:
            trainer.restore(self.resumed)
            if self.world.is_main:
                checkpoint.remove_after(self.folder / "checkpoints", trainer.step)
            if self.resumes_other_run:
                trainer.save()
        if self.world.is_main:
            run_folder.write_record(self.folder, self.config.to_dict(), *self._record)
        known_bad = self.bad_samples.summarize()
        for line in known_bad:
            self.log.info(line)
        self.log.open(trainer.step)
        try:
            status = trainer.run()
        finally:
            trainer.writer.join()  # before the folder is unlocked
            self.log.close()
        for line in self.bad_samples.summarize() if self.bad_samples.summarize() != known_bad else ():
            self.log.info(line)
        if status != "complete":
            how = "--resume auto" if self.config.resume.resume == "never" else "The same command"
            self.log.info(f"Stopped by {status} after step {trainer.step}. {how} resumes the run.")
        return Run(self.folder, status, trainer.step, read_last_metrics(self.folder))

    def result(self) -> Run:
        """Return the result of a complete run."""
        return Run(self.folder, "complete", self.resolved["steps"], read_last_metrics(self.folder))


@contextmanager
def open_run(config: Any, data: Sequence[str]) -> Iterator[OpenRun]:
    """Lock a run's folder, connect the ranks, and find the checkpoint to resume from; undo this at the end.

    Args:
        config: composed configuration with at least the parts `run` (RunConfig), `resume`, `loader`, `loop`
            and `compute`.
        data: paths of the images, which must not contain the run's folder.

    Raises:
        UserError: if there is no folder, or it cannot be used.
        RunError: if another rank fails.
    """
    if not config.run.out:
        raise UserError("The run has no folder. Give --out RUN.")
    keep_freed_memory()
    folder = Path(config.run.out)
    run_folder.check_folder(folder, data)
    world = distributed.init_world(config.compute.device)
    log = RunLogger(folder, quiet=not world.is_main)
    failed = True
    try:
        with ExitStack() as stack:

            def lock_and_find() -> str:  # on the main rank
                stack.enter_context(
                    lock_folder(folder, _LOCK_TIMEOUT if distributed.may_be_restarted() else 0.0)
                )
                return str(run_folder.find_checkpoint(config.resume.resume, folder, log.warning) or "")

            path = world.run_on_main(lock_and_find)
            yield OpenRun(config, folder, world, log, checkpoint.load(Path(path)) if path else None)
    except RuntimeError as error:
        if world.size > 1 and distributed.is_rank_failure(error):
            raise RunError(
                f"Another rank failed or does not answer, so this one stops ({first_line(error)}). Run the "
                "same command again to resume from the newest checkpoint."
            ) from error
        raise
    else:
        failed = False
    finally:
        distributed.shut_down(world, failed)


# ---------------------------------------------------------------------- decisions at the start of a run


def cache_on_device(config: LoaderConfig, source: Source, run: OpenRun) -> tuple[CachedDataset | None, str]:
    """Cache the training images on the device if --cache asks for it and they are suitable.

    A resumed run keeps the decision of its first start.

    Returns:
        The cached images, or None, and the reason.

    Raises:
        UserError: if --cache device is given and they are not suitable.
    """
    if run.resolved.get("cache", config.cache) == "none":
        return None, run.resolved.get("cache_reason", "--cache none")
    limit = MAX_CACHE_BYTES if config.cache == "auto" else sys.maxsize
    loaded = load_cached_dataset(source, run.world.device, limit, config.num_workers, run.bad_samples)
    if isinstance(loaded, CachedDataset):
        return loaded, f"{loaded.images.nbytes >> 20} MiB of equal-sized 8-bit images"
    if config.cache == "device":
        raise UserError(f"--cache device is not supported with {loaded}. Use --cache auto or none.")
    return None, loaded


def choose_precision(config: ComputeConfig, run: OpenRun) -> Precision:
    """Return the precision of a run: the requested one, or fp32 if the device does not support bf16."""
    requested = run.resolved.get("precision", config.precision)
    precision = get_supported_precision(requested, run.world.device)
    if precision != requested:
        run.log.warning(
            f"The device {run.world.device} does not support --precision {requested}. {precision} is used."
        )
    return precision


def enable_determinism(config: ComputeConfig) -> None:
    """Make torch use deterministic kernels only if --deterministic is given."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_batch_size(config: LoopConfig, ranks: int) -> None:
    """Raise UserError if a batch has too few images for each rank and each --accum-iter part."""
    if not all(
        split_evenly(part, config.accum_iter)[0] for part in split_evenly(range(config.batch_size), ranks)
    ):
        raise UserError(
            f"--batch-size {config.batch_size} is too small for {ranks} ranks with --accum-iter "
            f"{config.accum_iter}. Give {2 * ranks * config.accum_iter} or more."
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_last_metrics(folder: Path) -> dict[str, Any]:
    """Return the last row of a run's metrics; empty if there are none."""
    rows = read_metrics(folder)
    return rows[-1] if rows else {}
