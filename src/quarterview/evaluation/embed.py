"""Embeddings of images as Parquet shards that a kill can interrupt anywhere.

A folder of embeddings is ``embed.json`` and shards ``embeddings-00000-of-00007.parquet``. A shard
holds the images of one range of ids, is written under another name, synced, and only then gets its
own. What it holds depends on the images, the model and the settings alone, so a run that was killed
and given again makes the same bytes as one that was left alone.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from quarterview.data.reading import Report
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation.config import EmbedConfig
from quarterview.evaluation.features import (
    as_trained,
    central_batches,
    compile_blocks,
    tokens_after,
)
from quarterview.files import replace_text
from quarterview.models.vit import VisionTransformer
from quarterview.training.checkpoint import sync
from quarterview.training.distributed import choose_device
from quarterview.training.lock import lock
from quarterview.training.trainer import precision_context, usable_precision
from quarterview.weights.loading import load, read

RECORD = "embed.json"
_UNREADABLE = "unreadable"
_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16()}


class Embedder(NamedTuple):
    """A model, and what is to be taken from it."""

    model: VisionTransformer
    config: EmbedConfig
    device: torch.device
    shape: tuple[int, ...]
    """Of the embedding of one image: (D,), or (K + L, D) for all tokens, K of them cls."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a shard."""
        kind = _ARROW_TYPES[self.config.dtype]
        for size in reversed(self.shape):
            kind = pa.list_(pa.field("element", kind, nullable=False), size)
        return pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                pa.field("name", pa.string(), nullable=False),
                pa.field("label", pa.int64()),
                pa.field("embedding", kind, nullable=False),
            ]
        )

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W], or float in [0, 1] -> float32 [B, *shape] on the CPU."""
        context = precision_context(usable_precision("bf16", self.device), self.device)
        with context():
            return _take(self.config, self.model, to_float(pixels.to(self.device))).float().cpu()


def embed(config: EmbedConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the embeddings of images, or continue where an earlier call was interrupted.

    Args:
        progress: told how many shards are written and how many there are, at the start and after each.

    Returns:
        What ``embed.json`` holds.

    Raises:
        UserError: if the folder holds anything else, or embeddings of other images, of another
            model or by other settings.
        RunError: if an embedding is not finite.
    """
    device = choose_device(config.device)
    model = load(config.run, config.ema).to(device)
    depth = len(model.blocks)
    if config.block is not None and config.block > depth:
        raise UserError(
            f"--block {config.block} is more than the {depth} blocks of {config.run}. Give at most {depth}, "
            "or none for the final norm."
        )
    if config.compile:
        compile_blocks(model, config.block)
    source = open_sources(config.data, model.config.in_chans)
    embedder = Embedder(model, config, device, embedding_shape(model, config, device))
    folder = Path(config.out)
    check_folder(folder)
    with lock(folder):
        settings = settings_of(config, source, device)
        begin(folder, settings)
        shards = shard_ranges(len(source), config.shard_size)
        for done, (name, ids) in enumerate(shards.items()):
            if progress is not None:
                progress(done, len(shards))
            if not (folder / name).exists():
                write_shard(folder / name, embedder, source, ids)
        if progress is not None:
            progress(len(shards), len(shards))
        return finish(folder, settings, embedder, source, list(shards))


def embedding_shape(model: VisionTransformer, config: EmbedConfig, device: torch.device) -> tuple[int, ...]:
    """What one image gives."""
    with torch.inference_mode():
        blank = torch.zeros(1, model.config.in_chans, *model.config.image_size, device=device)
        return tuple(_take(config, model, blank).shape[1:])


def _take(config: EmbedConfig, model: VisionTransformer, images: Tensor) -> Tensor:
    tokens, cls = tokens_after(model, as_trained(model, images), config.block), model.config.cls_tokens
    if config.features == "tokens":
        return tokens
    return (tokens[:, :cls] if config.features == "cls" else tokens[:, cls:]).mean(dim=1)


# ---------------------------------------------------------------------- the folder


def check_folder(folder: Path) -> None:
    """Raises UserError if a folder holds anything but embeddings."""
    if not folder.is_dir() or (folder / RECORD).exists():
        return
    strange = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if strange:
        raise UserError(
            f"--out {folder} holds other things, such as {strange[0]}; accepted: a new or empty folder, or "
            "one with embeddings of the same images to go on with"
        )


def settings_of(config: EmbedConfig, source: Source, device: torch.device) -> dict[str, Any]:
    """All that the bytes of the shards depend on, but for the machine itself."""
    given = asdict(config)
    names = ("features", "block", "dtype", "shard_size", "batch_size", "crop_pct", "compile")
    named = {name: given[name] for name in names}
    return {
        "data": list(config.data),
        "data_fingerprint": source.fingerprint(),
        "images": len(source),
        "weights": read(config.run, config.ema).digest,
        **named,
        "device": device.type,
        "precision": usable_precision("bf16", device),
        **{name: version(name) for name in ("torch", "pyarrow")},
    }


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings in a new folder, or compare them with those that an old one was begun with.

    Raises:
        UserError: naming each difference.
    """
    file = folder / RECORD
    if not file.exists():
        replace_text(file, _as_text({"complete": False, "settings": settings}))
        return
    try:
        before = json.loads(file.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; accepted: --out with another folder") from None
    different = [
        f"{name} {before.get(name)} there, {value} here"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {folder} holds other embeddings: {'; '.join(different)}; accepted: the same again, or "
            "another folder"
        )


def shard_ranges(images: int, size: int) -> dict[str, range]:
    """The ids that each shard covers, by its file name."""
    starts = range(0, images, size)
    return {
        f"embeddings-{i:05d}-of-{len(starts):05d}.parquet": range(start, min(start + size, images))
        for i, start in enumerate(starts)
    }


def finish(
    folder: Path, settings: dict[str, Any], embedder: Embedder, source: Source, shards: list[str]
) -> dict[str, Any]:
    """Write ``embed.json`` from what the shards say of themselves.

    Raises:
        UserError: if none of the images could be read.
    """
    rows, unreadable = 0, []
    for name in shards:
        about = pq.read_metadata(folder / name)
        rows += about.num_rows
        unreadable += json.loads(about.metadata[_UNREADABLE.encode()])
    record = {
        "complete": True,
        "settings": settings,
        "shape": list(embedder.shape),
        "dimension": embedder.shape[-1],
        "rows": rows,
        "classes": None if source.classes is None else list(source.classes),
        "shards": shards,
        "unreadable": unreadable,
    }
    replace_text(folder / RECORD, _as_text(record))
    if not rows:
        raise UserError("none of the images could be read")
    return record


def _as_text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


# ---------------------------------------------------------------------- a shard


def write_shard(path: Path, embedder: Embedder, source: Source, ids: range) -> None:
    """Write one shard whole or not at all: a row group for each batch."""
    unreadable: list[dict[str, Any]] = []

    def note(report: Report) -> None:
        unreadable.append({"id": report.sample, "name": report.name, "reason": report.broken})

    partial = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(
        partial, embedder.schema, compression="zstd", use_dictionary=False, write_statistics=["id", "label"]
    ) as writer:
        for batch in _record_batches(embedder, source, ids, note):
            writer.write_batch(batch)
        writer.add_key_value_metadata({_UNREADABLE: json.dumps(unreadable)})
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _record_batches(embedder: Embedder, source: Source, ids: range, note: Any) -> Iterator[pa.RecordBatch]:
    config, schema = embedder.config, embedder.schema
    size = embedder.model.config.image_size
    for some, pixels in central_batches(source, ids, size, config.batch_size, note, config.crop_pct):
        found = embedder(pixels)
        if not found.isfinite().all():
            raise RunError(f"the embedding of an image of {source.name(some[0])} and after is no number")
        yield pa.record_batch(
            [
                pa.array(some, pa.int64()),
                pa.array([source.name(i) for i in some], pa.string()),
                pa.array([source.label(i) for i in some], pa.int64()),
                _column(found, schema.field("embedding").type, config.dtype),
            ],
            schema=schema,
        )


def _column(found: Tensor, kind: pa.DataType, dtype: str) -> pa.Array:
    """float32 [B, …] as fixed-size lists."""
    values = found.to(getattr(torch, dtype))
    if not values.isfinite().all():
        raise UserError(
            f"embeddings up to {found.abs().max():g} do not fit float16; accepted: --dtype float32"
        )
    column = pa.array(values.flatten().numpy())
    kinds = []
    while pa.types.is_fixed_size_list(kind):
        kinds.append(kind)
        kind = kind.value_type
    for outer in reversed(kinds):
        column = pa.FixedSizeListArray.from_arrays(column, type=outer)
    return column
