"""Write the folder of an export: completely or not at all, and never over other files."""

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from quarterview.errors import RunError, UserError
from quarterview.files import write_text_atomic
from quarterview.versions import get_quarterview_version
from quarterview.weights.export.model_card import FormatInfo, make_model_card
from quarterview.weights.export.verify import ExportResult, Model, get_package_versions
from quarterview.weights.facts import ModelInfo

RECORD_NAME = "quarterview.json"
"""The file that lists the files of an export, and marks its folder as an export."""


def write_folder(
    model: Model,
    folder: str | Path,
    info: ModelInfo | None,
    format_info: FormatInfo,
    write: Callable[[Path], Mapping[str, float]],
) -> ExportResult:
    """Write an export with its model card and record; an earlier export in the folder is replaced.

    Args:
        model: the model to export.
        folder: new, empty, or an earlier export.
        info: how the model was trained, for the model card.
        format_info: the format, for the model card.
        write: writes the files into a folder, opens them again, and returns the largest difference of each
            output from that of `model`.

    Raises:
        UserError: if the folder contains other files.
        RunError: if the outputs differ from those of `model`, or the files cannot be written. Nothing is then
            changed in the folder.
    """
    folder = Path(folder)
    check_output_folder(folder)
    with staging_folder(folder, RECORD_NAME) as partial:
        differences = dict(write(partial))
        versions = get_package_versions(*format_info.packages)
        card = make_model_card(model, format_info, info or ModelInfo(), differences, versions)
        write_text_atomic(partial / "README.md", card)
        files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        record = {
            "target": format_info.name,
            "quarterview": get_quarterview_version(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "differences": differences,
            "files": files,
        }
        write_text_atomic(partial / RECORD_NAME, json.dumps(record, indent=1) + "\n")
        _remove_previous_export(folder)
    return ExportResult(folder, differences, versions)


def check_output_folder(folder: Path) -> None:
    """Check that a folder is new, empty, or contains an earlier export and nothing else.

    Raises:
        UserError: otherwise.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Give a new folder, or that of an earlier export.")
    if not folder.is_dir():
        return
    exported = {RECORD_NAME, *list_export_files(folder)}
    present = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    others = (str(path) for path in present if str(path) not in exported and not _is_staging_leftover(path))
    other = next(others, None)
    if other is not None:
        raise UserError(
            f"{folder} contains files that are not of an export, such as {other}. Give a new or empty "
            "folder, or an earlier export."
        )


def list_export_files(folder: Path) -> list[str]:
    """Return the names of an export's files, without its record; empty if the folder is not an export."""
    try:
        return list(json.loads((folder / RECORD_NAME).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _remove_previous_export(folder: Path) -> None:
    names = list_export_files(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)  # first: an interrupted removal leaves no valid export
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for parent in {(folder / name).parent for name in names} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


@contextlib.contextmanager
def staging_folder(folder: Path, last_name: str) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `folder` on success, and deleted after an error.

    Args:
        folder: the destination; created if it does not exist.
        last_name: the name of the file that is moved last.

    Raises:
        RunError: if a file cannot be written.
    """
    partial, created = folder / f".{last_name}.partial", not folder.exists()
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for name in sorted(files, key=lambda name: str(name) == last_name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
        created = False
    except OSError as error:
        raise RunError(
            f"Cannot write the export to {folder}: {error}. Check the disk and the permissions."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if created and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _is_staging_leftover(path: Path) -> bool:
    """Return True if a relative path is in the temporary folder of an interrupted export."""
    return path.parts[0].startswith(".") and path.parts[0].endswith(".partial")
