"""One process a run folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quarterview.errors import UserError


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    A record lock belongs to the process that took it: workers forked from it do not inherit it,
    and it is gone when that process is, so a run can be resumed right after it was killed.

    Raises:
        UserError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}; accepted: a folder that no running process trains in"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
