"""``quarterview pretrain`` and ``quarterview tokenizer``: pre-training from images to a finished run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quarterview.commands import dry_run, slurm
from quarterview.commands.config import PretrainConfig, PretrainOptions
from quarterview.data.cache import CachedDataset
from quarterview.data.config import View
from quarterview.data.loader import Loader, split_evenly
from quarterview.data.sampler import SampleStream, compute_default_holdout
from quarterview.data.shuffle import create_shard_cache, create_stream, resolve_shuffle
from quarterview.data.sources.base import Source, get_remarks, read_all_labels
from quarterview.data.sources.open import open_sources
from quarterview.data.statistics import compute_channel_statistics
from quarterview.errors import EXIT_CODES, UserError
from quarterview.evaluation.online import is_probe_due, make_held_out_evaluators, make_probe_evaluators
from quarterview.methods.base import MethodContext, build
from quarterview.methods.config import ContrastiveConfig
from quarterview.methods.pca_fitting import fit_pca_target
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import PCATarget, TokenTarget
from quarterview.models.vit import VisionTransformer
from quarterview.training.config import ComputeConfig
from quarterview.training.optim import Schedule, compute_warmup_steps, create_adamw
from quarterview.training.run import (
    OpenRun,
    Run,
    cache_on_device,
    check_batch_size,
    choose_precision,
    enable_determinism,
    open_run,
)
from quarterview.training.sharding import prepare_method
from quarterview.training.trainer import Evaluator, Trainer
from quarterview.weights.facts import read_model_info
from quarterview.weights.loading import load_into, make_metadata, read_initial_weights, read_weights
from quarterview.weights.tokenizers import LoadedTokenizer, open_tokenizer


def main(config: PretrainConfig, argv: Sequence[str], options: PretrainOptions) -> int:
    """Run ``quarterview pretrain`` or ``quarterview tokenizer`` and return the exit code."""
    if options.dry_run:
        dry_run.print_dry_run(config)
        return 0
    if options.slurm is not None:
        config.check_complete()
        slurm.submit_command(
            options.slurm, config, config.data.data, partial(dry_run.check_data, config), argv
        )
        return 0
    return EXIT_CODES[pretrain(config, argv).status]


def pretrain(config: PretrainConfig | None = None, argv: Sequence[str] = (), **flags: Any) -> Run:
    """Pre-train an encoder, or resume an interrupted run.

    Args:
        config: the configuration; by default all flags have their defaults.
        argv: the command line, for the record.
        flags: flags that override `config`: ``pretrain(data="photos", out="runs/x")``.

    Returns:
        The run's folder, status and last metrics.

    Raises:
        UserError: if the configuration, the data or the run's folder is invalid.
        RunError: if the run diverges, too many images are broken, or another rank fails.
    """
    config = (config or PretrainConfig()).with_flags(**flags)
    config.check_complete()
    with open_run(config, config.data.data) as run:
        if config.init.init_from is not None and run.resumed is None:  # fails early if they are invalid
            read_initial_weights(config.autoencoder(), config.init.init_from, config.init.allow_partial)
        source = open_sources(
            config.data.data, config.model.in_chans, create_shard_cache(config.data), run.log.info
        )
        run.attach_data(source, config.loader.max_bad_samples, argv)
        if run.is_complete:
            return run.result()
        check_batch_size(config.loop, run.world.size)
        check_contrastive_batch(config, run.world.size)
        enable_determinism(config.compute)
        precision = choose_precision(config.compute, run)

        images = prepare_images(config, source, run)
        steps = config.loop.total_steps(images.stream.num_train)
        steps_per_epoch = images.stream.num_train / config.loop.batch_size
        warmup, warning = compute_warmup_steps(config.optim.warmup_epochs, steps_per_epoch, steps)
        if warning:
            run.log.warning(warning)

        tokenizer = open_target_tokenizer(config, run)
        method = build_method(config, images, tokenizer, steps, run)
        eval_method = prepare_method(method, get_compute_config(config), precision, run.world, run.log.info)
        optimizer = create_adamw(method, config.optim.weight_decay)
        schedule = Schedule(config.optim.peak_lr(config.loop.batch_size), warmup, steps)
        loader = create_loader(config, images, run)
        evaluators = create_evaluators(config, eval_method, loader, steps, run) if run.world.is_main else ()

        resolved = {
            **{"steps": steps, "warmup_steps": warmup, "precision": precision, **images.resolved},
            **({"tokenizer_digest": tokenizer.digest} if tokenizer else {}),
        }
        state, header = run.checkpoint_state(resolved), make_metadata(method.model.config)
        trainer = Trainer(
            config,
            run,
            method,
            optimizer,
            schedule,
            loader,
            precision,
            evaluators,
            eval_method,
            state,
            header,
        )
        result = run.train(trainer)
        if result.status == "complete":
            panels = f"{run.folder}/samples and " if any(run.folder.glob("samples/*.png")) else ""
            run.log.info(f"Finished {result.step} steps. See {panels}quarterview inspect {run.folder}.")
        return result


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class PreparedImages:
    """The training images of a run, and the settings that depend on them."""

    source: Source
    stream: SampleStream
    cached: CachedDataset | None
    """The images cached on the device, or None."""
    cache_reason: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shuffle: Literal["full", "shards"]
    license: str
    """License of the initial weights, as far as known, which also applies to the trained weights."""
    labels: Tensor | None
    """Labels, int64 [N], if the method learns them."""
    class_names: tuple[str, ...] | None

    @property
    def resolved(self) -> dict[str, Any]:
        """The decisions about the images that a resumed run keeps."""
        return {
            "images": len(self.source),
            "holdout": self.stream.holdout,
            "shuffle": self.shuffle,
            "cache": "device" if self.cached else "none",
            "cache_reason": self.cache_reason,
            "mean": list(self.mean),
            "std": list(self.std),
            "licence": self.license,
        }

    @property
    def classes(self) -> int:
        """Number of classes of the labels."""
        if self.labels is None:
            return 0
        return max(len(self.class_names or ()), int(self.labels.max()) + 1)


def prepare_images(config: PretrainConfig, source: Source, run: OpenRun) -> PreparedImages:
    """Choose held-out images and the cache, and compute channel statistics.

    A resumed run keeps the decisions of its first start.
    """
    resolved, log = run.resolved, run.log
    holdout = compute_default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    # --shuffle auto depends on where the data is, which may change: the first start decides.
    shuffle = resolved.get("shuffle", "full") if resolved else resolve_shuffle(config.data, source)
    stream = create_stream(config.data, source, holdout, config.loop.seed, shuffle)
    for line in get_remarks(source):
        log.warning(line)
    log.info(f"{len(source)} images, of which {holdout} are held out.")
    if holdout == 0 and config.data.holdout is None:
        log.warning(
            "With fewer than 100 images none are held out, so there is no val_loss and no panel. Give "
            "--holdout 8 for both."
        )
    cached, reason = cache_on_device(config.loader, source, run)
    mean, std = resolved.get("mean", config.model.mean), resolved.get("std", config.model.std)
    license = resolved.get("licence", "")
    if config.init.init_from is not None and not resolved:
        license = read_model_info(config.init.init_from, allow_partial=config.init.allow_partial).license
        start = read_weights(config.init.init_from, allow_partial=config.init.allow_partial).config
        if start.in_chans == config.model.in_chans:
            mean, std = (
                mean or start.mean,
                std or start.std,
            )  # the statistics that the weights were trained with
    if mean is None or std is None:
        measured = compute_channel_statistics(source, stream, config.loader.num_workers, run.bad_samples)
        mean, std = mean or measured[0], std or measured[1]
    log.info(
        f"Images are {'cached on the device' if cached else 'streamed'} ({reason}). Mean "
        f"{_format_numbers(mean)}, std {_format_numbers(std)}."
    )
    labels = torch.tensor(read_all_labels(source)) if config.method.needs_labels else None
    names = tuple(source.classes) if labels is not None and source.classes else None
    return PreparedImages(
        source, stream, cached, reason, tuple(mean), tuple(std), shuffle, license, labels, names
    )


def create_loader(config: PretrainConfig, images: PreparedImages, run: OpenRun) -> Loader:
    """Create the loader of normalized training images with the views that the method needs."""
    return Loader(
        images.source,
        images.stream,
        config.model.image_size,
        images.mean,
        images.std,
        run.world.device,
        config.loader.num_workers,
        images.cached,
        run.bad_samples,
        labels=images.labels,
        views=get_views(config),
    )


def get_views(config: PretrainConfig) -> tuple[View, ...]:
    """Return the augmentation of each view of an image: one view, or two for contrastive methods."""
    view, method = config.view.view, config.method
    if not isinstance(method, ContrastiveConfig):
        return (view,)
    if config.view.color_jitter or not getattr(method, "view_colors", True):
        return (view, view)
    return tuple(replace(view, colors=colors) for colors in method.color_distortions)


# ---------------------------------------------------------------------- model


def open_target_tokenizer(config: PretrainConfig, run: OpenRun) -> LoadedTokenizer | None:
    """Open the tokenizer whose tokens the method predicts, or return None."""
    given = getattr(config.method, "tokenizer", None)
    return open_tokenizer(given, run.resolved, run.world.device) if given is not None else None


def build_method(
    config: PretrainConfig,
    images: PreparedImages,
    tokenizer: LoadedTokenizer | None,
    steps: int,
    run: OpenRun,
) -> Any:
    """Build the method (see `quarterview.methods.base.Method`) with initial weights on the run's device."""
    world = run.world

    def gather(
        rows: Tensor,
    ) -> Tensor:  # a function, because the method may be deep-copied and a World cannot
        return world.all_gather(rows)

    setting = MethodContext(
        encoder=replace(config.model, mean=images.mean, std=images.std),
        seed=config.loop.seed,
        num_steps=steps,
        accum_iter=config.loop.accum_iter,
        gather=gather,
        codebook_size=tokenizer.codebook_size if tokenizer else None,
        num_classes=images.classes,
        class_names=images.class_names,
    )
    method: Any = build(config.method, setting).to(world.device)
    if isinstance(method.model, MaskedAutoencoder):
        initialize_autoencoder(method.model, config, images, tokenizer, run)
    return method


def get_compute_config(config: PretrainConfig) -> ComputeConfig:
    """Return the compute configuration; contrastive methods are never sharded."""
    return replace(config.compute, parallel="ddp") if config.method.uses_two_views else config.compute


def initialize_autoencoder(
    model: MaskedAutoencoder,
    config: PretrainConfig,
    images: PreparedImages,
    tokenizer: LoadedTokenizer | None,
    run: OpenRun,
) -> None:
    """Load initial weights into a masked autoencoder, and set up its target; a resumed run loads its own
    weights."""
    if config.init.init_from is not None and run.resumed is None:
        for line in load_into(model, config.init.init_from, config.init.allow_partial):
            run.log.info(line)
    if (
        model.config.decoder_depth == 0
        and not model.config.encoder_mask_tokens
        and config.method.name == "mae"
    ):
        run.log.warning(
            "A decoder with --decoder-depth 0 cannot predict masked patches from visible ones. Give "
            "--encoder-mask-tokens."
        )
    if isinstance(model.target, TokenTarget):
        assert tokenizer is not None
        model.target.set_tokenizer(tokenizer.match_model(model.config, run.world.device))
    if isinstance(model.target, PCATarget) and run.resumed is None and not model.target.components.any():
        fit_pca_target(model, images.source, images.stream, config.loader.num_workers, run.bad_samples)


def check_contrastive_batch(config: PretrainConfig, ranks: int) -> None:
    """Raise UserError if images of a batch are compared and the ranks do not have equal parts of a batch."""
    batch = config.loop.batch_size
    counts = {len(part) for part in split_evenly(range(batch), ranks)}
    if config.method.needs_whole_batch and (len(counts) > 1 or batch < 2):
        raise UserError(
            f"--batch-size {batch} is not supported with --method {config.method.name} on {ranks} ranks. "
            f"Give a multiple of {2 * ranks}."
        )


# ---------------------------------------------------------------------- evaluation


def create_evaluators(
    config: PretrainConfig, method: Any, loader: Loader, steps: int, run: OpenRun
) -> list[Evaluator]:
    """Create the evaluators of a run: of held-out images, and of a k-NN probe if --probe-train is given."""
    micro_batch = config.loop.batch_size // config.loop.accum_iter
    probe_every, steps_per_epoch = config.probe.probe_every, loader.stream.num_train / config.loop.batch_size
    probe_steps = None if probe_every is None else probe_every * steps_per_epoch

    def due(step: int) -> bool:
        return is_probe_due(step, probe_steps, config.run.eval_interval(steps), steps)

    evaluators: list[Evaluator] = []
    if not config.method.uses_two_views:  # whose task is the whole batch's
        evaluators += make_held_out_evaluators(method, loader, Path(config.run.out), micro_batch)
    if isinstance(method.model, VisionTransformer):
        kind = "cls" if config.method.uses_two_views else "mean"  # what was trained to be compared
        evaluators += make_probe_evaluators(
            method.model, kind, config.probe, config.loop.seed, due, config.loader.num_workers
        )
    return evaluators


def _format_numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
