"""Pre-train: put data, model, objective and loop together, and keep the run's folder."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from quarterview.data.cache import CachedSet
from quarterview.data.loader import DataConfig, Loader, shares
from quarterview.data.sampler import SampleStream, default_holdout
from quarterview.data.shuffle import chosen_shuffle, shard_cache, stream_of
from quarterview.data.sources.base import Source, labels_of, remarks
from quarterview.data.sources.open import open_sources
from quarterview.data.statistics import channel_statistics
from quarterview.data.transforms.views import BYOL, SIMCLR, View, ViewConfig
from quarterview.errors import UserError, check_types
from quarterview.evaluation.online import OnlineProbeConfig, held_out_hooks, probe_hooks, probe_is_due
from quarterview.methods.base import Objective
from quarterview.methods.pca_fitting import fit_components
from quarterview.methods.registry import (
    COMPARING,
    DEFAULTS,
    PREDICTING,
    ObjectiveConfig,
    fresh_objective,
    model_config_of,
)
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.encoder import Encoder
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import PCATarget, TokenTarget
from quarterview.training import checkpoint, run_folder
from quarterview.training.logging import Journal
from quarterview.training.optim import OptimConfig, Schedule, adamw, warmup_steps
from quarterview.training.run import Run, RunningConfig, Site, carry_out, hold, settle, spread, to_plain
from quarterview.training.trainer import Hook, LoopConfig, Trainer
from quarterview.weights.facts import facts_of
from quarterview.weights.loading import check_start, load_into, metadata, read
from quarterview.weights.tokenizers import OpenTokenizer, open_tokenizer

Part = TypeVar("Part", MAEConfig, DataConfig, OptimConfig, LoopConfig, OnlineProbeConfig, ObjectiveConfig)


@dataclass(frozen=True)
class PretrainConfig(
    OnlineProbeConfig, OptimConfig, ObjectiveConfig, ViewConfig, MAEConfig, DataConfig, RunningConfig
):
    """Everything about a pre-training run. Each field is a flag of ``quarterview pretrain``."""

    tokenizer: str | None = None
    """Of --target tokens: a run of quarterview tokenizer, or a folder of transformers' FlavaImageCodebook
    (DALL-E's)."""
    init_from: str | None = None
    """Weights to start from: a run, a checkpoint, an official .pth file, a folder of transformers or timm,
    timm:NAME or hf:OWNER/NAME. Image size, patch size and channels may differ."""
    allow_partial: tuple[str, ...] = ()
    """Names of weights, such as decoder*, that `init_from` may lack, or that may be left out of it."""

    def __post_init__(self) -> None:
        parts = (RunningConfig, DataConfig, MAEConfig, ViewConfig, ObjectiveConfig, OptimConfig)
        for part in (*parts, OnlineProbeConfig):
            part.__post_init__(self)
        names = self.allow_partial
        object.__setattr__(self, "allow_partial", (names,) if isinstance(names, str) else tuple(names))
        check_types(self, PretrainConfig)
        if self.mask == "grid" and self.masks_per_image > 1 and self.predict_share == 1:
            raise UserError(
                f"{self.masks_per_image} masks per image with --mask grid, which hides every image alike; "
                "accepted: 1, or a --predict-share below 1"
            )
        self._check_objective()

    def _check_objective(self) -> None:
        """Refuse what an objective cannot do."""
        name, tokens = self.objective, self.objective in PREDICTING and self.target == "tokens"
        if tokens != (self.tokenizer is not None):
            raise UserError(
                f"target {self.target} and tokenizer {self.tokenizer}; accepted: --target tokens with "
                "--tokenizer RUN, or neither"
            )
        wanted = DEFAULTS["beit"] if name == "beit" else {}
        for field in ("target", "encoder_mask_tokens", "decoder_depth"):
            if field in wanted and getattr(self, field) != wanted[field]:
                raise UserError(
                    f"{field} {getattr(self, field)} with objective beit; accepted: {wanted[field]}, or "
                    "objective mae"
                )
        if name == "denoising" and (
            self.decoder == "cross" or self.encoder_mask_tokens or not self.predicts_pictures
        ):
            raise UserError(
                "denoising hides nothing and predicts pictures; accepted: the standard decoder, no mask "
                "tokens in the encoder, and --target pixels or pca"
            )
        if name == "supervised" and (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(
                f"a batch of {self.batch_size} leaves an image without one to mix with; accepted: an even "
                "number, or --mixup 0 --cutmix 0"
            )
        if name == "denoising" and self.compile:
            raise UserError("compile with objective denoising; accepted: without it")
        if self.compares and self.accum_iter > 1:
            raise UserError(
                f"accum_iter {self.accum_iter} with {self.comparing}, which compares images of a batch, so "
                "that parts of it would be another task; accepted: 1, and --grad-checkpointing or a "
                "smaller --batch-size to save memory"
            )
        if name in COMPARING and self.parallel == "fsdp":
            raise UserError(f"parallel fsdp with objective {name}; accepted: ddp")
        if name not in PREDICTING and self.fused_blocks:
            blocks = " ".join(map(str, self.fused_blocks))
            raise UserError(
                f"fused_blocks {blocks} with objective {name}, which has no decoder; accepted: "
                f"with {', '.join(PREDICTING)}"
            )
        if self.uniformity and self.fused_blocks:
            raise UserError(
                f"uniformity {self.uniformity} with fused_blocks, whose sum is no feature that anything else "
                "reads; accepted: one of them"
            )
        if name not in PREDICTING and self.init_from is not None:
            raise UserError(f"init_from with objective {name}; accepted: with {', '.join(PREDICTING)}")
        if name == "tokenizer" and self.probe_train:
            raise UserError("a tokenizer has no features to probe; accepted: no probe_train")

    @property
    def compares(self) -> bool:
        """Whether the images of a batch are compared."""
        return self.objective in COMPARING or self.uniformity > 0

    @property
    def comparing(self) -> str:
        """What compares them, for errors."""
        return (
            f"objective {self.objective}" if self.objective in COMPARING else f"uniformity {self.uniformity}"
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
    names = ["model", "image_size", "in_chans", "cls_tokens"]
    if isinstance(weights.config, MAEConfig) and weights.has_decoder:
        names += ["decoder", "decoder_width", "decoder_depth", "decoder_heads"]
        names += ["encoder_mask_tokens", "target", "norm_pix_loss", "pca_components", "vocabulary"]
        names += ["fused_blocks"]
    return {name: getattr(weights.config, name) for name in names}


VOCABULARY = 1024
"""Words of a tokenizer that is made without being told how many."""

MAY_CHANGE = (
    *("data", "tokenizer", "shard_cache_gib", "shard_cache_dir"),
    *("probe_train", "probe_test", "probe_every", "probe_labels", "probe_k"),
)
"""What else a resumed run may do differently. `data` and `tokenizer` may have moved: their fingerprints must
be the same. No weight depends on what is probed."""


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
    trained = prepared.stream.trained
    total = config.total_steps(trained)
    warmup, warning = warmup_steps(config.warmup_epochs, trained / config.batch_size, total)
    if warning:
        journal.warn(warning)
    labels = labels_for(config, site.source)
    tokenizer = open_tokenizer(config.tokenizer, site.known, world.device) if config.tokenizer else None
    classes = 0 if labels is None else max(len(site.source.classes or ()), int(labels.max()) + 1)
    model_config = model_config_of(
        config,
        prepared.mean,
        prepared.std,
        class_names=tuple(site.source.classes) if labels is not None and site.source.classes else None,
        classes=classes,
        vocabulary=tokenizer.vocabulary if tokenizer else config.vocabulary or VOCABULARY,
    )

    def gather(rows: Tensor) -> Tensor:  # a function, for the objective may be copied, and a world may not
        return world.gather(rows)

    objective = fresh_objective(config, model_config, total, gather)
    assert isinstance(objective, nn.Module)
    objective.to(world.device)
    if isinstance(objective.model, MaskedAutoencoder):
        begin(objective.model, config, prepared, tokenizer, site)
    if config.compares:
        check_compared(config, world.size)
    if config.objective in COMPARING:
        config = replace(config, parallel="ddp")  # each rank has all of the model and of its teacher
    watched = spread(objective, config, precision, site)
    loader = Loader(
        site.source,
        prepared.stream,
        config.image_size,
        prepared.mean,
        prepared.std,
        world.device,
        config.threads,
        prepared.cached,
        site.ledger,
        labels=labels,
        views=views_of(config),
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
            "resolved": resolved(prepared, site, total, warmup, precision)
            | ({"tokenizer_digest": tokenizer.digest} if tokenizer else {}),
            "origin": run_folder.origin(config.resume, site.resumed),
        },
        metadata=metadata(model_config),
    )


def begin(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    prepared: Prepared,
    tokenizer: OpenTokenizer | None,
    site: Site,
) -> None:
    """Give a masked autoencoder its first weights and what its target needs; a resumed run has its own."""
    if config.init_from is not None and site.resumed is None:
        for line in load_into(model, config.init_from, config.allow_partial):
            site.journal.say(line)
    if config.decoder_depth == 0 and not config.encoder_mask_tokens and config.objective == "mae":
        site.journal.warn(
            "a decoder without blocks sees nothing of the picture unless --encoder-mask-tokens is given"
        )
    if isinstance(model.target, TokenTarget):
        assert tokenizer is not None
        model.target.use(tokenizer.for_images(model.config, site.world.device))
    if isinstance(model.target, PCATarget) and site.resumed is None and not model.target.components.any():
        fit_components(model, site.source, prepared.stream, config.threads, site.ledger)


def check_compared(config: PretrainConfig, ranks: int) -> None:
    """Raises UserError if the ranks' parts of a batch are not equal, or are too few to compare."""
    counts = {len(part) for part in shares(range(config.batch_size), ranks)}
    if len(counts) > 1 or config.batch_size < 2:
        raise UserError(
            f"a batch of {config.batch_size} images for {ranks} ranks with {config.comparing}; "
            f"accepted: multiples of {2 * ranks}"
        )


def views_of(config: PretrainConfig) -> tuple[View, ...]:
    """How the one or two views of an image are made."""
    if config.objective not in COMPARING:
        return (config.view,)
    if config.color_jitter or not config.view_colours:
        return (config.view, config.view)
    colours = (SIMCLR, SIMCLR) if config.objective == "simclr" else BYOL
    return tuple(replace(config.view, colours=its) for its in colours)


def labels_for(config: PretrainConfig, source: Source) -> Tensor | None:
    """The classes of the images, if they are learned.

    Raises:
        UserError: if an image has none.
    """
    return torch.tensor(labels_of(source)) if config.objective == "supervised" else None


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
    config: PretrainConfig, objective: Objective, loader: Loader, total: int, journal: Journal
) -> list[Hook]:
    """What is looked at during a run, at its validations."""
    micro_batch = config.batch_size // config.accum_iter
    steps_an_epoch = loader.stream.trained / config.batch_size
    probe_steps = None if config.probe_every is None else config.probe_every * steps_an_epoch

    def due(step: int) -> bool:
        return probe_is_due(step, probe_steps, config.validation_every(total), total)

    hooks: list[Hook] = []
    if config.objective not in COMPARING:  # whose task is the whole batch's
        hooks += held_out_hooks(objective, loader, Path(config.out), micro_batch)
    if isinstance(objective.model, MaskedAutoencoder | Encoder | Classifier):
        kind = "cls" if config.objective in COMPARING else "mean"  # what was trained to be compared
        probe = config.part(OnlineProbeConfig)
        hooks += probe_hooks(objective.model, kind, probe, config.seed, due, config.threads, journal)
    return hooks


def numbers(values: Sequence[float]) -> str:
    """A few numbers for people."""
    return " ".join(f"{value:.3f}" for value in values)
