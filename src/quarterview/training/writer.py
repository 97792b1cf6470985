"""Checkpoints written behind training: the loop waits for a copy of the tensors, not for the disk."""

from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from quarterview.training import checkpoint


class Writer:
    """Writes the checkpoints of a run, one at a time, in a thread of its own.

    Args:
        folder: ``RUN/checkpoints``.
        keep, keep_every: see `checkpoint.prune`.
        metadata: texts for the header of the weights.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, metadata: dict[str, str]) -> None:
        self.folder, self.keep, self.keep_every, self.metadata = folder, keep, keep_every, metadata
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._room: dict[str, dict[str, Tensor]] = {}

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Begin to write the checkpoint of a step. The tensors may change as soon as this returns.

        Raises:
            RunError: if the one before could not be written.
        """
        self.finish()
        copies = {name: self._copies(name, named) for name, named in tensors.items()}
        for device in {t.device for named in tensors.values() for t in named.values() if t.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._thread = Thread(target=self._write, args=(step, copies, state), name="checkpoint writer")
        self._thread.start()

    def _copies(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the host. Page-locked memory, to which a GPU copies fast, is taken once and kept."""
        room = self._room.setdefault(name, {})
        for key, value in tensors.items():
            if value.device.type == "cpu":
                room[key] = value.detach().clone()
                continue
            if key not in room:
                room[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            room[key].copy_(value.detach(), non_blocking=value.is_cuda)
        return dict(room)

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        try:
            checkpoint.save(self.folder, step, tensors, state, self.metadata)
            checkpoint.prune(self.folder, self.keep, self.keep_every)
        except Exception as error:  # raised where the loop asks for it
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether what was being written could not be."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            RunError: if it could not be.
        """
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
