"""Where the samples lie in tar shards: found once, by the shards' headers alone, and kept as plain files.

The index of a set is a folder in the user's cache:

- ``samples.npy``: for each sample a row of `SAMPLE`, 8 bytes, mapped and never read whole;
- ``labels.npy``: for each sample an int32, -1 if it has none; not there if none has;
- ``named.npy``, ``name_ends.npy``, ``names.npy``: the samples whose names do not fit in a header, where the
  text of each ends, and the text;
- ``index.json``: the shards, what was odd in them, and the CRC-32 of the other files; written last.

The samples of a shard follow one another in its order. Each shard's part is kept as well, as an ``.npz``
file, so that an interrupted indexing goes on, and a set that grew by a shard has that one to be read.
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
from quarterview.data.sources.base import digest
from quarterview.data.sources.files import printable
from quarterview.data.sources.shards import ShardFile, is_remote, read_range
from quarterview.data.sources.tar_headers import BLOCK, Faults, Member, Read, members
from quarterview.errors import UserError

FORMAT = "quarterview tar index 1"
SAMPLE = np.dtype([("block", "<u4"), ("bytes", "<u4")])
"""Where an image begins in its shard, in blocks of 512 bytes, and its length in bytes."""

MOST_IMAGE = 1 << 30
"""Bytes of an encoded image; larger ones are left out."""
_MOST_SHARD = BLOCK << 32
_MOST_LABEL = 32  # characters
_LABELS = 1 << 31
_LOCAL_CHUNK, _REMOTE_CHUNK = 4096, 1 << 20  # bytes read at a time: members smaller than that are read along
_AT_A_TIME = {False: 2, True: 16}  # shards, on a disk and remote
_SUFFIXES = frozenset(suffix.encode() for suffix in SUFFIXES)
_PICKLES = frozenset((b".pkl", b".pickle", b".pyd", b".pth", b".pt", b".joblib"))
_PIECE = 1 << 24

Say = Callable[[str], None]


class ShardIndex(NamedTuple):
    """What one shard holds."""

    samples: np.ndarray
    """[N] of `SAMPLE`."""
    labels: np.ndarray
    """int32 [N], -1 where there is none."""
    named: np.ndarray
    """int64 [M]: the samples whose names are not in their headers."""
    name_ends: np.ndarray
    """int64 [M]: where each of their names ends in `names`."""
    names: np.ndarray
    """uint8: their names, one after the other."""
    faults: dict[str, tuple[int, list[str]]]
    """Each kind of oddity: how often, and examples."""
    content: str
    """A digest of every member's name and size, and of the labels."""


# ---------------------------------------------------------------------- one shard


def scan(read: Read, size: int) -> ShardIndex:
    """Index a tar file.

    A sample is the members that share a key: what stands before the first dot of a name. Its image is the
    member with a suffix of an image, rather one directly behind the key; its label the whole number in
    ``KEY.cls``. Hidden files are passed over.

    Args:
        read: the file, see `tar_headers.Read`.
        size: its bytes.
    """
    faults = Faults()
    content = hashlib.blake2b(digest_size=8)
    images = _Images()
    label_keys, labels = array("Q"), array("q")
    if size > _MOST_SHARD:
        faults.add("more than 2 TiB in a shard, which is not read", f"{size} bytes")
        size = 0
    for member in members(read, size, faults):
        content.update(b"%d\0%s\0%d\0" % (len(member.name), member.name, member.size))
        if (parts := _parts(member.name, faults)) is None:
            continue
        key, extension = parts
        suffix = b"." + extension.rpartition(b".")[2]
        if extension == b"cls":
            label = _label(read, member)
            content.update(b"%d\0" % label)
            if label >= -1:
                label_keys.append(key)
                labels.append(label)
            else:
                faults.add("labels (.cls) that are no whole numbers", printable(member.name))
        elif suffix in _SUFFIXES:
            if not 0 < member.size <= MOST_IMAGE:
                faults.add(
                    f"images of no bytes, or of more than {MOST_IMAGE >> 30} GiB", printable(member.name)
                )
            else:
                images.append(key, member, b"." in extension)
        elif suffix in _PICKLES:
            faults.add("pickles, which are never read", printable(member.name))
    return images.joined(np.array(label_keys, "u8"), np.array(labels, "i8"), faults, content.hexdigest())


class _Images:
    """The images of a shard as they come: 17 bytes for each."""

    def __init__(self) -> None:
        self.keys, self.blocks, self.sizes, self.ranks = array("Q"), array("Q"), array("Q"), array("B")
        self.long: dict[int, bytes] = {}

    def append(self, key: int, member: Member, is_second_choice: bool) -> None:
        if member.is_long:
            self.long[len(self.keys)] = member.name
        self.keys.append(key)
        self.blocks.append(member.block)
        self.sizes.append(member.size)
        self.ranks.append(is_second_choice)

    def joined(self, label_keys: np.ndarray, labels: np.ndarray, faults: Faults, content: str) -> ShardIndex:
        """One image of each key, in the order of the file, with the label of its key."""
        keys = np.array(self.keys, "u8")
        order = np.lexsort((np.arange(len(keys)), np.array(self.ranks, "u1"), keys))
        ordered = keys[order]
        is_first = np.ones(len(keys), bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        chosen = np.sort(order[is_first])
        if len(chosen) < len(keys):
            at = BLOCK * int(self.blocks[int(order[~is_first].min())])
            faults.add("images whose key has another", f"byte {at}", len(keys) - len(chosen))
        samples = np.empty(len(chosen), SAMPLE)
        samples["block"], samples["bytes"] = (
            np.array(self.blocks, "u8")[chosen],
            np.array(self.sizes, "u8")[chosen],
        )
        known, first = np.unique(label_keys, return_index=True)
        if len(known) < len(label_keys):
            faults.add(
                "labels whose key has another", f"{len(label_keys)} labels", len(label_keys) - len(known)
            )
        found = np.full(len(chosen), -1, "<i4")
        if len(known):
            place = np.searchsorted(known, keys[chosen]).clip(max=len(known) - 1)
            found = np.where(known[place] == keys[chosen], labels[first][place], -1).astype("<i4")
        named = [place for place, row in enumerate(chosen.tolist()) if row in self.long] if self.long else []
        texts = [self.long[int(chosen[place])] for place in named]
        return ShardIndex(
            samples,
            found,
            np.array(named, "<i8"),
            np.cumsum([len(text) for text in texts], dtype="<i8"),
            np.frombuffer(b"".join(texts), np.uint8),
            {kind: (count, faults.examples[kind]) for kind, count in faults.counts.items()},
            content,
        )


def _parts(name: bytes, faults: Faults) -> tuple[int, bytes] | None:
    """The key of a member, hashed, and what stands behind it in lower case; None if it is of no sample."""
    folder, _, base = name.rpartition(b"/")
    if name.startswith(b"/"):
        faults.add("absolute names", printable(name))
        return None
    if folder:
        steps = [step for step in folder.split(b"/") if step not in (b"", b".")]
        if b".." in steps:
            faults.add("names with ..", printable(name))
            return None
        if any(step.startswith(b".") for step in steps):
            return None
        folder = b"/".join(steps)
    stem, dot, extension = base.partition(b".")
    if not stem or not dot:
        return None
    key = hashlib.blake2b(folder + b"/" + stem, digest_size=8).digest()
    return int.from_bytes(key, "little"), extension.lower()


def _label(read: Read, member: Member) -> int:
    """A label, -1 for a negative one, which is none; -2 for what is no whole number."""
    if not 0 < member.size <= _MOST_LABEL:
        return -2
    text = read(member.block * BLOCK, member.size).strip()
    if not text.removeprefix(b"-").isdigit():
        return -2
    label = int(text)
    return -2 if label >= _LABELS else max(label, -1)


def chunked(read: Read, size: int, chunk: int) -> Read:
    """The same bytes, at least `chunk` of them read at a time."""
    start, held = 0, b""

    def read_chunk(offset: int, length: int) -> bytes:
        nonlocal start, held
        length = max(0, min(length, size - offset))
        if not start <= offset <= offset + length <= start + len(held):
            start, held = offset, read(offset, min(max(length, chunk), max(0, size - offset)))
        return held[offset - start : offset - start + length]

    return read_chunk


# ---------------------------------------------------------------------- a set


class TarIndex:
    """The index of a set of shards, opened.

    Args:
        folder: where it is.
        is_checked: whether all of its bytes are compared with their checksums.

    Raises:
        ValueError, KeyError, TypeError or OSError: if it is not there, or damaged.
    """

    def __init__(self, folder: Path, is_checked: bool = True) -> None:
        self.folder = folder
        facts = json.loads((folder / "index.json").read_text("utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"another format: {facts['format']}")
        self.faults: dict[str, tuple[int, list[str]]] = facts["faults"]
        self.contents: list[str] = [shard["content"] for shard in facts["shards"]]
        self.starts = np.cumsum([0, *(shard["samples"] for shard in facts["shards"])], dtype=np.int64)
        """int64 [shards + 1]: the first sample of each, and the number of all."""
        self._crc: dict[str, int] = facts["crc32"]
        self.samples = self._opened("samples", SAMPLE, is_checked)
        self.labels = self._opened("labels", np.dtype("<i4"), is_checked) if "labels" in self._crc else None
        self._named = self._opened("named", np.dtype("<i8"), is_checked)
        self._name_ends = self._opened("name_ends", np.dtype("<i8"), is_checked)
        self._names = self._opened("names", np.dtype("u1"), is_checked)
        sizes = {len(self.samples), len(self.samples if self.labels is None else self.labels)}
        if sizes != {int(self.starts[-1])} or len(self._named) != len(self._name_ends):
            raise ValueError("its files are of different lengths")

    def long_name(self, index: int) -> bytes | None:
        """The name of a sample whose header does not hold it."""
        place = int(np.searchsorted(self._named, index))
        if place == len(self._named) or self._named[place] != index:
            return None
        begin = int(self._name_ends[place - 1]) if place else 0
        return bytes(self._names[begin : int(self._name_ends[place])])

    def _opened(self, name: str, kind: np.dtype, is_checked: bool) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if is_checked and _crc32(path) != self._crc[name]:
            raise ValueError(f"{path.name} is damaged")
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        if values.dtype != kind or values.ndim != 1:
            raise ValueError(f"{path.name} holds other values")
        return values


def open_index(shards: Sequence[ShardFile], say: Say | None = None) -> TarIndex:
    """The index of a set of shards, made if there is none, or a damaged one.

    Args:
        shards: the shards, in the order that the samples shall have.
        say: told what takes a while.

    Raises:
        UserError: if the cache cannot be written, or a local shard cannot be read.
        RunError: if a remote shard cannot be read.
    """
    folder, tell = index_folder(shards), say or _silent
    root = folder.parent
    try:
        if (index := _existing(folder, tell)) is not None:
            return index
        root.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):
            if (index := _existing(folder, _silent)) is None:
                _write(folder, shards, tell)
                index = TarIndex(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot keep the index of {len(shards)} tar shards in {root}: {error}; accepted: a folder that "
            "can be written, named by XDG_CACHE_HOME"
        ) from error
    return index


def index_folder(shards: Sequence[ShardFile]) -> Path:
    """Where the index of a set of shards is kept: by their names, sizes and stamps."""
    return cache_folder() / "tar-index" / digest(FORMAT, *shards)


def cache_folder() -> Path:
    """Where what can be made again is kept: ``quarterview`` in XDG_CACHE_HOME, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quarterview"


def _existing(folder: Path, tell: Say) -> TarIndex | None:
    if not folder.exists():
        return None
    try:
        return TarIndex(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        tell(f"the index of the tar shards in {folder} is damaged ({error}); it is made again")
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process on this machine holds the same lock."""
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _write(folder: Path, shards: Sequence[ShardFile], tell: Say) -> None:
    """Index a set: whole, or not at all."""
    parts = folder.parent / "shards"
    parts.mkdir(exist_ok=True)
    paths = [parts / f"{digest(FORMAT, *shard)}.npz" for shard in shards]
    there = {path: shard for shard, path in zip(shards, paths, strict=True)}  # one may be named twice
    missing = [(shard, path) for path, shard in there.items() if read_part(path) is None]
    if missing:
        gib = sum(shard.size for shard, _ in missing) / 2**30
        tell(f"indexing {len(missing)} of {len(shards)} tar shards, {gib:.1f} GiB, by their headers")
    with ThreadPoolExecutor(_AT_A_TIME[any(is_remote(shard.path) for shard in shards)]) as pool:
        for done, _ in enumerate(pool.map(lambda job: _make_part(*job), missing), 1):
            if done % 100 == 0:
                tell(f"indexed {done} of {len(missing)} shards")

    def each_part() -> Iterator[ShardIndex]:
        for path in paths:
            if (part := read_part(path)) is None:
                raise OSError(f"{path} cannot be read back")
            yield part

    write_index(folder, [shard.name for shard in shards], each_part)


def write_index(folder: Path, names: Sequence[str], each_part: Callable[[], Iterator[ShardIndex]]) -> None:
    """Write the index of a set from those of its shards, one of which is held at a time.

    Args:
        folder: which is replaced.
        names: of the shards.
        each_part: goes through their indexes, in order, as often as it is called.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    rows: list[dict[str, Any]] = []
    merged = Faults()
    labelled, named, text = False, 0, 0
    for name, part in zip(names, each_part(), strict=True):
        rows.append({"name": name, "samples": len(part.samples), "content": part.content})
        labelled = labelled or bool((part.labels >= 0).any())
        named, text = named + len(part.named), text + len(part.names)
        for kind, (count, examples) in part.faults.items():
            for place, example in enumerate(examples):
                merged.add(kind, f"{name}: {example}", count - len(examples) + 1 if place == 0 else 1)
    total = sum(row["samples"] for row in rows)
    lengths = {"samples": total, "named": named, "name_ends": named, "names": text}
    if labelled:
        lengths["labels"] = total
    crc = _write_arrays(partial, lengths, each_part)
    faults = {kind: (count, merged.examples[kind]) for kind, count in merged.counts.items()}
    _write_synced(
        partial / "index.json",
        json.dumps({"format": FORMAT, "shards": rows, "faults": faults, "crc32": crc}).encode(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


_KINDS = {
    **{"samples": SAMPLE, "labels": np.dtype("<i4"), "names": np.dtype("u1")},
    **{"named": np.dtype("<i8"), "name_ends": np.dtype("<i8")},
}


def _write_arrays(
    folder: Path, lengths: dict[str, int], each_part: Callable[[], Iterator[ShardIndex]]
) -> dict[str, int]:
    """Write one ``.npy`` file for each length; returns their CRC-32."""
    files = {name: (folder / f"{name}.npy").open("wb") for name in lengths}
    crc = dict.fromkeys(lengths, 0)
    try:
        for name, length in lengths.items():
            head = io.BytesIO()
            kind = np.lib.format.dtype_to_descr(_KINDS[name])
            header = {"descr": kind, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(head, header)
            _append(files[name], head.getvalue(), crc, name)
        first, begin = 0, 0
        for part in each_part():
            moved = part._replace(named=part.named + first, name_ends=part.name_ends + begin)
            for name in lengths:
                _append(
                    files[name], np.ascontiguousarray(getattr(moved, name), _KINDS[name]).tobytes(), crc, name
                )
            first, begin = first + len(part.samples), begin + len(part.names)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return crc


def _append(file: Any, data: bytes, crc: dict[str, int], name: str) -> None:
    file.write(data)
    crc[name] = zlib.crc32(data, crc[name])


def _make_part(shard: ShardFile, path: Path) -> None:
    try:
        chunk = _REMOTE_CHUNK if is_remote(shard.path) else _LOCAL_CHUNK

        def read(offset: int, length: int) -> bytes:
            return read_range(shard.path, offset, length)

        part = scan(chunked(read, shard.size, chunk), shard.size)
    except OSError as error:
        raise UserError(f"cannot read the shard {shard.path}: {error}") from error
    write_part(path, part)


def write_part(path: Path, part: ShardIndex) -> None:
    """Keep the index of a shard: an ``.npz`` file of plain arrays, and what is no array as JSON."""
    facts = np.frombuffer(json.dumps({"faults": part.faults, "content": part.content}).encode(), np.uint8)
    file = io.BytesIO()
    np.savez(file, facts=facts, **{name: getattr(part, name) for name in _KINDS})
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    _write_synced(partial, file.getvalue())
    partial.replace(path)


def read_part(path: Path) -> ShardIndex | None:
    """The index of a shard; None if it is not there, or damaged, which zip's checksums tell."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _KINDS}
            facts = json.loads(file["facts"].tobytes())
            return ShardIndex(**arrays, faults=facts["faults"], content=facts["content"])
    except Exception:  # NumPy, zipfile and zlib raise nearly everything of a damaged file
        return None


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_PIECE):
            crc = zlib.crc32(data, crc)
    return crc


def _silent(_text: str) -> None:
    """Nobody asked."""
