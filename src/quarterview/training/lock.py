"""One process a run folder."""

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

MARKER = ".quarterview.lock"
"""The file that makes a folder a run's."""


@contextmanager
def lock(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a run folder for this process.

    A record lock belongs to the process that took it: workers forked from it do not inherit it,
    and it is gone when that process is, so a run can be resumed right after it was killed.

    Args:
        patience: seconds to wait for another process to let go of it.

    Raises:
        UserError: if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} is a file, or lies in one; accepted: a folder") from None
    with (folder / MARKER).open("a+", encoding="utf-8") as file:
        until = time.monotonic() + patience
        while not (taken := _take(file, folder)) and time.monotonic() < until:
            time.sleep(0.1)
        if not taken:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}; accepted: a folder that no running process trains in"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"the file system of {folder} cannot lock files: {error}") from None
        return False
    return True
