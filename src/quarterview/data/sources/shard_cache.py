"""A cache of whole remote shards on a local disk, up to a number of bytes; the least recently used go first.

Any number of processes can share the folder. A shard is written under another name, and renamed when it is
complete. Its full size is reserved before the copy starts, so that the sum never exceeds the limit. Files are
opened for each read, so that it does no harm if another process removes one.
"""

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quarterview.data.sources.base import compute_digest
from quarterview.data.sources.shards import ShardFile, is_remote, read_local_range, read_range

_COPY_CHUNK = 32 << 20  # bytes per request
_PARTIAL, _SUFFIX = ".partial-", ".shard"
_MAX_SINGLE_READS = 4  # reads of a remote shard by a process, before it copies the shard


class ShardCache:
    """Local copies of remote shards.

    Args:
        folder: folder of the cache. The copies are in its sub-folder ``quarterview-shards``, which is made.
        max_bytes: largest total size of the copies, in bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.parent, self.max_bytes = Path(folder), max_bytes
        self.folder = self.parent / "quarterview-shards"  # its own folder, because files in it are removed
        self._is_disabled = False  # True once the disk is full or cannot be written
        self._fetch_lock = threading.Lock()  # record locks do not exclude threads of one process

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.parent, "max_bytes": self.max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, shard: ShardFile, offset: int, length: int) -> bytes | None:
        """Return bytes of the local copy of a shard; None if there is no copy."""
        path = self._path(shard)
        try:
            data = read_local_range(path, offset, length)
        except OSError:
            return None
        with suppress(OSError):  # the copy belongs to another user
            os.utime(path)
        return data

    def fetch(self, shard: ShardFile) -> bool:
        """Copy a shard, unless another process is copying it. Return True if a complete copy exists now.

        Raises:
            RunError: if the shard cannot be read.
        """
        if self._path(shard).exists():
            return True
        if shard.size > self.max_bytes or self._is_disabled or not self._fetch_lock.acquire(blocking=False):
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._fetch(shard)
        except OSError:  # no space, or no permission: continue without a cache
            self._is_disabled = True
            return False
        finally:
            self._fetch_lock.release()

    def _path(self, shard: ShardFile) -> Path:
        return self.folder / (compute_digest(*shard) + _SUFFIX)

    def _fetch(self, shard: ShardFile) -> bool:
        target = self._path(shard)
        partial = target.with_name(_PARTIAL + target.name)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _try_lock(handle, partial):
                return target.exists()
            try:
                if target.exists():  # another process has just made it
                    return True
                with self._lock_folder():
                    os.ftruncate(handle, 0)
                    if not self._free_space(shard.size, partial):
                        return False
                    os.ftruncate(handle, shard.size)  # reserves the space
                is_complete = _copy_shard(shard, handle)
                if is_complete:
                    os.fsync(handle)
                    partial.replace(target)
            finally:
                with suppress(FileNotFoundError):
                    partial.unlink()
            return is_complete
        finally:
            os.close(handle)

    @contextmanager
    def _lock_folder(self) -> Iterator[None]:
        """Hold the lock under which one process at a time frees and reserves space."""
        with (self.folder / ".lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _free_space(self, size: int, own: Path) -> bool:
        """Remove the least recently used copies until `size` bytes are free. False if that is impossible."""
        copies: list[tuple[float, int, Path]] = []
        used = 0
        for path in self.folder.iterdir():
            if path == own or not path.name.endswith(_SUFFIX):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                is_partial = path.name.startswith(_PARTIAL)
                if is_partial and _is_abandoned(path):
                    path.unlink()
                    continue
                used += status.st_size
                if not is_partial:
                    copies.append((status.st_mtime, status.st_size, path))
        if used - sum(freed for _, freed, _ in copies) + size > self.max_bytes:
            return False  # because of copies that are being written now
        for _, freed, path in sorted(copies):
            if used + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            used -= freed
        return True


class ShardReader:
    """Reads byte ranges of shards: from a disk, the cached copy of a remote shard, or its server.

    A remote shard is copied once a process has read several ranges of it, so that reading a few images of
    many shards, such as the held-out ones, does not copy all of these.

    Args:
        cache: cache for copies of remote shards; None for no copies.
    """

    def __init__(self, cache: ShardCache | None) -> None:
        self.cache = cache
        self._num_reads: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, shard: ShardFile, offset: int, length: int) -> bytes:
        """Return bytes of a shard, fewer at its end.

        Raises:
            OSError: if a local file cannot be read.
            RunError: if a remote file cannot be read.
        """
        if self.cache is not None and is_remote(shard.path):
            data = self._read_copy(self.cache, shard, offset, length)
            if data is not None:
                return data
        return read_range(shard.path, offset, length)

    def _read_copy(self, cache: ShardCache, shard: ShardFile, offset: int, length: int) -> bytes | None:
        data = cache.read(shard, offset, length)
        if data is not None:
            return data
        self._num_reads[shard.path] += 1
        if self._num_reads[shard.path] <= _MAX_SINGLE_READS or not cache.fetch(shard):
            return None
        del self._num_reads[shard.path]
        return cache.read(shard, offset, length)


def _try_lock(handle: int, path: Path) -> bool:
    """Lock a file without waiting. Return True if that worked and `path` still names this file."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_ino == path.stat().st_ino
    except OSError:
        return False


def _is_abandoned(partial: Path) -> bool:
    """Return True if no process writes a partial copy any more, because its process was killed."""
    try:
        with partial.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _copy_shard(shard: ShardFile, handle: int) -> bool:
    """Copy a shard into an open file. Return False if the server returned too few bytes."""
    for offset in range(0, shard.size, _COPY_CHUNK):
        length = min(_COPY_CHUNK, shard.size - offset)
        data = read_range(shard.path, offset, length)
        if len(data) != length:
            return False
        view = memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset + length - len(view))
            view = view[written:]
    return True
