"""Sources that read image files: a folder with its sub-folders, or a list of paths."""

import hashlib
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from quarterview.data.decode import SUFFIXES, decode, open_croppable_file
from quarterview.data.sources.base import Croppable, DecodedImage, compute_digest
from quarterview.data.sources.files import compute_signature, describe_file_type, read_file, to_printable
from quarterview.errors import UserError, unreadable


class FolderSource:
    """All image files in a folder and its sub-folders, sorted by name.

    Hidden files and folders are skipped. Links are followed, but a folder is read only once, under the first
    name that leads to it. If every image is in a sub-folder, and there are at least two sub-folders, their
    names are the classes. A file that is written or replaced after it was found is a bad sample.

    Args:
        path: the folder.
        channels: number of channels of the images that are returned.

    Raises:
        UserError: if there is no image, or the folder cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        self.skipped: Counter[str] = Counter()
        """Number of skipped entries by reason. Files that are not images are not counted."""
        self._names = _NameList()
        self._signatures = array("I")
        others: Counter[str] = Counter()
        names_hash = hashlib.blake2b(digest_size=8)
        tops: dict[str, int] = {}
        labels = array("q")
        try:
            for name, status in _walk_files(self.path, self.skipped):
                suffix = _get_suffix(name)
                if suffix not in SUFFIXES:
                    others[suffix or "without suffix"] += 1
                    continue
                self._names.append(name)
                self._signatures.append(compute_signature(status))
                names_hash.update(b"%s\0%d\0" % (os.fsencode(name), status.st_size))
                top = name.rpartition("/")[0].partition("/")[0]  # "" if it is in the folder itself
                labels.append(tops.setdefault(top, len(tops)))
        except OSError as error:
            raise unreadable(f"the folder {self.path}", error) from error
        if not len(self._names):
            raise UserError(_format_not_found(self.path, others))
        self._fingerprint = names_hash.hexdigest()
        has_labels = len(tops) >= 2 and "" not in tops
        self.classes: Sequence[str] | None = (
            [to_printable(os.fsencode(top)) for top in tops] if has_labels else None
        )
        self._labels = labels if has_labels else None

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> DecodedImage:
        return decode(self._read_file(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return open_croppable_file(self._read_file(index), self.channels)

    def _read_file(self, index: int) -> bytes:
        return read_file(self.path / self._names[index], self._signatures[index])

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return to_printable(os.fsencode(self._names[index]))

    def remarks(self) -> list[str]:
        """Return how many entries were skipped, if any were."""
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(self.skipped.items()))
        return [f"skipped in {self.path}: {kinds}"] if kinds else []

    def fingerprint(self) -> str:
        """Return a hash of the relative name and the size of every file."""
        return self._fingerprint


class ListSource:
    """The image files listed in a text file, one path per line, relative to the folder of the text file.

    A line may end in a tab and a label; the labels are all integers or all class names. Blank lines and
    lines that begin with ``#`` are skipped. A file that is written or replaced after `fingerprint` was
    called is a bad sample.

    Args:
        path: the text file, in UTF-8.
        channels: number of channels of the images that are returned.

    Raises:
        UserError: if the list cannot be read, is empty, or labels only some lines.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int) -> None:
        self.path = Path(path)
        self.channels = channels
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise unreadable(f"the list {self.path} as UTF-8 text", error) from error
        lines = [line.rstrip("\r") for line in text.split("\n")]
        entries = [line.partition("\t") for line in lines if line.strip() and not line.startswith("#")]
        if not entries:
            raise UserError(f"The list {self.path} names no image. Give one path per line.")
        self._names = _NameList()
        self._signatures: array[int] = array("I")
        for name, _, _ in entries:
            self._names.append(name)
        texts = [label.strip() for _, _, label in entries]
        self.classes: Sequence[str] | None
        self.classes, self._labels = _parse_labels(texts, self.path)

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> DecodedImage:
        return decode(self._read_file(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return open_croppable_file(self._read_file(index), self.channels)

    def _read_file(self, index: int) -> bytes:
        stamped = self._signatures[index] if self._signatures else None
        return read_file(self.path.parent / self._names[index], stamped)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> str:
        """Return a hash of every name, its label and its size in bytes, -1 for a missing file."""
        rows, stamps = [], array("I")
        for i, name in enumerate(self._names):
            try:
                status = (self.path.parent / name).stat()
            except (OSError, ValueError):
                rows.append((name, self.label(i), -1))
                stamps.append(0)
            else:
                rows.append((name, self.label(i), status.st_size))
                stamps.append(compute_signature(status))
        self._signatures = stamps
        return compute_digest(*rows)


class _NameList:
    """A list of many strings in two buffers. Python strings would cost every worker gigabytes."""

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


def _walk_files(root: Path, skipped: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the relative name and the status of every visible file, sorted by name in every folder.

    The walk is not recursive, because folders may be nested deeper than Python's calls. Every folder is
    entered once, because folders that link to one another have endlessly many paths.
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
            skipped[describe_file_type(status.st_mode)] += 1
        elif (status.st_dev, status.st_ino) in seen:
            skipped["folder that was already read"] += 1
        else:
            seen.add((status.st_dev, status.st_ino))
            waiting.append(_list_visible(root, f"{name}/" if name else "", skipped))


def _list_visible(root: Path, prefix: str, skipped: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the relative name and the status of every visible entry of a folder, sorted by name."""
    with os.scandir(root / prefix) as entries:
        visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in visible:
        try:
            status = entry.stat()
        except OSError:  # a link to itself, or an entry that was just removed
            skipped["broken link" if entry.is_symlink() else "removed meanwhile"] += 1
        else:
            yield prefix + entry.name, status


def _get_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower() if stem else ""


def _format_not_found(path: Path, others: Counter[str]) -> str:
    examples = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return (
        f"No image in the folder {path} and its sub-folders, but {others.total()} other files"
        + (f" ({examples})" if examples else "")
        + f". Give a folder with files of these types: {', '.join(SUFFIXES)}."
    )


def _parse_labels(texts: list[str], path: Path) -> tuple[list[str] | None, list[int] | None]:
    """Return the class names, None if the labels are integers, and the labels, None if there are none."""
    missing = texts.count("")
    if missing == len(texts):
        return None, None
    if missing:
        raise UserError(
            f"The list {path} has labels for {len(texts) - missing} of {len(texts)} images. Label all."
        )
    try:
        return None, [int(label) for label in texts]
    except ValueError:
        classes = sorted(set(texts))
        indices = {label: index for index, label in enumerate(classes)}
        return classes, [indices[label] for label in texts]
