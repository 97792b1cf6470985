"""Encoded images in Parquet tables, the layout in which the Hugging Face Hub serves image sets."""

import io
import json
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quarterview.data.decode import croppable_file, decode
from quarterview.data.sources.base import BadSampleError, Croppable, Picture, digest
from quarterview.data.sources.files import changed
from quarterview.data.sources.shard_cache import ShardCache, ShardReader
from quarterview.data.sources.shards import ShardFile, find_shards, is_remote, is_unchanged, local_shard
from quarterview.errors import UserError

HELD_BYTES = 2 << 30
"""Encoded images that a process holds, in bytes; one row group at the least."""

_FOOTERS_AT_A_TIME = 16  # of remote shards
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "fine_label", "coarse_label", "labels", "class")


class ParquetSource:
    """The rows of one Parquet file, or of several shards in the order of their names.

    The images are the column whose values are encoded files: binary, or a structure with a binary field
    ``bytes``. Labels are an integer column ``label``, ``fine_label``, ``coarse_label``, ``labels`` or
    ``class``; a missing or negative label is none. Encoded images are read by row groups, of which each
    process holds those it used last, as many as fit `HELD_BYTES`: a smaller set is read once. A file on a
    disk that was written since it was opened raises RunError when more of it is read.

    Args:
        path: a file, a folder of ``.parquet`` files, or a glob of them; or likewise a URL.
        channels: how many channels the pictures shall have.
        cache: where copies of remote shards are kept; None reads their parts where they are.

    Raises:
        UserError: if there is no such file, no image column or several, if the shards do not fit
            together, or if a folder holds several sets, such as a training and a test set.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int, cache: ShardCache | None = None) -> None:
        self.is_remote = is_remote(str(path))
        self.path = str(path) if self.is_remote else Path(path)
        self.channels = channels
        self._reader = ShardReader(cache)
        self._shards = find_shards(str(path), ".parquet") if self.is_remote else _local_shards(Path(path))
        contents = self._contents()
        schema = contents[0].schema
        self._image_column = _image_column(schema, self.path)
        self._label_column = _label_column(schema)
        self.classes = _class_names(schema, self._label_column)
        groups = [
            (number, place) for number, shard in enumerate(contents) for place in range(len(shard.rows))
        ]
        self._groups = np.array(groups, np.int64).reshape(-1, 2)  # the shard of each, and its place there
        self._starts = np.cumsum([0, *(rows for shard in contents for rows in shard.rows)], dtype=np.int64)
        self._image_bytes = sum(shard.sizes[self._image_column] for shard in contents)
        self._held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._labels: np.ndarray | None = None
        self._reading = threading.Lock()  # several threads decode; one reads a row group

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        own = ("_reading", "_held", "_labels")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_reading": threading.Lock(), "_held": OrderedDict(), "_labels": None}

    def image(self, index: int) -> Picture:
        return decode(self._file(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(self._file(index), self.channels)

    def _file(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        with self._reading:
            value = self._images(group)[index - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadSampleError("the row holds no image")
        return data

    def _images(self, group: int) -> pa.ChunkedArray:
        """The encoded images of a row group."""
        if group not in self._held:
            shard, place = self._groups[group]
            images = self._read(self._shards[shard], self._image_column, int(place))
            while self._held and self._bytes_held() + images.nbytes > HELD_BYTES:
                self._held.popitem(last=False)
            self._held[group] = images
        self._held.move_to_end(group)
        return self._held[group]

    def _bytes_held(self) -> int:
        return sum(images.nbytes for images in self._held.values())

    def label(self, index: int) -> int | None:
        if self._label_column is None:
            return None
        if self._labels is None:
            columns = [self._read(shard, self._label_column) for shard in self._shards]
            self._labels = np.concatenate([_whole_numbers(column) for column in columns])
        label = int(self._labels[index])
        return label if label >= 0 else None

    def shard_starts(self) -> np.ndarray:
        """int64 [row groups + 1]: the first row of each row group, and the number of all."""
        return self._starts

    def remarks(self) -> list[str]:
        """That the set is too large to be held, if it is."""
        if self._image_bytes <= HELD_BYTES:
            return []
        return [
            f"{self.path} holds {self._image_bytes / 2**30:.1f} GiB of images, of which each process keeps "
            f"{HELD_BYTES >> 30}; --shuffle shards reads each row group once an epoch, full again and again"
        ]

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def fingerprint(self) -> str:
        """Over the shards' names, sizes and numbers of rows."""
        return digest(len(self), *((shard.name, shard.size) for shard in self._shards))

    def _contents(self) -> "list[_Content]":
        """What the shards hold, by their footers."""
        with ThreadPoolExecutor(_FOOTERS_AT_A_TIME if self.is_remote else 1) as pool:
            contents = list(pool.map(self._content, self._shards))
        for shard, content in zip(self._shards, contents, strict=True):
            if not content.schema.equals(contents[0].schema):
                raise UserError(
                    f"{shard.path} has other columns than {self._shards[0].path}; accepted: shards of one set"
                )
        if not any(sum(content.rows) for content in contents):
            raise UserError(f"{self.path} holds no rows")
        return contents

    def _content(self, shard: ShardFile) -> "_Content":
        try:
            with self._opened(shard) as file:
                rows: list[int] = []
                sizes: Counter[str] = Counter()
                for place in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(place)
                    rows.append(group.num_rows)
                    for column in map(group.column, range(group.num_columns)):
                        sizes[column.path_in_schema.partition(".")[0]] += column.total_uncompressed_size
                return _Content(file.schema_arrow, rows, sizes)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"cannot read {shard.path} as Parquet: {_line(error)}") from error

    def _opened(self, shard: ShardFile) -> pq.ParquetFile:
        return pq.ParquetFile(_RemoteFile(self._reader, shard) if self.is_remote else shard.path)

    def _read(self, shard: ShardFile, name: str, group: int | None = None) -> pa.ChunkedArray:
        """A column of a shard, or of one row group of it."""
        try:
            with self._opened(shard) as file:
                groups = range(file.metadata.num_row_groups) if group is None else [group]
                found = file.read_row_groups(groups, columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            if not is_unchanged(shard):
                raise changed(shard.path) from error
            raise UserError(f"cannot read column {name!r} of {shard.path}: {_line(error)}") from error
        if not is_unchanged(shard):
            raise changed(shard.path)
        return found


class _Content(NamedTuple):
    """What one shard holds."""

    schema: pa.Schema
    rows: list[int]
    """Of each row group."""
    sizes: Counter[str]
    """Uncompressed bytes of each column."""


class _RemoteFile(io.RawIOBase):
    """A remote shard as a file, each part of which is read when it is asked for."""

    def __init__(self, reader: ShardReader, shard: ShardFile) -> None:
        self._reader, self._shard, self._place = reader, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._shard.size}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._shard.size - self._place)
        data = self._reader.read(self._shard, self._place, left if size < 0 else min(size, left))
        self._place += len(data)
        return data


def _local_shards(path: Path) -> list[ShardFile]:
    try:
        return [local_shard(shard) for shard in _paths(path)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _paths(path: Path) -> list[Path]:
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


def _whole_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """int64 [N], -1 where a label is missing."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _image_column(schema: pa.Schema, path: Path | str) -> str:
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
