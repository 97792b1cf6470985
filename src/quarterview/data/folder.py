"""Image files on a disk: a whole folder, or a list of paths."""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from quarterview.data.decode import SUFFIXES, croppable_file, decode
from quarterview.data.source import BadSampleError, Croppable, Picture, digest
from quarterview.errors import UserError


class FolderSource:
    """Every image file in a folder and its sub-folders, in an order that no file system decides.

    Hidden files and folders are skipped, links followed but never in a circle. Where every image lies in
    a sub-folder, and there are at least two of these, their names are the classes.

    Args:
        path: the folder.
        channels: how many channels the pictures shall have.

    Raises:
        UserError: if there is no image, or the folder cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self._names = _Names()
        others: Counter[str] = Counter()
        content = hashlib.blake2b(digest_size=8)
        tops: dict[str, int] = {}
        labels = array("q")
        try:
            for name, size in _files(self.path, "", frozenset()):
                suffix = _suffix(name)
                if suffix not in SUFFIXES:
                    others[suffix or "without suffix"] += 1
                    continue
                self._names.append(name)
                content.update(b"%s\0%d\0" % (os.fsencode(name), size))
                top = name.rpartition("/")[0].partition("/")[0]  # "" where it lies in the folder itself
                labels.append(tops.setdefault(top, len(tops)))
        except OSError as error:
            raise UserError(f"cannot read the folder {self.path}: {error}") from error
        if not len(self._names):
            raise UserError(_nothing_found(self.path, others))
        self._fingerprint = content.hexdigest()
        labelled = len(tops) >= 2 and "" not in tops
        self.classes: Sequence[str] | None = list(tops) if labelled else None
        self._labels = labels if labelled else None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Picture:
        return decode(_content(self.path / self._names[index]), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(_content(self.path / self._names[index]), self.channels)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        """Over every file's relative name and size."""
        return self._fingerprint


class ListSource:
    """The image files that a text file names, one a line, relative to the text file's own folder.

    A line may end in a tab and a label: integers everywhere, or class names everywhere. Blank lines and
    lines that begin with ``#`` are skipped.

    Args:
        path: the text file, in UTF-8.
        channels: how many channels the pictures shall have.

    Raises:
        UserError: if the list cannot be read, is empty, or labels some lines only.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the list {self.path} as UTF-8 text: {error}") from error
        lines = [line.rstrip("\r") for line in text.split("\n")]
        entries = [line.partition("\t") for line in lines if line.strip() and not line.startswith("#")]
        if not entries:
            raise UserError(f"the list {self.path} names no image; accepted: a path a line")
        self._names = _Names()
        for name, _, _ in entries:
            self._names.append(name)
        given = [label.strip() for _, _, label in entries]
        self.classes: Sequence[str] | None
        self.classes, self._labels = _labels_of_list(given, self.path)

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Picture:
        return decode(_content(self.path.parent / self._names[index]), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(_content(self.path.parent / self._names[index]), self.channels)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        """Over every name, its label and its file's size, -1 for a file that is missing."""
        return digest(*((name, self.label(i), self._size(name)) for i, name in enumerate(self._names)))

    def _size(self, name: str) -> int:
        try:
            return (self.path.parent / name).stat().st_size
        except (OSError, ValueError):
            return -1


class _Names:
    """Many strings in two buffers: as many str objects would cost every worker gigabytes."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, name: str) -> None:
        self._text += os.fsencode(name)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return os.fsdecode(bytes(self._text[self._ends[index] : self._ends[index + 1]]))


def _files(root: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """The relative name and the size of every visible file, folder by folder in the order of names."""
    folder = root / prefix
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link back to a folder that we are in
        return
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_symlink() and not Path(entry.path).exists():
            continue
        if entry.is_dir():
            yield from _files(root, f"{prefix}{entry.name}/", above | {identity})
        elif entry.is_file():
            yield prefix + entry.name, entry.stat().st_size


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower() if stem else ""


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BadSampleError(f"cannot be read: {error}") from error


def _nothing_found(path: Path, others: Counter[str]) -> str:
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return (
        f"no image in the folder {path}; looked there and in its sub-folders for {', '.join(SUFFIXES)}; "
        f"saw {others.total()} other files" + (f": {seen}" if seen else "")
    )


def _labels_of_list(given: list[str], path: Path) -> tuple[list[str] | None, list[int] | None]:
    """The class names, if the labels are names, and the labels, if there are any."""
    missing = given.count("")
    if missing == len(given):
        return None, None
    if missing:
        raise UserError(
            f"the list {path} labels {len(given) - missing} of {len(given)} images; accepted: all or none"
        )
    try:
        return None, [int(label) for label in given]
    except ValueError:
        classes = sorted(set(given))
        numbers = {label: number for number, label in enumerate(classes)}
        return classes, [numbers[label] for label in given]
