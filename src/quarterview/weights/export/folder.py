"""The folder of an export: written whole or not at all, and never over something else."""

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quarterview.errors import RunError, UserError
from quarterview.files import replace_text
from quarterview.versions import own_version
from quarterview.weights.export.model_card import Target, card
from quarterview.weights.export.verify import Exported, Model, versions
from quarterview.weights.facts import Facts

RECORD = "quarterview.json"
"""Lists the files of an export, and so marks its folder as one."""


def write_folder(
    model: Model,
    folder: str | Path,
    facts: Facts | None,
    target: Target,
    write: Callable[[Path], Mapping[str, float]],
) -> Exported:
    """Write an export with its card and its record; an older export in the folder is replaced.

    Args:
        model: of ours.
        folder: new, empty, or an older export.
        facts: where the weights come from.
        target: what the export is for.
        write: writes the files into a folder, opens them again, and returns the largest differences
            from our forward.

    Raises:
        UserError: if the folder holds something else.
        RunError: if the files differ from our forward, or cannot be written; then nothing is changed.
    """
    folder = Path(folder)
    check_folder(folder)
    with staged(folder, RECORD) as partial:
        differences = dict(write(partial))
        used = versions(*target.packages)
        replace_text(partial / "README.md", card(model, target, facts or Facts(), differences, used))
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        record = {
            "target": target.name,
            "quarterview": own_version(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": used,
            "differences": differences,
            "files": files,
        }
        replace_text(partial / RECORD, json.dumps(record, indent=1) + "\n")
        _remove_older(folder)
    return Exported(folder, differences, used)


def check_folder(folder: Path) -> None:
    """Raises UserError unless a folder is new, empty, or holds an export of ours and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; accepted: a folder, new or an older export's")
    if not folder.is_dir():
        return
    ours = {RECORD, *files_of(folder)}
    present = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    foreign = next((str(path) for path in present if str(path) not in ours and not _staging(path)), None)
    if foreign is not None:
        raise UserError(
            f"{folder} holds something else than an export ({foreign}); accepted: a new or empty folder, or "
            "an older export"
        )


def files_of(folder: Path) -> list[str]:
    """The files of the export in a folder, without its record; none if it holds no export."""
    try:
        return list(json.loads((folder / RECORD).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remove_older(folder: Path) -> None:
    older = files_of(folder)
    (folder / RECORD).unlink(missing_ok=True)  # first, so that half an export is never taken for a whole
    for name in older:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in older} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


@contextlib.contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files are moved into `folder` if all goes well, and removed if not.

    Args:
        folder: where the files belong; made if it is not there.
        last: the file that is moved last.

    Raises:
        RunError: if a file cannot be written.
    """
    partial, made = folder / f".{last}.partial", not folder.exists()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for name in sorted(files, key=lambda name: str(name) == last):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
        made = False
    except OSError as error:
        raise RunError(f"the export could not be written to {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _staging(path: Path) -> bool:
    """Whether a path lies in what a killed export left behind."""
    return path.parts[0].startswith(".") and path.parts[0].endswith(".partial")
