"""Embeddings of images as Parquet shards, written so that the command can be killed at any time.

A folder of embeddings is ``embed.json`` and shards ``embeddings-00000-of-00007.parquet``. A shard holds the
images of one range of ids. It is written under a temporary name, synced, and then renamed. Its bytes depend
only on the images, the model and the settings, so a command that was killed and repeated writes the same
bytes as one that ran through.
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

from quarterview.data.reading import SampleReport
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.data.transforms.crop import to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation.config import EmbedConfig
from quarterview.evaluation.features import (
    compile_blocks,
    get_intermediate_tokens,
    iterate_central_crops,
    normalize_for_model,
)
from quarterview.files import write_text_atomic
from quarterview.models.vit import VisionTransformer
from quarterview.training.checkpoint import fsync_path
from quarterview.training.distributed import choose_device
from quarterview.training.lock import lock_folder
from quarterview.training.trainer import get_autocast_context, get_supported_precision
from quarterview.weights.loading import load, read_weights

RECORD_NAME = "embed.json"
_UNREADABLE_KEY = "unreadable"
_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16()}


class Embedder(NamedTuple):
    """A model and the features to take from it."""

    model: VisionTransformer
    config: EmbedConfig
    device: torch.device
    shape: tuple[int, ...]
    """Shape of the embedding of one image: (D,), or (K + L, D) for all tokens, K of which are cls tokens."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a shard."""
        embedding_type = _ARROW_TYPES[self.config.dtype]
        for size in reversed(self.shape):
            embedding_type = pa.list_(pa.field("element", embedding_type, nullable=False), size)
        return pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                pa.field("name", pa.string(), nullable=False),
                pa.field("label", pa.int64()),
                pa.field("embedding", embedding_type, nullable=False),
            ]
        )

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Embed images: uint8 [B, C, H, W], or float in [0, 1] -> float32 [B, *shape] on the CPU."""
        context = get_autocast_context(get_supported_precision("bf16", self.device), self.device)
        with context():
            return _select_features(self.config, self.model, to_float(pixels.to(self.device))).float().cpu()


def embed(config: EmbedConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the embeddings of images. An interrupted call is continued by repeating it.

    Args:
        progress: called with the number of written shards and of all shards, at the start and after each
            shard.

    Returns:
        The content of ``embed.json``.

    Raises:
        UserError: if the folder has other files, or embeddings of other images, of another model or with
            other settings.
        RunError: if an embedding is not finite.
    """
    device = choose_device(config.device)
    model = load(config.run, config.ema).to(device)
    depth = len(model.blocks)
    if config.block is not None and config.block > depth:
        raise UserError(
            f"--block {config.block} is more than the {depth} blocks of {config.run}. Give at most {depth}, "
            "or leave it out for the tokens after the final norm."
        )
    if config.compile:
        compile_blocks(model, config.block)
    source = open_sources(config.data, model.config.in_chans)
    embedder = Embedder(model, config, device, compute_embedding_shape(model, config, device))
    folder = Path(config.out)
    check_output_folder(folder)
    with lock_folder(folder):
        settings = collect_settings(config, source, device)
        begin_record(folder, settings)
        shards = compute_shard_ranges(len(source), config.shard_size)
        for done, (name, ids) in enumerate(shards.items()):
            if progress is not None:
                progress(done, len(shards))
            if not (folder / name).exists():
                write_shard(folder / name, embedder, source, ids)
        if progress is not None:
            progress(len(shards), len(shards))
        return finish_record(folder, settings, embedder, source, list(shards))


def compute_embedding_shape(
    model: VisionTransformer, config: EmbedConfig, device: torch.device
) -> tuple[int, ...]:
    """Return the shape of the embedding of one image, without the batch dimension."""
    with torch.inference_mode():
        blank = torch.zeros(1, model.config.in_chans, *model.config.image_size, device=device)
        return tuple(_select_features(config, model, blank).shape[1:])


def _select_features(config: EmbedConfig, model: VisionTransformer, images: Tensor) -> Tensor:
    tokens = get_intermediate_tokens(model, normalize_for_model(model, images), config.block)
    cls = model.config.cls_tokens
    if config.features == "tokens":
        return tokens
    return (tokens[:, :cls] if config.features == "cls" else tokens[:, cls:]).mean(dim=1)


# ---------------------------------------------------------------------- output folder


def check_output_folder(folder: Path) -> None:
    """Raise UserError if a folder has files but no embeddings."""
    if not folder.is_dir() or (folder / RECORD_NAME).exists():
        return
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others:
        raise UserError(
            f"--out {folder} has other files, such as {others[0]}. Give a new or empty folder, or one with "
            "embeddings of the same images to continue."
        )


def collect_settings(config: EmbedConfig, source: Source, device: torch.device) -> dict[str, Any]:
    """Return all that the bytes of the shards depend on, except for the machine."""
    fields = asdict(config)
    names = ("features", "block", "dtype", "shard_size", "batch_size", "crop_pct", "compile")
    return {
        "data": list(config.data),
        "data_fingerprint": source.fingerprint(),
        "images": len(source),
        "weights": read_weights(config.run, config.ema).digest,
        **{name: fields[name] for name in names},
        "device": device.type,
        "precision": get_supported_precision("bf16", device),
        **{name: version(name) for name in ("torch", "pyarrow")},
    }


def begin_record(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or compare them with those of an existing folder.

    Raises:
        UserError: if the settings differ; the message names each difference.
    """
    file = folder / RECORD_NAME
    if not file.exists():
        write_text_atomic(file, _to_json({"complete": False, "settings": settings}))
        return
    try:
        before = json.loads(file.read_text("utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged. Give another folder with --out.") from None
    different = [
        f"{name} was {before.get(name)} and is now {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {folder} has embeddings with other settings: {'; '.join(different)}. Give the same "
            "settings, or another folder."
        )


def compute_shard_ranges(num_images: int, shard_size: int) -> dict[str, range]:
    """Return the image ids of each shard: file name -> range of ids."""
    starts = range(0, num_images, shard_size)
    return {
        f"embeddings-{i:05d}-of-{len(starts):05d}.parquet": range(start, min(start + shard_size, num_images))
        for i, start in enumerate(starts)
    }


def finish_record(
    folder: Path, settings: dict[str, Any], embedder: Embedder, source: Source, shards: list[str]
) -> dict[str, Any]:
    """Write ``embed.json`` from the metadata of the shards.

    Raises:
        UserError: if none of the images can be read.
    """
    rows, unreadable = 0, []
    for name in shards:
        metadata = pq.read_metadata(folder / name)
        rows += metadata.num_rows
        unreadable += json.loads(metadata.metadata[_UNREADABLE_KEY.encode()])
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
    write_text_atomic(folder / RECORD_NAME, _to_json(record))
    if not rows:
        raise UserError("None of the images of --data can be read. Give images in a supported format.")
    return record


def _to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


# ---------------------------------------------------------------------- shards


def write_shard(path: Path, embedder: Embedder, source: Source, ids: range) -> None:
    """Write one shard atomically, with a row group for each batch."""
    unreadable: list[dict[str, Any]] = []

    def on_unreadable(report: SampleReport) -> None:
        unreadable.append({"id": report.sample_id, "name": report.name, "reason": report.broken})

    partial = path.with_name(f".{path.name}.partial")
    with pq.ParquetWriter(
        partial, embedder.schema, compression="zstd", use_dictionary=False, write_statistics=["id", "label"]
    ) as writer:
        for batch in _embed_batches(embedder, source, ids, on_unreadable):
            writer.write_batch(batch)
        writer.add_key_value_metadata({_UNREADABLE_KEY: json.dumps(unreadable)})
    fsync_path(partial)
    partial.replace(path)
    fsync_path(path.parent)


def _embed_batches(
    embedder: Embedder, source: Source, ids: range, on_unreadable: Callable[[SampleReport], None]
) -> Iterator[pa.RecordBatch]:
    config, schema = embedder.config, embedder.schema
    size = embedder.model.config.image_size
    for batch_ids, pixels in iterate_central_crops(
        source, ids, size, config.batch_size, on_unreadable, config.crop_pct
    ):
        embeddings = embedder(pixels)
        if not embeddings.isfinite().all():
            raise RunError(
                f"An embedding is not finite, in the batch of {len(batch_ids)} images that starts with "
                f"{source.name(batch_ids[0])}. Check the weights of {config.run}."
            )
        yield pa.record_batch(
            [
                pa.array(batch_ids, pa.int64()),
                pa.array([source.name(i) for i in batch_ids], pa.string()),
                pa.array([source.label(i) for i in batch_ids], pa.int64()),
                _to_arrow_column(embeddings, schema.field("embedding").type, config.dtype),
            ],
            schema=schema,
        )


def _to_arrow_column(embeddings: Tensor, arrow_type: pa.DataType, dtype: str) -> pa.Array:
    """Convert float32 [B, …] to a column of nested fixed-size lists."""
    values = embeddings.to(getattr(torch, dtype))
    if not values.isfinite().all():
        raise UserError(
            f"Embeddings up to {embeddings.abs().max():g} do not fit --dtype float16. Give --dtype float32."
        )
    column = pa.array(values.flatten().numpy())
    list_types = []
    while pa.types.is_fixed_size_list(arrow_type):
        list_types.append(arrow_type)
        arrow_type = arrow_type.value_type
    for list_type in reversed(list_types):
        column = pa.FixedSizeListArray.from_arrays(column, type=list_type)
    return column
