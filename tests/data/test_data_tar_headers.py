import io
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterview.data.sources.files import to_printable
from quarterview.data.sources.tar_headers import BLOCK, Faults, Member, is_header_of, iter_members, parse_name
from quarterview.data.sources.tar_index import make_chunked_reader, scan_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(entries: list[tuple[str, bytes, bytes]], kind: int) -> bytes:
    """Return the bytes of a tar file of members, each a name, a type and a content."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, errors="surrogateescape") as tar:
        for name, member_type, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = member_type, 1.5 if kind == tarfile.PAX_FORMAT else 1
            if member_type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "target" * (1 if kind == tarfile.USTAR_FORMAT else 30)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def list_members(data: bytes, chunk: int = 1) -> tuple[list[Member], Faults]:
    faults = Faults()
    read = make_chunked_reader(lambda offset, length: data[offset : offset + length], len(data), chunk)
    return list(iter_members(read, len(data), faults)), faults


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isreg() and not info.sparse]


def ours(data: bytes, chunk: int = 1) -> list[tuple[str, int, int]]:
    return [
        (member.name.decode("utf-8", "surrogateescape"), member.block * BLOCK, member.size)
        for member in list_members(data, chunk)[0]
    ]


NAMES = st.one_of(
    st.text("aZé日 .=-\n", min_size=1, max_size=12),
    st.text("ab./", min_size=1, max_size=200).map(lambda text: "x" + text.replace("//", "/") + "z"),
    st.just("caf\udce9.jpg"),
)
TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE]
)


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=40)
@given(
    entries=st.lists(st.tuples(NAMES, TYPES, st.binary(max_size=1100)), max_size=6),
    chunk=st.sampled_from([1, 700, 4096]),
)
def test_members_are_those_of_tarfile(kind, entries, chunk):
    kept = [(name, t, content if t == tarfile.REGTYPE else b"") for name, t, content in entries]
    if kind == "ustar":
        kept = [(name[:60], t, content) for name, t, content in kept]
    data = write_tar(kept, FORMATS[kind])
    assert ours(data, chunk) == by_tarfile(data)
    for member in list_members(data)[0]:
        header = data[(member.block - 1) * BLOCK : member.block * BLOCK]
        assert is_header_of(header, member.size)
        assert member.has_long_name or parse_name(header) == member.name


def test_names_longer_than_a_header_field_are_complete():
    name = "folder/" * 30 + "é" * 40 + ".jpg"
    for kind in ("gnu", "pax"):
        (member,), faults = list_members(write_tar([(name, tarfile.REGTYPE, b"abc")], FORMATS[kind]))
        assert (member.name.decode(), member.size, member.has_long_name) == (name, 3, True)
        assert not faults.counts
    (member,), faults = list_members(
        write_tar([("a" * 5000, tarfile.REGTYPE, b""), ("b", tarfile.REGTYPE, b"")], 1)
    )
    assert member.name == b"b"
    assert faults.counts == {"names of more than 4096 bytes": 1}


def test_everything_but_regular_files_is_counted():
    kinds = {
        **{tarfile.LNKTYPE: "hard links", tarfile.SYMTYPE: "symbolic links", tarfile.FIFOTYPE: "named pipes"},
        **{tarfile.CHRTYPE: "character devices", tarfile.BLKTYPE: "block devices"},
        **{tarfile.GNUTYPE_SPARSE: "sparse files", b"Z": "members of an unknown kind"},
    }
    entries = [(f"{i}.jpg", kind, b"") for i, kind in enumerate(kinds)]
    entries += [("folder", tarfile.DIRTYPE, b""), ("good.jpg", tarfile.REGTYPE, b"abc")]
    (member,), faults = list_members(write_tar(entries, tarfile.GNU_FORMAT))
    assert member.name == b"good.jpg"
    assert faults.counts == dict.fromkeys(kinds.values(), 1)
    assert faults.examples["hard links"] == ["0.jpg"]


TWO = [("a.jpg", tarfile.REGTYPE, b"a" * 700), ("b.jpg", tarfile.REGTYPE, b"b" * 700)]


def with_size(data: bytes, field: bytes, offset: int = 0) -> bytes:
    """Replace the size in a header, and correct its checksum."""
    header = bytearray(data[offset : offset + BLOCK])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:offset] + bytes(header) + data[offset + BLOCK :]


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        (b"77777777777\0", "cut off before its end"),
        (b"\x80" + b"\xff" * 11, "cut off before its end"),
        (b"\xff" * 11 + b"\xfe", "damaged header; the rest of the shard is not read"),
        (b"-0000000001\0", "damaged header; the rest of the shard is not read"),
        (b"89999999999\0", "damaged header; the rest of the shard is not read"),
        (b"00_00000_00\0", "damaged header; the rest of the shard is not read"),
    ],
)
def test_wrong_sizes(field, kind):
    second = 3 * BLOCK
    data = with_size(write_tar(TWO, tarfile.USTAR_FORMAT), field, second)
    (member,), faults = list_members(data)
    assert member.name == b"a.jpg"
    assert faults.counts == {kind: 1}


def test_a_correct_size_in_base_256_is_accepted():
    data = with_size(write_tar(TWO, tarfile.GNU_FORMAT), b"\x80" + (700).to_bytes(11, "big"))
    assert ours(data) == by_tarfile(data)
    assert len(ours(data)) == 2


def test_contradictory_sizes_in_pax_and_header_are_a_fault():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 700, {"size": "20"}
        tar.addfile(info, io.BytesIO(b"x" * 700))
    _, faults = list_members(file.getvalue())
    assert "contradictory sizes in two headers" in faults.counts


@pytest.mark.parametrize("cut", [3 * BLOCK + 10, 4 * BLOCK + 20, 6 * BLOCK, 0])
def test_a_truncated_archive_keeps_the_members_before_the_cut(cut):
    data = write_tar(TWO, tarfile.USTAR_FORMAT)[:cut]
    listed, faults = list_members(data)
    assert [member.name for member in listed] == [b"a.jpg", b"b.jpg"][: {0: 0, 6 * BLOCK: 2}.get(cut, 1)]
    (kind,) = faults.counts
    assert ("cut off" in kind) == (cut > 0)


def test_a_damaged_header_ends_the_reading():
    data = bytearray(write_tar(TWO, tarfile.USTAR_FORMAT))
    data[3 * BLOCK + 5] ^= 1
    listed, faults = list_members(bytes(data))
    assert [member.name for member in listed] == [b"a.jpg"]
    assert faults.examples == {"damaged header; the rest of the shard is not read": ["byte 1536"]}


def test_concatenated_archives_are_a_fault():
    one = write_tar([("a.jpg", tarfile.REGTYPE, bytes(2 << 20))], tarfile.USTAR_FORMAT)
    listed, faults = list_members(one + one)
    assert len(listed) == 1
    assert "bytes after the end-of-archive mark, not read" in faults.counts


def test_printable_names_contain_no_control_characters():
    assert to_printable(b"caf\xe9\x1b[31m\n\xc3\xa9.jpg") == "caf\\xe9\\x1b[31m\\né.jpg"


SOUND = [
    ("a.jpg", tarfile.REGTYPE, b"a" * 700),
    ("folder/" * 30 + "b.png", tarfile.REGTYPE, b"b" * 40),
    ("b.cls", tarfile.REGTYPE, b"3"),
    ("link", tarfile.SYMTYPE, b""),
    ("c.jpg", tarfile.REGTYPE, b"c" * 1400),
]


@settings(max_examples=300)
@given(data=st.data())
def test_no_mutation_of_a_tar_file_crashes_hangs_or_allocates_without_bound(data):
    kind = data.draw(st.sampled_from(sorted(FORMATS.values())))
    sound = SOUND if kind else [(name[-60:], *rest) for name, *rest in SOUND]
    content = bytearray(write_tar(sound, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        position = data.draw(st.integers(0, 12 * BLOCK))
        patch = data.draw(
            st.one_of(st.binary(min_size=1, max_size=12), st.just(b"7" * 11), st.just(b"\x80" * 12))
        )
        content[position : position + len(patch)] = patch
    if data.draw(st.booleans()):
        offset = data.draw(st.integers(0, 8)) * BLOCK  # a header that is consistent though its fields lie
        fixed = with_size(bytes(content), data.draw(st.binary(min_size=12, max_size=12)), offset)
        content = bytearray(fixed)
    content = content[: data.draw(st.integers(0, len(content)))]
    read_lengths: list[int] = []

    def read(offset: int, length: int) -> bytes:
        read_lengths.append(length)
        return bytes(content[offset : offset + length])

    began = time.process_time()
    index = scan_shard(make_chunked_reader(read, len(content), 4096), len(content))
    assert time.process_time() - began < 1.0
    assert max(read_lengths, default=0) <= len(content)
    assert len(read_lengths) <= len(content) // BLOCK + 8
    for row in index.samples:
        assert int(row["block"]) * BLOCK + int(row["bytes"]) <= len(content)


def test_an_extension_of_a_gigabyte_is_not_read(tmp_path):
    data = write_tar([("x" * 200, tarfile.REGTYPE, b"a" * 700)], tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(with_size(data, b"%011o\0" % (1 << 30)))
    with path.open("r+b") as file:
        file.truncate((1 << 30) + (1 << 20))
    tracemalloc.start()
    with path.open("rb", buffering=0) as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        scan_shard(make_chunked_reader(read, path.stat().st_size, 4096), path.stat().st_size)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
