"""A run: its folder, its checkpoint, its record, and its end. The same for pre-training and fine-tuning.

``with open_run(config, inputs) as run`` takes the folder and finds the checkpoint to go on from; then
`OpenRun.attach` compares images and configuration with those of that checkpoint, and `OpenRun.train` trains.
"""

import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from quarterview.data.bad_samples import Ledger
from quarterview.data.cache import CACHE_BYTES, CachedSet, load_all
from quarterview.data.config import LoaderConfig
from quarterview.data.loader import shares
from quarterview.data.sources.base import Source
from quarterview.errors import RunError, UserError
from quarterview.training import checkpoint, distributed, run_folder
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.checkpoint import Checkpoint
from quarterview.training.config import ComputeConfig, LoopConfig, Precision
from quarterview.training.distributed import World
from quarterview.training.lock import lock
from quarterview.training.logging import RunLogger
from quarterview.training.metric_writers import read_metrics
from quarterview.training.trainer import Trainer, usable_precision

_PATIENCE = 120.0
"""Seconds that a run waits for the folder of ranks that it may replace, whose machine a file system may take
90 to give up."""


@dataclass(frozen=True)
class Run:
    """How a run ended, or was left."""

    folder: Path
    status: Literal["complete", "SIGTERM", "SIGINT"]
    """complete, or the signal that stopped it; a stopped run goes on where it was when called again."""
    step: int
    """Updates done."""
    metrics: dict[str, Any]
    """The last row of ``metrics.jsonl``."""


class OpenRun:
    """A run whose folder is taken. Made by `open_run`.

    Attributes:
        folder: the run's folder.
        world: the ranks that train it together.
        log: what speaks to people and keeps the metrics.
        resumed: the checkpoint to go on from; None for a new run.
        known: what was decided at the first start of a run that is resumed, and stays so.
        fingerprint: of the images that are trained on, once `attach` was called.
        bad_samples: told of every broken image, once `attach` was called.
    """

    fingerprint: str
    bad_samples: Ledger

    def __init__(
        self, config: Any, folder: Path, world: World, log: RunLogger, resumed: Checkpoint | None
    ) -> None:
        self.config, self.folder, self.world, self.log, self.resumed = config, folder, world, log, resumed
        self.known: dict[str, Any] = resumed.state["resolved"] if resumed else {}
        self.adopted = resumed is not None and resumed.path.parent != folder / "checkpoints"
        """Whether the checkpoint to go on from is another run's."""

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return self.resumed is not None and self.resumed.state["step"] >= self.known["steps"]

    def attach(
        self,
        source: Source,
        max_bad_samples: float,
        argv: Sequence[str] = (),
        may_change: Collection[str] = (),
    ) -> None:
        """Take the training images, and compare them and the configuration with those of the checkpoint.

        Args:
            max_bad_samples: share of broken images above which the run stops.
            argv: the command line, for the record.
            may_change: flags that a resumed run may have other values of, beside those marked so.

        Raises:
            UserError: if the ranks see different images, or the run began with another configuration.
        """
        self.fingerprint = source.fingerprint()
        if not self.world.all_same(self.fingerprint):
            raise UserError(
                f"rank {self.world.rank} sees other images than another rank does. Give each the same set."
            )
        if self.resumed is not None:
            run_folder.check_same(self.config, self.fingerprint, self.resumed, may_change)
            step, total = self.resumed.state["step"], self.known["steps"]
            if self.is_complete and self.adopted:
                raise UserError(
                    f"{self.resumed.path} is the end of a run, all {total} steps. Name an earlier checkpoint."
                )
            if self.is_complete:
                self.log.say(f"{self.folder} is complete: {total} steps. Nothing to do.")
                return
            self.log.say(f"going on from {self.resumed.path}, step {step} of {total}")
        if self.world.is_main and (self.resumed is None or self.adopted):
            run_folder.start_clean(self.folder)
        record = self.folder / "bad_samples.jsonl" if self.world.is_main else None
        collect = self.world.collect if self.world.size > 1 else None
        self.bad_samples = Ledger(record, len(source), max_bad_samples, collect)
        self._record = (self.fingerprint, len(source), argv)

    def state(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """What every checkpoint keeps beside tensors and counts.

        Args:
            resolved: what was decided at the first start and stays so.
        """
        return {
            "config": self.config.to_plain(),
            "resolved": {"fingerprint": self.fingerprint, **resolved},
            "origin": run_folder.origin(self.config.resume.resume, self.resumed),
        }

    def train(self, trainer: Trainer) -> Run:
        """Train to the end, or until a signal.

        Raises:
            RunError: if the run cannot go on: it diverged, or too many images are broken.
        """
        trainer.exchange = self.bad_samples.exchange
        if self.resumed is not None:
            trainer.restore(self.resumed)
            if self.world.is_main:
                checkpoint.remove_after(self.folder / "checkpoints", trainer.step)
            if self.adopted:
                trainer.save()
        if self.world.is_main:
            run_folder.write_record(self.folder, self.config.to_plain(), *self._record)
        known_bad = self.bad_samples.summary()
        for line in known_bad:
            self.log.say(line)
        self.log.open(trainer.step)
        try:
            status = trainer.run()
        finally:
            trainer.writer.settle()  # before the folder is anyone else's
            self.log.close()
        for line in self.bad_samples.summary() if self.bad_samples.summary() != known_bad else ():
            self.log.say(line)
        if status != "complete":
            way = "with --resume auto it" if self.config.resume.resume == "never" else "the same command"
            self.log.say(f"stopped by {status} after step {trainer.step}; {way} goes on from there")
        return Run(self.folder, status, trainer.step, last_row(self.folder))

    def result(self) -> Run:
        """How a run that is complete ended."""
        return Run(self.folder, "complete", self.known["steps"], last_row(self.folder))


@contextmanager
def open_run(config: Any, inputs: Sequence[str]) -> Iterator[OpenRun]:
    """Take a run's folder, join the other ranks, and find where to go on; let all go at the end.

    Args:
        config: composed, with at least the parts `run` (RunConfig), `loader`, `loop` and `compute`.
        inputs: the sets of images, among which the run's folder must not lie.

    Raises:
        UserError: if the request cannot be met: another run in the folder, no folder, …
        RunError: if another rank is lost.
    """
    if not config.run.out:
        raise UserError("The run has no folder. Give --out RUN.")
    keep_freed_memory()
    folder = Path(config.run.out)
    run_folder.check_folder(folder, inputs)
    world = distributed.join(config.compute.device)
    log = RunLogger(folder, quiet=not world.is_main)
    failed = True
    try:
        with ExitStack() as held:

            def take() -> str:  # the main rank does this for all
                held.enter_context(lock(folder, _PATIENCE if distributed.may_replace_others() else 0.0))
                return str(run_folder.find_checkpoint(config.resume.resume, folder, log.warn) or "")

            path = world.from_main(take)
            yield OpenRun(config, folder, world, log, checkpoint.load(Path(path)) if path else None)
    except RuntimeError as error:
        if world.size > 1 and distributed.is_lost_rank(error):
            raise RunError(
                f"another rank is gone or does not answer, so this one stops ({first_line(error)}); "
                "the same command goes on from the newest checkpoint"
            ) from error
        raise
    else:
        failed = False
    finally:
        distributed.leave(world, failed)


# ---------------------------------------------------------------------- what every run decides at its start


def hold_on_device(config: LoaderConfig, source: Source, run: OpenRun) -> tuple[CachedSet | None, str]:
    """The training images on the device, or None, and why.

    A resumed run keeps the decision of its first start.

    Raises:
        UserError: if they cannot be held and must be.
    """
    if run.known.get("cache", config.cache) == "none":
        return None, run.known.get("cache_reason", "as asked")
    limit = CACHE_BYTES if config.cache == "auto" else sys.maxsize
    loaded = load_all(source, run.world.device, limit, config.threads, run.bad_samples)
    if isinstance(loaded, CachedSet):
        return loaded, f"{loaded.images.nbytes >> 20} MiB of equal-sized 8-bit images"
    if config.cache == "device":
        raise UserError(f"--cache device cannot hold {loaded}; accepted: auto or none")
    return None, loaded


def choose_precision(config: ComputeConfig, run: OpenRun) -> Precision:
    """The precision that a run trains in: the one asked for, or fp32 where the device has no bf16."""
    asked = run.known.get("precision", config.precision)
    precision = usable_precision(asked, run.world.device)
    if precision != asked:
        run.log.warn(f"{run.world.device} has no {asked} arithmetic; training in {precision}")
    return precision


def make_deterministic(config: ComputeConfig) -> None:
    """Use deterministic kernels alone, if that is asked for."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_shares(config: LoopConfig, ranks: int) -> None:
    """Raises UserError if a batch is too small for each part of each rank to have an image."""
    if not all(shares(part, config.accum_iter)[0] for part in shares(range(config.batch_size), ranks)):
        raise UserError(
            f"a batch of {config.batch_size} is too small for {ranks} ranks with {config.accum_iter} "
            f"parts each; accepted: {2 * ranks * config.accum_iter} or more"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def last_row(folder: Path) -> dict[str, Any]:
    """The newest metrics of a run; empty if there are none."""
    rows = read_metrics(folder)
    return rows[-1] if rows else {}
