"""Read encoded images from Parquet tables, the format of image data sets on the Hugging Face Hub."""

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

from quarterview.data.decode import decode, open_croppable_file
from quarterview.data.sources.base import BadSampleError, Croppable, DecodedImage, compute_digest
from quarterview.data.sources.files import make_changed_error
from quarterview.data.sources.shard_cache import ShardCache, ShardReader
from quarterview.data.sources.shards import ShardFile, find_shards, get_local_shard, is_remote, is_unchanged
from quarterview.errors import UserError, unreadable

MAX_CACHED_BYTES = 2 << 30
"""The largest size in bytes of the encoded images that a process caches; at least one row group."""

_NUM_THREADS = 16  # which read the footers of remote shards
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label", "coarse_label", "labels", "class")


class ParquetSource:
    """A data source of the rows of one Parquet file, or of several shards sorted by name.

    The image column holds encoded image files: it is binary, or a struct with a binary field ``bytes``.
    Labels are an integer column ``label``, ``fine_label``, ``coarse_label``, ``labels`` or ``class``; a null
    or negative label means no label. Encoded images are read by row groups. Each process caches the row
    groups that it used last, up to `MAX_CACHED_BYTES`, so that a smaller data set is read once. If a local
    file changes after it was opened, the next read from it raises RunError.

    Args:
        path: a file, a folder of ``.parquet`` files or a glob of them, as a path or a URL.
        channels: number of channels of the images that are returned.
        cache: cache for copies of remote shards; None to read their row groups from the server.

    Raises:
        UserError: if there is no such file, no image column or several, if the shards have different columns,
            or if a folder holds several data sets, such as a training and a test set.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int, cache: ShardCache | None = None) -> None:
        self.is_remote = is_remote(str(path))
        self.path = str(path) if self.is_remote else Path(path)
        self.channels = channels
        self._reader = ShardReader(cache)
        self._shards = (
            find_shards(str(path), ".parquet") if self.is_remote else _find_local_shards(Path(path))
        )
        footers = self._read_footers()
        schema = footers[0].schema
        self._image_column = _find_image_column(schema, self.path)
        self._label_column = _find_label_column(schema)
        self.classes = _read_class_names(schema, self._label_column)
        groups = [
            (shard, group) for shard, footer in enumerate(footers) for group in range(len(footer.num_rows))
        ]
        self._groups = np.array(groups, np.int64).reshape(
            -1, 2
        )  # the shard of each row group, and its index in the shard
        self._starts = np.cumsum(
            [0, *(rows for footer in footers for rows in footer.num_rows)], dtype=np.int64
        )
        self._image_bytes = sum(footer.column_bytes[self._image_column] for footer in footers)
        self._cached: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._labels: np.ndarray | None = None
        self._read_lock = threading.Lock()  # several threads decode, one at a time reads a row group

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        excluded = ("_read_lock", "_cached", "_labels")
        return {name: value for name, value in self.__dict__.items() if name not in excluded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_read_lock": threading.Lock(), "_cached": OrderedDict(), "_labels": None}

    def image(self, index: int) -> DecodedImage:
        return decode(self._read_image(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return open_croppable_file(self._read_image(index), self.channels)

    def _read_image(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        with self._read_lock:
            value = self._get_row_group(group)[index - int(self._starts[group])].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise BadSampleError("the row holds no image")
        return data

    def _get_row_group(self, group: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group, from the cache or the file."""
        if group not in self._cached:
            shard, index = self._groups[group]
            images = self._read_column(self._shards[shard], self._image_column, int(index))
            while self._cached and self._count_cached_bytes() + images.nbytes > MAX_CACHED_BYTES:
                self._cached.popitem(last=False)
            self._cached[group] = images
        self._cached.move_to_end(group)
        return self._cached[group]

    def _count_cached_bytes(self) -> int:
        return sum(images.nbytes for images in self._cached.values())

    def label(self, index: int) -> int | None:
        if self._label_column is None:
            return None
        if self._labels is None:
            columns = [self._read_column(shard, self._label_column) for shard in self._shards]
            self._labels = np.concatenate([_to_int64(column) for column in columns])
        label = int(self._labels[index])
        return label if label >= 0 else None

    def shard_starts(self) -> np.ndarray:
        """Return int64 [num_row_groups + 1]: the first row of each row group, and the number of rows."""
        return self._starts

    def remarks(self) -> list[str]:
        """Return a warning if the data set does not fit into the cache."""
        if self._image_bytes <= MAX_CACHED_BYTES:
            return []
        return [
            f"{self.path} holds {self._image_bytes / 2**30:.1f} GiB of images, and each process caches "
            f"{MAX_CACHED_BYTES >> 30} GiB. Use --shuffle shards, which reads each row group once per epoch; "
            "--shuffle full reads it many times."
        ]

    def name(self, index: int) -> str:
        return f"{self.path} row {index}"

    def fingerprint(self) -> str:
        """Return a digest of the number of rows, and of the names and sizes of the shards."""
        return compute_digest(len(self), *((shard.name, shard.size) for shard in self._shards))

    def _read_footers(self) -> "list[_Footer]":
        """Read the footers of all shards, and check that columns agree and that there are rows."""
        with ThreadPoolExecutor(_NUM_THREADS if self.is_remote else 1) as pool:
            footers = list(pool.map(self._read_footer, self._shards))
        for shard, footer in zip(self._shards, footers, strict=True):
            if not footer.schema.equals(footers[0].schema):
                raise UserError(
                    f"{shard.path} has other columns than {self._shards[0].path}. Give shards of one "
                    "data set."
                )
        if not any(sum(footer.num_rows) for footer in footers):
            raise UserError(f"{self.path} contains no rows. Give a Parquet file with images.")
        return footers

    def _read_footer(self, shard: ShardFile) -> "_Footer":
        try:
            with self._open(shard) as file:
                num_rows: list[int] = []
                column_bytes: Counter[str] = Counter()
                for index in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(index)
                    num_rows.append(group.num_rows)
                    for column in map(group.column, range(group.num_columns)):
                        name = column.path_in_schema.partition(".")[0]
                        column_bytes[name] += column.total_uncompressed_size
                return _Footer(file.schema_arrow, num_rows, column_bytes)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(f"{shard.path} as Parquet", _get_first_line(error)) from error

    def _open(self, shard: ShardFile) -> pq.ParquetFile:
        return pq.ParquetFile(_RemoteFile(self._reader, shard) if self.is_remote else shard.path)

    def _read_column(self, shard: ShardFile, name: str, group: int | None = None) -> pa.ChunkedArray:
        """Read a column of a shard, or of one row group. Raises RunError if the shard has changed."""
        try:
            with self._open(shard) as file:
                groups = range(file.metadata.num_row_groups) if group is None else [group]
                values = file.read_row_groups(groups, columns=[name]).column(name)
        except (pa.ArrowException, OSError) as error:
            if not is_unchanged(shard):
                raise make_changed_error(shard.path) from error
            raise unreadable(f"column {name!r} of {shard.path}", _get_first_line(error)) from error
        if not is_unchanged(shard):
            raise make_changed_error(shard.path)
        return values


class _Footer(NamedTuple):
    """The schema and the sizes in the footer of one shard."""

    schema: pa.Schema
    num_rows: list[int]
    """The number of rows of each row group."""
    column_bytes: Counter[str]
    """The uncompressed size of each column in bytes."""


class _RemoteFile(io.RawIOBase):
    """A remote shard as a read-only file object; each read is a request."""

    def __init__(self, reader: ShardReader, shard: ShardFile) -> None:
        self._reader, self._shard, self._position = reader, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._shard.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        remaining = max(0, self._shard.size - self._position)
        data = self._reader.read(self._shard, self._position, remaining if size < 0 else min(size, remaining))
        self._position += len(data)
        return data


def _find_local_shards(path: Path) -> list[ShardFile]:
    try:
        return [get_local_shard(shard) for shard in _find_paths(path)]
    except OSError as error:
        raise unreadable(path, error) from error


def _find_paths(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        shards = sorted(
            child for child in path.iterdir() if child.suffix.lower() == ".parquet" and child.is_file()
        )
        sets = sorted({re.sub(r"-\d+(-of-\d+)?$", "", shard.stem) for shard in shards})
        if len(sets) > 1:
            raise UserError(
                f"The folder {path} holds several data sets: {', '.join(sets)}. Give one of them, such as "
                f"{path / (sets[0] + '*.parquet')}."
            )
    else:
        matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
        shards = sorted(file for file in matches if file.suffix.lower() == ".parquet" and file.is_file())
    if not shards:
        raise UserError(
            f"There is no Parquet file at {path}. Give a .parquet file, a folder or a glob of them."
        )
    return shards


def _to_int64(column: pa.ChunkedArray) -> np.ndarray:
    """Return a label column as int64 [N], with -1 for null."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy()


def _is_image_type(dtype: pa.DataType) -> bool:
    """Return True for binary types, and for structs with a binary field ``bytes``."""
    if pa.types.is_struct(dtype):
        index = dtype.get_field_index("bytes")
        return index >= 0 and _is_image_type(dtype.field(index).type)
    return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_binary_view(dtype)


def _find_image_column(schema: pa.Schema, path: Path | str) -> str:
    candidates = [field.name for field in schema if _is_image_type(field.type)]
    named = [name for name in _IMAGE_COLUMNS if name in candidates]
    if named or len(candidates) == 1:
        return (named or candidates)[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise UserError(
        f"{path} has {len(candidates)} columns that could hold the images, among the columns {columns}. Give "
        "a table with one column of type binary or struct<bytes, path>, or name it image or img."
    )


def _find_label_column(schema: pa.Schema) -> str | None:
    for name in _LABEL_COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0 and pa.types.is_integer(schema.field(index).type):
            return name
    return None


def _read_class_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Return the class names in the schema metadata of the `datasets` library, which has two formats."""
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        feature = metadata["info"]["features"][column]
        names = feature["names"] if "names" in feature else feature["dtype"]["class_label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):  # {"0": "cat", "1": "dog"}
        names = [names[key] for key in sorted(names, key=int)]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _get_first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]
