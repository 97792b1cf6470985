"""``quarterview pretrain``: data, model, method and optimizer put together, and trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quarterview.commands import dry_run, slurm
from quarterview.commands.config import PretrainConfig, PretrainOptions
from quarterview.data.cache import CachedSet
from quarterview.data.config import View
from quarterview.data.loader import Loader, shares
from quarterview.data.sampler import SampleStream, default_holdout
from quarterview.data.shuffle import chosen_shuffle, shard_cache, stream_of
from quarterview.data.sources.base import Source, labels_of, remarks
from quarterview.data.sources.open import open_sources
from quarterview.data.statistics import channel_statistics
from quarterview.errors import EXIT_CODES, UserError
from quarterview.evaluation.online import held_out_evaluators, probe_evaluators, probe_is_due
from quarterview.methods.base import Setting, build
from quarterview.methods.config import ContrastiveConfig
from quarterview.methods.pca_fitting import fit_components
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import PCATarget, TokenTarget
from quarterview.models.vit import VisionTransformer
from quarterview.training.config import ComputeConfig
from quarterview.training.optim import Schedule, adamw, warmup_steps
from quarterview.training.run import (
    OpenRun,
    Run,
    check_shares,
    choose_precision,
    hold_on_device,
    make_deterministic,
    open_run,
)
from quarterview.training.sharding import distribute
from quarterview.training.trainer import Evaluator, Trainer
from quarterview.weights.facts import facts_of
from quarterview.weights.loading import check_start, load_into, metadata, read
from quarterview.weights.tokenizers import OpenTokenizer, open_tokenizer


def main(config: PretrainConfig, argv: Sequence[str], options: PretrainOptions) -> int:
    """``quarterview pretrain`` and ``quarterview tokenizer``; returns the exit code."""
    if options.dry_run:
        dry_run.show(config)
        return 0
    if options.slurm is not None:
        config.check_complete()
        slurm.submit_command(options.slurm, config, config.data.data, partial(dry_run.check, config), argv)
        return 0
    return EXIT_CODES[pretrain(config, argv).status]


def pretrain(config: PretrainConfig | None = None, argv: Sequence[str] = (), **flags: Any) -> Run:
    """Pre-train an encoder, or go on with a run that was interrupted.

    Args:
        config: what to do; by default everything is a default.
        argv: the command line, for the record.
        flags: in what to depart from `config`, by the names of the flags:
            ``pretrain(data="photos", out="runs/x")``.

    Raises:
        UserError: if the request cannot be met: wrong data, another run in the folder, …
        RunError: if the run cannot go on: it diverged, or too many images are broken.
    """
    config = (config or PretrainConfig()).with_flags(**flags)
    config.check_complete()
    with open_run(config, config.data.data) as run:
        if config.init.init_from is not None and run.resumed is None:  # told before any data is read
            check_start(config.autoencoder(), config.init.init_from, config.init.allow_partial)
        source = open_sources(config.data.data, config.model.in_chans, shard_cache(config.data), run.log.say)
        run.attach(source, config.loader.max_bad_samples, argv)
        if run.is_complete:
            return run.result()
        check_shares(config.loop, run.world.size)
        check_compared(config, run.world.size)
        make_deterministic(config.compute)
        precision = choose_precision(config.compute, run)

        images = prepare_images(config, source, run)
        steps = config.loop.total_steps(images.stream.trained)
        steps_per_epoch = images.stream.trained / config.loop.batch_size
        warmup, warning = warmup_steps(config.optim.warmup_epochs, steps_per_epoch, steps)
        if warning:
            run.log.warn(warning)

        tokenizer = find_tokenizer(config, run)
        method = build_method(config, images, tokenizer, steps, run)
        watched = distribute(method, compute_of(config), precision, run.world, run.log.say)
        optimizer = adamw(method, config.optim.weight_decay)
        schedule = Schedule(config.optim.peak_lr(config.loop.batch_size), warmup, steps)
        loader = make_loader(config, images, run)
        evaluators = evaluators_of(config, watched, loader, steps, run) if run.world.is_main else ()

        resolved = {
            **{"steps": steps, "warmup_steps": warmup, "precision": precision, **images.resolved},
            **({"tokenizer_digest": tokenizer.digest} if tokenizer else {}),
        }
        state, header = run.state(resolved), metadata(method.model.config)
        trainer = Trainer(
            config, run, method, optimizer, schedule, loader, precision, evaluators, watched, state, header
        )
        result = run.train(trainer)
        if result.status == "complete":
            panels = f"See {run.folder}/samples, or: " if any(run.folder.glob("samples/*.png")) else "See: "
            run.log.say(f"done: {result.step} steps. {panels}quarterview inspect {run.folder}")
        return result


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """The training images of a run, and what only they could tell."""

    source: Source

    stream: SampleStream
    cached: CachedSet | None
    """All of them, held on the device."""
    cache_reason: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shuffle: Literal["full", "shards"]
    licence: str
    """Of the weights to start from, as far as it is known: what is made of them goes by it."""
    labels: Tensor | None
    """int64 [N], if they are learned."""
    class_names: tuple[str, ...] | None

    @property
    def resolved(self) -> dict[str, Any]:
        """What was decided about them at the start of a run, and stays so."""
        return {
            "images": len(self.source),
            "holdout": self.stream.holdout,
            "shuffle": self.shuffle,
            "cache": "device" if self.cached else "none",
            "cache_reason": self.cache_reason,
            "mean": list(self.mean),
            "std": list(self.std),
            "licence": self.licence,
        }

    @property
    def classes(self) -> int:
        """How many classes the labels have."""
        if self.labels is None:
            return 0
        return max(len(self.class_names or ()), int(self.labels.max()) + 1)


def prepare_images(config: PretrainConfig, source: Source, run: OpenRun) -> Images:
    """Decide what is held out, whether images are held on the device, and measure their mean and deviation.

    A resumed run keeps the decisions of its first start.
    """
    known, log = run.known, run.log
    holdout = default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    # Data may move between a network and a disk, which `auto` goes by: the first start decides.
    shuffle = known.get("shuffle", "full") if known else chosen_shuffle(config.data, source)
    stream = stream_of(config.data, source, holdout, config.loop.seed, shuffle)
    for line in remarks(source):
        log.warn(line)
    log.say(f"{len(source)} images, {holdout} of them held out of training")
    if holdout == 0 and config.data.holdout is None:
        log.warn("fewer than 100 images, so none are held out: no val_loss, no panel; --holdout 8 gives both")
    cached, reason = hold_on_device(config.loader, source, run)
    mean, std = known.get("mean", config.model.mean), known.get("std", config.model.std)
    licence = known.get("licence", "")
    if config.init.init_from is not None and not known:
        licence = facts_of(config.init.init_from, allow_partial=config.init.allow_partial).licence
        start = read(config.init.init_from, allow_partial=config.init.allow_partial).config
        if start.in_chans == config.model.in_chans:
            mean, std = mean or start.mean, std or start.std  # what the weights were trained with
    if mean is None or std is None:
        measured = channel_statistics(source, stream, config.loader.threads, run.bad_samples)
        mean, std = mean or measured[0], std or measured[1]
    log.say(
        f"images are {'held on the device' if cached else 'streamed'} ({reason}); "
        f"mean {_numbers(mean)}, std {_numbers(std)}"
    )
    labels = torch.tensor(labels_of(source)) if config.method.learns_labels else None
    names = tuple(source.classes) if labels is not None and source.classes else None
    return Images(source, stream, cached, reason, tuple(mean), tuple(std), shuffle, licence, labels, names)


def make_loader(config: PretrainConfig, images: Images, run: OpenRun) -> Loader:
    """Batches of the training images, normalised, with the views that the method wants."""
    return Loader(
        images.source,
        images.stream,
        config.model.image_size,
        images.mean,
        images.std,
        run.world.device,
        config.loader.threads,
        images.cached,
        run.bad_samples,
        labels=images.labels,
        views=views_of(config),
    )


def views_of(config: PretrainConfig) -> tuple[View, ...]:
    """How the one or two views of an image are made."""
    view, method = config.view.view, config.method
    if not isinstance(method, ContrastiveConfig):
        return (view,)
    if config.view.color_jitter or not getattr(method, "view_colours", True):
        return (view, view)
    return tuple(replace(view, colors=colors) for colors in method.colors)


# ---------------------------------------------------------------------- the model's beginning


def find_tokenizer(config: PretrainConfig, run: OpenRun) -> OpenTokenizer | None:
    """The tokenizer whose tokens are predicted, if any are."""
    given = getattr(config.method, "tokenizer", None)
    return open_tokenizer(given, run.known, run.world.device) if given is not None else None


def build_method(
    config: PretrainConfig, images: Images, tokenizer: OpenTokenizer | None, steps: int, run: OpenRun
) -> Any:
    """The method (see `quarterview.methods.base.Method`) at its beginning, on the run's device."""
    world = run.world

    def gather(rows: Tensor) -> Tensor:  # a function, for the method may be copied, and a world may not
        return world.gather(rows)

    setting = Setting(
        encoder=replace(config.model, mean=images.mean, std=images.std),
        seed=config.loop.seed,
        steps=steps,
        accum_iter=config.loop.accum_iter,
        gather=gather,
        vocabulary=tokenizer.vocabulary if tokenizer else None,
        classes=images.classes,
        class_names=images.class_names,
    )
    method: Any = build(config.method, setting).to(world.device)
    if isinstance(method.model, MaskedAutoencoder):
        initialize(method.model, config, images, tokenizer, run)
    return method


def compute_of(config: PretrainConfig) -> ComputeConfig:
    """The hardware that is asked for; methods that compare images have all of the model on each rank."""
    return replace(config.compute, parallel="ddp") if config.method.compares else config.compute


def initialize(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    images: Images,
    tokenizer: OpenTokenizer | None,
    run: OpenRun,
) -> None:
    """Give a masked autoencoder its first weights and what its target needs; a resumed run has its own."""
    if config.init.init_from is not None and run.resumed is None:
        for line in load_into(model, config.init.init_from, config.init.allow_partial):
            run.log.say(line)
    if (
        model.config.decoder_depth == 0
        and not model.config.encoder_mask_tokens
        and config.method.name == "mae"
    ):
        run.log.warn(
            "a decoder without blocks sees nothing of the picture unless --encoder-mask-tokens is given"
        )
    if isinstance(model.target, TokenTarget):
        assert tokenizer is not None
        model.target.use(tokenizer.for_images(model.config, run.world.device))
    if isinstance(model.target, PCATarget) and run.resumed is None and not model.target.components.any():
        fit_components(model, images.source, images.stream, config.loader.threads, run.bad_samples)


def check_compared(config: PretrainConfig, ranks: int) -> None:
    """Raises UserError if images of a batch are compared, and the ranks' parts are not equal or too few."""
    batch = config.loop.batch_size
    counts = {len(part) for part in shares(range(batch), ranks)}
    if config.method.compares_batch and (len(counts) > 1 or batch < 2):
        raise UserError(
            f"--batch-size {batch} cannot be compared on {ranks} ranks by --method {config.method.name}. "
            f"Give a multiple of {2 * ranks}."
        )


# ---------------------------------------------------------------------- evaluation


def evaluators_of(
    config: PretrainConfig, method: Any, loader: Loader, steps: int, run: OpenRun
) -> list[Evaluator]:
    """What is looked at during a run, at its evaluations: held-out images, and labelled ones if asked for."""
    micro_batch = config.loop.batch_size // config.loop.accum_iter
    probe_every, steps_per_epoch = config.probe.probe_every, loader.stream.trained / config.loop.batch_size
    probe_steps = None if probe_every is None else probe_every * steps_per_epoch

    def due(step: int) -> bool:
        return probe_is_due(step, probe_steps, config.run.evaluation_every(steps), steps)

    evaluators: list[Evaluator] = []
    if not config.method.compares:  # whose task is the whole batch's
        evaluators += held_out_evaluators(method, loader, Path(config.run.out), micro_batch)
    if isinstance(method.model, VisionTransformer):
        kind = "cls" if config.method.compares else "mean"  # what was trained to be compared
        evaluators += probe_evaluators(
            method.model, kind, config.probe, config.loop.seed, due, config.loader.threads
        )
    return evaluators


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
