"""The folder of a run: whose it is, how a new run starts in it, where an old one goes on, and its record."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quarterview.config import MAY_CHANGE, Composed
from quarterview.errors import UserError
from quarterview.files import replace_text
from quarterview.training import checkpoint
from quarterview.training.lock import MARKER
from quarterview.training.record import provenance

_WRITTEN = (  # what an unfinished run may leave, and a new run removes
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
    """Refuse folders in which a run would do harm.

    Raises:
        UserError: if `folder` is a file, holds files of something else and no run, or lies in a
            folder of images, whose pictures would then become training images.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; accepted: a folder, new or a run's")
    for source in data:
        if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--out {folder} lies in {source}, so that the run's pictures would be trained on; "
                "accepted: a folder beside the images"
            )
    if not folder.is_dir() or (folder / MARKER).exists() or checkpoint.newest(folder / "checkpoints"):
        return
    ours = {path for pattern in _WRITTEN for path in folder.glob(pattern)}
    foreign = next((path for path in folder.rglob("*") if path.is_file() and path not in ours), None)
    if foreign is not None:
        raise UserError(
            f"--out {folder} holds something else than a run ({foreign.relative_to(folder)}); "
            "accepted: a new or empty folder"
        )


def start_clean(folder: Path) -> None:
    """Remove what a run left that was killed before its first checkpoint, and nothing else."""
    for pattern in _WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()


def find_checkpoint(resume: str, folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, undamaged, or None for a new run.

    A run that once went on from a named checkpoint goes on from its own newest one when the same
    command is given again.

    Args:
        resume: ``auto``, ``never``, or the path of a run or of a checkpoint.
        folder: the run's folder.
        warn: told of the run's own checkpoints that are damaged, which are set aside.

    Raises:
        UserError: if there is none where one was named, or a run where there should be none, or what was
            named is damaged, or all that there is.
    """
    newest = checkpoint.newest(folder / "checkpoints")
    if resume == "auto":
        return _newest_whole(folder, warn)
    if resume == "never":
        if newest is not None:
            raise UserError(
                f"{folder} already holds a run, and --resume never was given; accepted: a new --out"
            )
        return None
    if newest is not None and checkpoint.read_state(newest).get("origin") == str(Path(resume).resolve()):
        return _newest_whole(folder, warn)
    named = Path(resume)
    if not (named / "state.json").is_file():
        found = checkpoint.newest(named / "checkpoints")
        if found is None:
            raise UserError(
                f"--resume {resume} holds no complete checkpoint; accepted: auto, never, a run's folder, or "
                "a checkpoint folder in it"
            )
        named = found
    if named.parent.resolve() == (folder / "checkpoints").resolve():
        named = folder / "checkpoints" / named.resolve().name
        checkpoint.check(named)
        return named
    if newest is not None:
        raise UserError(f"{folder} already holds a run, and --resume names another; accepted: a new --out")
    checkpoint.check(named)
    return named


def _newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    found, said = checkpoint.newest_whole(folder / "checkpoints")
    for line in said:
        warn(line)
    return found


def origin(resume: str, resumed: checkpoint.Checkpoint | None) -> str | None:
    """The path that a run was once told to go on from, to be kept in its checkpoints."""
    if resume not in ("auto", "never"):
        return str(Path(resume).resolve())
    return resumed.state.get("origin") if resumed else None


def check_same(
    config: Composed, fingerprint: str, resumed: checkpoint.Checkpoint, may_change: Collection[str] = ()
) -> None:
    """Compare what is asked for with what a checkpoint's run was told.

    Args:
        config: what is asked for; fields marked MAY_CHANGE may differ.
        fingerprint: of the data that is asked for.
        may_change: further fields that may differ.

    Raises:
        UserError: with the differences, if the checkpoint belongs to another request.
    """
    kind = type(config)
    now, default = kind.flat(config.to_plain()), kind.flat(kind.from_flags(**_chosen(config)).to_plain())
    before = {**default, **kind.flat(resumed.state["config"])}  # some fields may be newer than the run
    changed = [
        f"  {name}: was {before.get(name)}, now {now[name]}"
        for name in now
        if name not in {*config.marked(MAY_CHANGE), *may_change} and before.get(name) != now[name]
    ]
    if resumed.state["resolved"]["fingerprint"] != fingerprint:
        name = "data" if "data" in now else "train"
        changed.append(f"  {name}: another set of images than before (was {before[name]}, now {now[name]})")
    if changed:
        another = f"--init-from {resumed.path} --out NEW" if "init_from" in now else "--out NEW"
        raise UserError(
            f"{resumed.path} belongs to a run with another configuration:\n" + "\n".join(changed) + "\n"
            f"Give the same flags to go on with it, or start another run with {another}"
        )


def _chosen(config: Composed) -> dict[str, Any]:
    """Which of several parts a configuration has, such as its method."""
    return {name: config.parts()[name].name for name in config.choices()}


def write_record(
    folder: Path, config: Mapping[str, Any], fingerprint: str, images: int, argv: Sequence[str]
) -> None:
    """``config.yaml``, which ``--recipe`` reads, and ``run.json``, which says where a run came from.

    Args:
        config: every field of the run's configuration, as YAML holds it.
        fingerprint: of the data.
        images: how many there are.
        argv: the command line.
    """
    replace_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
    record = {**provenance(argv), "data": {"fingerprint": fingerprint, "images": images}}
    replace_text(folder / "run.json", json.dumps(record, indent=1))
