"""The folder of a run: checks before a start, the checkpoint to resume from, and the record."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quarterview.config import MAY_CHANGE, ComposedConfig
from quarterview.errors import UserError
from quarterview.files import write_text_atomic
from quarterview.training import checkpoint
from quarterview.training.lock import LOCK_FILE
from quarterview.training.record import collect_provenance

_RUN_FILES = (  # files that an unfinished run may leave and a new run removes
    "metrics.jsonl",
    "skipped_steps.jsonl",
    "bad_samples.jsonl",
    "config.yaml",
    "run.json",
    ".*.partial",
    "samples/step-*.png",
    "tensorboard/events.*",
    "checkpoints/.partial-*/*",
    "checkpoints/.removed-*/*",
)


def check_folder(folder: Path, data: Sequence[str]) -> None:
    """Check that a run can use a folder.

    Raises:
        UserError: if `folder` is a file, contains other files than those of a run, or is inside a folder of
            training images, so that the run's own images would become training images.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file. Give a new folder, or the folder of a run.")
    for source in data:
        if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--out {folder} is inside the folder of images {source}, so that images drawn by the run "
                "would become training images. Give a folder outside of it."
            )
    if not folder.is_dir() or (folder / LOCK_FILE).exists() or checkpoint.find_newest(folder / "checkpoints"):
        return
    ours = {path for pattern in _RUN_FILES for path in folder.glob(pattern)}
    foreign = next((path for path in folder.rglob("*") if path.is_file() and path not in ours), None)
    if foreign is not None:
        raise UserError(
            f"--out {folder} is not a run: it contains {foreign.relative_to(folder)}. Give a new or empty "
            "folder."
        )


def remove_leftovers(folder: Path) -> None:
    """Remove the files of a run that was killed before its first checkpoint, and nothing else."""
    for pattern in _RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def find_checkpoint(resume: str, folder: Path, log: Callable[[str], None]) -> Path | None:
    """Return the undamaged checkpoint to resume from, or None for a new run.

    A run that was started with --resume PATH resumes from its own newest checkpoint when the same command is
    run again.

    Args:
        resume: ``auto``, ``never``, or the path of a run or of a checkpoint.
        folder: the run's folder.
        log: called with a message for each damaged checkpoint of the run.

    Raises:
        UserError: if `resume` names no checkpoint or a damaged one, if all checkpoints are damaged, or if the
            folder has a run that must not be resumed.
    """
    newest = checkpoint.find_newest(folder / "checkpoints")
    if resume == "auto":
        return _find_newest_undamaged(folder, log)
    if resume == "never":
        if newest is not None:
            raise UserError(
                f"--out {folder} already has a run, and --resume is never. Give another --out, or --resume "
                "auto."
            )
        return None
    if newest is not None and checkpoint.read_state(newest).get("origin") == str(Path(resume).resolve()):
        return _find_newest_undamaged(folder, log)
    named = Path(resume)
    if not (named / "state.json").is_file():
        found = checkpoint.find_newest(named / "checkpoints")
        if found is None:
            raise UserError(
                f"--resume {resume} has no complete checkpoint. Give auto, never, the folder of a run, or a "
                "checkpoint in it."
            )
        named = found
    if named.parent.resolve() == (folder / "checkpoints").resolve():
        named = folder / "checkpoints" / named.resolve().name
        checkpoint.verify(named)
        return named
    if newest is not None:
        raise UserError(
            f"--out {folder} already has a run, and --resume {resume} is another one. Give another --out."
        )
    checkpoint.verify(named)
    return named


def _find_newest_undamaged(folder: Path, log: Callable[[str], None]) -> Path | None:
    path, messages = checkpoint.find_newest_undamaged(folder / "checkpoints")
    for message in messages:
        log(message)
    return path


def get_origin(resume: str, resumed: checkpoint.Checkpoint | None) -> str | None:
    """Return the path that a run was started from with --resume PATH, which its checkpoints record."""
    if resume not in ("auto", "never"):
        return str(Path(resume).resolve())
    return resumed.state.get("origin") if resumed else None


def check_same_run(
    config: ComposedConfig, fingerprint: str, resumed: checkpoint.Checkpoint, may_change: Collection[str] = ()
) -> None:
    """Check that a checkpoint was made with the same configuration and data.

    Args:
        config: the requested configuration; fields marked MAY_CHANGE may differ.
        fingerprint: of the requested data.
        resumed: the checkpoint to resume from.
        may_change: further fields that may differ.

    Raises:
        UserError: if they differ. The message lists the differences.
    """
    kind = type(config)
    now, default = (
        kind.flatten(config.to_dict()),
        kind.flatten(kind.from_flags(**_get_choices(config)).to_dict()),
    )
    before = {
        **default,
        **kind.flatten(resumed.state["config"]),
    }  # fields that the run's version did not have
    changed = [
        f"  {name}: was {before.get(name)}, now {now[name]}"
        for name in now
        if name not in {*config.flags_marked(MAY_CHANGE), *may_change} and before.get(name) != now[name]
    ]
    if resumed.state["resolved"]["fingerprint"] != fingerprint:
        name = "data" if "data" in now else "train"
        changed.append(f"  {name}: the images differ (was {before[name]}, now {now[name]})")
    if changed:
        another = f"--init-from {resumed.path} --out NEW" if "init_from" in now else "--out NEW"
        raise UserError(
            f"{resumed.path} was trained with another configuration:\n" + "\n".join(changed) + "\n"
            f"Give the same flags to resume it, or start another run with {another}."
        )


def _get_choices(config: ComposedConfig) -> dict[str, Any]:
    """Return the names of the chosen parts, such as the method."""
    return {name: config.parts()[name].name for name in config.choices()}


def write_record(
    folder: Path, config: Mapping[str, Any], fingerprint: str, images: int, argv: Sequence[str]
) -> None:
    """Write ``config.yaml``, which ``--recipe`` reads, and ``run.json``, the run's provenance.

    Args:
        folder: the run's folder.
        config: the run's configuration, see `ComposedConfig.to_dict`.
        fingerprint: of the data.
        images: number of images.
        argv: the command line.
    """
    write_text_atomic(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    record = {**collect_provenance(argv), "data": {"fingerprint": fingerprint, "images": images}}
    write_text_atomic(folder / "run.json", json.dumps(record, indent=1))
