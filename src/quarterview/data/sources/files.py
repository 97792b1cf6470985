"""Read image files from a disk, and refuse what is not a regular file or has changed since it was found."""

import os
import stat
import zlib
from pathlib import Path

from quarterview.data.sources.base import BadSampleError
from quarterview.errors import RunError

MAX_BYTES = 1 << 30
"""The largest file that is read, in bytes. The largest accepted image is smaller, even uncompressed."""

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK, because opening a pipe would wait until somebody writes into it."""
_FILE_TYPES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def describe_file_type(mode: int) -> str:
    """Return what a path that is not a regular file is, from its `st_mode`."""
    return _FILE_TYPES.get(stat.S_IFMT(mode), "not a regular file")


def compute_signature(status: os.stat_result) -> int:
    """Return a number below 2³² from size and modification time, which changes when a file is rewritten."""
    return zlib.crc32(b"%d %d" % (status.st_size, status.st_mtime_ns))


def read_file(path: Path, expected_signature: int | None = None) -> bytes:
    """Return all bytes of an image file.

    Args:
        path: path of the file.
        expected_signature: the file's signature when it was found; None to accept any.

    Raises:
        BadSampleError: if the file cannot be read, is too large, is not a regular file, or has changed.
    """
    try:
        with os.fdopen(os.open(path, _OPEN_FLAGS), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSampleError(f"cannot be read: it is {describe_file_type(status.st_mode)}")
            if status.st_size > MAX_BYTES:
                raise BadSampleError(
                    f"cannot be read: it has {status.st_size:,} bytes, more than {MAX_BYTES:,}"
                )
            if expected_signature is not None and compute_signature(status) != expected_signature:
                raise BadSampleError("was changed after the folder was listed: another size or time")
            return file.read(status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSampleError(f"cannot be read: {error}") from error


def get_signature(path: Path) -> int | None:
    """Return the signature of a file; None if the file does not exist."""
    try:
        return compute_signature(path.stat())
    except OSError:
        return None


def check_unchanged(path: Path, expected_signature: int | None) -> None:
    """Raise RunError if a file does not have the expected signature any more."""
    if get_signature(path) != expected_signature:
        raise make_changed_error(path)


def make_changed_error(path: str | Path) -> RunError:
    """Create the error for a file that has changed during a run."""
    return RunError(
        f"{path} was changed, replaced or removed during the run. Restore the file and give the same command "
        "to continue, or start a new run."
    )


def to_printable(name: bytes) -> str:
    """Return a name with escapes for bytes that are not UTF-8 and for characters that cannot be printed."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
