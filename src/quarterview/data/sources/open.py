"""Open the data source that a value of --data names."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from quarterview.data.decode import SUFFIXES
from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.base import ConcatenatedSource, Source
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.data.sources.packed import PackedSource, is_store
from quarterview.data.sources.parquet import ParquetSource
from quarterview.data.sources.shapes import ShapesSource
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.shards import is_remote
from quarterview.data.sources.tar import TarSource
from quarterview.data.sources.tar_index import Log
from quarterview.data.sources.torchvision_sets import TorchvisionSource
from quarterview.errors import UserError, invalid, unknown, unreadable

SUPPORTED_DATA = (
    "a folder of images, of Parquet files or of .tar shards, a packed store, a .parquet file or a glob of "
    "them, a .tar shard, a glob or a range of them such as train-{000..099}.tar, by path or URL, .npy, .npz, "
    "a .txt or .lst list of image files, torchvision:NAME[:SPLIT], shapes[:COUNT][:seed=S][:size=PIXELS]"
)
"""All forms that `open_source` accepts, for messages and help."""

_DEFAULT_NUM_SHAPES = 10_000
_BY_SUFFIX: dict[str, Callable[[Path, int], Source]] = {
    ".parquet": ParquetSource,
    ".npy": ArraySource,
    ".npz": ArraySource,
    ".txt": ListSource,
    ".lst": ListSource,
}


def open_sources(
    specs: Sequence[str], channels: int, cache: ShardCache | None = None, log: Log | None = None
) -> Source:
    """Open the sources that the specs name, and return them as one, one after the other.

    Args:
        channels, cache, log: see `open_source`.

    Raises:
        UserError: if there is no spec, or `open_source` refuses one.
    """
    if not specs:
        raise UserError(f"No images are given. Give {SUPPORTED_DATA}.")
    sources = [open_source(spec, channels, cache, log) for spec in specs]
    return sources[0] if len(sources) == 1 else ConcatenatedSource(sources)


def open_source(spec: str, channels: int, cache: ShardCache | None = None, log: Log | None = None) -> Source:
    """Open the source that a spec names.

    Args:
        spec: one of the forms in `SUPPORTED_DATA`. ``shapes`` alone means 10,000 images of 32 pixels with
            seed 0. A spec that begins with ``shapes`` or ``torchvision:`` is never a path.
        channels: number of channels of the images that are returned.
        cache: cache for the shards that are read over a network; None for no cache.
        log: called with a line of text before something that takes long.

    Raises:
        UserError: if the spec names nothing that exists and can be read. The message suggests a near name.
    """
    kind, *details = spec.split(":")
    if kind == "shapes":
        return _open_shapes(spec, details, channels)
    if kind == "torchvision":
        if len(details) not in (1, 2):
            raise invalid("--data", repr(spec), "torchvision:NAME or torchvision:NAME:SPLIT")
        return TorchvisionSource(details[0], channels, *details[1:])
    path = Path(spec).expanduser()
    if is_remote(spec) or _is_local_tar(spec, path):
        is_parquet = is_remote(spec) and spec.partition("?")[0].lower().endswith(".parquet")
        return ParquetSource(spec, channels, cache) if is_parquet else TarSource(spec, channels, cache, log)
    if is_store(path):
        return PackedSource(path, channels)
    if path.is_dir():
        return (ParquetSource if _contains_only(path, ".parquet") else FolderSource)(path, channels)
    return _open_file(spec, path, channels)


def _is_local_tar(spec: str, path: Path) -> bool:
    """Return True if the spec names tar shards on a disk."""
    if path.is_dir():
        return _contains_only(path, ".tar")
    return path.suffix.lower() == ".tar" and (path.exists() or bool(set("*?[{") & set(spec)))


def _open_file(spec: str, path: Path, channels: int) -> Source:
    suffix = path.suffix.lower()
    if path.exists() or (suffix == ".parquet" and any(char in spec for char in "*?[")):
        if suffix in SUFFIXES:
            raise UserError(f"{spec} is a single image. Give the folder that contains it, {path.parent}.")
        if suffix not in _BY_SUFFIX:
            raise UserError(f"{spec} has the unknown suffix {suffix!r}. Give {SUPPORTED_DATA}.")
        return _BY_SUFFIX[suffix](path, channels)
    raise UserError(f"{spec} does not exist{_suggest_path(path)}. Give {SUPPORTED_DATA}.")


def _open_shapes(spec: str, details: Sequence[str], channels: int) -> Source:
    settings = {"count": _DEFAULT_NUM_SHAPES, "seed": 0, "size": 32}
    for position, detail in enumerate(details):
        name, equals, value = detail.partition("=")
        if not equals and position == 0:
            name, value = "count", detail
        if name not in settings:
            raise unknown("setting of shapes", name, settings)
        try:
            settings[name] = int(value)
        except ValueError:
            raise UserError(
                f"{detail!r} in {spec!r} is not a whole number. Give such as shapes:5000:seed=1."
            ) from None
    return ShapesSource(channels=channels, **settings)


def _contains_only(folder: Path, suffix: str) -> bool:
    """Return True if the folder contains files of the suffix, and no image file and no folder."""
    try:
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        suffixes = {"/" if entry.is_dir() else entry.suffix.lower() for entry in visible}
    except OSError as error:
        raise unreadable(f"the folder {folder}", error) from error
    return suffix in suffixes and suffixes.isdisjoint({"/", *SUFFIXES})


def _suggest_path(path: Path) -> str:
    """Return a hint for a path that does not exist: its existing parent, and the most similar name in it."""
    parent, name = path.parent, path.name
    while not parent.exists() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; {parent} contains {near[0]!r}" if near else f"; {parent} contains no {name!r}"
