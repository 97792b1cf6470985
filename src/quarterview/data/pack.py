"""Write a packed store, by as many processes and machines as there are, to the same bytes.

Where a shard begins and what it holds depends on the source and the settings alone. Its files are written
under other names, synced, and renamed; the last of them says that it is whole. So writers need not know of
one another: whoever was interrupted goes on with the shards that are missing, and whoever finds all of them
there completes ``store.json``.
"""

import io
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM, signal
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quarterview.data.bad_samples import Ledger
from quarterview.data.config import LoaderConfig
from quarterview.data.decode import MAX_PIXELS
from quarterview.data.pack_config import PackConfig
from quarterview.data.reading import Report, read
from quarterview.data.sources.base import Source, remarks
from quarterview.data.sources.open import open_sources
from quarterview.data.sources.packed import (
    BROKEN,
    FLOAT32,
    FORMAT,
    INDEX,
    JPEG,
    MOST_LABELS,
    RECORD,
    UINT8,
    Shard,
    Store,
    blake2b,
    damage,
    read_record,
    read_store,
    shard_ranges,
)
from quarterview.data.transforms.crop import crop_resize
from quarterview.data.workers import watched
from quarterview.errors import RunError, UserError

LOGGER = logging.getLogger("quarterview")
_SHOWN = 10
_JPEG_SIDE = 65_500  # pixels that JPEG can count
_STALE_SECONDS = 3600  # a file that is being written is touched more often


class Packed(NamedTuple):
    """How far a packed store is."""

    shards: int
    """Shards that are there."""
    all_shards: int
    """Shards that the whole store has."""
    images: int
    """Images that the whole store has."""
    size: int
    """Bytes of the images in the shards that are there."""

    @property
    def complete(self) -> bool:
        """Whether the store can be read."""
        return self.shards == self.all_shards


class Verified(NamedTuple):
    """What a packed store holds whose checksums were all found right."""

    images: int
    """How many there are."""
    broken: int
    """How many of them could not be read when they were packed."""


Progress = Callable[[int, int], object]
"""Called with the shards that are done, and with those that there are to do."""


def pack(config: PackConfig, progress: Progress = lambda _done, _total: None) -> Packed:
    """Write a packed store, or one part of it, or what is missing of it.

    What is odd about the images, and which of them are broken, is logged at WARNING.

    Args:
        config: what to pack, and how.
        progress: told how far it is, first with no shard done.

    Raises:
        UserError: if the folder holds anything else, or a store of other images or by other settings.
        RunError: if too many of the images are broken.
    """
    folder = Path(config.out)
    source = open_sources(config.data, config.in_chans, say=LOGGER.info)
    settings = settings_of(config, source)
    begin(folder, settings)
    for line in remarks(source):
        LOGGER.warning(line)
    ledger = Ledger(None, len(source), config.max_bad_samples)
    mine = config.share(len(list(shard_ranges(len(source), config.shard_size))))
    workers = LoaderConfig(workers=config.workers).threads
    progress(0, len(mine))
    for done, reports in enumerate(_ensured(_Shards(source, folder, config), mine, workers), 1):
        for report in reports:
            ledger(report)
        progress(done, len(mine))
    for line in ledger.summary():
        LOGGER.warning(line)
    return finish(folder, settings, source, config.max_bad_samples)


def verify(folder: Path, progress: Progress = lambda _done, _total: None) -> Verified:
    """Compare every image and index of a packed store with its checksum.

    Args:
        folder: the store.
        progress: told how far it is, first with no shard done.

    Raises:
        UserError: if the folder is no complete store, or an index is damaged.
        RunError: if an image is damaged.
    """
    store = read_store(folder)
    wrong: list[str] = []
    progress(0, len(store.shards))
    for number, shard in enumerate(store.shards):
        wrong += damage(folder, number, shard, store)
        progress(number + 1, len(store.shards))
    if wrong:
        listed = "\n".join(f"  {what}" for what in wrong[:_SHOWN])
        raise RunError(
            f"{folder} is damaged in {len(wrong)} place(s):\n{listed}\nThe `quarterview pack` that wrote it "
            "once more writes the damaged shards anew."
        )
    return Verified(store.images, sum(shard.broken for shard in store.shards))


# ---------------------------------------------------------------------- the folder


def settings_of(config: PackConfig, source: Source) -> dict[str, Any]:
    """All that the bytes of a store depend on."""
    return {
        "source": source.fingerprint(),
        "images": len(source),
        "channels": config.in_chans,
        "shard_size": config.shard_size,
        "short_side": config.short_side,
        "encoding": config.encoding,
        "quality": config.quality if config.encoding == "jpeg" else None,
        **{name: version(name) for name in ("torch", "pillow")},
    }


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings in a new folder, or compare them with those that an old one was begun with.

    Raises:
        UserError: if the folder holds other things, or a store of other images or by other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {folder} is a file, or lies in one; accepted: a folder") from None
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if RECORD not in there:
        if there:
            raise UserError(
                f"--out {folder} holds other things, such as {there[0]}; accepted: a new or empty folder, "
                "or a packed store of the same images to go on with"
            )
        with _written(folder / RECORD) as file:
            file.write(_as_text({"format": FORMAT, "complete": False, "settings": settings}))
        return
    before = read_record(folder).get("settings")
    before = before if isinstance(before, dict) else {}
    different = [
        f"{name} {before.get(name)} there, {value} here"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {folder} holds another packed store: {'; '.join(different)}; accepted: the same images "
            "and settings, or another folder"
        )


def finish(folder: Path, settings: dict[str, Any], source: Source, max_bad_samples: float) -> Packed:
    """Complete ``store.json`` if every shard is there, whoever wrote it.

    Raises:
        RunError: if more than a share `max_bad_samples` of all images are broken.
    """
    ranges = list(shard_ranges(settings["images"], settings["shard_size"]))
    shards = [sealed(folder, number) for number in range(len(ranges))]
    there = [shard for shard in shards if shard is not None]
    found = Packed(len(there), len(shards), len(source), sum(shard.bin_bytes for shard in there))
    if not found.complete:
        return found
    broken = sum(shard.broken for shard in there)
    if broken > max_bad_samples * len(source):
        raise RunError(
            f"{broken} of {len(source)} images are broken, which is more than the {max_bad_samples:.2%} that "
            "--max-bad-samples allows; their names and the reasons are in the .jsonl files of the shards"
        )
    record = {
        "format": FORMAT,
        "complete": True,
        "settings": settings,
        "classes": None if source.classes is None else list(source.classes),
        "broken": broken,
        "shards": [shard._asdict() for shard in there],
    }
    remove_stale(folder)
    with _written(folder / RECORD) as file:
        file.write(_as_text(record))
    return found


def remove_stale(folder: Path) -> None:
    """Remove what writers that were killed left half written. Others may be at work: theirs is young."""
    for partial in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink()


def _as_text(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which is there whole or not at all, whoever else writes it too."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------------- a shard


class _Shards(Dataset):
    """Makes sure of a shard, in a worker: what happened to its images."""

    def __init__(self, source: Source, folder: Path, config: PackConfig) -> None:
        self.source, self.folder, self.config = source, folder, config
        classes = None if source.classes is None else list(source.classes)
        self.store = Store(len(source), config.in_chans, config.shard_size, classes, [])

    def __getitem__(self, index: int) -> list[Report] | Exception:
        start = index * self.config.shard_size
        ids = range(start, min(start + self.config.shard_size, len(self.source)))
        try:
            if not _is_whole(self.folder, index, self.store):
                write_shard(self.folder, index, self.source, ids, self.config)
            return _reports(self.folder, index, ids)
        except (UserError, RunError, OSError) as error:  # raised in the main process, where it is told well
            return error


def _ensured(shards: _Shards, numbers: range, workers: int) -> Iterator[list[Report]]:
    """What happened to the images of each shard, all of which are there when this ends."""
    loader = DataLoader(
        shards,
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_interrupt,
    )
    with watched(iter(loader)) as found:
        for reports in found:
            if isinstance(reports, Exception):
                raise reports
            yield reports


def _as_it_is(reports: list[Report] | Exception) -> list[Report] | Exception:
    return reports


def _ignore_interrupt(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one ends the others."""
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_DFL)


def write_shard(folder: Path, number: int, source: Source, ids: range, config: PackConfig) -> None:
    """Read the images `ids` and write them as one shard."""
    stem = folder / f"{number:05d}"
    rows = np.zeros(len(ids), INDEX)
    lines = io.BytesIO()
    with _written(stem.with_suffix(".bin")) as images:
        for row, sample in zip(rows, ids, strict=True):
            data, fields, said = _packed(source, sample, config)
            line = json.dumps(said).encode() + b"\n"
            fields |= {"offset": images.tell(), "length": len(data), "checksum": zlib.crc32(data)}
            fields |= {"line": lines.tell(), "line_length": len(line)}
            for name, value in fields.items():
                row[name] = value
            images.write(data)
            lines.write(line)
        size = images.tell()
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    shard = Shard(
        images=len(ids),
        broken=int((rows["encoding"] == BROKEN).sum()),
        bin_bytes=size,
        jsonl_bytes=lines.tell(),
        npy_blake2b=blake2b(index.getvalue()),
        jsonl_blake2b=blake2b(lines.getvalue()),
    )
    contents = {".npy": index.getvalue(), ".jsonl": lines.getvalue(), ".json": _as_text(shard._asdict())}
    for suffix, content in contents.items():  # the last one says that the others are there
        with _written(stem.with_suffix(suffix)) as file:
            file.write(content)


def _packed(source: Source, sample: int, config: PackConfig) -> tuple[bytes, dict[str, int], dict[str, Any]]:
    """The bytes of an image, what its row says of it, and what its line says."""
    picture, reports = read(source, sample)
    label = source.label(sample)
    if label is not None and not 0 <= label < MOST_LABELS:
        raise UserError(
            f"{source.name(sample)}: label {label}; accepted: 0 to {MOST_LABELS - 1}, or none at all"
        )
    fields = {"label": -1 if label is None else label}
    said: dict[str, Any] = {"name": source.name(sample)}
    if picture is None:
        return b"", fields, said | {"broken": reports[-1].broken}
    pixels = reduced(picture.pixels, config.short_side)
    if pixels.shape[1] * pixels.shape[2] > MAX_PIXELS:
        raise UserError(
            f"{source.name(sample)}: {pixels.shape[1]} × {pixels.shape[2]} pixels; accepted: {MAX_PIXELS} in "
            "all, which a smaller --short-side gives"
        )
    encoding, data = encoded(pixels, config)
    fields |= {"height": pixels.shape[1], "width": pixels.shape[2], "encoding": encoding}
    if picture.notes:
        return data, fields | {"noted": 1}, said | {"notes": picture.notes}
    return data, fields, said


def reduced(pixels: Tensor, short_side: int | None) -> Tensor:
    """An image [C, H, W] whose shorter side is at most `short_side`."""
    height, width = pixels.shape[1:]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    return crop_resize(pixels, (0, 0, height, width), (round(height * scale), round(width * scale)))


def encoded(pixels: Tensor, config: PackConfig) -> tuple[int, bytes]:
    """How an image [C, H, W] is stored, and its bytes."""
    samples = pixels.permute(1, 2, 0).contiguous().numpy()
    height, width, channels = samples.shape
    if samples.dtype != np.uint8:
        return FLOAT32, samples.astype("<f4").tobytes()
    if config.encoding == "raw" or channels not in (1, 3) or max(height, width) > _JPEG_SIDE:
        return UINT8, samples.tobytes()
    file = io.BytesIO()
    Image.fromarray(samples if channels == 3 else samples[..., 0]).save(file, "JPEG", quality=config.quality)
    return JPEG, file.getvalue()


def sealed(folder: Path, number: int) -> Shard | None:
    """What a shard that was finished says of itself; None if it is not there, or was cut short."""
    try:
        return Shard(**json.loads((folder / f"{number:05d}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_whole(folder: Path, number: int, store: Store) -> bool:
    shard = sealed(folder, number)
    try:
        return shard is not None and not damage(folder, number, shard, store)
    except (UserError, OSError):
        return False


def _reports(folder: Path, number: int, ids: range) -> list[Report]:
    """What a shard says of its images that were broken or converted."""
    lines = map(json.loads, (folder / f"{number:05d}.jsonl").read_bytes().splitlines())
    return [
        Report(sample, line["name"], line.get("broken"), tuple(line.get("notes", ())))
        for sample, line in zip(ids, lines, strict=True)
        if "broken" in line or "notes" in line
    ]
