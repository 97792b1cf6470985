"""Asynchronous checkpoint writing: the training loop waits for a copy of the tensors, not for the disk."""

from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from quarterview.training import checkpoint


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, in a background thread.

    Args:
        folder: ``RUN/checkpoints``.
        keep, keep_every: see `checkpoint.prune`.
        metadata: strings for the header of the weights files.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, metadata: dict[str, str]) -> None:
        self.folder, self.keep, self.keep_every, self.metadata = folder, keep, keep_every, metadata
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._host_buffers: dict[str, dict[str, Tensor]] = {}

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Start writing the checkpoint of a step. The tensors may change as soon as this returns.

        Raises:
            RunError: if the previous checkpoint could not be written.
        """
        self.finish()
        copies = {name: self._copy_to_host(name, named) for name, named in tensors.items()}
        for device in {t.device for named in tensors.values() for t in named.values() if t.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._thread = Thread(target=self._write, args=(step, copies, state), name="checkpoint writer")
        self._thread.start()

    def _copy_to_host(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the host. Pinned memory, which speeds up copies, is allocated once and reused."""
        buffers = self._host_buffers.setdefault(name, {})
        for key, value in tensors.items():
            if value.device.type == "cpu":
                buffers[key] = value.detach().clone()
                continue
            if key not in buffers:
                buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            buffers[key].copy_(value.detach(), non_blocking=value.is_cuda)
        return dict(buffers)

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
        try:
            checkpoint.save(self.folder, step, tensors, state, self.metadata)
            checkpoint.prune(self.folder, self.keep, self.keep_every)
        except Exception as error:  # raised again in `finish`
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Return whether a checkpoint could not be written."""
        return self._error is not None

    def join(self) -> None:
        """Wait until nothing is being written, without raising an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            RunError: if it could not be written.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
