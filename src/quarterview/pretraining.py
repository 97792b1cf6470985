"""Pre-train: put data, model, objective and loop together, and keep the run's folder."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import yaml

from quarterview import draws, runs
from quarterview.data.cache import CACHE_BYTES, CachedSet, load_all
from quarterview.data.ledger import Ledger
from quarterview.data.loader import Batch, DataConfig, Loader
from quarterview.data.open import open_sources
from quarterview.data.source import Source
from quarterview.data.statistics import channel_statistics
from quarterview.data.stream import SampleStream, default_holdout
from quarterview.errors import UserError, check_types
from quarterview.evaluate.panel import draw_panel
from quarterview.exchange.weights import load_into, metadata, read_config
from quarterview.model.config import MAEConfig
from quarterview.model.mae import fresh_model
from quarterview.objectives.mae import MaskedAutoencoding
from quarterview.train import checkpoint, distributed
from quarterview.train.distributed import World
from quarterview.train.journal import Journal, metrics, replace_text
from quarterview.train.lock import lock
from quarterview.train.loop import Hook, LoopConfig, Trainer, usable_precision
from quarterview.train.optim import OptimConfig, Schedule, adamw, warmup_steps

Part = TypeVar("Part", MAEConfig, DataConfig, OptimConfig, LoopConfig)


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
    init_from: str | None = None
    """A run, checkpoint or .safetensors file of the same architecture whose weights to start from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", str(self.out))
        check_types(self, RunConfig)


@dataclass(frozen=True)
class PretrainConfig(LoopConfig, OptimConfig, MAEConfig, DataConfig, RunConfig):
    """Everything about a pre-training run. Each field is a flag of ``quarterview pretrain``."""

    def __post_init__(self) -> None:
        for part in (RunConfig, DataConfig, MAEConfig, OptimConfig, LoopConfig):
            part.__post_init__(self)

    def part(self, kind: type[Part]) -> Part:
        """The fields of one of the configurations that this one is made of."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    @property
    def threads(self) -> int:
        """How many images are decoded at a time."""
        return min(8, os.cpu_count() or 1) if self.workers is None else self.workers


MAY_CHANGE = {
    *("out", "resume", "data", "workers", "max_bad_samples", "device", "compile", "deterministic"),
    *("log_every", "eval_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"),
}
"""What a resumed run may do differently. `data` may have moved: its fingerprint must be the same."""


@dataclass(frozen=True)
class Run:
    """How a call of `pretrain` ended."""

    folder: Path
    status: Literal["complete", "SIGTERM", "SIGINT"]
    """complete, or the signal that stopped it; a stopped run goes on where it was when called again."""
    step: int
    """Updates done."""
    metrics: dict[str, Any]
    """The last row of ``metrics.jsonl``."""


def pretrain(config: PretrainConfig, argv: Sequence[str] = ()) -> Run:
    """Pre-train a masked autoencoder, or go on with a run that was interrupted.

    Args:
        config: what to do.
        argv: the command line, for the record.

    Raises:
        UserError: if the request cannot be met: wrong data, another run in the folder, …
        RunError: if the run cannot go on: it diverged, or too many images are broken.
    """
    if not config.out:
        raise UserError("no folder for the run; accepted: --out RUN")
    if not config.data:
        raise UserError(
            "no images; accepted: --data with folders, .txt lists of paths, parquet, .npy/.npz arrays, "
            "torchvision:NAME or shapes"
        )
    folder = Path(config.out)
    runs.check_folder(folder, config.data)
    world = distributed.join(config.device)
    try:
        if not world.is_main:
            return _pretrain(config, folder, world, argv)
        with lock(folder):
            return _pretrain(config, folder, world, argv)
    finally:
        distributed.leave(world)


def _pretrain(config: PretrainConfig, folder: Path, world: World, argv: Sequence[str]) -> Run:
    journal = Journal(folder, quiet=not world.is_main)
    resumed = runs.find_checkpoint(config.resume, folder)
    if config.init_from is not None and resumed is None:
        read_config(config.init_from)  # so that a wrong one is told before the data is read
    source = open_sources(config.data, config.in_chans)
    fingerprint = source.fingerprint()
    adopted = resumed is not None and resumed.path.parent != folder / "checkpoints"
    if resumed is not None:
        runs.check_same(to_plain(config), to_plain(PretrainConfig()), MAY_CHANGE, fingerprint, resumed)
        step, total = resumed.state["step"], resumed.state["resolved"]["steps"]
        if step >= total and not adopted:
            journal.say(f"{folder} is complete: {total} steps. Nothing to do.")
            return Run(folder, "complete", total, last_row(folder))
        journal.say(f"going on from {resumed.path}, step {step} of {total}")
    if world.is_main and (resumed is None or adopted):
        runs.start_clean(folder)
    ledger = Ledger(
        folder / "bad_samples.jsonl" if world.is_main else None, len(source), config.max_bad_samples
    )
    prepared = prepare(config, source, fingerprint, world, ledger, journal, resumed)
    trainer = build(config, prepared, world, journal, folder, resumed)
    if resumed is not None:
        trainer.restore(resumed)
        if world.is_main:
            checkpoint.remove_after(folder / "checkpoints", trainer.step)
        if adopted:
            trainer.save()
    if world.is_main:
        write_record(config, prepared, folder, argv)
    said = ledger.summary()
    for line in said:
        journal.say(line)
    journal.open(trainer.step)
    try:
        status = trainer.run()
    finally:
        journal.close()
    for line in ledger.summary() if ledger.summary() != said else ():
        journal.say(line)
    journal.say(ending(config, folder, status, trainer))
    return Run(folder, status, trainer.step, last_row(folder))


def ending(config: PretrainConfig, folder: Path, status: str, trainer: Trainer) -> str:
    """What to say when a run ends, and how to go on."""
    if status == "complete":
        panels = f"See {folder}/samples, or: " if trainer.hooks else "See: "
        return f"done: {trainer.step} steps. {panels}quarterview inspect {folder}"
    way = "with --resume auto it" if config.resume == "never" else "the same command"
    return f"stopped by {status} after step {trainer.step}; {way} goes on from there"


# ---------------------------------------------------------------------- preparing


class Prepared(NamedTuple):
    """What only the data could tell."""

    source: Source
    fingerprint: str
    stream: SampleStream
    cached: CachedSet | None
    cache_reason: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    report: Ledger


def prepare(
    config: PretrainConfig,
    source: Source,
    fingerprint: str,
    world: World,
    ledger: Ledger,
    journal: Journal,
    resumed: checkpoint.Checkpoint | None,
) -> Prepared:
    """Open the data: what is held out, whether it is held on the device, its mean and deviation.

    A resumed run keeps the decisions of its first start.
    """
    known = resumed.state["resolved"] if resumed else {}
    holdout = default_holdout(len(source)) if config.holdout is None else config.holdout
    stream = SampleStream(len(source), holdout, config.seed)
    journal.say(f"{len(source)} images, {holdout} of them held out of training")
    if holdout == 0 and config.holdout is None:
        journal.warn(
            "fewer than 100 images, so none are held out: no val_loss, no panel; --holdout 8 gives both"
        )

    cached, reason = None, known.get("cache_reason", "as asked")
    if known.get("cache", config.cache) in ("auto", "device"):
        limit = CACHE_BYTES if config.cache == "auto" else sys.maxsize
        loaded = load_all(source, world.device, limit, config.threads, ledger)
        if isinstance(loaded, CachedSet):
            cached, reason = loaded, f"{loaded.images.nbytes >> 20} MiB of equal-sized 8-bit images"
        elif config.cache == "device":
            raise UserError(f"--cache device cannot hold {loaded}; accepted: auto or none")
        else:
            reason = loaded
    mean, std = known.get("mean", config.mean), known.get("std", config.std)
    if mean is None or std is None:
        measured = channel_statistics(source, stream, config.threads, ledger)
        mean, std = mean or measured[0], std or measured[1]
    journal.say(
        f"images are {'held on the device' if cached else 'streamed'} ({reason}); "
        f"mean {numbers(mean)}, std {numbers(std)}"
    )
    return Prepared(source, fingerprint, stream, cached, reason, tuple(mean), tuple(std), ledger)


def build(
    config: PretrainConfig,
    prepared: Prepared,
    world: World,
    journal: Journal,
    folder: Path,
    resumed: checkpoint.Checkpoint | None,
) -> Trainer:
    """Model, objective, optimiser and loop of a run at its beginning."""
    if config.batch_size % (world.size * config.accum_iter):
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared equally by {world.size} ranks in "
            f"{config.accum_iter} parts; accepted: multiples of {world.size * config.accum_iter}"
        )
    asked = resumed.state["resolved"]["precision"] if resumed else config.precision
    precision = usable_precision(asked, world.device)
    if precision != asked:
        journal.warn(f"{world.device} has no {asked} arithmetic; training in {precision}")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model_config = replace(config.part(MAEConfig), mean=prepared.mean, std=prepared.std)
    model = fresh_model(model_config, config.seed).to(world.device)
    if config.init_from is not None and resumed is None:
        load_into(model, config.init_from)
        journal.say(f"weights from {config.init_from}")
    if config.decoder_depth == 0 and not config.encoder_mask_tokens:
        journal.warn(
            "a decoder without blocks sees nothing of the picture unless --encoder-mask-tokens is given"
        )
    if config.compile:
        model.compile()

    trained = prepared.stream.trained
    total = config.total_steps(trained)
    warmup, warning = warmup_steps(config.warmup_epochs, trained / config.batch_size, total)
    if warning:
        journal.warn(warning)
    objective = MaskedAutoencoding(model, config.seed)
    loader = Loader(
        prepared.source,
        prepared.stream,
        model_config.image_size,
        prepared.mean,
        prepared.std,
        world.device,
        config.threads,
        prepared.cached,
        prepared.report,
    )
    return Trainer(
        objective,
        adamw(objective, config.weight_decay),
        Schedule(config.peak_lr(config.batch_size), warmup, total),
        loader,
        replace(config.part(LoopConfig), precision=precision),
        world,
        journal,
        folder,
        hooks=held_out_hooks(objective, loader, folder, config.batch_size // config.accum_iter)
        if world.is_main
        else (),
        ema=config.ema,
        clip_grad=config.clip_grad,
        state={
            "config": to_plain(config),
            "resolved": resolved(prepared, total, warmup, precision),
            "origin": runs.origin(config.resume, resumed),
        },
        metadata=metadata(model_config),
    )


def resolved(prepared: Prepared, steps: int, warmup: int, precision: str) -> dict[str, Any]:
    """What was decided at the start of a run and stays so."""
    return {
        "steps": steps,
        "warmup_steps": warmup,
        "images": len(prepared.source),
        "holdout": prepared.stream.holdout,
        "fingerprint": prepared.fingerprint,
        "cache": "device" if prepared.cached else "none",
        "cache_reason": prepared.cache_reason,
        "mean": list(prepared.mean),
        "std": list(prepared.std),
        "precision": precision,
    }


# ---------------------------------------------------------------------- hooks


def held_out_hooks(
    objective: MaskedAutoencoding, loader: Loader, folder: Path, micro_batch: int
) -> list[Hook]:
    """The validation loss and the panel, both on the held-out images with masks that never change."""
    held_out = loader.held_out()
    if held_out is None:
        return []

    def val_loss(step: int) -> dict[str, float]:
        losses = [
            (objective(Batch(*part)).loss * len(part[0]))
            for part in zip(*(x.split(micro_batch) for x in held_out), strict=True)
        ]
        return {"val_loss": float(torch.stack(losses).sum() / len(held_out.ids))}

    def panel(step: int) -> dict[str, float]:
        few = Batch(held_out.images[:8], held_out.ids[:8], held_out.epochs[:8])
        uniforms = draws.uniform(objective.seed, "mask", few.epochs, few.ids, objective.model.uniforms_needed)
        path = folder / "samples" / f"step-{step:08d}.png"
        draw_panel(objective.model, few.images, objective.model.mask_noise(uniforms), path, f"step {step}")
        return {}

    return [val_loss, panel]


# ---------------------------------------------------------------------- the record


def write_record(config: PretrainConfig, prepared: Prepared, folder: Path, argv: Sequence[str]) -> None:
    """``config.yaml``, which ``--recipe`` reads, and ``run.json``, which says where a run came from."""
    replace_text(folder / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
    record = {
        "argv": list(argv),
        "versions": {
            name: version(name) for name in ("quarterview", "torch", "torchvision", "numpy", "pillow")
        },
        "python": platform.python_version(),
        "git": git_state(),
        "hardware": hardware(),
        "data": {"fingerprint": prepared.fingerprint, "images": len(prepared.source)},
    }
    replace_text(folder / "run.json", json.dumps(record, indent=1))


def git_state() -> str | None:
    """The commit of the working folder and whether it is changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """What this runs on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def to_plain(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON and YAML hold it: lists instead of tuples."""
    return json.loads(json.dumps(asdict(config)))


def last_row(folder: Path) -> dict[str, Any]:
    """The newest metrics of a run; empty if there are none."""
    rows = metrics(folder)
    return rows[-1] if rows else {}


def numbers(values: Sequence[float]) -> str:
    """A few numbers for people."""
    return " ".join(f"{value:.3f}" for value in values)
