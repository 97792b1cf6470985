"""Checkpoints: written whole or not at all, without pickle.

A checkpoint is a folder ``step-00001000`` of safetensors files, one ``state.json`` and their checksums
in ``SHA256SUMS``, which ``sha256sum --check`` reads too. It is written under a temporary name, every
file and the folder are synced to disk, and only then it gets its name; so a folder with such a name is
complete, whatever was killed and when. ``last`` is a relative link to the newest.
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

SELF_DESCRIBING = ("model", "ema")
"""Files whose header says what model they are of, so that each can be used alone."""
SUMS = "SHA256SUMS"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """A loaded checkpoint."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """By the name of the file without its ending: ``model``, ``optimizer``, …"""
    state: dict
    """What ``state.json`` holds."""


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict, metadata: dict[str, str]
) -> Path:
    """Write the checkpoint of a step into the run's ``checkpoints`` folder, atomically.

    Args:
        folder: ``RUN/checkpoints``; made if it is not there.
        tensors: the files to write and what is in each.
        state: numbers and texts, as JSON.
        metadata: texts for the header of the files in `SELF_DESCRIBING`.

    Raises:
        RunError: if it cannot be written; nothing of it is left then.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True)
        sync(folder.parent)
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
            f"the checkpoint of step {step} could not be written to {folder}: it takes {size:,} bytes "
            f"({' '.join(str(error).split())}); make room and give the same command again"
        ) from None
    if final.exists():
        _remove(final)
    partial.rename(final)
    sync(folder)
    _point(folder / "last", final.name)
    return final


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{free:,} bytes are free")


def _write(
    folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict, metadata: dict[str, str]
) -> None:
    for name, named in tensors.items():
        contiguous = {key: value.detach().cpu().contiguous() for key, value in named.items()}
        header = metadata if name in SELF_DESCRIBING else None
        save_file(contiguous, folder / f"{name}.safetensors", header)
    (folder / "state.json").write_text(json.dumps(state, indent=1), "utf-8")
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(sums), "utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file, outside any run.

    Args:
        file: to write; a file of that name is replaced.
        tensors: by name.
        metadata: texts for the header.

    Raises:
        RunError: if it cannot be written.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(contiguous, file, metadata)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file} could not be written: {' '.join(str(error).split())}") from None
    sync(file)


def _remove(path: Path) -> None:
    """Remove a checkpoint. Its name goes first, so that a kill leaves none that only looks complete."""
    doomed = path.with_name(f".removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _point(link: Path, target: str) -> None:
    fresh = link.with_name(".last")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint, ascending."""
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of ``RUN/checkpoints``, or None."""
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def prune(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed save left behind.

    Args:
        keep_every: steps that divide by this keep theirs for good.
    """
    for step in steps(folder)[:-keep]:
        if keep_every is None or step % keep_every:
            _remove(folder / f"step-{step:08d}")
    for pattern in (".partial-*", ".removed-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints beyond a step, of which a run resumed there knows nothing."""
    if (folder / f"step-{step:08d}").is_dir():
        _point(folder / "last", f"step-{step:08d}")
    for later in reversed(steps(folder)):
        if later > step:
            _remove(folder / f"step-{later:08d}")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is undamaged, and what to say of those that are not.

    A damaged one is set aside as ``damaged-step-…``, where nothing looks for it, and is never removed.

    Raises:
        UserError: if all that there are are damaged.
    """
    said = [
        f"a save of {path.name.removeprefix('.partial-')} was interrupted; it is left out"
        for path in sorted(folder.glob(".partial-step-*"))
    ]
    damaged: dict[Path, UserError] = {}
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            check(path)
        except UserError as error:
            damaged[path] = error
            continue
        for newer, error in damaged.items():
            aside = newer.with_name(f"damaged-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
            said.append(f"{error}; it is set aside as {aside.name}, and the run goes on from {path.name}")
        if damaged:
            _point(folder / "last", path.name)
        return path, said
    for error in damaged.values():
        raise error
    return None, said


def check(path: Path) -> None:
    """Raises UserError unless each file of a checkpoint is as it was written.

    The first checkpoints had no checksums; of those it is only asked whether they can be read.
    """
    try:
        if not (path / SUMS).is_file():
            load(path)
            return
        lines = [line.partition("  ") for line in (path / SUMS).read_text("utf-8").splitlines()]
        named = {name for _, _, name in lines}
        there = {file.name for file in path.iterdir() if file.is_file()}
        ours = {name for name in there if name.endswith((".safetensors", ".json"))}
        changed = sorted((named - there) | (ours - named))
        changed = changed or [name for expected, _, name in lines if _sha256(path / name) != expected]
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    if changed or not lines:
        raise _damaged(path, ValueError(f"{', '.join(changed) or SUMS} is not as it was written"))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        UserError: if it is none.
    """
    if not (path / "state.json").is_file() or not (path / "model.safetensors").is_file():
        raise UserError(f"{path} is no checkpoint; accepted: a folder like RUN/checkpoints/step-00001000")
    state = read_state(path)
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    return Checkpoint(path, tensors, state)


def read_state(path: Path) -> dict:
    """What the ``state.json`` of a checkpoint holds.

    Raises:
        UserError: if it is damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(state, dict):
        raise _damaged(path, TypeError("state.json holds no table"))
    return state


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"the checkpoint {path} is damaged ({' '.join(str(error).split())})")
