"""Measurement of a run: its folder, its model and its images."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.config import DataConfig
from quarterview.data.sampler import SampleStream, compute_default_holdout
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.data.statistics import compute_channel_statistics
from quarterview.data.transforms.crop import normalize
from quarterview.doctor.collapse import (
    FeatureStatistics,
    compute_encoder_statistics,
    compute_pixel_statistics,
)
from quarterview.doctor.config import MIN_IMAGES
from quarterview.doctor.examined import MODEL, RunMeasurements
from quarterview.doctor.findings import Finding
from quarterview.doctor.history import summarize_history
from quarterview.doctor.inpainters import compute_inpainter_losses, compute_model_losses
from quarterview.errors import UserError
from quarterview.evaluation.pictures import ImageStatistics, compute_image_statistics, read_image_sample
from quarterview.models import masking
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.models.mae import MaskedAutoencoder
from quarterview.safe_yaml import read_yaml
from quarterview.training import checkpoint
from quarterview.training.config import LoopConfig, OptimConfig
from quarterview.training.metric_writers import read_metrics
from quarterview.training.optim import compute_warmup_steps
from quarterview.training.trainer import get_autocast_context, get_supported_precision
from quarterview.weights.facts import flatten_settings
from quarterview.weights.loading import load_autoencoder

_NUM_THREADS = 4
_MAX_IMAGES, _MIN_LARGE_IMAGES, _MAX_PIXELS = 256, 48, 1 << 22

ConfigT = TypeVar("ConfigT", MAEConfig, DataConfig, OptimConfig, LoopConfig)


class RunRecord(NamedTuple):
    """The contents of a run's folder."""

    folder: Path
    model: MAEConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    resolved: Mapping[str, Any]
    """Values that were resolved at the start of the run; empty without a checkpoint."""
    step: int | None
    """Step of the newest checkpoint; None without a checkpoint."""


def read_run_record(folder: Path) -> RunRecord:
    """Read the configuration of a run, from its newest checkpoint or else from ``config.yaml``.

    Raises:
        UserError: if the folder is not a run, or a run of another method than mae with target pixels.
    """
    newest = checkpoint.find_newest(folder / "checkpoints")
    if newest is not None:
        state = checkpoint.read_state(newest)
        values, resolved, step = state.get("config", {}), state.get("resolved", {}), int(state["step"])
    else:
        resolved, step = {}, None
        try:
            values = read_yaml((folder / "config.yaml").read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{folder} is not a run: it has neither checkpoints nor config.yaml. Give the --out of a "
                "quarterview pretrain."
            ) from None
    values = flatten_settings(values) if isinstance(values, dict) else {}
    if "model" not in values:
        raise UserError(
            f"The configuration of {folder} has no model. Give the --out of a quarterview pretrain."
        )
    method = values.get("method", values.get("objective", "mae"))  # `objective` in version 0.1
    target = values.get("target", "pixels")
    if (method, target) != ("mae", "pixels"):
        raise UserError(
            f"{folder} was trained with --method {method}{f' --target {target}' if method == 'mae' else ''}, "
            "but quarterview doctor needs --method mae --target pixels. Use quarterview knn or linear."
        )
    return RunRecord(
        folder,
        create_config(MAEConfig, values),
        create_config(DataConfig, values),
        create_config(OptimConfig, values),
        create_config(LoopConfig, values),
        resolved,
        step,
    )


def create_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Create a configuration of one class from the values of a whole run."""
    return config_class(
        **{field.name: values[field.name] for field in fields(config_class) if field.name in values}
    )


class ImageMeasurements(NamedTuple):
    """The measurements that need the images, see `RunMeasurements`."""

    fingerprint: str
    num_images: int
    is_held_out: bool
    losses: dict[str, Tensor]
    train_losses: Tensor | None
    image_statistics: ImageStatistics
    is_eight_bit: bool
    encoder_statistics: FeatureStatistics | None
    random_encoder_statistics: FeatureStatistics
    pixel_statistics: FeatureStatistics


def measure_images(
    record: RunRecord, data: Sequence[str], num_images: int | None, device: torch.device
) -> tuple[ImageMeasurements | None, list[Finding]]:
    """Measure everything that needs the images.

    Args:
        data: paths of the images, if they have been moved, or an empty sequence.
        num_images: number of held-out images, and of training images, to evaluate; None for the default.

    Returns:
        The measurements, or None if the images cannot be read, and findings on what was not measured.

    Raises:
        UserError: if `data` cannot be read.
    """
    try:
        source = open_sources(data or record.data.data, record.model.in_chans)
        fingerprint = source.fingerprint()
    except UserError as error:
        if data:
            raise
        evidence = f"the images cannot be read ({error}), so loss, features and images were not checked"
        return None, [
            Finding(
                "warning", "no images", evidence, "the images were moved", "give their new path with --data"
            )
        ]
    findings = []
    if record.step is None:
        findings.append(
            Finding(
                "warning", "no checkpoint", "there is no complete checkpoint, so the model was not checked"
            )
        )
    if fingerprint != record.resolved.get("fingerprint", fingerprint):
        evidence = f"{len(source)} images with fingerprint {fingerprint}; the run was trained on others"
        findings.append(
            Finding(
                "warning",
                "other images",
                evidence,
                "the dataset was changed",
                "give the images of the run with --data",
            )
        )
    if num_images is None:
        pixels = record.model.image_size[0] * record.model.image_size[1]
        num_images = min(_MAX_IMAGES, max(_MIN_LARGE_IMAGES, _MAX_PIXELS // pixels))
    measured = _measure(record, source, fingerprint, num_images, device)
    if not measured.is_held_out:
        evidence = "no images were held out, so the losses are of training images"
        findings.append(
            Finding("warning", "no holdout", evidence, "--holdout 0, or few images", "--holdout 64")
        )
    return measured, findings


def create_stream(record: RunRecord, source: Source) -> SampleStream:
    """Create the sample stream of the run, which defines the held-out images."""
    holdout = record.resolved.get("holdout", record.data.holdout)
    holdout = compute_default_holdout(len(source)) if holdout is None else holdout
    return SampleStream(len(source), min(holdout, len(source) - 1), record.loop.seed)


def _measure(
    record: RunRecord, source: Source, fingerprint: str, num_images: int, device: torch.device
) -> ImageMeasurements:
    stream = create_stream(record, source)
    held_out_ids, train_ids = stream.get_held_out_ids()[:num_images], stream.select_train_ids(num_images)
    has_held_out = len(held_out_ids) >= MIN_IMAGES  # otherwise training images are used
    ids = torch.cat([held_out_ids, train_ids]) if has_held_out else train_ids
    sample = read_image_sample(source, ids.tolist(), record.model.image_size)
    if len(sample.ids) == 0:
        raise UserError(
            f"No image can be read, for example {source.name(0)}. Give readable images with --data."
        )
    model = load_autoencoder(record.folder) if record.step is not None else None
    config = model.config if model else add_channel_statistics(record, source, stream)
    random_model = create_mae(config, record.loop.seed).to(device).eval()
    images = normalize_for_model(random_model.config, sample.images).to(device)
    mask = make_validation_masks(random_model, record.loop.seed, sample.ids.to(device))
    if has_held_out:
        is_evaluated = torch.isin(sample.ids, held_out_ids)
    else:
        is_evaluated = torch.ones(len(sample.ids), dtype=torch.bool)
    losses = compute_inpainter_losses(
        random_model, images[is_evaluated.to(device)], mask[is_evaluated.to(device)]
    )
    model_losses: Tensor | None = None
    model_statistics: FeatureStatistics | None = None
    precision = get_supported_precision(record.resolved.get("precision", "bf16"), device)
    with get_autocast_context(precision, device)():
        if model is not None:
            model = model.to(device)
            model_losses = compute_model_losses(model, images, mask)
            losses[MODEL] = model_losses[is_evaluated]
            model_statistics = compute_encoder_statistics(model, images)
        random_statistics = compute_encoder_statistics(random_model, images)
    return ImageMeasurements(
        fingerprint=fingerprint,
        num_images=len(source),
        is_held_out=has_held_out,
        losses=losses,
        train_losses=model_losses[~is_evaluated] if model_losses is not None and has_held_out else None,
        image_statistics=compute_image_statistics(sample, record.model.shape.patch_size),
        is_eight_bit=sample.eight_bit,
        encoder_statistics=model_statistics,
        random_encoder_statistics=random_statistics,
        pixel_statistics=compute_pixel_statistics(images),
    )


def add_channel_statistics(record: RunRecord, source: Source, stream: SampleStream) -> MAEConfig:
    """Return the model configuration with channel statistics, computing them if they are missing."""
    mean, std = record.model.mean, record.model.std
    if mean is None or std is None:
        computed = compute_channel_statistics(source, stream, _NUM_THREADS, lambda _: None)
        mean, std = mean or computed[0], std or computed[1]
    return replace(record.model, mean=mean, std=std)


def normalize_for_model(config: MAEConfig, images: Tensor) -> Tensor:
    """Normalise images [B, C, H, W] in [0, 1] by the channel statistics of a model."""
    mean, std = config.mean or (0.0,) * config.in_chans, config.std or (1.0,) * config.in_chans
    return normalize(images, mean, std)


def make_validation_masks(model: MaskedAutoencoder, seed: int, ids: Tensor) -> Tensor:
    """Return the masks that validation uses for these images: bool [B, L]."""
    noise = model.mask_noise(rng.uniform(seed, "mask", 0, ids, model.num_mask_uniforms))
    return masking.mask_from_noise(noise, model.num_visible)


def combine_measurements(record: RunRecord, measured: ImageMeasurements | None) -> RunMeasurements:
    """Combine the measurements of the images with those of the run's folder."""
    images = measured.num_images if measured else record.resolved.get("images")
    steps = record.resolved.get("steps") or record.loop.steps
    holdout = record.resolved.get("holdout", record.data.holdout or 0)
    num_train = max(1, (images or 1) - holdout)
    steps = steps or record.loop.total_steps(num_train)
    planned, _ = compute_warmup_steps(record.optim.warmup_epochs, num_train / record.loop.batch_size, steps)
    warmup = record.resolved.get("warmup_steps", planned)
    history = summarize_history(read_metrics(record.folder), warmup)
    # A run that stopped because of skipped steps has no rows for the last of them in metrics.jsonl.
    skipped = max(history.num_skipped, count_lines(record.folder / "skipped_steps.jsonl"))
    return RunMeasurements(
        model=record.model,
        optim=record.optim,
        loop=record.loop,
        num_steps=steps,
        warmup_steps=warmup,
        history=history._replace(num_skipped=skipped),
        num_images=images,
        num_broken=count_lines(record.folder / "bad_samples.jsonl"),
        is_held_out=measured.is_held_out if measured else False,
        losses=measured.losses if measured else None,
        train_losses=measured.train_losses if measured else None,
        image_statistics=measured.image_statistics if measured else None,
        is_eight_bit=measured.is_eight_bit if measured else False,
        encoder_statistics=measured.encoder_statistics if measured else None,
        random_encoder_statistics=measured.random_encoder_statistics if measured else None,
        pixel_statistics=measured.pixel_statistics if measured else None,
    )


def count_lines(path: Path) -> int:
    """Count the lines of a file; 0 if the file does not exist."""
    return len(path.read_text("utf-8").splitlines()) if path.exists() else 0
