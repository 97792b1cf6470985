"""Write a packed store (see docs/pack.md), with any number of processes and machines.

The bytes of a shard depend only on the source and the settings. Its files are written under temporary names,
synced and renamed; the .json file is written last and marks the shard as complete. So writers need no
coordination: a restarted writer writes the missing shards, and the writer that finds all shards complete
writes the final ``store.json``.
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

from quarterview.data.bad_samples import BadSampleLog
from quarterview.data.config import LoaderConfig
from quarterview.data.decode import MAX_PIXELS
from quarterview.data.pack_config import PackConfig
from quarterview.data.reading import SampleReport, read_sample
from quarterview.data.sources.base import Source, get_remarks
from quarterview.data.sources.open import open_sources
from quarterview.data.sources.packed import (
    BROKEN,
    FLOAT32,
    FORMAT,
    INDEX_DTYPE,
    JPEG,
    LABEL_LIMIT,
    STORE_JSON,
    UINT8,
    Shard,
    Store,
    compute_blake2b,
    find_damage,
    get_shard_ranges,
    read_store,
    read_store_json,
)
from quarterview.data.transforms.crop import crop_resize
from quarterview.data.workers import watch_workers
from quarterview.errors import RunError, UserError, invalid

LOGGER = logging.getLogger("quarterview")
_MAX_LISTED = 10
_MAX_JPEG_SIDE = 65_500  # pixels, the limit of libjpeg
_STALE_SECONDS = 3600  # files that are being written are modified more often


class PackResult(NamedTuple):
    """The state of a packed store after a call of `pack`."""

    num_written_shards: int
    """Number of shards that are complete."""
    num_shards: int
    """Number of shards of the whole store."""
    num_images: int
    """Number of images of the whole store."""
    num_bytes: int
    """Total size of the images in the complete shards, in bytes."""

    @property
    def is_complete(self) -> bool:
        """True if all shards are complete, so that the store can be read."""
        return self.num_written_shards == self.num_shards


class VerifyResult(NamedTuple):
    """The contents of a packed store whose checksums are all correct."""

    num_images: int
    """Number of images."""
    num_broken: int
    """Number of images that could not be read when the store was packed."""


ProgressCallback = Callable[[int, int], object]
"""A function that is called with the number of finished shards and the total number of shards."""


def pack(config: PackConfig, on_progress: ProgressCallback = lambda _done, _total: None) -> PackResult:
    """Write the shards of a packed store that are missing, of the whole store or of one part.

    Conversions of images and broken images are logged at WARNING.

    Args:
        on_progress: called before the first shard and after each shard.

    Raises:
        UserError: if the folder contains other files, or a store of other images or other settings.
        RunError: if too many images are broken.
    """
    folder = Path(config.out)
    source = open_sources(config.data, config.in_chans, log=LOGGER.info)
    settings = get_settings(config, source)
    begin_store(folder, settings)
    for line in get_remarks(source):
        LOGGER.warning(line)
    bad_samples = BadSampleLog(None, len(source), config.max_bad_samples)
    mine = config.select_shards(len(list(get_shard_ranges(len(source), config.shard_size))))
    workers = LoaderConfig(workers=config.workers).num_workers
    on_progress(0, len(mine))
    for done, reports in enumerate(
        _write_missing_shards(_ShardDataset(source, folder, config), mine, workers), 1
    ):
        for report in reports:
            bad_samples(report)
        on_progress(done, len(mine))
    for line in bad_samples.summarize():
        LOGGER.warning(line)
    return finish_store(folder, settings, source, config.max_bad_samples)


def verify(folder: Path, on_progress: ProgressCallback = lambda _done, _total: None) -> VerifyResult:
    """Compare every image and index of a packed store with its checksum.

    Args:
        folder: the store.
        on_progress: called before the first shard and after each shard.

    Raises:
        UserError: if the folder is not a complete store, or an index is damaged.
        RunError: if an image is damaged.
    """
    store = read_store(folder)
    errors: list[str] = []
    on_progress(0, len(store.shards))
    for shard_index, shard in enumerate(store.shards):
        errors += find_damage(folder, shard_index, shard, store)
        on_progress(shard_index + 1, len(store.shards))
    if errors:
        listed = "\n".join(f"  {error}" for error in errors[:_MAX_LISTED])
        raise RunError(
            f"{folder} is damaged in {len(errors)} place(s):\n{listed}\nRun the `quarterview pack` command "
            "that wrote the store again: it rewrites the damaged shards."
        )
    return VerifyResult(store.images, sum(shard.broken for shard in store.shards))


# ---------------------------------------------------------------------- the folder


def get_settings(config: PackConfig, source: Source) -> dict[str, Any]:
    """Return everything that the bytes of a store depend on, as the entry "settings" of ``store.json``."""
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


def begin_store(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or compare them with those of an existing store.

    Raises:
        UserError: if the folder contains other files, or a store of other images or other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {folder} is a file, or is inside a file. Give a folder.") from None
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if STORE_JSON not in names:
        if names:
            raise UserError(
                f"--out {folder} contains other files, such as {names[0]}. Give a new or empty folder, or an "
                "unfinished store of the same images."
            )
        with _open_atomic(folder / STORE_JSON) as file:
            file.write(_encode_json({"format": FORMAT, "complete": False, "settings": settings}))
        return
    before = read_store_json(folder).get("settings")
    before = before if isinstance(before, dict) else {}
    different = [
        f"{name} is {before.get(name)}, not {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {folder} contains a store with other settings: {'; '.join(different)}. Use the same "
            "images and settings, or another folder."
        )


def finish_store(
    folder: Path, settings: dict[str, Any], source: Source, max_bad_samples: float
) -> PackResult:
    """Write the final ``store.json`` if all shards are complete, and return the state of the store.

    Raises:
        RunError: if more than the fraction `max_bad_samples` of all images is broken.
    """
    ranges = list(get_shard_ranges(settings["images"], settings["shard_size"]))
    shards = [read_shard_record(folder, shard_index) for shard_index in range(len(ranges))]
    written = [shard for shard in shards if shard is not None]
    result = PackResult(len(written), len(shards), len(source), sum(shard.bin_bytes for shard in written))
    if not result.is_complete:
        return result
    broken = sum(shard.broken for shard in written)
    if broken > max_bad_samples * len(source):
        raise RunError(
            f"{broken} of {len(source)} images are broken, which is more than the {max_bad_samples:.2%} that "
            "--max-bad-samples allows. Repair or remove those listed in the .jsonl files of the shards, or "
            "allow more with --max-bad-samples."
        )
    record = {
        "format": FORMAT,
        "complete": True,
        "settings": settings,
        "classes": None if source.classes is None else list(source.classes),
        "broken": broken,
        "shards": [shard._asdict() for shard in written],
    }
    remove_stale_files(folder)
    with _open_atomic(folder / STORE_JSON) as file:
        file.write(_encode_json(record))
    return result


def remove_stale_files(folder: Path) -> None:
    """Remove partial files of killed writers. Recent ones are kept: their writers may still be running."""
    for partial in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink()


def _encode_json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


@contextmanager
def _open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end, or is removed if an exception is raised.

    Several processes and machines may write the same path at the same time.
    """
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


class _ShardDataset(Dataset):
    """A map-style dataset of shards that writes the shard at an index, unless it is intact.

    An item is the list of reports on the images of the shard, or the exception that was raised.
    """

    def __init__(self, source: Source, folder: Path, config: PackConfig) -> None:
        self.source, self.folder, self.config = source, folder, config
        classes = None if source.classes is None else list(source.classes)
        self.store = Store(len(source), config.in_chans, config.shard_size, classes, [])

    def __getitem__(self, index: int) -> list[SampleReport] | Exception:
        start = index * self.config.shard_size
        ids = range(start, min(start + self.config.shard_size, len(self.source)))
        try:
            if not _is_shard_intact(self.folder, index, self.store):
                write_shard(self.folder, index, self.source, ids, self.config)
            return _read_reports(self.folder, index, ids)
        except (
            UserError,
            RunError,
            OSError,
        ) as error:  # raised in the main process, which reports it without a worker's traceback
            return error


def _write_missing_shards(
    dataset: _ShardDataset, shard_indices: range, num_workers: int
) -> Iterator[list[SampleReport]]:
    """Write the shards that are missing or damaged, and yield the reports on the images of every shard."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=shard_indices,
        num_workers=min(num_workers, len(shard_indices)),
        collate_fn=_identity,
        worker_init_fn=_init_worker,
    )
    with watch_workers(iter(loader)) as shard_reports:
        for reports in shard_reports:
            if isinstance(reports, Exception):
                raise reports
            yield reports


def _identity(reports: list[SampleReport] | Exception) -> list[SampleReport] | Exception:
    return reports


def _init_worker(_worker: int) -> None:
    """Ignore SIGINT in a worker: Ctrl-C reaches every process, and the main one stops the workers."""
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, SIG_DFL)


def write_shard(folder: Path, shard_index: int, source: Source, ids: range, config: PackConfig) -> None:
    """Read the images `ids` and write them as one shard.

    Raises:
        UserError: if an image or a label cannot be stored.
    """
    stem = folder / f"{shard_index:05d}"
    rows = np.zeros(len(ids), INDEX_DTYPE)
    lines = io.BytesIO()
    with _open_atomic(stem.with_suffix(".bin")) as images:
        for row, sample in zip(rows, ids, strict=True):
            data, fields, description = _encode_sample(source, sample, config)
            line = json.dumps(description).encode() + b"\n"
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
        npy_blake2b=compute_blake2b(index.getvalue()),
        jsonl_blake2b=compute_blake2b(lines.getvalue()),
    )
    contents = {".npy": index.getvalue(), ".jsonl": lines.getvalue(), ".json": _encode_json(shard._asdict())}
    for suffix, content in contents.items():  # the .json file comes last: it marks the shard as complete
        with _open_atomic(stem.with_suffix(suffix)) as file:
            file.write(content)


def _encode_sample(
    source: Source, sample: int, config: PackConfig
) -> tuple[bytes, dict[str, int], dict[str, Any]]:
    """Return the bytes of an image, the fields of its row in the index, and its line in the .jsonl file."""
    image, reports = read_sample(source, sample)
    label = source.label(sample)
    if label is not None and not 0 <= label < LABEL_LIMIT:
        raise invalid(
            f"The label of {source.name(sample)}", label, f"a label from 0 to {LABEL_LIMIT - 1}, or none"
        )
    fields = {"label": -1 if label is None else label}
    description: dict[str, Any] = {"name": source.name(sample)}
    if image is None:
        return b"", fields, description | {"broken": reports[-1].broken}
    pixels = resize_short_side(image.pixels, config.short_side)
    if pixels.shape[1] * pixels.shape[2] > MAX_PIXELS:
        raise UserError(
            f"{source.name(sample)} has {pixels.shape[1]} × {pixels.shape[2]} pixels, more than "
            f"{MAX_PIXELS // 1_000_000} megapixels. Give a smaller --short-side."
        )
    encoding, data = encode_image(pixels, config)
    fields |= {"height": pixels.shape[1], "width": pixels.shape[2], "encoding": encoding}
    if image.notes:
        return data, fields | {"noted": 1}, description | {"notes": image.notes}
    return data, fields, description


def resize_short_side(pixels: Tensor, short_side: int | None) -> Tensor:
    """Resize an image [C, H, W] so that its shorter side is at most `short_side`; None keeps the size."""
    height, width = pixels.shape[1:]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    return crop_resize(pixels, (0, 0, height, width), (round(height * scale), round(width * scale)))


def encode_image(pixels: Tensor, config: PackConfig) -> tuple[int, bytes]:
    """Encode an image [C, H, W]. Returns one of the encodings of `sources.packed`, and the bytes."""
    samples = pixels.permute(1, 2, 0).contiguous().numpy()
    height, width, channels = samples.shape
    if samples.dtype != np.uint8:
        return FLOAT32, samples.astype("<f4").tobytes()
    if config.encoding == "raw" or channels not in (1, 3) or max(height, width) > _MAX_JPEG_SIDE:
        return UINT8, samples.tobytes()
    file = io.BytesIO()
    Image.fromarray(samples if channels == 3 else samples[..., 0]).save(file, "JPEG", quality=config.quality)
    return JPEG, file.getvalue()


def read_shard_record(folder: Path, shard_index: int) -> Shard | None:
    """Read the .json file of a shard; None if it is missing or incomplete."""
    try:
        return Shard(**json.loads((folder / f"{shard_index:05d}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_shard_intact(folder: Path, shard_index: int, store: Store) -> bool:
    shard = read_shard_record(folder, shard_index)
    try:
        return shard is not None and not find_damage(folder, shard_index, shard, store)
    except (UserError, OSError):
        return False


def _read_reports(folder: Path, shard_index: int, ids: range) -> list[SampleReport]:
    """Read the reports on the broken and converted images of a shard."""
    lines = map(json.loads, (folder / f"{shard_index:05d}.jsonl").read_bytes().splitlines())
    return [
        SampleReport(sample, line["name"], line.get("broken"), tuple(line.get("notes", ())))
        for sample, line in zip(ids, lines, strict=True)
        if "broken" in line or "notes" in line
    ]
