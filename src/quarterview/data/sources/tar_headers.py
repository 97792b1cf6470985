"""The members of a tar file by their headers alone: ustar, GNU and pax, from anywhere that bytes can be read.

Nothing is extracted. A tar file may come from anyone, so no size in it is believed before it is compared with
the file's own, what is held for a member is bounded, and whatever is odd about one is counted in `Faults`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from quarterview.data.sources.files import printable

BLOCK = 512
"""Bytes of a header; contents begin at multiples of it."""

MOST_NAME = 4096
"""Bytes of a name; members with longer ones are left out."""
_MOST_EXTENSION = 1 << 20  # bytes of an extended header or a long name that are read
_MOST_PADDING = 1 << 20  # after the end mark; GNU tar fills up to 10 KiB
_EMPTY = bytes(BLOCK)
_SHOWN = 3

_REGULAR, _OLD_REGULAR, _CONTIGUOUS = b"0", b"\0", b"7"
_WITHOUT_CONTENT = {
    **{b"1": "hard links", b"2": "symbolic links"},
    **{b"3": "character devices", b"4": "block devices", b"6": "named pipes"},
}
_FOLDER, _LONG_NAME, _LONG_LINK, _SPARSE = b"5", b"L", b"K", b"S"
_PAX, _SOLARIS_PAX, _GLOBAL_PAX = b"x", b"X", b"g"
_EXTENSIONS = (_LONG_NAME, _PAX, _SOLARIS_PAX)
_MOST_DIGITS = 20
_UNREADABLE = "extended headers that cannot be read"

Read = Callable[[int, int], bytes]
"""The bytes of a file from an offset on, as many as asked for or as there are."""


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: bytes
    block: int
    """Where its content begins, in blocks of 512 bytes. Its header is the block before."""
    size: int
    """Bytes of its content, all of which lie in the file."""
    is_long: bool
    """Whether the name does not stand in its header, but in an extension of it."""


class _Extension(NamedTuple):
    """What is said of the member that follows."""

    name: bytes | None = None
    size: int | None = None
    fault: str | None = None


class Faults:
    """What was odd, by its kind, with a few examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] += count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(example)


def members(read: Read, size: int, faults: Faults) -> Iterator[Member]:
    """The regular files of a tar file in its order, as far as it is sound.

    It ends at the mark of the end, at the end of the file, or at the first header that is damaged, after
    which nothing in the file can be trusted; the last two are faults. Links, devices and sparse files are
    faults and left out. Names are not judged.

    Args:
        read: the file.
        size: its bytes.
        faults: where to count what is odd.
    """
    offset, extension = 0, _Extension()
    while True:
        header = read(offset, BLOCK)
        if len(header) < BLOCK or header == _EMPTY:
            _tell_end(offset, header, size, faults)
            return
        length = _stored_size(header)
        if length is None:
            faults.add("damaged header, and nothing after it is read", f"byte {offset}")
            return
        kind, content, name, fault = header[156:157], offset + BLOCK, named(header), None
        extends = kind in (_GLOBAL_PAX, _LONG_LINK, *_EXTENSIONS)
        is_long = not extends and extension.name is not None
        if not extends:
            fault = extension.fault
            if extension.size not in (None, length):
                fault, length = fault or "sizes on which two headers disagree", extension.size or 0
            name, extension = extension.name or name, _Extension()
        is_folder = kind == _FOLDER or (kind == _OLD_REGULAR and name.endswith(b"/"))
        if kind in _WITHOUT_CONTENT or is_folder:
            length = 0
        if kind == _SPARSE:
            content = _after_sparse_map(read, header, content, size)
        if content + length > size:
            faults.add("cut off before its end", f"{printable(name[:100])} of {length} bytes")
            return
        if kind in _EXTENSIONS:
            extension = _extended(kind, read, content, length, extension)
        elif fault := fault or _fault(kind, name):
            faults.add(fault, printable(name[:100]))
        elif not extends and not is_folder:
            yield Member(name, content // BLOCK, length, is_long)
        offset = content + -(-length // BLOCK) * BLOCK


def is_header_of(header: bytes, length: int) -> bool:
    """Whether a block is the sound header of a regular file of so many bytes."""
    return len(header) == BLOCK and _stored_size(header) == length and header[156:157] in (
        _REGULAR, _OLD_REGULAR, _CONTIGUOUS,
    )  # fmt: skip


def named(header: bytes) -> bytes:
    """The name that stands in a header, its prefix included."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _fault(kind: bytes, name: bytes) -> str | None:
    """What speaks against a member, or nothing."""
    if kind in _WITHOUT_CONTENT:
        return _WITHOUT_CONTENT[kind]
    if kind == _SPARSE:
        return "sparse files"
    if kind not in (_REGULAR, _OLD_REGULAR, _CONTIGUOUS, _FOLDER, _GLOBAL_PAX, _LONG_LINK):
        return "members of an unknown kind"
    return f"names of more than {MOST_NAME} bytes" if len(name) > MOST_NAME else None


def _tell_end(offset: int, header: bytes, size: int, faults: Faults) -> None:
    """Says what is odd about the end of a file."""
    if not size:
        faults.add("no bytes in a shard", "byte 0")
    elif header != _EMPTY:
        faults.add("cut off, without the mark of its end", f"byte {offset}")
    elif size - offset > _MOST_PADDING:
        faults.add("bytes after the mark of the end, which are not read", f"{size - offset} bytes")


def _stored_size(header: bytes) -> int | None:
    """The size that a header states; None if its checksum is wrong or the size is no size."""
    try:
        stated = int(header[148:156].rstrip(b" \0").strip() or b"0", 8)
    except ValueError:
        return None
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if total != stated and total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]) != stated:
        return None  # the second sum is of signed bytes, as some old programs have it
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] & 0x80:
        return None  # negative
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else (None if digits else 0)


def _after_sparse_map(read: Read, header: bytes, content: int, size: int) -> int:
    """Where the content of an old GNU sparse file begins: after the rest of its map."""
    more = header[482:483]
    while more not in (b"\0", b"") and content < size:
        block = read(content, BLOCK)
        more, content = block[504:505], content + BLOCK
    return content


def _extended(kind: bytes, read: Read, content: int, length: int, before: _Extension) -> _Extension:
    """What an extension says of the member after it, besides what others before it said."""
    data = read(content, length) if length <= _MOST_EXTENSION else b""
    if len(data) != length:
        return before._replace(fault=_UNREADABLE)
    if kind == _LONG_NAME:
        return before._replace(name=data.split(b"\0", 1)[0])
    fields = _pax_fields(data)
    if fields is None:
        return before._replace(fault=_UNREADABLE)
    if any(key.startswith(b"GNU.sparse.") for key in fields):
        return before._replace(fault="sparse files")
    stated = fields.get(b"size", b"0")
    if not stated.isdigit() or len(stated) > _MOST_DIGITS:
        return before._replace(fault=_UNREADABLE)
    size = int(stated) if b"size" in fields else before.size
    return before._replace(name=fields.get(b"path", before.name), size=size)


def _pax_fields(data: bytes) -> dict[bytes, bytes] | None:
    """The records ``LENGTH KEY=VALUE`` of a pax header; None if they are damaged."""
    fields: dict[bytes, bytes] = {}
    place = 0
    while place < len(data) and data[place]:
        space = data.find(b" ", place, place + 20)
        digits = data[place:space] if space > 0 else b""
        if not digits.isdigit():
            return None
        end = place + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not space < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        fields[key] = value
        place = end
    return fields
