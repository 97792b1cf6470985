"""A packed store: images made small once, in a few large files, to be read at random.

``store.json`` describes the whole. Shard i holds the images from ``i × shard_size`` on, in four files:

- ``00000.bin``: the images one after the other, each a JPEG file, or its pixels [H, W, C];
- ``00000.npy``: for each image a row of `INDEX`, which says where it is and what;
- ``00000.jsonl``: for each image a line: its name, and what was done to it or why it is broken;
- ``00000.json``: sizes and checksums of the other three; written last, and repeated in ``store.json``.

docs/pack.md says it all. A store may come from anywhere, so nothing in it is trusted: its indexes are checked
when it is opened, and every image against its checksum when a process first reads it.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview.data.decode import MAX_PIXELS, croppable_file, decode
from quarterview.data.sources.base import BadSampleError, Croppable, Picture, digest
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError

RECORD = "store.json"
FORMAT = "quarterview packed store 1"
"""What ``store.json`` says it is; another layout will have another number."""

BROKEN, JPEG, UINT8, FLOAT32 = range(4)
"""How an image is stored: not at all, as it could not be read; as a JPEG file; as pixels [H, W, C]."""

INDEX = np.dtype(
    [
        *(("offset", "<u8"), ("length", "<u8")),  # of the image in the .bin file, in bytes
        *(("line", "<u8"), ("line_length", "<u8")),  # of its line in the .jsonl file
        ("label", "<i8"),  # -1 if it has none
        *(("height", "<u4"), ("width", "<u4")),  # 0 if it is broken
        ("checksum", "<u4"),  # CRC-32 of the image's bytes
        ("encoding", "<u2"),  # one of the four above
        ("noted", "<u2"),  # 1 if something was done to it
    ]
)
"""The index of a shard: 56 bytes an image."""

MOST_LABELS = 1 << 40
"""A store's labels are below this."""
_MOST_LINE = 1 << 20  # bytes said of an image
_HEADER_BYTES = 4096  # at most, of a .npy file
_TYPES = {UINT8: np.dtype("u1"), FLOAT32: np.dtype("<f4")}
_MEND = "accepted: the `quarterview pack` that wrote it once more, which writes damaged shards anew"


class Row(NamedTuple):
    """A row of `INDEX`."""

    offset: int
    length: int
    line: int
    line_length: int
    label: int
    height: int
    width: int
    checksum: int
    encoding: int
    noted: int


class Shard(NamedTuple):
    """Sizes and checksums (BLAKE2b of 16 bytes, in hex) of the files of a shard."""

    images: int
    broken: int
    bin_bytes: int
    jsonl_bytes: int
    npy_blake2b: str
    jsonl_blake2b: str


class Store(NamedTuple):
    """What ``store.json`` says."""

    images: int
    channels: int
    shard_size: int
    classes: list[str] | None
    shards: list[Shard]


class PackedSource:
    """The images of a packed store, which `quarterview pack` writes.

    Files are opened for each read and nothing is mapped, so a store that shrinks under a running process
    gives broken samples, never a crash. The indexes are held in memory. Once its checksum was found right,
    a crop of an image of raw pixels reads the rows it needs and no more.

    Args:
        path: the folder.
        channels: how many channels the pictures shall have: the store's, or any number if that is 1.

    Raises:
        UserError: if the store is incomplete or damaged, or has other channels.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path, self.channels = Path(path), channels
        self._store = read_store(self.path)
        self.classes: Sequence[str] | None = self._store.classes
        if self._store.channels not in (1, channels):
            raise UserError(
                f"{self.path} holds images of {self._store.channels} channels, not {channels}; accepted: "
                f"--in-chans {self._store.channels}"
            )
        self._rows = np.concatenate(
            [read_index(self.path, i, shard, self._store) for i, shard in enumerate(self._store.shards)]
        )
        self._sound = np.zeros(len(self), bool)  # images whose checksum was found right

    def __len__(self) -> int:
        return self._store.images

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "channels": self.channels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def image(self, index: int) -> Picture:
        row = self._row(index)
        if row.encoding == JPEG:
            pixels = decode(self._whole(index, row).tobytes(), self.channels).pixels
        else:
            pixels = self._fit(self._pixels(index, row, 0, row.height)).contiguous()
        return Picture(pixels, self._notes(index, row))

    def croppable(self, index: int) -> Croppable:
        row = self._row(index)
        if row.encoding == JPEG:
            file = croppable_file(self._whole(index, row).tobytes(), self.channels)
            return _PackedFile(file, self._notes(index, row))
        return _PackedPixels(self, index, row)

    def crop(self, index: int, row: Row, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        """A crop of an image of raw pixels."""
        top, left, height, width = box
        rows = self._pixels(index, row, top, height)  # [C, height, W]
        cropped = crop_resize(rows, (0, left, height, width), image_size)
        return Picture(self._fit(cropped), self._notes(index, row))

    def label(self, index: int) -> int | None:
        label = int(self._rows["label"][index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        """As its source called it."""
        name = self._line(index).get("name")
        return name if isinstance(name, str) else f"{self.path} image {index}"

    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first image of each shard, and the number of all."""
        return np.cumsum([0, *(shard.images for shard in self._store.shards)], dtype=np.int64)

    def fingerprint(self) -> str:
        """Over the indexes, which hold every label and the checksum of every image, and the names."""
        _, channels, _, classes, shards = self._store
        return digest(channels, classes, *((shard.npy_blake2b, shard.jsonl_blake2b) for shard in shards))

    def _row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        row = Row(*self._rows[index].item())
        if row.encoding == BROKEN:
            raise BadSampleError(str(self._line(index).get("broken", "was broken when it was packed")))
        return row

    def _pixels(self, index: int, row: Row, top: int, height: int) -> Tensor:
        """Some rows of an image of raw pixels: [C, height, W], as they lie in the file, channels last."""
        shape, kind = (row.width, self._store.channels), _TYPES[row.encoding]
        stride = row.width * self._store.channels * kind.itemsize
        if self._sound[index]:
            data = self._read(index, "bin", row.offset + top * stride, height * stride)
        else:
            data = self._whole(index, row)[top * stride : (top + height) * stride]
        return torch.from_numpy(data.view(kind).reshape(height, *shape)).permute(2, 0, 1)

    def _fit(self, pixels: Tensor) -> Tensor:
        return pixels.expand(self.channels, -1, -1)

    def _whole(self, index: int, row: Row) -> np.ndarray:
        """All bytes of an image, checked: uint8 [length]."""
        data = self._read(index, "bin", row.offset, row.length)
        if not self._sound[index]:
            if zlib.crc32(data.data) != row.checksum:
                raise BadSampleError("is damaged: its checksum is not that of the image that was packed")
            if row.encoding == FLOAT32 and not np.isfinite(data.view(_TYPES[FLOAT32])).all():
                raise BadSampleError("the image holds values that are not finite")
            self._sound[index] = True
        return data

    def _notes(self, index: int, row: Row) -> tuple[str, ...]:
        notes = self._line(index).get("notes") if row.noted else ()
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    def _line(self, index: int) -> dict[str, Any]:
        """What is said of an image in words; nothing if that is damaged."""
        row = Row(*self._rows[index].item())
        try:
            line = json.loads(self._read(index, "jsonl", row.line, row.line_length).tobytes())
        except (BadSampleError, ValueError, RecursionError):
            return {}
        return line if isinstance(line, dict) else {}

    def _read(self, index: int, suffix: str, offset: int, length: int) -> np.ndarray:
        """Bytes of a file of an image's shard: uint8 [length]."""
        data = np.empty(length, np.uint8)
        name = f"{index // self._store.shard_size:05d}.{suffix}"
        try:
            handle = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                read = 0
                while read < length and (more := os.preadv(handle, [data.data[read:]], offset + read)):
                    read += more
            finally:
                os.close(handle)
        except OSError as error:
            raise BadSampleError(f"cannot be read: {error}") from error
        if read != length:
            raise BadSampleError(f"cannot be read: {name} ends before it")
        return data


class _PackedPixels(NamedTuple):
    """An image of raw pixels, of which the rows of a crop alone are read."""

    source: PackedSource
    index: int
    row: Row

    @property
    def size(self) -> tuple[int, int]:
        return self.row.height, self.row.width

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        return self.source.crop(self.index, self.row, box, image_size)


class _PackedFile(NamedTuple):
    """An image that is stored as a file, and what was done to it before."""

    file: Croppable
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.file.size

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        return self.file.crop(box, image_size)._replace(notes=self.notes)


# ---------------------------------------------------------------------- the files of a store


def is_store(folder: Path) -> bool:
    """Whether a folder is a packed store, complete or not."""
    record = folder / RECORD
    try:
        if not record.is_file():  # a pipe would wait for someone to write into it
            return False
        with record.open("rb") as file:
            return FORMAT.rpartition(" ")[0].encode() in file.read(100)
    except OSError:
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """``store.json``, complete or not.

    Raises:
        UserError: if it is not there, or no record of a store.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no packed store, it holds no {RECORD}; accepted: what `quarterview pack` wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {error}; accepted: to pack the images once more, into a new folder"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise UserError(f"{path} describes {found!r}; accepted: {FORMAT!r}")
    return record


def read_store(folder: Path) -> Store:
    """What a complete store holds.

    Raises:
        UserError: if it is incomplete, or its record is damaged.
    """
    record = read_record(folder)
    if record.get("complete") is not True:
        raise UserError(
            f"the packed store {folder} is not complete; accepted: the `quarterview pack` that began it once "
            "more, each of its parts if it has several"
        )
    try:
        store = _store_of(record)
    except (KeyError, TypeError, ValueError):
        store = None
    if store is None or not _is_possible(store):
        raise UserError(f"{folder / RECORD} is damaged; {_MEND}")
    return store


def _store_of(record: dict[str, Any]) -> Store:
    settings, shards = record["settings"], [Shard(**shard) for shard in record["shards"]]
    return Store(settings["images"], settings["channels"], settings["shard_size"], record["classes"], shards)


def _is_possible(store: Store) -> bool:
    """Whether numbers are numbers, and the shards hold the images between them."""
    images, channels, shard_size, classes, shards = store
    numbers = [images, channels, shard_size, *(number for shard in shards for number in shard[:4])]
    return (
        all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        and min(images, channels, shard_size) > 0
        and channels <= 1 << 16
        and len(shards) == -(-images // shard_size)
        and all(
            shard.images == len(ids)
            for shard, ids in zip(shards, shard_ranges(images, shard_size), strict=True)
        )
        and (classes is None or (type(classes) is list and all(type(name) is str for name in classes)))
    )


def shard_ranges(images: int, size: int) -> Iterator[range]:
    """The images that each shard holds."""
    return (range(start, min(start + size, images)) for start in range(0, images, size))


def read_index(folder: Path, number: int, shard: Shard, store: Store) -> np.ndarray:
    """The index of a shard, checked against its checksum, its shard's files and itself.

    Raises:
        UserError: if anything is amiss.
    """
    stem = folder / f"{number:05d}"
    try:
        for suffix, expected in (("bin", shard.bin_bytes), ("jsonl", shard.jsonl_bytes)):
            path = stem.with_suffix(f".{suffix}")
            if (found := path.stat().st_size) != expected:
                raise UserError(f"{path} has {found} bytes instead of {expected}; {_MEND}")
        path = stem.with_suffix(".npy")
        if path.stat().st_size > INDEX.itemsize * shard.images + _HEADER_BYTES:
            raise UserError(f"{path} is larger than an index of {shard.images} images; {_MEND}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read a shard of the packed store {folder}: {error}; {_MEND}") from error
    if blake2b(data) != shard.npy_blake2b:
        raise UserError(f"{path} is damaged: its checksum is not the one in {RECORD}; {_MEND}")
    rows = rows_of(data)
    if rows is None or len(rows) != shard.images or not _is_sound(rows, shard, store):
        raise UserError(f"{path} is no index of its shard; {_MEND}")
    return rows


def rows_of(data: bytes) -> np.ndarray | None:
    """The array of a ``.npy`` file of rows of `INDEX`; None if it is anything else."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        if version != (1, 0) or kind != INDEX or len(shape) != 1:
            return None
        return np.frombuffer(data, INDEX, offset=file.tell()).reshape(shape)
    except Exception:  # of the header's parser, which raises nearly everything
        return None


def _is_sound(rows: np.ndarray, shard: Shard, store: Store) -> bool:
    """Whether all that the rows say can be true of the shard's files."""
    encoding, there = rows["encoding"], rows["encoding"] != BROKEN
    pixels = rows["height"].astype(np.uint64) * rows["width"]  # fits: 2**32 squared at most
    samples = pixels.clip(0, MAX_PIXELS + 1) * np.uint64(store.channels)
    raw = [encoding == UINT8, encoding == FLOAT32]
    size = np.select(raw, [samples, samples * np.uint64(4)], rows["length"])
    known = MOST_LABELS if store.classes is None else len(store.classes)
    good = (encoding <= FLOAT32) & (rows["label"] >= -1) & (rows["label"] < known) & (rows["length"] == size)
    good &= _is_inside(rows["line"], rows["line_length"], shard.jsonl_bytes)
    good &= rows["line_length"] <= _MOST_LINE
    good &= _is_inside(rows["offset"], rows["length"], shard.bin_bytes)
    good &= ~there | ((pixels > 0) & (pixels <= MAX_PIXELS) & (rows["length"] > 0))
    return bool(good.all())


def _is_inside(offset: np.ndarray, length: np.ndarray, end: int) -> np.ndarray:
    return (offset <= end) & (length <= end - offset.clip(0, end))


def blake2b(data: bytes) -> str:
    """The checksum of an index or of a file of lines."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def damage(folder: Path, number: int, shard: Shard, store: Store) -> list[str]:
    """What is wrong with a shard, all of whose bytes are read; nothing if it is sound.

    Raises:
        UserError: if its index is amiss.
    """
    stem = folder / f"{number:05d}"
    rows = read_index(folder, number, shard, store)
    wrong = []
    if blake2b(stem.with_suffix(".jsonl").read_bytes()) != shard.jsonl_blake2b:
        wrong.append(f"{stem}.jsonl is damaged: its checksum is not the one in {RECORD}")
    with stem.with_suffix(".bin").open("rb") as file:
        for place, row in enumerate(rows):
            file.seek(int(row["offset"]))
            if zlib.crc32(file.read(int(row["length"]))) != row["checksum"]:
                wrong.append(f"image {number * store.shard_size + place} in {stem}.bin is damaged")
    return wrong
