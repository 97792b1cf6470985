"""Find shards, and read byte ranges of them, on a disk or over a network with fsspec."""

import itertools
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from quarterview.errors import RunError, UserError, missing_package, unreadable

MAX_SHARDS = 1_000_000
"""The largest number of shards that a spec may name."""
_NUM_THREADS = 16  # which ask servers for the sizes of shards
_RETRY_DELAYS = (0.5, 2.0, 8.0, 30.0)  # seconds before another attempt at a remote read
_VERSION_KEYS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "mtime", "LastModified", "last_modified"),
    *("Last-Modified", "updated", "created"),
)
"""Keys of fsspec's file information whose values change with the file, the most reliable first."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardFile(NamedTuple):
    """A file that holds a part of a data set, on a disk or at a URL."""

    path: str
    """A path or a URL."""
    size: int
    """The size in bytes."""
    version: str
    """A text that changes when the file changes, such as its ETag; empty if the file system has none."""

    @property
    def name(self) -> str:
        """The file name, without folder and query."""
        return self.path.partition("?")[0].rstrip("/").rpartition("/")[2]


def is_remote(path: str) -> bool:
    """Return True if a path is a URL, which is read with fsspec."""
    return "://" in path


def get_local_shard(path: str | os.PathLike[str]) -> ShardFile:
    """Return a local file as a shard, with its current size and time. Raises OSError."""
    status = Path(path).stat()
    return ShardFile(os.fspath(path), status.st_size, str(status.st_mtime_ns))


def is_unchanged(shard: ShardFile) -> bool:
    """Return True if a local shard has not changed. Remote shards are assumed not to have changed."""
    try:
        return is_remote(shard.path) or get_local_shard(shard.path) == shard
    except OSError:
        return False


def find_shards(spec: str, suffix: str = ".tar") -> list[ShardFile]:
    """Return the shards that a spec names, in the order of the braces, otherwise sorted by name.

    Args:
        spec: a file, a folder, a glob with ``*``, or braces such as ``{000..099}`` and ``{train,extra}``, as
            a path or a URL.
        suffix: suffix of the shards in a folder or a glob.

    Raises:
        UserError: if there are no shards, or one is missing.
        RunError: if a server fails, after several attempts.
    """
    try:
        shards = _find_remote(spec, suffix) if is_remote(spec) else _find_local(spec, suffix)
    except OSError as error:
        raise unreadable(f"the shards of {spec}", error) from error
    if not shards:
        raise UserError(
            f"There is no {suffix} file at {spec}. Give a {suffix} file, a folder of them, a glob such as "
            f"shards/*{suffix}, or a range such as shards/train-{{000000..000099}}{suffix}."
        )
    return shards


def expand_braces(spec: str) -> list[str]:
    """Return all paths that a spec with braces stands for. Raises UserError if there are too many."""
    parts = _BRACES.split(spec)  # alternately text, and the content of braces
    choices = [[part] if i % 2 == 0 else _expand_brace(part) for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
        if count > MAX_SHARDS:
            raise UserError(f"{spec} names more than {MAX_SHARDS} shards. Give at most {MAX_SHARDS}.")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _expand_brace(braced: str) -> list[str]:
    if (ends := _RANGE.fullmatch(braced)) is None:
        return braced.split(",") if "," in braced else ["{" + braced + "}"]
    first, last = int(ends[1]), int(ends[2])
    if not first <= last < first + MAX_SHARDS:
        raise UserError(
            f"The range {{{braced}}} is not valid. Give {{first..last}} with first <= last, of at most "
            f"{MAX_SHARDS} shards."
        )
    return [f"{index:0{len(ends[1])}d}" for index in range(first, last + 1)]


# ---------------------------------------------------------------------- finding


def _find_local(spec: str, suffix: str) -> list[ShardFile]:
    path = Path(spec).expanduser().absolute()
    if path.is_dir():
        paths = sorted(str(child) for child in path.iterdir() if child.suffix.lower() == suffix)
    elif path.exists():
        paths = [str(path)]
    else:
        paths = [match for pattern in expand_braces(str(path)) for match in _glob_local(pattern, suffix)]
    shards = []
    for shard_path in paths:
        try:
            shards.append(get_local_shard(shard_path))
        except OSError as error:
            raise unreadable(f"the shard {shard_path}", error) from error
    return shards


def _glob_local(pattern: str, suffix: str) -> list[str]:
    if not any(char in pattern for char in "*?["):
        return [pattern]
    path = Path(pattern)
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(str(file) for file in matches if file.suffix.lower() == suffix)


def _find_remote(spec: str, suffix: str) -> list[ShardFile]:
    listings: list[tuple[str, Mapping[str, Any]]] = []
    for url in expand_braces(spec):
        is_file = "*" not in url and url.partition("?")[0].lower().endswith(suffix)
        listings += [(url, {})] if is_file else _list_remote(url, suffix)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(lambda entry: _get_remote_shard(*entry), listings))


def _list_remote(url: str, suffix: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the URLs of the shards in a remote folder or glob, each with its entry in the listing.

    Raises:
        UserError: if there is no such folder.
        RunError: if the folder cannot be listed, after several attempts.
    """
    pattern = url if "*" in url else f"{url.rstrip('/')}/*{suffix}"
    system, path = _open_file_system(pattern)
    try:
        infos: Mapping[str, Any] = _retry(pattern, lambda: system.glob(path, detail=True))
    except FileNotFoundError as error:
        raise unreadable(f"the shards of {pattern}", _get_first_line(error)) from error
    names = sorted(name for name in infos if name.lower().endswith(suffix))
    return [
        (system.unstrip_protocol(name), infos[name])
        for name in names
        if infos[name].get("type") != "directory"
    ]


def _get_remote_shard(url: str, listing: Mapping[str, Any]) -> ShardFile:
    """Return a remote shard. Asks the server if the listing does not have the size, as over http."""
    info = listing
    if not isinstance(info.get("size"), int):
        system, path = _open_file_system(url)
        try:
            info = _retry(url, lambda: system.info(path))
        except FileNotFoundError as error:
            raise UserError(f"The shard {url} does not exist: {_get_first_line(error)}.") from error
    if not isinstance(info.get("size"), int):
        raise UserError(f"The server of {url} does not report its size. Use a server that does.")
    version = next((str(info[name]) for name in _VERSION_KEYS if info.get(name) is not None), "")
    return ShardFile(url, info["size"], version)


# ---------------------------------------------------------------------- reading


def read_range(path: str, offset: int, length: int) -> bytes:
    """Return bytes of a shard, fewer at its end. Opens the file for each read.

    Raises:
        OSError: if a local file cannot be read.
        RunError: if a remote file cannot be read, after several attempts.
    """
    return (
        _read_remote_range(path, offset, length)
        if is_remote(path)
        else read_local_range(path, offset, length)
    )


def read_local_range(path: str | os.PathLike[str], offset: int, length: int) -> bytes:
    """Return bytes of a local file, fewer at its end. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while length > 0 and (part := os.pread(handle, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
    finally:
        os.close(handle)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_remote_range(url: str, offset: int, length: int) -> bytes:
    if length <= 0:
        return b""
    system, path = _open_file_system(url)
    try:
        data = _retry(url, lambda: system.cat_file(path, start=offset, end=offset + length))
    except FileNotFoundError as error:
        raise RunError(
            f"The shard {url} does not exist any more: {_get_first_line(error)}. Restore it and give the "
            "same command to continue."
        ) from error
    if len(data) > length:
        raise RunError(f"The server of {url} ignores byte ranges. Use one that supports Range.")
    return data


def _retry(url: str, request: Callable[[], Any]) -> Any:
    """Return the result of `request`, with retries. Raises RunError, or FileNotFoundError at once."""
    for wait in (*_RETRY_DELAYS, None):
        try:
            return request()
        except Exception as error:  # of any library under fsspec
            if isinstance(error, FileNotFoundError) and _is_confirmed_missing(error):
                raise
            if wait is None or isinstance(error, PermissionError):
                raise RunError(
                    f"Cannot read {url}: {_get_first_line(error)}. Give the same command to continue, once "
                    "it can be read."
                ) from error
        time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_confirmed_missing(error: FileNotFoundError) -> bool:
    """Return True if the file is missing; over http, fsspec raises this error on any failure."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)


def _open_file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    fsspec caches a file system per process and server, and makes another one in a forked process.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise missing_package("fsspec", f"The URL {url}", "remote") from None
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # an ImportError names the package that reads s3, gs, …
        raise unreadable(url, _get_first_line(error)) from error


def _get_first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
