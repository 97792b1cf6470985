"""Shards where they lie: on a disk, or behind anything that fsspec reads. Found, and read in ranges."""

import itertools
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from quarterview.errors import RunError, UserError

MOST_SHARDS = 1_000_000
_STATED_AT_A_TIME = 16
_WAITS = (0.5, 2.0, 8.0, 30.0)  # seconds before another attempt at a remote read
_STAMPS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "mtime", "LastModified", "last_modified"),
    *("Last-Modified", "updated", "created"),
)
"""What file systems of fsspec call that which changes with a file, the surest first."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardFile(NamedTuple):
    """One shard."""

    path: str
    """A path or a URL."""
    size: int
    """In bytes."""
    stamp: str
    """Changes when the file does; empty where nothing tells."""

    @property
    def name(self) -> str:
        """Without its folder."""
        return self.path.partition("?")[0].rstrip("/").rpartition("/")[2]


def is_remote(path: str) -> bool:
    """Whether this is a URL, which fsspec reads."""
    return "://" in path


def local_shard(path: str | os.PathLike[str]) -> ShardFile:
    """A file on a disk as it is now. Raises OSError."""
    status = Path(path).stat()
    return ShardFile(os.fspath(path), status.st_size, str(status.st_mtime_ns))


def is_unchanged(shard: ShardFile) -> bool:
    """Whether a file on a disk is the one that it was; of a remote one, which is not asked, it is taken."""
    try:
        return is_remote(shard.path) or local_shard(shard.path) == shard
    except OSError:
        return False


def find_shards(spec: str, suffix: str = ".tar") -> list[ShardFile]:
    """The shards that a spec names: in the order of braces, or of their names.

    Args:
        spec: a file, a folder of them, a pattern with ``*``, or braces such as ``{000..099}`` and
            ``{train,extra}``, as a path or a URL.
        suffix: of the shards in a folder or of a pattern.

    Raises:
        UserError: if there are none, or one is missing.
    """
    try:
        shards = _remote(spec, suffix) if is_remote(spec) else _local(spec, suffix)
    except OSError as error:
        raise UserError(f"cannot look for shards at {spec}: {error}") from error
    if not shards:
        raise UserError(
            f"no {suffix} file at {spec}; accepted: a {suffix} file, a folder of them, a pattern such as "
            f"shards/*{suffix}, or a range such as shards/train-{{000000..000099}}{suffix}"
        )
    return shards


def expand_braces(spec: str) -> list[str]:
    """Every text that a spec with braces stands for. Raises UserError if there are too many."""
    parts = _BRACES.split(spec)  # text, then what stands in braces, in turn
    choices = [[part] if place % 2 == 0 else _choices(part) for place, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
        if count > MOST_SHARDS:
            raise UserError(f"{spec} names more than {MOST_SHARDS} shards; accepted: at most as many")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(braced: str) -> list[str]:
    if (ends := _RANGE.fullmatch(braced)) is None:
        return braced.split(",") if "," in braced else ["{" + braced + "}"]
    first, last = int(ends[1]), int(ends[2])
    if not first <= last < first + MOST_SHARDS:
        raise UserError(f"the range {{{braced}}}; accepted: first..last, at most {MOST_SHARDS} of them")
    return [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]


# ---------------------------------------------------------------------- finding


def _local(spec: str, suffix: str) -> list[ShardFile]:
    path = Path(spec).expanduser().absolute()
    if path.is_dir():
        paths = sorted(str(child) for child in path.iterdir() if child.suffix.lower() == suffix)
    elif path.exists():
        paths = [str(path)]
    else:
        paths = [one for text in expand_braces(str(path)) for one in _matching(text, suffix)]
    shards = []
    for one in paths:
        try:
            shards.append(local_shard(one))
        except OSError as error:
            raise UserError(f"cannot read the shard {one}: {error}") from error
    return shards


def _matching(pattern: str, suffix: str) -> list[str]:
    if not any(letter in pattern for letter in "*?["):
        return [pattern]
    path = Path(pattern)
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(str(file) for file in found if file.suffix.lower() == suffix)


def _remote(spec: str, suffix: str) -> list[ShardFile]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for url in expand_braces(spec):
        plain = "*" not in url and url.partition("?")[0].lower().endswith(suffix)
        found += [(url, {})] if plain else _listed(url, suffix)
    with ThreadPoolExecutor(_STATED_AT_A_TIME) as pool:
        return list(pool.map(lambda entry: _stated(*entry), found))


def _listed(url: str, suffix: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The shards that match a remote pattern, or lie in a remote folder, with what the listing says of each.

    Raises:
        UserError: if there is no such folder.
        RunError: if it cannot be listed, after several attempts.
    """
    pattern = url if "*" in url else f"{url.rstrip('/')}/*{suffix}"
    system, path = _file_system(pattern)
    try:
        infos: Mapping[str, Any] = _patiently(pattern, lambda: system.glob(path, detail=True))
    except FileNotFoundError as error:
        raise UserError(f"cannot list {pattern}: {_line(error)}") from error
    names = sorted(name for name in infos if name.lower().endswith(suffix))
    return [
        (system.unstrip_protocol(name), infos[name])
        for name in names
        if infos[name].get("type") != "directory"
    ]


def _stated(url: str, listed: Mapping[str, Any]) -> ShardFile:
    """A remote shard; the server is asked where a listing does not tell its size, as over http."""
    info = listed
    if not isinstance(info.get("size"), int):
        system, path = _file_system(url)
        try:
            info = _patiently(url, lambda: system.info(path))
        except FileNotFoundError as error:
            raise UserError(f"there is no shard {url}: {_line(error)}") from error
    if not isinstance(info.get("size"), int):
        raise UserError(f"{url} does not tell its size; accepted: servers that do")
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")
    return ShardFile(url, info["size"], stamp)


# ---------------------------------------------------------------------- reading


def read_range(path: str, offset: int, length: int) -> bytes:
    """Bytes of a shard, fewer where it ends before. Files are opened for each read.

    Raises:
        OSError: if a local file cannot be read.
        RunError: if a remote one cannot, after several attempts.
    """
    return _remote_range(path, offset, length) if is_remote(path) else local_range(path, offset, length)


def local_range(path: str | os.PathLike[str], offset: int, length: int) -> bytes:
    """Likewise, of a file on a disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while length > 0 and (part := os.pread(handle, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
    finally:
        os.close(handle)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _remote_range(url: str, offset: int, length: int) -> bytes:
    if length <= 0:
        return b""
    system, path = _file_system(url)
    try:
        data = _patiently(url, lambda: system.cat_file(path, start=offset, end=offset + length))
    except FileNotFoundError as error:
        raise RunError(f"the shard {url} is gone: {_line(error)}; the same command goes on later") from error
    if len(data) > length:
        raise RunError(f"the server of {url} does not serve parts of files; accepted: one that does (Range)")
    return data


def _patiently(url: str, ask: Callable[[], Any]) -> Any:
    """What `ask` gives, which may fail for a while. Raises RunError, or FileNotFoundError at once."""
    for wait in (*_WAITS, None):
        try:
            return ask()
        except Exception as error:  # of any library under fsspec
            if isinstance(error, FileNotFoundError) and _is_answer(error):
                raise
            if wait is None or isinstance(error, PermissionError):
                raise RunError(
                    f"cannot read {url}: {_line(error)}; when it can be read, the same command goes on"
                ) from error
        time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_answer(error: FileNotFoundError) -> bool:
    """Whether a server said that there is no such file: over http, fsspec says so of any failure."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    fsspec keeps one for each process and server, and makes another in a forked process.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(
            f"{url} is remote: pip install 'quarterview[remote]'; accepted without it: files"
        ) from None
    try:
        return url_to_fs(url)
    except ImportError as error:  # which package reads s3, gs, … is fsspec's to say
        raise UserError(
            f"cannot read {url}: {_line(error)}; accepted: file, http and memory URLs with "
            "'quarterview[remote]', others with the package that fsspec names"
        ) from error
    except ValueError as error:
        raise UserError(f"cannot read {url}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
