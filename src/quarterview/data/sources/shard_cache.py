"""Whole remote shards on a local disk, as many as a number of bytes allows.

Any number of processes share the folder. A shard is written under another name and renamed when it is
whole; the space it will take is counted from the beginning, so that the sum never exceeds the limit. The ones
used least recently go first. Files are opened for each read, so that one that is taken away does no harm.
"""

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quarterview.data.sources.base import digest
from quarterview.data.sources.shards import ShardFile, is_remote, local_range, read_range

_PIECE = 32 << 20  # bytes asked for at a time
_PARTIAL, _SUFFIX = ".partial-", ".shard"
_SINGLY = 4  # reads of a remote shard by a process, before it asks for the whole


class ShardCache:
    """Local copies of remote shards.

    Args:
        folder: where they lie, in a folder ``quarterview-shards`` in it; made if it is not there.
        most_bytes: that they may take.
    """

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int) -> None:
        self.parent, self.most_bytes = Path(folder), most_bytes
        self.folder = self.parent / "quarterview-shards"  # nothing else is there to be removed
        self._is_full = False  # the disk, or it cannot be written
        self._fetching = threading.Lock()  # record locks do not hold between threads

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.parent, "most_bytes": self.most_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, shard: ShardFile, offset: int, length: int) -> bytes | None:
        """Bytes of the local copy of a shard; None if there is none."""
        path = self._path(shard)
        try:
            data = local_range(path, offset, length)
        except OSError:
            return None
        with suppress(OSError):  # another's copy
            os.utime(path)
        return data

    def fetch(self, shard: ShardFile) -> bool:
        """Copy a shard, unless there is a copy, or another process is making it. Whether there is one now.

        Raises:
            RunError: if the shard cannot be read.
        """
        if self._path(shard).exists():
            return True
        if shard.size > self.most_bytes or self._is_full or not self._fetching.acquire(blocking=False):
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._fetch(shard)
        except OSError:  # no space, or not ours to write: reading goes on without
            self._is_full = True
            return False
        finally:
            self._fetching.release()

    def _path(self, shard: ShardFile) -> Path:
        return self.folder / (digest(*shard) + _SUFFIX)

    def _fetch(self, shard: ShardFile) -> bool:
        target = self._path(shard)
        partial = target.with_name(_PARTIAL + target.name)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _locked_alone(handle, partial):
                return target.exists()
            try:
                if target.exists():  # another process has just made it
                    return True
                with self._settled():
                    os.ftruncate(handle, 0)
                    if not self._make_room(shard.size, partial):
                        return False
                    os.ftruncate(handle, shard.size)  # what it will take, for others to see
                whole = _copy(shard, handle)
                if whole:
                    os.fsync(handle)
                    partial.replace(target)
            finally:
                with suppress(FileNotFoundError):
                    partial.unlink()
            return whole
        finally:
            os.close(handle)

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """While no other process makes room."""
        with (self.folder / ".lock").open("a") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, own: Path) -> bool:
        """Remove what was used least recently until there is room. False if there is none even so."""
        copies: list[tuple[float, int, Path]] = []
        taken = 0
        for path in self.folder.iterdir():
            if path == own or not path.name.endswith(_SUFFIX):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                is_partial = path.name.startswith(_PARTIAL)
                if is_partial and _is_left_behind(path):
                    path.unlink()
                    continue
                taken += status.st_size
                if not is_partial:
                    copies.append((status.st_mtime, status.st_size, path))
        if taken - sum(freed for _, freed, _ in copies) + size > self.most_bytes:
            return False  # for what others write at this moment
        for _, freed, path in sorted(copies):
            if taken + size <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            taken -= freed
        return True


class ShardReader:
    """Reads parts of shards: from a disk, from the copy of a remote one, or from where it is.

    A remote shard is copied once a process has read several parts of it, so that a few images of many shards,
    such as the held-out ones, do not copy all of them.

    Args:
        cache: where copies are kept; None keeps none.
    """

    def __init__(self, cache: ShardCache | None) -> None:
        self.cache = cache
        self._asked: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def read(self, shard: ShardFile, offset: int, length: int) -> bytes:
        """Bytes of a shard, fewer where it ends before.

        Raises:
            OSError: if a local file cannot be read.
            RunError: if a remote one cannot.
        """
        if self.cache is not None and is_remote(shard.path):
            data = self._copied(self.cache, shard, offset, length)
            if data is not None:
                return data
        return read_range(shard.path, offset, length)

    def _copied(self, cache: ShardCache, shard: ShardFile, offset: int, length: int) -> bytes | None:
        data = cache.read(shard, offset, length)
        if data is not None:
            return data
        self._asked[shard.path] += 1
        if self._asked[shard.path] <= _SINGLY or not cache.fetch(shard):
            return None
        del self._asked[shard.path]
        return cache.read(shard, offset, length)


def _locked_alone(handle: int, path: Path) -> bool:
    """Whether this process holds the file now, and it is still the one of that name."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_ino == path.stat().st_ino
    except OSError:
        return False


def _is_left_behind(partial: Path) -> bool:
    """Whether nobody writes this copy any more, as its process was killed."""
    try:
        with partial.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _copy(shard: ShardFile, handle: int) -> bool:
    """Whether all bytes came."""
    for offset in range(0, shard.size, _PIECE):
        length = min(_PIECE, shard.size - offset)
        data = read_range(shard.path, offset, length)
        if len(data) != length:
            return False
        view = memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset + length - len(view))
            view = view[written:]
    return True
