"""Read packed stores: images, resized once by `quarterview pack`, in a few large files with random access.

``store.json`` describes the store. Shard i holds the images from ``i × shard_size`` on, in four files:

- ``00000.bin``: the concatenated images, each a JPEG file, or its pixels [H, W, C];
- ``00000.npy``: a row of `INDEX_DTYPE` per image, with its offset, length, label, size and encoding;
- ``00000.jsonl``: a line per image: its name, and the conversions applied to it or why it is broken;
- ``00000.json``: sizes and checksums of the other three; written last, and repeated in ``store.json``.

docs/pack.md has the full format. A store may be hostile, so nothing in it is trusted: its indexes are checked
when it is opened, and each image is checked against its checksum when a process first reads it.

This format is our own because of safety at the same speed: Arrow IPC must be memory-mapped to be as fast, and
a mapped file that shrinks ends the process by SIGBUS (docs/log.md, 2026-12-01).
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

from quarterview.data.decode import MAX_PIXELS, decode, open_croppable_file
from quarterview.data.sources.base import BadSampleError, Croppable, DecodedImage, compute_digest
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError, unreadable

STORE_JSON = "store.json"
FORMAT = "quarterview packed store 1"
"""The format in ``store.json``. A different layout will have a different number."""

BROKEN, JPEG, UINT8, FLOAT32 = range(4)
"""The encodings of an image: none, because it is broken; a JPEG file; or pixels [H, W, C] of a dtype."""

INDEX_DTYPE = np.dtype(
    [
        *(("offset", "<u8"), ("length", "<u8")),  # of the image in the .bin file, in bytes
        *(("line", "<u8"), ("line_length", "<u8")),  # of the image's line in the .jsonl file, in bytes
        ("label", "<i8"),  # -1 for none
        *(("height", "<u4"), ("width", "<u4")),  # 0 if it is broken
        ("checksum", "<u4"),  # CRC-32 of the image's bytes
        ("encoding", "<u2"),  # BROKEN, JPEG, UINT8 or FLOAT32
        ("noted", "<u2"),  # 1 if the line has notes on conversions
    ]
)
"""The dtype of the index of a shard: 56 bytes per image."""

LABEL_LIMIT = 1 << 40
"""The labels of a store are smaller than this."""
_MAX_LINE_BYTES = 1 << 20  # of an image's line in a .jsonl file
_MAX_NPY_HEADER_BYTES = 4096  # of a .npy file
_PIXEL_DTYPES = {UINT8: np.dtype("u1"), FLOAT32: np.dtype("<f4")}
_REPAIR = "Run the `quarterview pack` command that wrote the store again, which repairs damaged shards."


class Row(NamedTuple):
    """A row of `INDEX_DTYPE`."""

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
    """The sizes and checksums (BLAKE2b of 16 bytes, in hex) of the files of a shard."""

    images: int
    broken: int
    bin_bytes: int
    jsonl_bytes: int
    npy_blake2b: str
    jsonl_blake2b: str


class Store(NamedTuple):
    """The description of a store in ``store.json``."""

    images: int
    channels: int
    shard_size: int
    classes: list[str] | None
    shards: list[Shard]


class PackedSource:
    """A data source of the images in a packed store, which `quarterview pack` writes.

    Files are opened for each read and never memory-mapped, so a store that shrinks while it is read gives
    broken samples, never a crash. The indexes are kept in memory. Once the checksum of an image of raw pixels
    has been verified, a crop of it reads only the pixel rows that it needs.

    Args:
        path: folder of the store.
        channels: number of channels of the images that are returned: that of the store, or any number if the
            store has one channel.

    Raises:
        UserError: if the store is incomplete or damaged, or has another number of channels.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path, self.channels = Path(path), channels
        self._store = read_store(self.path)
        self.classes: Sequence[str] | None = self._store.classes
        if self._store.channels not in (1, channels):
            raise UserError(
                f"{self.path} contains images of {self._store.channels} channels, not {channels}. Use "
                f"--in-chans {self._store.channels}."
            )
        self._rows = np.concatenate(
            [read_index(self.path, i, shard, self._store) for i, shard in enumerate(self._store.shards)]
        )
        self._is_verified = np.zeros(len(self), bool)  # whether the checksum of each image was verified

    def __len__(self) -> int:
        return self._store.images

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "channels": self.channels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def image(self, index: int) -> DecodedImage:
        row = self._get_row(index)
        if row.encoding == JPEG:
            pixels = decode(self._read_checked(index, row).tobytes(), self.channels).pixels
        else:
            pixels = self._expand_channels(self._read_pixel_rows(index, row, 0, row.height)).contiguous()
        return DecodedImage(pixels, self._get_notes(index, row))

    def croppable(self, index: int) -> Croppable:
        row = self._get_row(index)
        if row.encoding == JPEG:
            file = open_croppable_file(self._read_checked(index, row).tobytes(), self.channels)
            return _PackedFile(file, self._get_notes(index, row))
        return _PackedPixels(self, index, row)

    def crop(self, index: int, row: Row, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        """Return a crop of an image of raw pixels: [C, *image_size]. See `Croppable.crop`."""
        top, left, height, width = box
        rows = self._read_pixel_rows(index, row, top, height)  # [C, height, W]
        cropped = crop_resize(rows, (0, left, height, width), image_size)
        return DecodedImage(self._expand_channels(cropped), self._get_notes(index, row))

    def label(self, index: int) -> int | None:
        label = int(self._rows["label"][index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        """Return the name that the image had in the source that was packed."""
        name = self._read_line(index).get("name")
        return name if isinstance(name, str) else f"{self.path} image {index}"

    def shard_starts(self) -> np.ndarray:
        """Return int64 [num_shards + 1]: the first image of each shard, and the number of images."""
        return np.cumsum([0, *(shard.images for shard in self._store.shards)], dtype=np.int64)

    def fingerprint(self) -> str:
        """Return a digest of the indexes, which hold all labels and images' checksums, and of the names."""
        _, channels, _, classes, shards = self._store
        return compute_digest(
            channels, classes, *((shard.npy_blake2b, shard.jsonl_blake2b) for shard in shards)
        )

    def _get_row(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        row = Row(*self._rows[index].item())
        if row.encoding == BROKEN:
            raise BadSampleError(str(self._read_line(index).get("broken", "was broken when it was packed")))
        return row

    def _read_pixel_rows(self, index: int, row: Row, top: int, height: int) -> Tensor:
        """Read rows of an image of raw pixels: [C, height, W], channels last in memory, as in the file."""
        dtype = _PIXEL_DTYPES[row.encoding]
        stride = row.width * self._store.channels * dtype.itemsize
        if self._is_verified[index]:
            data = self._read_range(index, "bin", row.offset + top * stride, height * stride)
        else:
            data = self._read_checked(index, row)[top * stride : (top + height) * stride]
        pixels = data.view(dtype).reshape(height, row.width, self._store.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _expand_channels(self, pixels: Tensor) -> Tensor:
        return pixels.expand(self.channels, -1, -1)

    def _read_checked(self, index: int, row: Row) -> np.ndarray:
        """Read all bytes of an image and verify their checksum: uint8 [length]."""
        data = self._read_range(index, "bin", row.offset, row.length)
        if not self._is_verified[index]:
            if zlib.crc32(data.data) != row.checksum:
                raise BadSampleError("is damaged: its checksum differs from that in the index")
            if row.encoding == FLOAT32 and not np.isfinite(data.view(_PIXEL_DTYPES[FLOAT32])).all():
                raise BadSampleError("values that are not finite")
            self._is_verified[index] = True
        return data

    def _get_notes(self, index: int, row: Row) -> tuple[str, ...]:
        notes = self._read_line(index).get("notes") if row.noted else ()
        return tuple(map(str, notes)) if isinstance(notes, list) else ()

    def _read_line(self, index: int) -> dict[str, Any]:
        """Return an image's line in the .jsonl file; empty if the line is damaged."""
        row = Row(*self._rows[index].item())
        try:
            line = json.loads(self._read_range(index, "jsonl", row.line, row.line_length).tobytes())
        except (BadSampleError, ValueError, RecursionError):
            return {}
        return line if isinstance(line, dict) else {}

    def _read_range(self, index: int, suffix: str, offset: int, length: int) -> np.ndarray:
        """Read bytes of a file of an image's shard: uint8 [length]."""
        data = np.empty(length, np.uint8)
        name = f"{index // self._store.shard_size:05d}.{suffix}"
        try:
            handle = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                num_read = 0
                while num_read < length and (
                    more := os.preadv(handle, [data.data[num_read:]], offset + num_read)
                ):
                    num_read += more
            finally:
                os.close(handle)
        except OSError as error:
            raise BadSampleError(f"cannot be read: {error}") from error
        if num_read != length:
            raise BadSampleError(f"cannot be read: {name} is too short")
        return data


class _PackedPixels(NamedTuple):
    """A `Croppable` image of raw pixels, which reads only the rows of a crop."""

    source: PackedSource
    index: int
    row: Row

    @property
    def size(self) -> tuple[int, int]:
        return self.row.height, self.row.width

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        return self.source.crop(self.index, self.row, box, image_size)


class _PackedFile(NamedTuple):
    """A `Croppable` image that is stored as a JPEG file, with the notes on its conversions when packed."""

    file: Croppable
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.file.size

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        return self.file.crop(box, image_size)._replace(notes=self.notes)


# ---------------------------------------------------------------------- the files of a store


def is_store(folder: Path) -> bool:
    """Return True if a folder is a packed store, complete or not."""
    record = folder / STORE_JSON
    try:
        if not record.is_file():  # opening a pipe would wait for a writer
            return False
        with record.open("rb") as file:
            return FORMAT.rpartition(" ")[0].encode() in file.read(100)
    except OSError:
        return False


def read_store_json(folder: Path) -> dict[str, Any]:
    """Read the ``store.json`` of a store, complete or not.

    Raises:
        UserError: if the file does not exist, or is not the description of a packed store.
    """
    path = folder / STORE_JSON
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a packed store: it contains no {STORE_JSON}. Give a folder that "
            "`quarterview pack` wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, "Pack the images again, into a new folder.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        actual = record.get("format") if isinstance(record, dict) else record
        raise UserError(f"{path} has the format {actual!r}. Give a packed store of the format {FORMAT!r}.")
    return record


def read_store(folder: Path) -> Store:
    """Read and check the description of a complete store.

    Raises:
        UserError: if the store is incomplete, or ``store.json`` is damaged.
    """
    record = read_store_json(folder)
    if record.get("complete") is not True:
        raise UserError(
            f"The packed store {folder} is not complete. Run the `quarterview pack` command that began it "
            "again, with each --part if it has several."
        )
    try:
        store = _parse_store(record)
    except (KeyError, TypeError, ValueError):
        store = None
    if store is None or not _is_consistent(store):
        raise UserError(f"{folder / STORE_JSON} is damaged. {_REPAIR}")
    return store


def _parse_store(record: dict[str, Any]) -> Store:
    settings, shards = record["settings"], [Shard(**shard) for shard in record["shards"]]
    return Store(settings["images"], settings["channels"], settings["shard_size"], record["classes"], shards)


def _is_consistent(store: Store) -> bool:
    """Return True if all numbers are valid, and the shards' image counts agree with the store's."""
    images, channels, shard_size, classes, shards = store
    numbers = [images, channels, shard_size, *(number for shard in shards for number in shard[:4])]
    return (
        all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
        and min(images, channels, shard_size) > 0
        and channels <= 1 << 16
        and len(shards) == -(-images // shard_size)
        and all(
            shard.images == len(ids)
            for shard, ids in zip(shards, get_shard_ranges(images, shard_size), strict=True)
        )
        and (classes is None or (type(classes) is list and all(type(name) is str for name in classes)))
    )


def get_shard_ranges(num_images: int, shard_size: int) -> Iterator[range]:
    """Yield the range of images in each shard."""
    return (range(start, min(start + shard_size, num_images)) for start in range(0, num_images, shard_size))


def read_index(folder: Path, shard_index: int, shard: Shard, store: Store) -> np.ndarray:
    """Read the index of a shard, and check its checksum, its consistency, and the sizes of the shard's files.

    Raises:
        UserError: if the shard cannot be read, or a check fails.
    """
    stem = folder / f"{shard_index:05d}"
    try:
        for suffix, expected in (("bin", shard.bin_bytes), ("jsonl", shard.jsonl_bytes)):
            path = stem.with_suffix(f".{suffix}")
            if (size := path.stat().st_size) != expected:
                raise UserError(f"{path} has {size} bytes, expected {expected}. {_REPAIR}")
        path = stem.with_suffix(".npy")
        if path.stat().st_size > INDEX_DTYPE.itemsize * shard.images + _MAX_NPY_HEADER_BYTES:
            raise UserError(f"{path} is larger than an index of {shard.images} images. {_REPAIR}")
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(f"a shard of the packed store {folder}", error, _REPAIR) from error
    if compute_blake2b(data) != shard.npy_blake2b:
        raise UserError(f"{path} is damaged: its checksum differs from that in {STORE_JSON}. {_REPAIR}")
    rows = parse_index(data)
    if rows is None or len(rows) != shard.images or not _is_valid(rows, shard, store):
        raise UserError(f"{path} is not a valid index of its shard. {_REPAIR}")
    return rows


def parse_index(data: bytes) -> np.ndarray | None:
    """Return the rows in the bytes of a ``.npy`` file of `INDEX_DTYPE`; None if they are anything else."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if version != (1, 0) or dtype != INDEX_DTYPE or len(shape) != 1:
            return None
        return np.frombuffer(data, INDEX_DTYPE, offset=file.tell()).reshape(shape)
    except Exception:  # the header's parser raises many types
        return None


def _is_valid(rows: np.ndarray, shard: Shard, store: Store) -> bool:
    """Return True if the rows of an index are possible, given the sizes of the shard's files."""
    encoding, is_stored = rows["encoding"], rows["encoding"] != BROKEN
    pixels = rows["height"].astype(np.uint64) * rows["width"]  # fits: 2**32 squared at most
    values = pixels.clip(0, MAX_PIXELS + 1) * np.uint64(store.channels)
    raw = [encoding == UINT8, encoding == FLOAT32]
    size = np.select(raw, [values, values * np.uint64(4)], rows["length"])
    num_labels = LABEL_LIMIT if store.classes is None else len(store.classes)
    is_valid = (
        (encoding <= FLOAT32)
        & (rows["label"] >= -1)
        & (rows["label"] < num_labels)
        & (rows["length"] == size)
    )
    is_valid &= _is_inside(rows["line"], rows["line_length"], shard.jsonl_bytes)
    is_valid &= rows["line_length"] <= _MAX_LINE_BYTES
    is_valid &= _is_inside(rows["offset"], rows["length"], shard.bin_bytes)
    is_valid &= ~is_stored | ((pixels > 0) & (pixels <= MAX_PIXELS) & (rows["length"] > 0))
    return bool(is_valid.all())


def _is_inside(offset: np.ndarray, length: np.ndarray, end: int) -> np.ndarray:
    """Return where ``offset + length <= end``, without integer overflow."""
    return (offset <= end) & (length <= end - offset.clip(0, end))


def compute_blake2b(data: bytes) -> str:
    """Return the checksum of an index or a .jsonl file, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def find_damage(folder: Path, shard_index: int, shard: Shard, store: Store) -> list[str]:
    """Read all bytes of a shard, and return a sentence on each damage; empty if there is none.

    Raises:
        UserError: if the index of the shard is damaged.
    """
    stem = folder / f"{shard_index:05d}"
    rows = read_index(folder, shard_index, shard, store)
    damage = []
    if compute_blake2b(stem.with_suffix(".jsonl").read_bytes()) != shard.jsonl_blake2b:
        damage.append(f"{stem}.jsonl is damaged: its checksum differs from that in {STORE_JSON}")
    with stem.with_suffix(".bin").open("rb") as file:
        for i, row in enumerate(rows):
            file.seek(int(row["offset"]))
            if zlib.crc32(file.read(int(row["length"]))) != row["checksum"]:
                damage.append(f"image {shard_index * store.shard_size + i} in {stem}.bin is damaged")
    return damage
