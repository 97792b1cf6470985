"""From what the user wrote to a source of images."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from quarterview.data.decode import SUFFIXES
from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.base import Concatenated, Source
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.data.sources.packed import PackedSource, is_store
from quarterview.data.sources.parquet import ParquetSource
from quarterview.data.sources.shapes import ShapesSource
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.shards import is_remote
from quarterview.data.sources.tar import TarSource
from quarterview.data.sources.tar_index import Say
from quarterview.data.sources.torchvision_sets import TorchvisionSource
from quarterview.errors import UserError, unknown

ACCEPTED = (
    "a folder of images, of Parquet files or of .tar shards, a packed store, a .parquet file or a glob of "
    "them, a .tar shard, a glob or a range of them such as train-{000..099}.tar, by path or URL, .npy, .npz, "
    "a .txt or .lst list of image files, torchvision:NAME[:SPLIT], shapes[:COUNT][:seed=S][:size=PIXELS]"
)
"""Everything that `open_source` understands, for messages and help."""

_SHAPES_COUNT = 10_000
_BY_SUFFIX: dict[str, Callable[[Path, int], Source]] = {
    ".parquet": ParquetSource,
    ".npy": ArraySource,
    ".npz": ArraySource,
    ".txt": ListSource,
    ".lst": ListSource,
}


def open_sources(
    specs: Sequence[str], channels: int, cache: ShardCache | None = None, say: Say | None = None
) -> Source:
    """One source of everything that the specs name, one after the other.

    Args:
        channels, cache, say: as of `open_source`.

    Raises:
        UserError: if there is no spec, or `open_source` refuses one.
    """
    if not specs:
        raise UserError(f"no images are named; accepted: {ACCEPTED}")
    sources = [open_source(spec, channels, cache, say) for spec in specs]
    return sources[0] if len(sources) == 1 else Concatenated(sources)


def open_source(spec: str, channels: int, cache: ShardCache | None = None, say: Say | None = None) -> Source:
    """The source that a spec names.

    Args:
        spec: one of what `ACCEPTED` lists. By default ``shapes`` are 10,000 of seed 0 and 32 pixels; the
            form that begins with ``shapes`` or ``torchvision:`` is never a path.
        channels: how many channels the pictures shall have.
        cache: where copies of remote shards are kept, if they are.
        say: told what takes a while.

    Raises:
        UserError: if it names nothing that exists or can be read, with the nearest that would.
    """
    kind, *details = spec.split(":")
    if kind == "shapes":
        return _shapes(spec, details, channels)
    if kind == "torchvision":
        if len(details) not in (1, 2):
            raise UserError(f"cannot read {spec!r}; accepted: torchvision:NAME or torchvision:NAME:SPLIT")
        return TorchvisionSource(details[0], channels, *details[1:])
    path = Path(spec).expanduser()
    if is_remote(spec) or _is_tar(spec, path):
        is_parquet = is_remote(spec) and spec.partition("?")[0].lower().endswith(".parquet")
        return ParquetSource(spec, channels, cache) if is_parquet else TarSource(spec, channels, cache, say)
    if is_store(path):
        return PackedSource(path, channels)
    if path.is_dir():
        return (ParquetSource if _holds_only(path, ".parquet") else FolderSource)(path, channels)
    return _file(spec, path, channels)


def _is_tar(spec: str, path: Path) -> bool:
    """Whether these are tar shards on a disk."""
    if path.is_dir():
        return _holds_only(path, ".tar")
    return path.suffix.lower() == ".tar" and (path.exists() or bool(set("*?[{") & set(spec)))


def _file(spec: str, path: Path, channels: int) -> Source:
    suffix = path.suffix.lower()
    if path.exists() or (suffix == ".parquet" and any(letter in spec for letter in "*?[")):
        if suffix in SUFFIXES:
            raise UserError(f"{spec} is a single image; accepted: the folder that holds it, {path.parent}")
        if suffix not in _BY_SUFFIX:
            raise UserError(f"cannot tell what {spec} is by its suffix {suffix!r}; accepted: {ACCEPTED}")
        return _BY_SUFFIX[suffix](path, channels)
    raise UserError(f"{spec} does not exist{_nearest(path)}; accepted: {ACCEPTED}")


def _shapes(spec: str, details: Sequence[str], channels: int) -> Source:
    settings = {"count": _SHAPES_COUNT, "seed": 0, "size": 32}
    for position, detail in enumerate(details):
        name, equals, value = detail.partition("=")
        if not equals and position == 0:
            name, value = "count", detail
        if name not in settings:
            raise unknown("setting of shapes", name, settings)
        try:
            settings[name] = int(value)
        except ValueError:
            raise UserError(f"cannot read {detail!r} in {spec!r}; accepted: a whole number") from None
    return ShapesSource(channels=channels, **settings)


def _holds_only(folder: Path, suffix: str) -> bool:
    """Whether the folder holds files of the suffix, and neither an image nor another folder beside them."""
    try:
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        suffixes = {"/" if entry.is_dir() else entry.suffix.lower() for entry in visible}
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error}") from error
    return suffix in suffixes and suffixes.isdisjoint({"/", *SUFFIXES})


def _nearest(path: Path) -> str:
    """Of a path that does not exist: where it goes astray, and the nearest name that is there."""
    parent, name = path.parent, path.name
    while not parent.exists() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    try:
        names = [entry.name for entry in parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": {parent} holds {near[0]!r}" if near else f": {parent} holds no {name!r}"
