"""Encoded images in Parquet tables, the layout in which the Hugging Face Hub serves image sets."""

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quarterview.data.decode import croppable_file, decode
from quarterview.data.files import check_unchanged, stamped
from quarterview.data.source import BadSampleError, Croppable, Picture, digest
from quarterview.errors import UserError

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label", "coarse_label", "labels", "class")


class ParquetSource:
    """The rows of one Parquet file, or of several shards in the order of their names.

    The images are the column whose values are encoded files: binary, or a structure with a binary field
    ``bytes``. Labels are an integer column ``label``, ``fine_label``, ``coarse_label``, ``labels`` or
    ``class``; a missing or negative label is none. The encoded images are held in memory from the first
    one asked for: each process reads them itself, unless it was forked from one that had, and stops with a
    RunError if a file was written since it was opened.

    Args:
        path: a file, a folder of ``.parquet`` files, or a glob of them.
        channels: how many channels the pictures shall have.

    Raises:
        UserError: if there is no such file, no image column or several, if the shards do not fit
            together, or if a folder holds several sets, such as a training and a test set.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self._shards = _shards(self.path)
        self._stamps = [stamped(shard) for shard in self._shards]
        schema = self._read_schema()
        self._image_column = _image_column(schema, self.path)
        self._label_column = _label_column(schema)
        self.classes = _class_names(schema, self._label_column)
        self._images: pa.ChunkedArray | None = None
        self._labels: list[int | None] | None = None
        self._reading = threading.Lock()  # several threads decode; one reads the column

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_reading"} | {
            "_images": None,
            "_labels": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_reading": threading.Lock()}

    def image(self, index: int) -> Picture:
        return decode(self._file(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(self._file(index), self.channels)

    def _file(self, index: int) -> bytes:
        with self._reading:
            if self._images is None:
                self._images = self._column(self._image_column)
        value = self._images[index].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadSampleError("the row holds no image")
        return data

    def label(self, index: int) -> int | None:
        if self._label_column is None:
            return None
        if self._labels is None:
            values = self._column(self._label_column).to_pylist()
            self._labels = [value if value is not None and value >= 0 else None for value in values]
        return self._labels[index]

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def fingerprint(self) -> str:
        """Over the shards' names, sizes and numbers of rows."""
        return digest(self._count, *((shard.name, shard.stat().st_size) for shard in self._shards))

    def _read_schema(self) -> pa.Schema:
        """The schema of all shards, which count the rows on the way."""
        self._count = 0
        first: pa.Schema | None = None
        for shard in self._shards:
            try:
                with pq.ParquetFile(shard) as file:
                    schema = file.schema_arrow
                    self._count += file.metadata.num_rows
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"cannot read {shard} as Parquet: {_line(error)}") from error
            if first is not None and not schema.equals(first):
                raise UserError(
                    f"{shard} has other columns than {self._shards[0]}; accepted: shards of one set"
                )
            first = first or schema
        if first is None or not self._count:
            raise UserError(f"{self.path} holds no rows")
        return first

    def _column(self, name: str) -> pa.ChunkedArray:
        try:
            tables = [pq.read_table(shard, columns=[name], partitioning=None) for shard in self._shards]
        except (pa.ArrowException, OSError) as error:
            self._check_unchanged()
            raise UserError(f"cannot read column {name!r} of {self.path}: {_line(error)}") from error
        self._check_unchanged()
        return pa.concat_tables(tables).column(name)

    def _check_unchanged(self) -> None:
        for shard, before in zip(self._shards, self._stamps, strict=True):
            check_unchanged(shard, before)


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(
            child for child in path.iterdir() if child.suffix.lower() == ".parquet" and child.is_file()
        )
        sets = sorted({re.sub(r"-\d+(-of-\d+)?$", "", shard.stem) for shard in shards})
        if len(sets) > 1:
            raise UserError(
                f"the folder {path} holds several sets: {', '.join(sets)}; accepted: one of them, such as "
                f"{path / (sets[0] + '*.parquet')}"
            )
    else:
        found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        shards = sorted(file for file in found if file.suffix.lower() == ".parquet" and file.is_file())
    if not shards:
        raise UserError(f"no Parquet file at {path}; accepted: a .parquet file, a folder or a glob of them")
    return shards


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _image_column(schema: pa.Schema, path: Path) -> str:
    found = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in _IMAGE_NAMES if name in found]
    if named or len(found) == 1:
        return (named or found)[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise UserError(
        f"{path} has {len(found)} columns that could be the images, of the columns {columns}; accepted: one "
        "of binary or struct<bytes, path>, or one of several named image or img"
    )


def _label_column(schema: pa.Schema) -> str | None:
    for name in _LABEL_NAMES:
        index = schema.get_field_index(name)
        if index >= 0 and pa.types.is_integer(schema.field(index).type):
            return name
    return None


def _class_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """From the note that the `datasets` library leaves in the schema, in either of its two forms."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        feature = note["info"]["features"][column]
        names = feature["names"] if "names" in feature else feature["dtype"]["class_label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):  # {"0": "cat", "1": "dog"}
        names = [names[key] for key in sorted(names, key=int)]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
