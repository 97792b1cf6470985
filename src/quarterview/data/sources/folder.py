"""Image files on a disk: a whole folder, or a list of paths."""

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from quarterview.data.decode import SUFFIXES, croppable_file, decode
from quarterview.data.sources.base import Croppable, Picture, digest
from quarterview.data.sources.files import content, kind_of, printable, stamp
from quarterview.errors import UserError


class FolderSource:
    """Every image file in a folder and its sub-folders, in an order that no file system decides.

    Hidden files and folders are skipped. Links are followed, but a folder is read once, under the first
    name that leads to it. Where every image lies in a sub-folder, and there are at least two of these,
    their names are the classes. A file that is written or replaced after it was found is a bad sample.

    Args:
        path: the folder.
        channels: how many channels the pictures shall have.

    Raises:
        UserError: if there is no image, or the folder cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self.left_out: Counter[str] = Counter()
        """What is no file that can be read, by its kind; files that are no images do not count."""
        self._names = _Names()
        self._stamps = array("I")
        others: Counter[str] = Counter()
        listed = hashlib.blake2b(digest_size=8)
        tops: dict[str, int] = {}
        labels = array("q")
        try:
            for name, status in _files(self.path, self.left_out):
                suffix = _suffix(name)
                if suffix not in SUFFIXES:
                    others[suffix or "without suffix"] += 1
                    continue
                self._names.append(name)
                self._stamps.append(stamp(status))
                listed.update(b"%s\0%d\0" % (os.fsencode(name), status.st_size))
                top = name.rpartition("/")[0].partition("/")[0]  # "" where it lies in the folder itself
                labels.append(tops.setdefault(top, len(tops)))
        except OSError as error:
            raise UserError(f"cannot read the folder {self.path}: {error}") from error
        if not len(self._names):
            raise UserError(_nothing_found(self.path, others))
        self._fingerprint = listed.hexdigest()
        labelled = len(tops) >= 2 and "" not in tops
        self.classes: Sequence[str] | None = (
            [printable(os.fsencode(top)) for top in tops] if labelled else None
        )
        self._labels = labels if labelled else None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Picture:
        return decode(self._content(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(self._content(index), self.channels)

    def _content(self, index: int) -> bytes:
        return content(self.path / self._names[index], self._stamps[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return printable(os.fsencode(self._names[index]))

    def remarks(self) -> list[str]:
        """What was left out, if anything was."""
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.left_out.items()))
        return [f"left out of {self.path}: {kinds}"] if kinds else []

    def fingerprint(self) -> str:
        """Over every file's relative name and size."""
        return self._fingerprint


class ListSource:
    """The image files that a text file names, one a line, relative to the text file's own folder.

    A line may end in a tab and a label: integers everywhere, or class names everywhere. Blank lines and
    lines that begin with ``#`` are skipped. Once the fingerprint was asked for, a file that is written or
    replaced after that is a bad sample.

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
        self._stamps: array[int] = array("I")
        for name, _, _ in entries:
            self._names.append(name)
        given = [label.strip() for _, _, label in entries]
        self.classes: Sequence[str] | None
        self.classes, self._labels = _labels_of_list(given, self.path)

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> Picture:
        return decode(self._content(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(self._content(index), self.channels)

    def _content(self, index: int) -> bytes:
        stamped = self._stamps[index] if self._stamps else None
        return content(self.path.parent / self._names[index], stamped)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        """Over every name, its label and its file's size, -1 for a file that is missing."""
        rows, stamps = [], array("I")
        for i, name in enumerate(self._names):
            try:
                status = (self.path.parent / name).stat()
            except (OSError, ValueError):
                rows.append((name, self.label(i), -1))
                stamps.append(0)
            else:
                rows.append((name, self.label(i), status.st_size))
                stamps.append(stamp(status))
        self._stamps = stamps
        return digest(*rows)


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


def _files(root: Path, left_out: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The relative name of every visible file and its status, folder by folder in the order of names.

    Not recursive, as folders may lie in one another deeper than Python calls may; and every folder once, as
    a few that link to one another would be met in any number of ways.
    """
    seen: set[tuple[int, int]] = set()
    waiting: list[Iterator[tuple[str, os.stat_result]]] = [iter([("", root.stat())])]
    while waiting:
        name, status = next(waiting[-1], (None, None))
        if name is None or status is None:
            waiting.pop()
        elif stat.S_ISREG(status.st_mode):
            yield name, status
        elif not stat.S_ISDIR(status.st_mode):
            left_out[kind_of(status.st_mode)] += 1
        elif (status.st_dev, status.st_ino) in seen:
            left_out["a folder met before"] += 1
        else:
            seen.add((status.st_dev, status.st_ino))
            waiting.append(_visible(root, f"{name}/" if name else "", left_out))


def _visible(root: Path, prefix: str, left_out: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The relative names of what a folder holds, in order, and what is known of each."""
    with os.scandir(root / prefix) as entries:
        visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in visible:
        try:
            status = entry.stat()
        except OSError:  # also of a link to itself, and of what was there a moment ago
            left_out["a link that leads nowhere" if entry.is_symlink() else "gone at once"] += 1
        else:
            yield prefix + entry.name, status


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower() if stem else ""


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
