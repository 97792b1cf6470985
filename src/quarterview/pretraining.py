"""Pre-train: put data, model, objective and loop together, and keep the run's folder."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from quarterview import runs
from quarterview.data.cache import CachedSet
from quarterview.data.loader import DataConfig, Loader
from quarterview.data.open import open_sources
from quarterview.data.order import chosen_shuffle, shard_cache, stream_of
from quarterview.data.source import Source, remarks
from quarterview.data.statistics import channel_statistics
from quarterview.data.stream import SampleStream, default_holdout
from quarterview.errors import UserError, check_types
from quarterview.evaluate.online import OnlineProbeConfig, held_out_hooks, probe_hooks, probe_is_due
from quarterview.exchange.facts import facts_of
from quarterview.exchange.weights import check_start, load_into, metadata, read
from quarterview.model.config import MAEConfig
from quarterview.model.mae import fresh_model
from quarterview.objectives.mae import MaskedAutoencoding, MaskingConfig
from quarterview.running import Run, RunningConfig, Site, carry_out, hold, settle, spread, to_plain
from quarterview.train import checkpoint
from quarterview.train.journal import Journal
from quarterview.train.loop import Hook, LoopConfig, Trainer
from quarterview.train.optim import OptimConfig, Schedule, adamw, warmup_steps

Part = TypeVar("Part", MAEConfig, DataConfig, OptimConfig, LoopConfig, OnlineProbeConfig)


@dataclass(frozen=True)
class PretrainConfig(OnlineProbeConfig, OptimConfig, MaskingConfig, MAEConfig, DataConfig, RunningConfig):
    """Everything about a pre-training run. Each field is a flag of ``quarterview pretrain``."""

    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, an official .pth file, a folder of transformers or timm,
    timm:NAME or hf:OWNER/NAME. Image size, patch size and channels may differ."""
    allow_partial: tuple[str, ...] = ()
    """Names of weights, such as decoder*, that `init_from` may lack, or that may be left out of it."""

    def __post_init__(self) -> None:
        for part in (RunningConfig, DataConfig, MAEConfig, MaskingConfig, OptimConfig, OnlineProbeConfig):
            part.__post_init__(self)
        names = self.allow_partial
        object.__setattr__(self, "allow_partial", (names,) if isinstance(names, str) else tuple(names))
        check_types(self, PretrainConfig)
        if self.mask == "grid" and self.masks_per_image > 1 and self.predict_share == 1:
            raise UserError(
                f"{self.masks_per_image} masks per image with --mask grid, which hides every image alike; "
                "accepted: 1, or a --predict-share below 1"
            )

    def part(self, kind: type[Part]) -> Part:
        """The fields of one of the configurations that this one is made of."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


def start_values(init_from: str, out: str, allow_partial: Sequence[str] = ()) -> dict[str, Any]:
    """What the weights to start from say of a configuration: its defaults, where nothing else is said.

    Args:
        out: the run's folder. Once there is a checkpoint in it, that is asked, and the start is no
            longer needed.

    Raises:
        UserError: if they cannot be read.
    """
    begun = checkpoint.newest(Path(out) / "checkpoints") if out else None
    weights = read(begun or init_from, allow_partial=allow_partial)
    names = ["model", "image_size", "in_chans"]
    if isinstance(weights.config, MAEConfig) and weights.has_decoder:
        names += ["decoder", "decoder_width", "decoder_depth", "decoder_heads"]
        names += ["encoder_mask_tokens", "norm_pix_loss"]
    return {name: getattr(weights.config, name) for name in names}


MAY_CHANGE = (
    *("data", "shard_cache_gib", "shard_cache_dir"),
    *("probe_train", "probe_test", "probe_every", "probe_labels", "probe_k"),
)
"""What else a resumed run may do differently. `data` may have moved: its fingerprint must be the same. No
weight depends on what is probed."""


def pretrain(config: PretrainConfig, argv: Sequence[str] = ()) -> Run:
    """Pre-train a masked autoencoder, or go on with a run that was interrupted.

    Args:
        config: what to do.
        argv: the command line, for the record.

    Raises:
        UserError: if the request cannot be met: wrong data, another run in the folder, …
        RunError: if the run cannot go on: it diverged, or too many images are broken.
    """
    if config.out and not config.data:
        raise UserError(
            "no images; accepted: --data with folders, packed stores, tar shards, .txt lists of paths, "
            "parquet, .npy/.npz arrays, torchvision:NAME or shapes"
        )

    def build_run(site: Site) -> Trainer:
        return build(config, prepare(config, site), site)

    def open_images() -> Source:
        if config.init_from is not None and not checkpoint.steps(Path(config.out) / "checkpoints"):
            # A wrong one is told before the data is read.
            check_start(config.part(MAEConfig), config.init_from, config.allow_partial)
        return open_sources(config.data, config.in_chans, shard_cache(config), Journal().say)

    return carry_out(config, config.data, open_images, build_run, ending, MAY_CHANGE, argv)


def ending(run: Run) -> str:
    """What to say of a run that is complete."""
    panels = f"See {run.folder}/samples, or: " if any(run.folder.glob("samples/*.png")) else "See: "
    return f"done: {run.step} steps. {panels}quarterview inspect {run.folder}"


# ---------------------------------------------------------------------- preparing


class Prepared(NamedTuple):
    """What only the data could tell."""

    stream: SampleStream
    cached: CachedSet | None
    cache_reason: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shuffle: Literal["full", "shards"]
    licence: str
    """Of the weights to start from, as far as it is known: what is made of them goes by it."""


def prepare(config: PretrainConfig, site: Site) -> Prepared:
    """Open the data: what is held out, whether it is held on the device, its mean and deviation.

    A resumed run keeps the decisions of its first start.
    """
    known, source, journal = site.known, site.source, site.journal
    holdout = default_holdout(len(source)) if config.holdout is None else config.holdout
    # Data may move between a network and a disk, which `auto` goes by: the first start decides.
    shuffle = known.get("shuffle", "full") if known else chosen_shuffle(config, source)
    stream = stream_of(config, source, holdout, config.seed, shuffle)
    for line in remarks(source):
        journal.warn(line)
    journal.say(f"{len(source)} images, {holdout} of them held out of training")
    if holdout == 0 and config.holdout is None:
        journal.warn(
            "fewer than 100 images, so none are held out: no val_loss, no panel; --holdout 8 gives both"
        )
    cached, reason = hold(config, site)
    mean, std = known.get("mean", config.mean), known.get("std", config.std)
    licence = known.get("licence", "")
    if config.init_from is not None and not known:
        licence = facts_of(config.init_from, allow_partial=config.allow_partial).licence
        start = read(config.init_from, allow_partial=config.allow_partial).config
        if start.in_chans == config.in_chans:
            mean, std = mean or start.mean, std or start.std  # what the weights were trained with
    if mean is None or std is None:
        measured = channel_statistics(source, stream, config.threads, site.ledger)
        mean, std = mean or measured[0], std or measured[1]
    journal.say(
        f"images are {'held on the device' if cached else 'streamed'} ({reason}); "
        f"mean {numbers(mean)}, std {numbers(std)}"
    )
    return Prepared(stream, cached, reason, tuple(mean), tuple(std), shuffle, licence)


def build(config: PretrainConfig, prepared: Prepared, site: Site) -> Trainer:
    """Model, objective, optimiser and loop of a run at its beginning."""
    world, journal, folder = site.world, site.journal, site.folder
    precision = settle(config, site)
    model_config = replace(config.part(MAEConfig), mean=prepared.mean, std=prepared.std)
    model = fresh_model(model_config, config.seed).to(world.device)
    if config.init_from is not None and site.resumed is None:
        for line in load_into(model, config.init_from, config.allow_partial):
            journal.say(line)
    if config.decoder_depth == 0 and not config.encoder_mask_tokens:
        journal.warn(
            "a decoder without blocks sees nothing of the picture unless --encoder-mask-tokens is given"
        )
    trained = prepared.stream.trained
    total = config.total_steps(trained)
    warmup, warning = warmup_steps(config.warmup_epochs, trained / config.batch_size, total)
    if warning:
        journal.warn(warning)
    objective = MaskedAutoencoding(model, config.seed, config.masks_per_image)
    watched = spread(objective, config, precision, site)
    loader = Loader(
        site.source,
        prepared.stream,
        model_config.image_size,
        prepared.mean,
        prepared.std,
        world.device,
        config.threads,
        prepared.cached,
        site.ledger,
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
        hooks=watchers(config, watched, loader, total, journal) if world.is_main else (),
        watched=watched,
        ema=config.ema,
        clip_grad=config.clip_grad,
        state={
            "config": to_plain(config),
            "resolved": resolved(prepared, site, total, warmup, precision),
            "origin": runs.origin(config.resume, site.resumed),
        },
        metadata=metadata(model_config),
    )


def resolved(prepared: Prepared, site: Site, steps: int, warmup: int, precision: str) -> dict[str, Any]:
    """What was decided at the start of a run and stays so."""
    return {
        "steps": steps,
        "warmup_steps": warmup,
        "licence": prepared.licence,
        "images": len(site.source),
        "holdout": prepared.stream.holdout,
        "shuffle": prepared.shuffle,
        "fingerprint": site.fingerprint,
        "cache": "device" if prepared.cached else "none",
        "cache_reason": prepared.cache_reason,
        "mean": list(prepared.mean),
        "std": list(prepared.std),
        "precision": precision,
    }


# ---------------------------------------------------------------------- watching


def watchers(
    config: PretrainConfig, objective: MaskedAutoencoding, loader: Loader, total: int, journal: Journal
) -> list[Hook]:
    """What is looked at during a run, at its validations."""
    micro_batch = config.batch_size // config.accum_iter
    steps_an_epoch = loader.stream.trained / config.batch_size
    probe_steps = None if config.probe_every is None else config.probe_every * steps_an_epoch

    def due(step: int) -> bool:
        return probe_is_due(step, probe_steps, config.validation_every(total), total)

    return [
        *held_out_hooks(objective, loader, Path(config.out), micro_batch),
        *probe_hooks(
            objective.model, config.part(OnlineProbeConfig), config.seed, due, config.threads, journal
        ),
    ]


def numbers(values: Sequence[float]) -> str:
    """A few numbers for people."""
    return " ".join(f"{value:.3f}" for value in values)
