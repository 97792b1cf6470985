"""Say what weights are, wherever they are from, and how two of them differ."""

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from quarterview.models.classifier import ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig, keep_count
from quarterview.training.metric_writers import read_metrics
from quarterview.weights.loading import Weights, read

_CLASSES_SHOWN = 12
_PARTS = {
    "embedding": ("patch_embed", "cls_token", "pos_embed"),
    "blocks": ("blocks", "norm", "fc_norm"),
    "decoder": ("decoder", "mask_token", "target"),
    "head": ("head",),
}
"""Where a parameter belongs, by how its name begins."""


def inspect(given: str) -> list[tuple[str, str]]:
    """What is known about weights from anywhere: names and values, in order.

    Raises:
        UserError: if they are not understood.
    """
    weights = read(given)
    config, shape = weights.config, weights.config.shape
    height, width = config.image_size
    several = f", {config.cls_tokens} cls tokens" if config.cls_tokens > 1 else ""
    rows = [
        ("kind", weights.kind),
        ("weights", str(weights.file or given)),
        ("model", f"{config.model}: {shape.width} wide, {shape.depth} blocks, {shape.heads} heads{several}"),
        (
            "images",
            f"{height}×{width}, {config.in_chans} channels, {config.patches} patches of {shape.patch_size}",
        ),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in parameters(weights.tensors).items())),
        *(_task(config, weights) if isinstance(config, MAEConfig) else _head(config)),
        ("mean", _numbers(config.mean)),
        ("std", _numbers(config.std)),
        ("good for", uses(weights)),
    ]
    rows += [("note", note) for note in weights.warnings]
    return rows + _last_metrics(Path(given))


def parameters(tensors: dict[str, Tensor]) -> dict[str, int]:
    """How many numbers each part holds."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = next(part for part, starts in _PARTS.items() if name.startswith(starts))
        found[part] = found.get(part, 0) + tensor.numel()
    return {part: found[part] for part in _PARTS if part in found}


def uses(weights: Weights) -> str:
    """The commands that take such weights."""
    frozen = "knn, linear, embed, look, compare, finetune, export"
    if isinstance(weights.config, ClassifierConfig):
        return f"classifying; {frozen}; pretrain --init-from takes its encoder"
    if weights.has_decoder and weights.config.predicts_pictures:
        return f"{frozen}, reconstruct, pretrain --init-from"
    if weights.has_decoder:
        what = weights.config.described_target
        return f"{frozen}, pretrain --init-from; not reconstruct, for {what} are no picture"
    return f"{frozen}, pretrain --init-from with a fresh decoder; not reconstruct, which wants a trained one"


def _task(config: MAEConfig, weights: Weights) -> list[tuple[str, str]]:
    if not weights.has_decoder:
        return [("decoder", "none")]
    visible = keep_count(config.patches, config.mask_ratio)
    predicted = f", {config.predict_share:.0%} of the hidden predicted" if config.predict_share < 1 else ""
    fused = " ".join(map(str, config.fused_blocks))
    return [
        (
            "decoder",
            f"{config.decoder}, {config.decoder_width} wide, {config.decoder_depth} blocks, "
            f"{config.decoder_heads} heads",
        ),
        ("masks", f"{config.mask}, {config.mask_ratio:.0%} hidden, {visible} patches visible{predicted}"),
        ("target", config.described_target),
        *([("fused", f"blocks {fused} and the last")] if fused else []),
    ]


def _head(config: ClassifierConfig) -> list[tuple[str, str]]:
    names = f": {', '.join(config.class_names[:_CLASSES_SHOWN])}" if config.class_names else ""
    more = ", …" if config.class_names and len(config.class_names) > _CLASSES_SHOWN else ""
    of_cls = "the cls token" if config.cls_tokens == 1 else "the mean of the cls tokens"
    read_from = "the mean of the patch tokens" if config.pool == "mean" else of_cls
    return [("head", f"{config.classes} classes{names}{more}, read from {read_from}")]


def _numbers(values: tuple[float, ...] | None) -> str:
    return "not recorded" if values is None else " ".join(f"{value:.4f}" for value in values)


def _last_metrics(path: Path) -> list[tuple[str, str]]:
    rows = read_metrics(path) if path.is_dir() else []
    if not rows:
        return []
    last = rows[-1]
    losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    held_out = f", held-out {losses[-1]:.4f}" if losses else ""
    return [
        ("trained", f"{last['step']} steps, {last['epoch']:.1f} epochs: loss {last['loss']:.4f}{held_out}")
    ]


# ---------------------------------------------------------------------- two of them


class Difference(NamedTuple):
    """In what two weights differ."""

    configs: list[tuple[str, str, str]]
    """What differs of their kinds and configurations, see `configured`."""
    parts: list[tuple[str, str, str, str, str]]
    """The parts and how their tensors differ, see `parts`."""
    tensors: list[tuple[str, str, str]]
    """The names of tensors that only one has or that have other shapes, see `odd_tensors`."""
    same: bool
    """Whether they hold the same tensors."""


def compare_weights(one: str, other: str) -> Difference:
    """Compare two weights: their configurations, and their tensors part by part.

    Raises:
        UserError: if one of them is not understood.
    """
    first, second = read(one), read(other)
    same = first.tensors.keys() == second.tensors.keys() and all(
        tensor.equal(second.tensors[name]) for name, tensor in first.tensors.items()
    )
    return Difference(
        configured(first, second),
        parts(first.tensors, second.tensors),
        odd_tensors(first.tensors, second.tensors),
        same,
    )


def configured(first: Weights, second: Weights) -> list[tuple[str, str, str]]:
    """What differs of two kinds and configurations; what only one has stands against a dash."""
    rows = [("kind", first.kind, second.kind)]
    for name in dict.fromkeys(f.name for weights in (first, second) for f in fields(weights.config)):
        rows.append((name, _field(first, name), _field(second, name)))
    return [row for row in rows if row[1] != row[2]]


def _field(weights: Weights, name: str) -> str:
    value = getattr(weights.config, name, None)
    if isinstance(weights.config, MAEConfig) and not weights.has_decoder and name in _OF_A_DECODER:
        return "–"
    if name in ("mean", "std"):
        return _numbers(value)
    return "–" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


_OF_A_DECODER = {field.name for field in fields(MAEConfig)} - {field.name for field in fields(ViTConfig)}


def parts(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[tuple[str, str, str, str, str]]:
    """A row for each part: how many tensors are equal, differ, by how much at most, and are alone."""
    rows = []
    for part, starts in _PARTS.items():
        mine, theirs = (
            {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}
            for tensors in (first, second)
        )
        both = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
        changed = [name for name in both if not mine[name].equal(theirs[name].to(mine[name].dtype))]
        gaps = [float((mine[name].double() - theirs[name].double()).abs().max()) for name in changed]
        alone = len(mine.keys() | theirs.keys()) - len(both)
        if mine or theirs:
            shown = f"{max(gaps):.3g}" if gaps else "–"
            rows.append((part, str(len(both) - len(changed)), str(len(changed)), shown, str(alone)))
    return rows


def odd_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[tuple[str, str, str]]:
    """The tensors of a part that both have, which only one has or which have another shape."""
    shared = {
        part
        for part, starts in _PARTS.items()
        if all(any(name.startswith(starts) for name in tensors) for tensors in (first, second))
    }
    names = [
        name
        for name in dict.fromkeys([*first, *second])
        if next(part for part, starts in _PARTS.items() if name.startswith(starts)) in shared
    ]
    shapes = [(name, _shape(first.get(name)), _shape(second.get(name))) for name in names]
    return [row for row in shapes if row[1] != row[2]]


def _shape(tensor: Tensor | None) -> str:
    return "not" if tensor is None else "×".join(map(str, tensor.shape))
