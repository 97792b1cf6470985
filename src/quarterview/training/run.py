"""Carry out a run: the same for pre-training and fine-tuning.

The folder is locked, an older checkpoint found and checked, the record written, the loop run and
its end told. What is trained, and how it is built, the caller says.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from quarterview.data.bad_samples import Ledger
from quarterview.data.cache import CACHE_BYTES, CachedSet, load_all
from quarterview.data.loader import LoadConfig, shares
from quarterview.data.sources.base import Source
from quarterview.errors import RunError, UserError, check_types
from quarterview.models.vit import Recomputable, recompute_blocks
from quarterview.training import checkpoint, distributed, run_folder
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.checkpoint import Checkpoint
from quarterview.training.distributed import World
from quarterview.training.lock import lock
from quarterview.training.logging import Journal, metrics
from quarterview.training.sharding import is_sharded_by_default, shard, units
from quarterview.training.trainer import LoopConfig, Trainer, usable_precision

Trained = TypeVar("Trained", bound=nn.Module)

MAY_CHANGE = {
    *("out", "resume", "workers", "max_bad_samples", "device", "deterministic"),
    *("compile", "grad_checkpointing", "accum_iter", "parallel", "ranks_per_copy"),
    *("log_every", "eval_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every"),
}
"""What a resumed run may do differently, whatever it trains."""

_PATIENCE = 120.0
"""Seconds that a run waits for the folder of ranks that it may replace, whose machine a file system may take
90 to give up."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and starts."""

    out: str = ""
    """Required: the run's folder; made if it is not there."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes a CUDA GPU where there is one. mps is untested."""
    resume: str = "auto"
    """auto goes on from the run's newest checkpoint if there is one, never refuses to, and a path
    names the run or the checkpoint to go on from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", str(self.out))
        check_types(self, RunConfig)


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


class Site(NamedTuple):
    """What a run is built on."""

    folder: Path
    world: World
    journal: Journal
    source: Source
    """The training images."""
    fingerprint: str
    """Of what is trained on."""
    ledger: Ledger
    resumed: Checkpoint | None
    """The checkpoint to go on from."""

    @property
    def known(self) -> dict[str, Any]:
        """What was decided at the first start of a run that is resumed."""
        return self.resumed.state["resolved"] if self.resumed else {}


@dataclass(frozen=True)
class RunningConfig(RunConfig, LoadConfig, LoopConfig):
    """What every run's configuration has."""

    def __post_init__(self) -> None:
        for part in (RunConfig, LoadConfig, LoopConfig):
            part.__post_init__(self)


def carry_out(
    config: RunningConfig,
    inputs: Sequence[str],
    open_source: Callable[[], Source],
    build: Callable[[Site], Trainer],
    ending: Callable[[Run], str],
    may_change: Collection[str] = (),
    argv: Sequence[str] = (),
) -> Run:
    """Train, or go on with a run that was interrupted.

    Args:
        config: with defaults for all of its fields.
        inputs: the sets of images, among which the run's folder must not lie.
        open_source: the training images.
        build: the trainer of the run at its beginning.
        ending: what to say of a complete run; the main rank alone asks.
        may_change: fields that a resumed run may do differently, besides `MAY_CHANGE`.
        argv: the command line, for the record.

    Raises:
        UserError: if the request cannot be met: wrong data, another run in the folder, …
        RunError: if the run cannot go on: it diverged, or too many images are broken.
    """
    if not config.out:
        raise UserError("no folder for the run; accepted: --out RUN")
    keep_freed_memory()
    folder = Path(config.out)
    run_folder.check_folder(folder, inputs)
    world = distributed.join(config.device)
    journal = Journal(folder, quiet=not world.is_main)
    failed = True

    def begin() -> str:
        """Take the folder and find where to go on, which the main rank does for all."""
        held.enter_context(lock(folder, _PATIENCE if distributed.may_replace_others() else 0.0))
        return str(run_folder.find_checkpoint(config.resume, folder, journal.warn) or "")

    try:
        with ExitStack() as held:
            path = world.from_main(begin)
            resumed = checkpoint.load(Path(path)) if path else None
            run = _carry_out(
                config, folder, world, journal, resumed, open_source, build, ending, may_change, argv
            )
    except RuntimeError as error:
        if world.size > 1 and distributed.is_lost_rank(error):
            raise RunError(
                f"another rank is gone or does not answer, so this one stops ({first_line(error)}); "
                "the same command goes on from the newest checkpoint"
            ) from error
        raise
    else:
        failed = False
        return run
    finally:
        distributed.leave(world, failed)


def _carry_out(
    config: RunningConfig,
    folder: Path,
    world: World,
    journal: Journal,
    resumed: Checkpoint | None,
    open_source: Callable[[], Source],
    build: Callable[[Site], Trainer],
    ending: Callable[[Run], str],
    may_change: Collection[str],
    argv: Sequence[str],
) -> Run:
    source = open_source()
    fingerprint = source.fingerprint()
    if not world.all_same(fingerprint):
        raise UserError(
            f"rank {world.rank} sees other images than another rank does; accepted: the same set on each"
        )
    adopted = resumed is not None and resumed.path.parent != folder / "checkpoints"
    if resumed is not None:
        accepted = {*MAY_CHANGE, *may_change}
        run_folder.check_same(to_plain(config), defaults(config), accepted, fingerprint, resumed)
        step, total = resumed.state["step"], resumed.state["resolved"]["steps"]
        if step >= total and adopted:
            raise UserError(
                f"{resumed.path} is the end of a run, all {total} steps; accepted: an earlier checkpoint"
            )
        if step >= total:
            journal.say(f"{folder} is complete: {total} steps. Nothing to do.")
            return Run(folder, "complete", total, last_row(folder))
        journal.say(f"going on from {resumed.path}, step {step} of {total}")
    if world.is_main and (resumed is None or adopted):
        run_folder.start_clean(folder)
    bad = folder / "bad_samples.jsonl" if world.is_main else None
    ledger = Ledger(bad, len(source), config.max_bad_samples, world.collect if world.size > 1 else None)
    trainer = build(Site(folder, world, journal, source, fingerprint, ledger, resumed))
    trainer.together = ledger.exchange
    if resumed is not None:
        trainer.restore(resumed)
        if world.is_main:
            checkpoint.remove_after(folder / "checkpoints", trainer.step)
        if adopted:
            trainer.save()
    if world.is_main:
        run_folder.write_record(folder, to_plain(config), fingerprint, len(source), argv)
    status = _train(trainer, ledger, journal)
    run = Run(folder, status, trainer.step, last_row(folder))
    if run.status == "complete":
        if world.is_main:
            journal.say(ending(run))
    else:
        way = "with --resume auto it" if config.resume == "never" else "the same command"
        journal.say(f"stopped by {run.status} after step {run.step}; {way} goes on from there")
    return run


def _train(trainer: Trainer, ledger: Ledger, journal: Journal) -> Literal["complete", "SIGTERM", "SIGINT"]:
    said = ledger.summary()
    for line in said:
        journal.say(line)
    journal.open(trainer.step)
    try:
        status = trainer.run()
    finally:
        trainer.writer.settle()  # before the folder is anyone else's
        journal.close()
    for line in ledger.summary() if ledger.summary() != said else ():
        journal.say(line)
    return status


def hold(config: LoadConfig, site: Site) -> tuple[CachedSet | None, str]:
    """The training images on the device, or None, and why.

    A resumed run keeps the decision of its first start.

    Raises:
        UserError: if they cannot be held and must be.
    """
    if site.known.get("cache", config.cache) == "none":
        return None, site.known.get("cache_reason", "as asked")
    limit = CACHE_BYTES if config.cache == "auto" else sys.maxsize
    loaded = load_all(site.source, site.world.device, limit, config.threads, site.ledger)
    if isinstance(loaded, CachedSet):
        return loaded, f"{loaded.images.nbytes >> 20} MiB of equal-sized 8-bit images"
    if config.cache == "device":
        raise UserError(f"--cache device cannot hold {loaded}; accepted: auto or none")
    return None, loaded


def settle(config: LoopConfig, site: Site) -> Literal["bf16", "fp32"]:
    """Check the batch against the ranks, and say which precision is used.

    Raises:
        UserError: if the batch is too small to be shared.
    """
    world = site.world
    check_shares(config, world.size)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    asked = site.known.get("precision", config.precision)
    precision = usable_precision(asked, world.device)
    if precision != asked:
        site.journal.warn(f"{world.device} has no {asked} arithmetic; training in {precision}")
    return precision


def check_shares(config: LoopConfig, ranks: int) -> None:
    """Raises UserError if a batch is too small for each part of each rank to have an image."""
    if not all(shares(part, config.accum_iter)[0] for part in shares(range(config.batch_size), ranks)):
        raise UserError(
            f"a batch of {config.batch_size} is too small for {ranks} ranks with {config.accum_iter} "
            f"parts each; accepted: {2 * ranks * config.accum_iter} or more"
        )


def spread(objective: Trained, config: LoopConfig, precision: Literal["bf16", "fp32"], site: Site) -> Trained:
    """Let a model recompute its blocks, compile it, cut it among the ranks: what is asked for, in this order.

    Its optimiser is made after that.

    Returns:
        What to look at the model through: the objective, or the main rank's whole copy of a sharded one.
    """
    world, model = site.world, objective.get_submodule("model")
    if config.grad_checkpointing:
        recompute_blocks(model)
    blocks = [module for module in objective.modules() if isinstance(module, Recomputable)]
    sharded = world.size > 1 and (
        config.parallel == "fsdp" or (config.parallel == "auto" and is_sharded_by_default(model, world))
    )
    watched = copy.deepcopy(objective).eval() if sharded and world.is_main else objective
    if config.compile:
        # What gathers the weights of a unit cannot be compiled, so it must not lie within.
        for module in [part for block in blocks for part in units(block)] if sharded else [model]:
            module.compile()
    if sharded:
        shard(objective, blocks, world, config.ranks_per_copy, precision)
        site.journal.say(f"weights and optimiser are cut among the ranks (fsdp, {len(blocks)} blocks)")
    return watched


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON and YAML hold it: lists instead of tuples."""
    return json.loads(json.dumps(asdict(config)))


def defaults(config: Any) -> dict[str, Any]:
    """The defaults of a configuration's fields, likewise."""
    return json.loads(json.dumps({field.name: field.default for field in fields(config)}))


def last_row(folder: Path) -> dict[str, Any]:
    """The newest metrics of a run; empty if there are none."""
    rows = metrics(folder)
    return rows[-1] if rows else {}
