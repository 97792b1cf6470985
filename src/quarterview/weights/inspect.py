"""Describe weights of any supported source, and compare two of them."""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from quarterview.models.classifier import ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig, compute_num_visible
from quarterview.training.metric_writers import read_metrics
from quarterview.weights.loading import Weights, read_weights

_MAX_CLASSES_SHOWN = 12
_PART_PREFIXES = {
    "embedding": ("patch_embed", "cls_token", "pos_embed"),
    "blocks": ("blocks", "norm", "fc_norm"),
    "decoder": ("decoder", "mask_token", "target"),
    "head": ("head",),
}
"""The parts of a model, and the prefixes of the names of their parameters."""


def inspect_weights(source: str) -> list[tuple[str, str]]:
    """Describe weights of any supported source: pairs of a property and its value, in display order.

    Raises:
        UserError: if the weights cannot be read.
    """
    weights = read_weights(source)
    config, shape = weights.config, weights.config.shape
    height, width = config.image_size
    several = f", {config.cls_tokens} cls tokens" if config.cls_tokens > 1 else ""
    rows = [
        ("kind", weights.kind),
        ("weights", str(weights.file or source)),
        (
            "model",
            f"{config.model}: {shape.width} wide, {shape.depth} blocks, {shape.num_heads} heads{several}",
        ),
        (
            "images",
            f"{height}×{width}, {config.in_chans} channels, "
            f"{config.num_patches} patches of {shape.patch_size}×{shape.patch_size}",
        ),
        (
            "parameters",
            ", ".join(f"{part} {count:,}" for part, count in count_parameters(weights.tensors).items()),
        ),
        *(_describe_decoder(config, weights) if isinstance(config, MAEConfig) else _describe_head(config)),
        ("mean", _format_numbers(config.mean)),
        ("std", _format_numbers(config.std)),
        ("usable with", describe_uses(weights)),
    ]
    rows += [("note", note) for note in weights.warnings]
    return rows + _describe_last_metrics(Path(source))


def count_parameters(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the number of parameters in each part of a model."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = next(part for part, prefixes in _PART_PREFIXES.items() if name.startswith(prefixes))
        counts[part] = counts.get(part, 0) + tensor.numel()
    return {part: counts[part] for part in _PART_PREFIXES if part in counts}


def describe_uses(weights: Weights) -> str:
    """Return the commands that accept such weights, in words."""
    frozen = "knn, linear, embed, look, compare, finetune, export"
    if isinstance(weights.config, ClassifierConfig):
        return f"classification; {frozen}; pretrain --init-from (the encoder only)"
    if weights.has_decoder and weights.config.can_reconstruct:
        return f"{frozen}, reconstruct, pretrain --init-from"
    if weights.has_decoder:
        target = weights.config.target_description
        return f"{frozen}, pretrain --init-from; not reconstruct, because {target} are not images"
    return (
        f"{frozen}, pretrain --init-from with a new decoder; not reconstruct, which needs a trained decoder"
    )


def _describe_decoder(config: MAEConfig, weights: Weights) -> list[tuple[str, str]]:
    if not weights.has_decoder:
        return [("decoder", "none")]
    visible = compute_num_visible(config.num_patches, config.mask_ratio)
    predicted = f", {config.predict_ratio:.0%} of the masked predicted" if config.predict_ratio < 1 else ""
    fused = " ".join(map(str, config.fused_blocks))
    return [
        (
            "decoder",
            f"{config.decoder}, {config.decoder_width} wide, {config.decoder_depth} blocks, "
            f"{config.decoder_heads} heads",
        ),
        ("masks", f"{config.mask}, {config.mask_ratio:.0%} masked, {visible} patches visible{predicted}"),
        ("target", config.target_description),
        *([("fused", f"blocks {fused} and the last")] if fused else []),
    ]


def _describe_head(config: ClassifierConfig) -> list[tuple[str, str]]:
    names = f": {', '.join(config.class_names[:_MAX_CLASSES_SHOWN])}" if config.class_names else ""
    more = ", …" if config.class_names and len(config.class_names) > _MAX_CLASSES_SHOWN else ""
    of_cls = "the cls token" if config.cls_tokens == 1 else "the mean of the cls tokens"
    read_from = "the mean of the patch tokens" if config.pool == "mean" else of_cls
    return [("head", f"{config.classes} classes{names}{more}, read from {read_from}")]


def _format_numbers(values: tuple[float, ...] | None) -> str:
    return "not recorded" if values is None else " ".join(f"{value:.4f}" for value in values)


def _describe_last_metrics(path: Path) -> list[tuple[str, str]]:
    rows = read_metrics(path) if path.is_dir() else []
    if not rows:
        return []
    last = rows[-1]
    losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    held_out = f", held-out {losses[-1]:.4f}" if losses else ""
    return [
        ("trained", f"{last['step']} steps, {last['epoch']:.1f} epochs: loss {last['loss']:.4f}{held_out}")
    ]


# ---------------------------------------------------------------------- comparison


class WeightsDifference(NamedTuple):
    """The differences between two sets of weights."""

    config_rows: list[tuple[str, str, str]]
    """Differences of type and configuration, see `compare_configs`."""
    part_rows: list[tuple[str, str, str, str, str]]
    """Statistics of each part of the model, see `compare_parts`."""
    mismatched_tensors: list[tuple[str, str, str]]
    """Tensors that one side lacks or that differ in shape, see `find_mismatched_tensors`."""
    is_identical: bool
    """True if names and values of all tensors are equal."""


def compare_weights(one: str, other: str) -> WeightsDifference:
    """Compare the configurations and the tensors of two sets of weights.

    Raises:
        UserError: if one of them cannot be read.
    """
    first, second = read_weights(one), read_weights(other)
    is_identical = first.tensors.keys() == second.tensors.keys() and all(
        tensor.equal(second.tensors[name]) for name, tensor in first.tensors.items()
    )
    return WeightsDifference(
        compare_configs(first, second),
        compare_parts(first.tensors, second.tensors),
        find_mismatched_tensors(first.tensors, second.tensors),
        is_identical,
    )


def compare_configs(first: Weights, second: Weights) -> list[tuple[str, str, str]]:
    """Return rows (field, first, second) of the fields that differ; a dash where a side has no such field."""
    rows = [("kind", first.kind, second.kind)]
    for name in dict.fromkeys(f.name for weights in (first, second) for f in fields(weights.config)):
        rows.append((name, _format_field(first, name), _format_field(second, name)))
    return [row for row in rows if row[1] != row[2]]


def _format_field(weights: Weights, name: str) -> str:
    value = getattr(weights.config, name, None)
    if isinstance(weights.config, MAEConfig) and not weights.has_decoder and name in _DECODER_FIELDS:
        return "–"
    if name in ("mean", "std"):
        return _format_numbers(value)
    return "–" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_DECODER_FIELDS = {field.name for field in fields(MAEConfig)} - {field.name for field in fields(ViTConfig)}


def compare_parts(
    first: dict[str, Tensor], second: dict[str, Tensor]
) -> list[tuple[str, str, str, str, str]]:
    """Return a row for each part: part, equal tensors, different ones, largest difference, unmatched ones.

    Unmatched tensors are on one side only, or have another shape on the other side.
    """
    rows = []
    for part, prefixes in _PART_PREFIXES.items():
        one, other = (
            {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
            for tensors in (first, second)
        )
        both = [name for name in one if name in other and one[name].shape == other[name].shape]
        changed = [name for name in both if not one[name].equal(other[name].to(one[name].dtype))]
        differences = [float((one[name].double() - other[name].double()).abs().max()) for name in changed]
        num_unmatched = len(one.keys() | other.keys()) - len(both)
        if one or other:
            largest = f"{max(differences):.3g}" if differences else "–"
            rows.append((part, str(len(both) - len(changed)), str(len(changed)), largest, str(num_unmatched)))
    return rows


def find_mismatched_tensors(
    first: dict[str, Tensor], second: dict[str, Tensor]
) -> list[tuple[str, str, str]]:
    """Return rows (name, first shape, second shape) of tensors that one side lacks or that differ in shape.

    Parts that one side lacks completely, such as a decoder, are left out.
    """
    shared = {
        part
        for part, prefixes in _PART_PREFIXES.items()
        if all(any(name.startswith(prefixes) for name in tensors) for tensors in (first, second))
    }
    names = [
        name
        for name in dict.fromkeys([*first, *second])
        if next(part for part, prefixes in _PART_PREFIXES.items() if name.startswith(prefixes)) in shared
    ]
    shapes = [(name, _format_shape(first.get(name)), _format_shape(second.get(name))) for name in names]
    return [row for row in shapes if row[1] != row[2]]


def _format_shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "×".join(map(str, tensor.shape))
