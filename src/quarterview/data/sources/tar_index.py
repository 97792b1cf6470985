"""Build and open the index of a set of tar shards: the offset, length and label of each sample.

The shards are scanned once, by their headers alone. The index is a folder in the user's cache:

- ``samples.npy``: a row of `SAMPLE_DTYPE`, 8 bytes, per sample; memory-mapped, never read as a whole;
- ``labels.npy``: an int32 per sample, -1 if the sample has no label; missing if no sample has one;
- ``named.npy``, ``name_ends.npy``, ``names.npy``: the samples whose names do not fit in a tar header, the
  end of each name in the text, and the text;
- ``index.json``: the shards, the faults found in them, and the CRC-32 of the other files; written last.

Samples are ordered by shard, and by offset within a shard. The index of each shard is also kept by itself, as
an ``.npz`` file, so that an interrupted build continues where it stopped, and a set that grows by one shard
reads that shard only.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quarterview.data.decode import SUFFIXES
from quarterview.data.sources.base import compute_digest
from quarterview.data.sources.files import to_printable
from quarterview.data.sources.shards import ShardFile, is_remote, read_range
from quarterview.data.sources.tar_headers import BLOCK, Faults, Member, ReadRange, iter_members
from quarterview.errors import UserError, unreadable

FORMAT = "quarterview tar index 1"
SAMPLE_DTYPE = np.dtype([("block", "<u4"), ("bytes", "<u4")])
"""The offset of an image in its shard, in blocks of 512 bytes, and the length of the image in bytes."""

MAX_IMAGE_BYTES = 1 << 30
"""The largest size of an encoded image in bytes. Larger ones are skipped."""
_MAX_SHARD_BYTES = BLOCK << 32
_MAX_LABEL_BYTES = 32
_LABEL_LIMIT = 1 << 31  # labels are smaller
_LOCAL_CHUNK, _REMOTE_CHUNK = 4096, 1 << 20  # bytes per read; smaller members are read along with headers
_NUM_THREADS = {False: 2, True: 16}  # by whether a shard is remote; each thread scans a shard
_IMAGE_SUFFIXES = frozenset(suffix.encode() for suffix in SUFFIXES)
_PICKLE_SUFFIXES = frozenset((b".pkl", b".pickle", b".pyd", b".pth", b".pt", b".joblib"))
_CRC_CHUNK = 1 << 24

Log = Callable[[str], None]
"""A function that shows a line of text to the user."""


class ShardIndex(NamedTuple):
    """The samples, labels and faults of one shard."""

    samples: np.ndarray
    """[N] of `SAMPLE_DTYPE`."""
    labels: np.ndarray
    """int32 [N]: the labels, -1 for none."""
    named: np.ndarray
    """int64 [M]: the indices of the samples whose names do not fit in their headers."""
    name_ends: np.ndarray
    """int64 [M]: the end of each of these names in `names`."""
    names: np.ndarray
    """uint8: the bytes of these names, concatenated."""
    faults: dict[str, tuple[int, list[str]]]
    """The count and some examples of each kind of fault."""
    content: str
    """A digest of the name and size of each member, and of the labels."""


# ---------------------------------------------------------------------- one shard


def scan_shard(read: ReadRange, size: int) -> ShardIndex:
    """Index a tar file.

    A sample is the members that share a key: the part of the name before the first dot of the base name. Its
    image is the member with an image suffix, preferably directly after the key (``KEY.png`` rather than
    ``KEY.depth.png``). Its label is the integer in ``KEY.cls``. Hidden files are skipped.

    Args:
        read: function that reads the file.
        size: size of the file in bytes.
    """
    faults = Faults()
    content = hashlib.blake2b(digest_size=8)
    images = _ImageCollector()
    label_keys, labels = array("Q"), array("q")
    if size > _MAX_SHARD_BYTES:
        faults.add("shards of more than 2 TiB, not read", f"{size} bytes")
        size = 0
    for member in iter_members(read, size, faults):
        content.update(b"%d\0%s\0%d\0" % (len(member.name), member.name, member.size))
        if (parts := _split_name(member.name, faults)) is None:
            continue
        key, extension = parts
        suffix = b"." + extension.rpartition(b".")[2]
        if extension == b"cls":
            label = _read_label(read, member)
            content.update(b"%d\0" % label)
            if label >= -1:
                label_keys.append(key)
                labels.append(label)
            else:
                faults.add("labels (.cls) that are not integers", to_printable(member.name))
        elif suffix in _IMAGE_SUFFIXES:
            if not 0 < member.size <= MAX_IMAGE_BYTES:
                faults.add(
                    f"images that are empty or of more than {MAX_IMAGE_BYTES >> 30} GiB",
                    to_printable(member.name),
                )
            else:
                images.append(key, member, b"." in extension)
        elif suffix in _PICKLE_SUFFIXES:
            faults.add("pickles, which are never read", to_printable(member.name))
    return images.build_index(np.array(label_keys, "u8"), np.array(labels, "i8"), faults, content.hexdigest())


class _ImageCollector:
    """Collects the images of a shard in 25 bytes each, and builds the shard's index from them."""

    def __init__(self) -> None:
        self.keys, self.blocks, self.sizes, self.priorities = array("Q"), array("Q"), array("Q"), array("B")
        self.long_names: dict[int, bytes] = {}

    def append(self, key: int, member: Member, is_second_choice: bool) -> None:
        if member.has_long_name:
            self.long_names[len(self.keys)] = member.name
        self.keys.append(key)
        self.blocks.append(member.block)
        self.sizes.append(member.size)
        self.priorities.append(is_second_choice)

    def build_index(
        self, label_keys: np.ndarray, labels: np.ndarray, faults: Faults, content: str
    ) -> ShardIndex:
        """Build the index: one image per key, in file order, with the label of its key."""
        keys = np.array(self.keys, "u8")
        order = np.lexsort((np.arange(len(keys)), np.array(self.priorities, "u1"), keys))
        ordered = keys[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        chosen = np.sort(order[is_first])
        if len(chosen) < len(keys):
            offset = BLOCK * int(self.blocks[int(order[~is_first].min())])
            faults.add("images of a key that already has an image", f"byte {offset}", len(keys) - len(chosen))
        samples = np.empty(len(chosen), SAMPLE_DTYPE)
        samples["block"], samples["bytes"] = (
            np.array(self.blocks, "u8")[chosen],
            np.array(self.sizes, "u8")[chosen],
        )
        unique_keys, first = np.unique(label_keys, return_index=True)
        if len(unique_keys) < len(label_keys):
            faults.add(
                "labels of a key that already has a label",
                f"{len(label_keys)} labels",
                len(label_keys) - len(unique_keys),
            )
        image_labels = np.full(len(chosen), -1, "<i4")
        if len(unique_keys):
            at = np.searchsorted(unique_keys, keys[chosen]).clip(max=len(unique_keys) - 1)
            image_labels = np.where(unique_keys[at] == keys[chosen], labels[first][at], -1).astype("<i4")
        named = []
        if self.long_names:
            named = [sample for sample, row in enumerate(chosen.tolist()) if row in self.long_names]
        texts = [self.long_names[int(chosen[sample])] for sample in named]
        return ShardIndex(
            samples,
            image_labels,
            np.array(named, "<i8"),
            np.cumsum([len(text) for text in texts], dtype="<i8"),
            np.frombuffer(b"".join(texts), np.uint8),
            {fault: (count, faults.examples[fault]) for fault, count in faults.counts.items()},
            content,
        )


def _split_name(name: bytes, faults: Faults) -> tuple[int, bytes] | None:
    """Return the hash of a member's key, and its extension in lower case; None if it belongs to no sample."""
    folder, _, base = name.rpartition(b"/")
    if name.startswith(b"/"):
        faults.add("absolute names", to_printable(name))
        return None
    if folder:
        steps = [step for step in folder.split(b"/") if step not in (b"", b".")]
        if b".." in steps:
            faults.add("names with ..", to_printable(name))
            return None
        if any(step.startswith(b".") for step in steps):
            return None
        folder = b"/".join(steps)
    stem, dot, extension = base.partition(b".")
    if not stem or not dot:
        return None
    key = hashlib.blake2b(folder + b"/" + stem, digest_size=8).digest()
    return int.from_bytes(key, "little"), extension.lower()


def _read_label(read: ReadRange, member: Member) -> int:
    """Return the label in a ``.cls`` member: -1 (none) if it is negative, -2 if it is not an integer."""
    if not 0 < member.size <= _MAX_LABEL_BYTES:
        return -2
    text = read(member.block * BLOCK, member.size).strip()
    if not text.removeprefix(b"-").isdigit():
        return -2
    label = int(text)
    return -2 if label >= _LABEL_LIMIT else max(label, -1)


def make_chunked_reader(read: ReadRange, size: int, chunk: int) -> ReadRange:
    """Return a buffered version of `read`, which reads at least `chunk` bytes at a time."""
    start, buffer = 0, b""

    def read_chunk(offset: int, length: int) -> bytes:
        nonlocal start, buffer
        length = max(0, min(length, size - offset))
        if not start <= offset <= offset + length <= start + len(buffer):
            start, buffer = offset, read(offset, min(max(length, chunk), max(0, size - offset)))
        return buffer[offset - start : offset - start + length]

    return read_chunk


# ---------------------------------------------------------------------- a set


class TarIndex:
    """The opened index of a set of shards.

    Args:
        folder: folder of the index.
        verify: compare all bytes with their checksums.

    Raises:
        ValueError, KeyError, TypeError, OSError: if the index does not exist, or is damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        facts = json.loads((folder / "index.json").read_text("utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"unknown format {facts['format']!r}, expected {FORMAT!r}")
        self.faults: dict[str, tuple[int, list[str]]] = facts["faults"]
        self.content_digests: list[str] = [shard["content"] for shard in facts["shards"]]
        self.starts = np.cumsum([0, *(shard["samples"] for shard in facts["shards"])], dtype=np.int64)
        """int64 [num_shards + 1]: the first sample of each shard, and the number of samples."""
        self._crc: dict[str, int] = facts["crc32"]
        self.samples = self._open_array("samples", SAMPLE_DTYPE, verify)
        self.labels = self._open_array("labels", np.dtype("<i4"), verify) if "labels" in self._crc else None
        self._named = self._open_array("named", np.dtype("<i8"), verify)
        self._name_ends = self._open_array("name_ends", np.dtype("<i8"), verify)
        self._names = self._open_array("names", np.dtype("u1"), verify)
        sizes = {len(self.samples), len(self.samples if self.labels is None else self.labels)}
        if sizes != {int(self.starts[-1])} or len(self._named) != len(self._name_ends):
            raise ValueError("its files have different lengths")

    def long_name(self, index: int) -> bytes | None:
        """Return the name of a sample if its tar header does not hold the name, else None."""
        row = int(np.searchsorted(self._named, index))
        if row == len(self._named) or self._named[row] != index:
            return None
        begin = int(self._name_ends[row - 1]) if row else 0
        return bytes(self._names[begin : int(self._name_ends[row])])

    def _open_array(self, name: str, dtype: np.dtype, verify: bool) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if verify and _compute_crc32(path) != self._crc[name]:
            raise ValueError(f"{path.name} is damaged")
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.dtype != dtype or values.ndim != 1:
            raise ValueError(f"{path.name} is {values.dtype} {list(values.shape)}, expected {dtype} [N]")
        return values


def open_index(shards: Sequence[ShardFile], log: Log | None = None) -> TarIndex:
    """Open the index of a set of shards; build it if it does not exist or is damaged.

    Args:
        shards: the shards, in the order of the samples.
        log: called with a line of text before something that takes long.

    Raises:
        UserError: if the cache folder cannot be written, or a local shard cannot be read.
        RunError: if a remote shard cannot be read.
    """
    folder, log = get_index_folder(shards), log or _log_nothing
    root = folder.parent
    try:
        if (index := _open_existing(folder, log)) is not None:
            return index
        root.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(folder.with_suffix(".lock")):
            if (index := _open_existing(folder, _log_nothing)) is None:
                _build_index(folder, shards, log)
                index = TarIndex(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Cannot write the index of {len(shards)} tar shards to {root}: {error}. Set XDG_CACHE_HOME to a "
            "folder that can be written."
        ) from error
    return index


def get_index_folder(shards: Sequence[ShardFile]) -> Path:
    """Return the folder of the index of a set of shards. It depends on their paths, sizes and versions."""
    return get_cache_folder() / "tar-index" / compute_digest(FORMAT, *shards)


def get_cache_folder() -> Path:
    """Return the cache folder: ``quarterview`` in XDG_CACHE_HOME, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quarterview"


def _open_existing(folder: Path, log: Log) -> TarIndex | None:
    if not folder.exists():
        return None
    try:
        return TarIndex(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log(f"The index of the tar shards in {folder} is damaged ({error}). Building it again.")
        return None


@contextmanager
def _exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`, which one process on this machine can hold at a time."""
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _build_index(folder: Path, shards: Sequence[ShardFile], log: Log) -> None:
    """Build the index of a set of shards. Nothing is left in `folder` if that fails."""
    shard_folder = folder.parent / "shards"
    shard_folder.mkdir(exist_ok=True)
    paths = [shard_folder / f"{compute_digest(FORMAT, *shard)}.npz" for shard in shards]
    by_path = {path: shard for shard, path in zip(shards, paths, strict=True)}  # a shard may be given twice
    missing = [(shard, path) for path, shard in by_path.items() if read_shard_index(path) is None]
    if missing:
        gib = sum(shard.size for shard, _ in missing) / 2**30
        log(f"Indexing {len(missing)} of {len(shards)} tar shards, {gib:.1f} GiB, by their headers.")
    with ThreadPoolExecutor(_NUM_THREADS[any(is_remote(shard.path) for shard in shards)]) as pool:
        for num_done, _ in enumerate(pool.map(lambda job: _scan_to_file(*job), missing), 1):
            if num_done % 100 == 0:
                log(f"Indexed {num_done} of {len(missing)} tar shards.")

    def iter_shard_indexes() -> Iterator[ShardIndex]:
        for path in paths:
            if (shard_index := read_shard_index(path)) is None:
                raise OSError(f"{path} cannot be read after it was written")
            yield shard_index

    write_index(folder, [shard.name for shard in shards], iter_shard_indexes)


def write_index(
    folder: Path, names: Sequence[str], iter_shard_indexes: Callable[[], Iterator[ShardIndex]]
) -> None:
    """Write the index of a set from the indexes of its shards, with one of these in memory at a time.

    Args:
        folder: folder of the index, which is replaced.
        names: names of the shards.
        iter_shard_indexes: function that returns a new iterator over the shards' indexes, in order.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    rows: list[dict[str, Any]] = []
    merged = Faults()
    has_labels, num_named, num_name_bytes = False, 0, 0
    for name, shard in zip(names, iter_shard_indexes(), strict=True):
        rows.append({"name": name, "samples": len(shard.samples), "content": shard.content})
        has_labels = has_labels or bool((shard.labels >= 0).any())
        num_named, num_name_bytes = num_named + len(shard.named), num_name_bytes + len(shard.names)
        for fault, (count, examples) in shard.faults.items():
            for i, example in enumerate(examples):
                merged.add(fault, f"{name}: {example}", count - len(examples) + 1 if i == 0 else 1)
    total = sum(row["samples"] for row in rows)
    lengths = {"samples": total, "named": num_named, "name_ends": num_named, "names": num_name_bytes}
    if has_labels:
        lengths["labels"] = total
    crc = _write_arrays(partial, lengths, iter_shard_indexes)
    faults = {fault: (count, merged.examples[fault]) for fault, count in merged.counts.items()}
    _write_synced(
        partial / "index.json",
        json.dumps({"format": FORMAT, "shards": rows, "faults": faults, "crc32": crc}).encode(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


_ARRAY_DTYPES = {
    **{"samples": SAMPLE_DTYPE, "labels": np.dtype("<i4"), "names": np.dtype("u1")},
    **{"named": np.dtype("<i8"), "name_ends": np.dtype("<i8")},
}


def _write_arrays(
    folder: Path, lengths: dict[str, int], iter_shard_indexes: Callable[[], Iterator[ShardIndex]]
) -> dict[str, int]:
    """Write an ``.npy`` file of each length in `lengths`, and return the CRC-32 of each."""
    files = {name: (folder / f"{name}.npy").open("wb") for name in lengths}
    crc = dict.fromkeys(lengths, 0)
    try:
        for name, length in lengths.items():
            header = io.BytesIO()
            descr = np.lib.format.dtype_to_descr(_ARRAY_DTYPES[name])
            fields = {"descr": descr, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(header, fields)
            _append_with_crc(files[name], header.getvalue(), crc, name)
        first, begin = 0, 0
        for shard in iter_shard_indexes():
            shifted = shard._replace(named=shard.named + first, name_ends=shard.name_ends + begin)
            for name in lengths:
                _append_with_crc(
                    files[name],
                    np.ascontiguousarray(getattr(shifted, name), _ARRAY_DTYPES[name]).tobytes(),
                    crc,
                    name,
                )
            first, begin = first + len(shard.samples), begin + len(shard.names)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return crc


def _append_with_crc(file: Any, data: bytes, crc: dict[str, int], name: str) -> None:
    file.write(data)
    crc[name] = zlib.crc32(data, crc[name])


def _scan_to_file(shard: ShardFile, path: Path) -> None:
    try:
        chunk = _REMOTE_CHUNK if is_remote(shard.path) else _LOCAL_CHUNK

        def read(offset: int, length: int) -> bytes:
            return read_range(shard.path, offset, length)

        shard_index = scan_shard(make_chunked_reader(read, shard.size, chunk), shard.size)
    except OSError as error:
        raise unreadable(f"the shard {shard.path}", error) from error
    write_shard_index(path, shard_index)


def write_shard_index(path: Path, shard_index: ShardIndex) -> None:
    """Write the index of a shard as an ``.npz`` file of arrays, with the faults and the digest as JSON."""
    facts = {"faults": shard_index.faults, "content": shard_index.content}
    arrays = {name: getattr(shard_index, name) for name in _ARRAY_DTYPES}
    file = io.BytesIO()
    np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _write_synced(partial, file.getvalue())
    partial.replace(path)


def read_shard_index(path: Path) -> ShardIndex | None:
    """Read the index of a shard; None if there is none, or the checksums of the zip file show damage."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAY_DTYPES}
            facts = json.loads(file["facts"].tobytes())
            return ShardIndex(**arrays, faults=facts["faults"], content=facts["content"])
    except Exception:  # NumPy, zipfile and zlib raise many types on a damaged file
        return None


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _compute_crc32(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CRC_CHUNK):
            crc = zlib.crc32(data, crc)
    return crc


def _log_nothing(_text: str) -> None:
    """Ignore a line of text."""
