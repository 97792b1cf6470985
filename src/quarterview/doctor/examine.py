"""Look at a run: its folder, its model and its images."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.config import DataConfig
from quarterview.data.sampler import SampleStream, default_holdout
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.data.statistics import channel_statistics
from quarterview.data.transforms.crop import normalise
from quarterview.doctor.collapse import Spread, encoder_spread, image_spread
from quarterview.doctor.config import MIN_IMAGES
from quarterview.doctor.examined import MODEL, Examined
from quarterview.doctor.findings import Finding
from quarterview.doctor.history import read_history
from quarterview.doctor.inpainters import inpainted_losses, model_losses
from quarterview.errors import UserError
from quarterview.evaluation.pictures import Pictures, describe, read_sample
from quarterview.models import masking
from quarterview.models.config import MAEConfig
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.safe_yaml import read_yaml
from quarterview.training import checkpoint
from quarterview.training.config import LoopConfig, OptimConfig
from quarterview.training.metric_writers import read_metrics
from quarterview.training.optim import warmup_steps
from quarterview.training.trainer import precision_context, usable_precision
from quarterview.weights.facts import flat_settings
from quarterview.weights.loading import load_autoencoder

_THREADS = 4
_MOST_IMAGES, _LEAST_IMAGES, _MOST_PIXELS = 256, 48, 1 << 22

Part = TypeVar("Part", MAEConfig, DataConfig, OptimConfig, LoopConfig)


class Record(NamedTuple):
    """What a run's folder says of itself."""

    folder: Path
    model: MAEConfig
    data: DataConfig
    optim: OptimConfig
    loop: LoopConfig
    resolved: Mapping[str, Any]
    """Decisions of the start; empty if there is no checkpoint yet."""
    step: int | None
    """Of the newest checkpoint; None if there is none."""


def read_record(folder: Path) -> Record:
    """Read a run's configuration, from its newest checkpoint or else from ``config.yaml``.

    Raises:
        UserError: if the folder is no run.
    """
    newest = checkpoint.newest(folder / "checkpoints")
    if newest is not None:
        state = checkpoint.read_state(newest)
        values, resolved, step = state.get("config", {}), state.get("resolved", {}), int(state["step"])
    else:
        resolved, step = {}, None
        try:
            values = read_yaml((folder / "config.yaml").read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{folder} is no run: it holds neither checkpoints nor config.yaml; accepted: a folder "
                "that `quarterview pretrain --out` wrote"
            ) from None
    values = flat_settings(values) if isinstance(values, dict) else {}
    if "model" not in values:
        raise UserError(
            f"{folder} says nothing of how it was trained; accepted: a run of `quarterview pretrain`"
        )
    method = values.get("method", values.get("objective", "mae"))  # which version 0.1 called objective
    target = values.get("target", "pixels")
    if (method, target) != ("mae", "pixels"):
        raise UserError(
            f"{folder} was trained with --method {method}{f' --target {target}' if method == 'mae' else ''}, "
            "and the doctor compares predictions of pixels with inpainters. Give a run of --method mae "
            "--target pixels, or use quarterview knn or linear."
        )
    return Record(
        folder,
        part(MAEConfig, values),
        part(DataConfig, values),
        part(OptimConfig, values),
        part(LoopConfig, values),
        resolved,
        step,
    )


def part(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """The fields of one configuration out of those of a run."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


class Seen(NamedTuple):
    """What looking at the images gave; see `Examined`."""

    fingerprint: str
    size: int
    held_out: bool
    losses: dict[str, Tensor]
    trained_losses: Tensor | None
    pictures: Pictures
    eight_bit: bool
    encoder: Spread | None
    fresh: Spread
    pixels: Spread


def see_images(
    record: Record, data: Sequence[str], count: int | None, device: torch.device
) -> tuple[Seen | None, list[Finding]]:
    """Everything that takes the images, and what could not be done for want of them.

    Args:
        data: where the images are, if elsewhere than they were.
        count: of held-out images, and of training images, to look at.

    Raises:
        UserError: if `data` cannot be read.
    """
    try:
        source = open_sources(data or record.data.data, record.model.in_chans)
        fingerprint = source.fingerprint()
    except UserError as error:
        if data:
            raise
        seen = f"the images cannot be read ({error}); loss, features and pictures were not looked at"
        return None, [
            Finding("caution", "no images", seen, "they were moved", "--data with where they are now")
        ]
    notes = []
    if record.step is None:
        notes.append(
            Finding(
                "caution", "no checkpoint", "there is no complete checkpoint, so the model was not looked at"
            )
        )
    if fingerprint != record.resolved.get("fingerprint", fingerprint):
        seen = f"{len(source)} images with fingerprint {fingerprint}; the run was trained on others"
        notes.append(
            Finding("caution", "other images", seen, "the set was changed", "--data with the set of then")
        )
    if count is None:
        pixels = record.model.image_size[0] * record.model.image_size[1]
        count = min(_MOST_IMAGES, max(_LEAST_IMAGES, _MOST_PIXELS // pixels))
    seen = _see(record, source, fingerprint, count, device)
    if not seen.held_out:
        told = "no images were held out, so these are of images that the model was trained on"
        notes.append(Finding("caution", "no holdout", told, "--holdout 0 or few images", "--holdout 64"))
    return seen, notes


def stream_of(record: Record, source: Source) -> SampleStream:
    """The run's order of samples, which says what was held out."""
    holdout = record.resolved.get("holdout", record.data.holdout)
    holdout = default_holdout(len(source)) if holdout is None else holdout
    return SampleStream(len(source), min(holdout, len(source) - 1), record.loop.seed)


def _see(record: Record, source: Source, fingerprint: str, count: int, device: torch.device) -> Seen:
    stream = stream_of(record, source)
    new, known = stream.held_out()[:count], stream.training_sample(count)
    held_out = len(new) >= MIN_IMAGES  # otherwise training images stand in for them
    ids = torch.cat([new, known]) if held_out else known
    sample = read_sample(source, ids.tolist(), record.model.image_size)
    if len(sample.ids) == 0:
        raise UserError(f"no image can be read, {source.name(0)} among them; accepted: images that can")
    model = load_autoencoder(record.folder) if record.step is not None else None
    fresh = fresh_model(model.config if model else with_statistics(record, source, stream), record.loop.seed)
    fresh = fresh.to(device).eval()
    images = normalised(fresh.config, sample.images).to(device)
    mask = masks(fresh, record.loop.seed, sample.ids.to(device))
    is_new = torch.isin(sample.ids, new) if held_out else torch.ones(len(sample.ids), dtype=torch.bool)
    losses = inpainted_losses(fresh, images[is_new.to(device)], mask[is_new.to(device)])
    ours: Tensor | None = None
    precision = usable_precision(record.resolved.get("precision", "bf16"), device)
    with precision_context(precision, device)():
        if model is not None:
            model = model.to(device)
            ours = model_losses(model, images, mask)
            losses[MODEL] = ours[is_new]
        spreads = [None if m is None else encoder_spread(m, images) for m in (model, fresh)]
    assert spreads[1] is not None
    return Seen(
        fingerprint=fingerprint,
        size=len(source),
        held_out=held_out,
        losses=losses,
        trained_losses=ours[~is_new] if ours is not None and held_out else None,
        pictures=describe(sample, record.model.shape.patch_size),
        eight_bit=sample.eight_bit,
        encoder=spreads[0],
        fresh=spreads[1],
        pixels=image_spread(images),
    )


def with_statistics(record: Record, source: Source, stream: SampleStream) -> MAEConfig:
    """The model's configuration with the channel means that the run measured, or would."""
    mean, std = record.model.mean, record.model.std
    if mean is None or std is None:
        measured = channel_statistics(source, stream, _THREADS, lambda _: None)
        mean, std = mean or measured[0], std or measured[1]
    return replace(record.model, mean=mean, std=std)


def normalised(config: MAEConfig, images: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1] as the model wants them."""
    mean, std = config.mean or (0.0,) * config.in_chans, config.std or (1.0,) * config.in_chans
    return normalise(images, mean, std)


def masks(model: MaskedAutoencoder, seed: int, ids: Tensor) -> Tensor:
    """The masks that validation gives these images, bool [B, L]."""
    noise = model.mask_noise(rng.uniform(seed, "mask", 0, ids, model.uniforms_needed))
    return masking.mask_from_noise(noise, model.kept)


def examine(record: Record, seen: Seen | None) -> Examined:
    """Put together what the folder and the images gave."""
    images = seen.size if seen else record.resolved.get("images")
    steps = record.resolved.get("steps") or record.loop.steps
    holdout = record.resolved.get("holdout", record.data.holdout or 0)
    trained = max(1, (images or 1) - holdout)
    steps = steps or record.loop.total_steps(trained)
    planned, _ = warmup_steps(record.optim.warmup_epochs, trained / record.loop.batch_size, steps)
    warmup = record.resolved.get("warmup_steps", planned)
    history = read_history(read_metrics(record.folder), warmup)
    # A run that the loop gave up wrote no row of its last steps.
    skipped = max(history.skipped, lines(record.folder / "skipped_steps.jsonl"))
    return Examined(
        model=record.model,
        optim=record.optim,
        loop=record.loop,
        steps=steps,
        warmup=warmup,
        history=history._replace(skipped=skipped),
        images=images,
        broken=lines(record.folder / "bad_samples.jsonl"),
        held_out=seen.held_out if seen else False,
        losses=seen.losses if seen else None,
        trained_losses=seen.trained_losses if seen else None,
        pictures=seen.pictures if seen else None,
        eight_bit=seen.eight_bit if seen else False,
        encoder=seen.encoder if seen else None,
        fresh=seen.fresh if seen else None,
        pixels=seen.pixels if seen else None,
    )


def lines(path: Path) -> int:
    """How many lines a file has; none if it is not there."""
    return len(path.read_text("utf-8").splitlines()) if path.exists() else 0
