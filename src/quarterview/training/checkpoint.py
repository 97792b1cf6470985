"""Atomic checkpoints without pickle.

A checkpoint is a folder ``step-00001000`` of safetensors files, ``state.json``, and checksums of both in
``SHA256SUMS``, which ``sha256sum --check`` reads. It is written under a temporary name, every file and the
folder are synced to disk, and only then it is renamed. So a folder of that name is complete even if the
process was killed. ``last`` is a relative link to the newest checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quarterview.errors import RunError, UserError

FILES_WITH_METADATA = ("model", "ema")
"""Files with the model's configuration in their header, so that each can be used alone."""
CHECKSUMS_FILE = "SHA256SUMS"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """A loaded checkpoint."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """Tensors by file name without its suffix (``model``, ``optimizer``, …) and by name."""
    state: dict
    """The contents of ``state.json``."""


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, metadata: dict[str, str]
) -> Path:
    """Write the checkpoint of a step into the run's ``checkpoints`` folder, atomically.

    Args:
        folder: ``RUN/checkpoints``, created if missing.
        step: number of updates.
        tensors: tensors by file name without its suffix and by name.
        state: numbers and strings to write as JSON.
        metadata: strings for the header of the files in `FILES_WITH_METADATA`.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: if the checkpoint cannot be written; no partial one is left then.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True)
        fsync_path(folder.parent)
    size = sum(value.nbytes for named in tensors.values() for value in named.values())
    final, partial = folder / f"step-{step:08d}", folder / f".partial-step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _check_space(folder, size)
        partial.mkdir()
        _write(partial, tensors, state, metadata)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"The checkpoint of step {step}, {size:,} bytes, could not be written to {folder}: "
            f"{' '.join(str(error).split())}. Free disk space and run the same command again."
        ) from None
    if final.exists():
        _remove(final)
    partial.rename(final)
    fsync_path(folder)
    _set_link(folder / "last", final.name)
    return final


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"only {free:,} bytes are free")


def _write(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict, metadata: dict[str, str]
) -> None:
    for name, named in tensors.items():
        contiguous = {key: value.detach().cpu().contiguous() for key, value in named.items()}
        header = metadata if name in FILES_WITH_METADATA else None
        save_file(contiguous, folder / f"{name}.safetensors", header)
    (folder / "state.json").write_text(json.dumps(state, indent=1), "utf-8")
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS_FILE).write_text("".join(sums), "utf-8")
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file outside of a checkpoint.

    Args:
        file: path of the file; an existing file is replaced.
        tensors: tensors by name.
        metadata: strings for the header.

    Raises:
        RunError: if the file cannot be written.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(contiguous, file, metadata)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file} could not be written: {' '.join(str(error).split())}.") from None
    fsync_path(file)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill leaves no incomplete one under its name."""
    removed = path.with_name(f".removed-{path.name}")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def _set_link(link: Path, target: str) -> None:
    temporary = link.with_name(".last")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    fsync_path(link.parent)


def fsync_path(path: Path) -> None:
    """Sync a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in ``RUN/checkpoints``, ascending."""
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def find_newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in ``RUN/checkpoints``, or None."""
    found = list_steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and the leftovers of an interrupted save.

    Args:
        folder: ``RUN/checkpoints``.
        keep: number of newest checkpoints to keep.
        keep_every: also keep the checkpoints of all multiples of this step.
    """
    for step in list_steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            _remove(folder / f"step-{step:08d}")
    for pattern in (".partial-*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step from which a run is resumed."""
    if (folder / f"step-{step:08d}").is_dir():
        _set_link(folder / "last", f"step-{step:08d}")
    for later in reversed(list_steps(folder)):
        if later > step:
            _remove(folder / f"step-{later:08d}")


def find_newest_undamaged(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and messages about damaged or incomplete ones.

    A damaged checkpoint is renamed to ``damaged-step-…``, which nothing reads, and is never removed.

    Raises:
        UserError: if all checkpoints are damaged.
    """
    messages = [
        f"The checkpoint {path.name.removeprefix('.partial-')} is incomplete because its saving was "
        "interrupted. It is ignored."
        for path in sorted(folder.glob(".partial-step-*"))
    ]
    damaged: dict[Path, UserError] = {}
    for step in reversed(list_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            verify(path)
        except UserError as error:
            damaged[path] = error
            continue
        for newer, error in damaged.items():
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            messages.append(f"{error} It is renamed to {aside.name}, and the run resumes from {path.name}.")
        if damaged:
            _set_link(folder / "last", path.name)
        return path, messages
    for error in damaged.values():
        raise error
    return None, messages


def verify(path: Path) -> None:
    """Check the files of a checkpoint against their checksums.

    The first checkpoints had no checksums. They are only checked for being readable.

    Raises:
        UserError: if a file is missing, added or changed.
    """
    try:
        if not (path / CHECKSUMS_FILE).is_file():
            load(path)
            return
        lines = [line.partition("  ") for line in (path / CHECKSUMS_FILE).read_text("utf-8").splitlines()]
        listed = {name for _, _, name in lines}
        existing = {file.name for file in path.iterdir() if file.is_file()}
        ours = {name for name in existing if name.endswith((".safetensors", ".json"))}
        changed = sorted((listed - existing) | (ours - listed))
        changed = changed or [name for expected, _, name in lines if _sha256(path / name) != expected]
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if changed or not lines:
        raise _damaged(path, ValueError(f"{', '.join(changed) or CHECKSUMS_FILE} was changed"))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: if it is not a checkpoint, or is damaged.
    """
    if not (path / "state.json").is_file() or not (path / "model.safetensors").is_file():
        raise UserError(f"{path} is not a checkpoint. Give a folder such as RUN/checkpoints/step-00001000.")
    state = read_state(path)
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    return Checkpoint(path, tensors, state)


def read_state(path: Path) -> dict:
    """Return the contents of a checkpoint's ``state.json``.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(state, dict):
        raise _damaged(path, TypeError("state.json does not contain an object"))
    return state


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"The checkpoint {path} is damaged: {' '.join(str(error).split())}.")
