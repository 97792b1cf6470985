"""Files of images on a disk, read whole: what is no plain file, and what has changed since it was found."""

import os
import stat
import zlib
from pathlib import Path

from quarterview.data.sources.base import BadSampleError
from quarterview.errors import RunError

MAX_BYTES = 1 << 30
"""Larger files are refused unread: the largest image that is accepted has less, even unpacked."""

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""The last, because a pipe would wait for someone to write into it."""
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def kind_of(mode: int) -> str:
    """What something that is no plain file is, by its `st_mode`."""
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def stamp(status: os.stat_result) -> int:
    """A number below 2³² that changes when a file is written or replaced: of its size and its time."""
    return zlib.crc32(b"%d %d" % (status.st_size, status.st_mtime_ns))


def content(path: Path, stamped: int | None = None) -> bytes:
    """All bytes of an image file.

    Args:
        path: of the file.
        stamped: its `stamp` when it was found, if it was.

    Raises:
        BadSampleError: if it cannot be read, is too large, is no plain file, or is not the one found.
    """
    try:
        with os.fdopen(os.open(path, _FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSampleError(f"cannot be read: it is {kind_of(status.st_mode)}")
            if status.st_size > MAX_BYTES:
                raise BadSampleError(
                    f"cannot be read: {status.st_size:,} bytes; accepted: up to {MAX_BYTES:,}"
                )
            if stamped is not None and stamp(status) != stamped:
                raise BadSampleError("was changed after the images were looked for: another size or time")
            return file.read(status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSampleError(f"cannot be read: {error}") from error


def stamped(path: Path) -> int | None:
    """The `stamp` of a file; None if there is none."""
    try:
        return stamp(path.stat())
    except OSError:
        return None


def check_unchanged(path: Path, before: int | None) -> None:
    """Raises RunError if a file, of which much depends, is not the one whose stamp this is."""
    if stamped(path) != before:
        raise changed(path)


def changed(path: str | Path) -> RunError:
    """What is said of a file that is not the one that it was."""
    return RunError(
        f"{path} was changed, replaced or removed while this was running; accepted: the file as it was, "
        "with which the same command goes on, or a new run"
    )


def printable(name: bytes) -> str:
    """A name for people: what is no UTF-8, or would not be printed, in escapes."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
