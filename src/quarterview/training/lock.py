"""A lock that keeps a second process out of a run folder."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from quarterview.errors import UserError

LOCK_FILE = ".quarterview.lock"
"""The locked file. A folder that has it is a run folder."""


@contextmanager
def lock_folder(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """Lock a run folder for this process.

    The lock is a POSIX record lock, which belongs to one process: forked workers do not inherit it, and it
    ends with the process, so a killed run can be resumed at once.

    Args:
        timeout: seconds to wait for another process to release the lock.

    Raises:
        UserError: if another process has the lock, or the file system cannot lock files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"The run folder {folder} is a file, or is inside a file. Give --out a folder."
        ) from None
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        until = time.monotonic() + timeout
        while not (locked := _try_lock(file, folder)) and time.monotonic() < until:
            time.sleep(0.1)
        if not locked:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"The run folder {folder} is in use by {holder}. Wait until it ends, or give another --out."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _try_lock(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"The file system of {folder} cannot lock files: {error}. Give --out a folder on another one."
            ) from None
        return False
    return True
