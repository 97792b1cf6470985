import fcntl
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_shards import png, served, shard, shards

from quarterview.data.config import DataConfig
from quarterview.data.sampler import SampleStream, ShardedStream
from quarterview.data.shuffle import chosen_shuffle, shard_cache, stream_of
from quarterview.data.sources import shards as shard_files
from quarterview.data.sources import tar_index
from quarterview.data.sources.base import BadSampleError, Concatenated, croppable, remarks, shard_starts
from quarterview.data.sources.open import open_source, open_sources
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.shards import ShardFile, expand_braces, find_shards
from quarterview.data.sources.tar import TarSource
from quarterview.errors import RunError, UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no waiting for a network that fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "_WAITS", (0.0, 0.0))


def levels(source) -> list[int]:
    return [int(source.image(i).pixels[0, 0, 0]) for i in range(len(source))]


# ---------------------------------------------------------------------- what is in them


def test_samples_are_the_members_that_share_a_key(tmp_path):
    shards(tmp_path / "s", [3, 0, 2])
    source = open_source(str(tmp_path / "s"), 3)
    assert isinstance(source, TarSource)
    assert levels(source) == [0, 1, 2, 3, 4]
    assert [source.label(i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert source.name(3) == "002.tar/000000.png"
    assert source.classes is None
    assert source.shard_starts().tolist() == [0, 3, 3, 5]
    assert source.remarks() == []
    assert croppable(source, 4).crop((0, 0, 16, 16), (8, 8)).pixels.shape == (3, 8, 8)
    for wrong in (-1, 5):
        for ask in (source.image, source.label, source.name):
            with pytest.raises(IndexError):
                ask(wrong)


def test_webdataset_names(tmp_path):
    entries = [
        ("./a/x.depth.png", png(1)),  # of the same key as the next, which is directly behind it
        ("./a/x.PNG", png(2)),
        ("./a/x.json", b"{}"),
        ("a/x.cls", b" 7\n"),
        ("b/x.png", png(3)),
        ("only.seg.png", png(4)),
        ("v1.2/y.png", png(5)),
        ("README", b"no key"),
        (".hidden.png", b"?"),
        (".folder/z.png", b"?"),
        ("negative.png", png(6)),
        ("negative.cls", b"-1"),
        ("apart.cls", b"9"),
        ("word.cls", b"cat"),
        ("apart.png", png(7)),
        ("word.png", png(8)),
    ]
    source = open_source(str(shard(tmp_path / "a.tar", entries)), 3)
    assert levels(source) == [2, 3, 4, 5, 6, 7, 8]
    assert [source.label(i) for i in range(7)] == [7, None, None, None, None, 9, None]
    assert [source.name(i) for i in (0, 3)] == ["a.tar/./a/x.PNG", "a.tar/v1.2/y.png"]
    assert source.remarks() == [
        "1 in tar shards: images whose key has another (a.tar: byte 512)",
        "1 in tar shards: labels (.cls) that are no whole numbers (a.tar: word.cls)",
    ]


def test_hostile_members_are_counted_and_the_good_ones_used(tmp_path, monkeypatch):
    path = tmp_path / "evil" / "evil.tar"
    path.parent.mkdir()
    canary = tmp_path / "executed"
    payload = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))

        add("a.png", png(1))
        add("../up.png", png(2))
        add("x/../../up.png", png(2))
        add("/etc/absolute.png", png(3))
        add("soft.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.png", kind=tarfile.LNKTYPE, link="a.png")
        add("device.png", kind=tarfile.CHRTYPE)
        add("evil.pkl", payload)
        add("pickle.png", payload)
        add("empty.png")
        add("a.png", png(4))
        add("caf\udce9\n.png", png(5))
        add("long/" * 40 + "b.png", png(6))
    before = sorted(file for file in tmp_path.rglob("*") if "cache" not in file.parts)
    source = open_source(str(path), 3)
    assert len(source) == 4
    assert [int(source.image(i).pixels[0, 0, 0]) for i in (0, 2, 3)] == [1, 5, 6]
    with pytest.raises(BadSampleError, match="not a readable image"):
        source.image(1)
    assert source.name(2) == "evil.tar/caf\\xe9\\n.png"
    assert source.name(3) == "evil.tar/" + "long/" * 40 + "b.png"
    assert {line.partition(" (")[0] for line in remarks(source)} == {
        "2 in tar shards: names with ..",
        "1 in tar shards: absolute names",
        "1 in tar shards: symbolic links",
        "1 in tar shards: hard links",
        "1 in tar shards: character devices",
        "1 in tar shards: pickles, which are never read",
        "1 in tar shards: images of no bytes, or of more than 1 GiB",
        "1 in tar shards: images whose key has another",
    }
    assert sorted(file for file in tmp_path.rglob("*") if "cache" not in file.parts) == before
    assert not canary.exists()


def test_broken_shards_do_not_spoil_the_others(tmp_path):
    shards(tmp_path, [4, 4, 4])
    whole = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(whole[:4640])
    (tmp_path / "003.tar").write_bytes(b"")
    (tmp_path / "004.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "005.tar").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"cannot read the shard \S+005.tar"):
        open_source(str(tmp_path), 3)
    (tmp_path / "005.tar").unlink()
    source = open_source(str(tmp_path), 3)
    assert 8 < len(source) < 12
    assert len(set(levels(source))) == len(source)
    assert {line.partition(" (")[0].partition(": ")[2] for line in source.remarks()} == {
        "cut off before its end", "no bytes in a shard", "damaged header, and nothing after it is read",
    }  # fmt: skip


def test_a_set_without_any_image_is_refused_with_what_was_seen(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + b"gzip" * 1000)
    with pytest.raises(UserError, match=r"no image in the 1 tar shards.*\n.*damaged header.*a\.tar: byte 0"):
        open_source(str(tmp_path / "a.tar"), 3)


# ---------------------------------------------------------------------- finding them


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{b,a}/{0..1}.tar", ["b/0.tar", "b/1.tar", "a/0.tar", "a/1.tar"]),
        ("a{b}.tar", ["a{b}.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(spec, expected):
    assert expand_braces(spec) == expected


@pytest.mark.parametrize("spec", ["{0..99999999}", "{2..1}", "{0..999999}{0..9}", "{0..999}{0..999}{0..9}"])
def test_braces_of_too_many_are_refused(spec):
    with pytest.raises(UserError, match="accepted"):
        expand_braces(spec)


def test_specs(tmp_path):
    shards(tmp_path / "s", [1, 2, 1])
    (tmp_path / "s" / "README.md").write_text("about")
    for spec, count in {
        **{"s": 4, "s/*.tar": 4, "s/{000..001}.tar": 3, "s/001.tar": 2, "s/00[12].tar": 3},
        "s/{002,000}.tar": 2,
    }.items():
        source = open_source(str(tmp_path / spec), 3)
        assert isinstance(source, TarSource)
        assert len(source) == count
    for spec, match in {
        "s/9*.tar": "no .tar file at",
        "s/{000..009}.tar": r"cannot read the shard \S+003.tar",
        "s/9.tar": "does not exist",
    }.items():
        with pytest.raises(UserError, match=match):
            open_source(str(tmp_path / spec), 3)


def test_the_fingerprint_is_of_what_the_shards_hold_and_not_of_where(tmp_path):
    first = open_source(str(shards(tmp_path / "a", [3, 2])), 3).fingerprint()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "000.tar", (1, 1))
    assert open_source(str(tmp_path / "b"), 3).fingerprint() == first
    assert open_source(f"file://{tmp_path}/b", 3).fingerprint() == first
    entries = [("000000.png", png(3)), ("000000.cls", b"3"), ("000001.png", png(4)), ("000001.cls", b"5")]
    before = (tmp_path / "b" / "001.tar").stat().st_size
    shard(tmp_path / "b" / "001.tar", entries)  # another label
    assert (tmp_path / "b" / "001.tar").stat().st_size == before
    assert open_source(str(tmp_path / "b"), 3).fingerprint() != first


# ---------------------------------------------------------------------- the index


def scans(monkeypatch) -> list[int]:
    """The sizes of the shards that are scanned from now on."""
    scanned, real = [], tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda read, size: scanned.append(size) or real(read, size))
    return scanned


def test_shards_are_scanned_once_and_again_when_they_change(tmp_path, monkeypatch):
    shards(tmp_path / "s", [3, 2])
    scanned, said = scans(monkeypatch), []
    for _ in range(2):
        open_source(str(tmp_path / "s"), 3, say=said.append)
    assert len(scanned) == 2
    assert said == ["indexing 2 of 2 tar shards, 0.0 GiB, by their headers"]
    shutil.copy(tmp_path / "s" / "000.tar", tmp_path / "s" / "002.tar")
    assert len(open_source(str(tmp_path / "s"), 3)) == 8
    assert len(scanned) == 3  # the new one alone
    os.utime(tmp_path / "s" / "001.tar", (1, 1))
    open_source(str(tmp_path / "s"), 3)
    assert len(scanned) == 4


@pytest.mark.parametrize("name", ["samples.npy", "labels.npy", "names.npy", "index.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_index_is_made_again(tmp_path, name, how):
    source = open_source(str(shards(tmp_path / "s", [3, 2])), 3)
    path = source._folder / name
    data = bytearray(path.read_bytes())
    data[-1 if name != "index.json" else len(data) // 2] ^= 255
    path.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-1]), "gone": b""}[how])
    if how == "gone":
        path.unlink()
    said = []
    again = open_source(str(tmp_path / "s"), 3, say=said.append)
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert "made again" in said[0]
    assert levels(again) == [0, 1, 2, 3, 4]
    assert [again.label(i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_damaged_part_is_scanned_again(tmp_path, monkeypatch):
    source = open_source(str(shards(tmp_path / "s", [3, 2])), 3)
    (first, _) = sorted((source._folder.parent / "shards").glob("*.npz"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 255
    first.write_bytes(data)
    shutil.rmtree(source._folder)
    scanned = scans(monkeypatch)
    assert levels(open_source(str(tmp_path / "s"), 3)) == [0, 1, 2, 3, 4]
    assert len(scanned) == 1
    whole = first.read_bytes()
    for bit in range(0, 8 * len(whole), 5):  # NotImplementedError, EOFError and RuntimeError among them
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        first.write_bytes(data)
        tar_index.read_part(first)
    first.write_bytes(b"")
    assert tar_index.read_part(first) is None


def test_a_shard_named_twice_or_at_an_odd_path(tmp_path):
    folder = shards(tmp_path / os.fsdecode(b"\xff"), [2])
    assert levels(open_source(f"{folder}/{{000,000}}.tar", 3)) == [0, 1, 0, 1]


def test_the_index_is_read_by_numpy_alone(tmp_path):
    source = open_source(str(shards(tmp_path / "s", [3, 2])), 3)
    rows = np.load(source._folder / "samples.npy", mmap_mode="r", allow_pickle=False)
    assert rows.dtype.itemsize == 8
    assert isinstance(source._index.samples, np.memmap)
    facts = json.loads((source._folder / "index.json").read_text())
    assert [part["samples"] for part in facts["shards"]] == [3, 2]
    data = (tmp_path / "s" / "001.tar").read_bytes()
    block, length = rows[4].item()
    assert data[block * 512 : block * 512 + length] == png(4)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    shards(tmp_path / "s", [1])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        open_source(str(tmp_path / "s"), 3)


def test_a_shard_that_changes_under_a_run_is_noticed(tmp_path):
    shards(tmp_path / "s", [3, 3])
    source = open_source(str(tmp_path / "s"), 3)
    with (tmp_path / "s" / "001.tar").open("r+b") as file:  # the same members, another content
        file.seek(700)
        file.write(b"x")
    with pytest.raises(BadSampleError, match="is not the one that was indexed"):
        source.image(3)
    shard(tmp_path / "s" / "000.tar", [(f"{i}.png", png(i, 40)) for i in range(3)])
    (tmp_path / "s" / "001.tar").write_bytes(b"short")
    for index in (1, 5):
        with pytest.raises(BadSampleError, match="is not the one that was indexed"):
            source.image(index)
    (tmp_path / "s" / "001.tar").unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.image(5)
    assert source.name(5).startswith("001.tar")


def test_sources_travel_small_and_open_late(tmp_path):
    source = open_source(str(shards(tmp_path / "s", [30, 30])), 3)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert levels(pickle.loads(sent)) == levels(source)
    handles = len(list(Path("/proc/self/fd").iterdir()))
    assert levels(source)
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


# ---------------------------------------------------------------------- elsewhere


def test_shards_are_read_over_http_by_ranges(tmp_path):
    shards(tmp_path / "s", [5, 4], side=200)
    local = open_source(str(tmp_path / "s"), 3)
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/{{000..001}}.tar", 3)
        assert source.is_remote
        assert source.fingerprint() == local.fingerprint()
        server.requests.clear()
        assert source.image(7).pixels.equal(local.image(7).pixels)
        assert source.name(7) == local.name(7) == "001.tar/000002.png"
        ((path, asked),) = server.requests  # of the image and its header alone, and none for the name
        begin, end = map(int, asked.removeprefix("bytes=").split("-"))
        assert path == "/s/001.tar"
        assert end - begin + 1 == 512 + source._index.samples[7]["bytes"]


def test_folders_and_patterns_over_http_are_those_of_the_disk(tmp_path):
    shards(tmp_path / "s", [2, 3, 1])
    (tmp_path / "s" / "002.tar").rename(tmp_path / "s" / "extra.tar")
    with served(tmp_path) as (url, _):
        for spec in ("s", "s/0*.tar", "s/{extra,0*}.tar", "s/{0*,extra}.tar"):
            here, there = open_source(f"{tmp_path}/{spec}", 3), open_source(f"{url}/{spec}", 3)
            assert [shard.name for shard in there.shards] == [shard.name for shard in here.shards], spec
            assert there.fingerprint() == here.fingerprint()


def test_a_server_that_fails_when_shards_are_looked_for_is_asked_again(tmp_path):
    shards(tmp_path / "s", [3])
    with served(tmp_path) as (url, server):
        for spec in ("s/000.tar", "s"):
            server.kind.failures = 2
            assert len(open_source(f"{url}/{spec}", 3)) == 3
        server.kind.failures = 10**6
        with pytest.raises(RunError, match="the same command goes on"):
            open_source(f"{url}/s/000.tar", 3)
        server.kind.failures = 0
        with pytest.raises(UserError, match="there is no shard"):
            open_source(f"{url}/s/none.tar", 3)


def test_memory_and_file_urls(tmp_path):
    import fsspec

    shards(tmp_path / "s", [2, 3])
    system = fsspec.filesystem("memory")
    try:
        for path in (tmp_path / "s").iterdir():
            system.pipe_file(f"/shards/{path.name}", path.read_bytes())
        for spec in ("memory://shards/*.tar", "memory://shards", f"file://{tmp_path}/s/*.tar"):
            source = open_source(spec, 3)
            assert source.is_remote
            assert levels(source) == [0, 1, 2, 3, 4]
    finally:
        system.rm("/shards", recursive=True)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    shards(tmp_path / "s", [1])
    missing = pytest.raises(UserError, match=r"there is no shard http\S+001.tar")
    with served(tmp_path) as (url, _), missing:
        open_source(f"{url}/s/{{000..001}}.tar", 3)
    with pytest.raises(UserError, match="s3fs"):
        open_source("s3://bucket/a.tar", 3)
    with pytest.raises(UserError, match="nonsense"):
        open_source("nonsense://a.tar", 3)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"quarterview\[remote\]"):
        open_source("http://127.0.0.1/a.tar", 3)


def test_a_network_that_fails_is_asked_again_and_then_ends_the_run(tmp_path):
    shards(tmp_path / "s", [3])
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/000.tar", 3)
        server.kind.failures = 2
        assert source.image(1).pixels.shape == (3, 16, 16)
        server.kind.failures = 3
        with pytest.raises(RunError, match=r"cannot read http.*503"):
            source.image(1)
        (tmp_path / "s" / "000.tar").unlink()
        with pytest.raises(RunError, match="is gone"):
            source.image(1)


def test_a_server_without_ranges_is_refused(tmp_path):
    shards(tmp_path / "s", [3], side=300)
    with served(tmp_path, serves_ranges=False) as (url, _):
        source = open_source(f"{url}/s/000.tar", 3)  # which is so small that it is read at once
        with pytest.raises(RunError, match="does not serve parts of files"):
            source.image(1)


# ---------------------------------------------------------------------- copies


def kept(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.glob("[!.]*.shard")} if cache.folder.exists() else set()


def test_shards_are_copied_once_several_images_are_asked_for(tmp_path):
    shards(tmp_path / "s", [12, 12])
    cache = ShardCache(tmp_path / "copies", 1 << 30)
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/{{000..001}}.tar", 3, cache)
        server.requests.clear()
        for index in (0, 1, 2, 3):
            source.image(index)
        assert kept(cache) == set()
        assert levels(source) == list(range(24))
        assert len(kept(cache)) == 2
        assert all(path.read_bytes() == (tmp_path / "s" / name).read_bytes() for path, name in copies(source))
        assert len(server.requests) == 2 * (4 + 1)  # four images of each shard, then the whole
        server.requests.clear()
        assert levels(pickle.loads(pickle.dumps(source))) == list(range(24))
        assert server.requests == []


def copies(source: TarSource) -> list[tuple[Path, str]]:
    assert source._reader.cache is not None
    return [(source._reader.cache._path(file), file.name) for file in source.shards]


def test_copies_keep_to_their_bytes_and_the_oldest_goes_first(tmp_path):
    shards(tmp_path / "s", [6] * 4)
    size = (tmp_path / "s" / "000.tar").stat().st_size
    cache = ShardCache(tmp_path / "copies", int(size * 2.5))
    files = [ShardFile(f"file://{path}", size, "x") for path in sorted((tmp_path / "s").iterdir())]
    assert cache.fetch(files[0])
    assert cache.fetch(files[1])
    os.utime(cache._path(files[1]), (1, 1))
    assert cache.read(files[0], 0, 5) == (tmp_path / "s" / "000.tar").read_bytes()[:5]
    mine = tmp_path / "copies" / "mine.shard"
    mine.write_bytes(b"not to be touched")
    assert cache.fetch(files[2])
    assert kept(cache) == {cache._path(file).name for file in (files[0], files[2])}
    assert cache.read(files[1], 0, 5) is None
    assert not ShardCache(tmp_path / "copies", size - 1).fetch(files[3])
    assert mine.exists()
    stale = cache.folder / ".partial-0123456789abcdef.shard"
    stale.write_bytes(bytes(2 * size))
    with held_by_another_process(stale):
        assert not cache.fetch(files[3])  # it could not be had if all copies went
        assert kept(cache) == {cache._path(file).name for file in (files[0], files[2])}
    assert cache.fetch(files[3])
    assert not stale.exists()


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    """While another process writes a copy."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(writer, b"locked")
            signal.pause()
    try:
        assert os.read(reader, 6) == b"locked"
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def test_a_copy_that_cannot_be_made_is_gone_without(tmp_path):
    shards(tmp_path / "s", [12])
    (tmp_path / "file").write_text("no folder")
    source = open_source(f"file://{tmp_path}/s", 3, ShardCache(tmp_path / "file", 1 << 30))
    assert levels(source) == list(range(12))
    short = ShardFile(f"file://{tmp_path}/s/000.tar", 10**6, "x")
    cache = ShardCache(tmp_path / "copies", 1 << 30)
    assert not cache.fetch(short)  # it has fewer bytes than it had
    assert kept(cache) == set()
    assert list(cache.folder.glob(".partial*")) == []


def _fetch_all(url: str, cache: ShardCache, found) -> None:
    source = open_source(url, 3, cache)
    found.put(levels(source))


def test_several_processes_share_the_copies(tmp_path):
    shards(tmp_path / "s", [12] * 3)
    size = (tmp_path / "s" / "000.tar").stat().st_size
    cache = ShardCache(tmp_path / "copies", int(size * 1.5))  # which keep taking them from each other
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    with served(tmp_path) as (url, _):
        spec = f"{url}/s/{{000..002}}.tar"
        open_source(spec, 3)
        processes = [context.Process(target=_fetch_all, args=(spec, cache, found)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [found.get(timeout=60) for _ in processes] == [list(range(36))] * 3
        for process in processes:
            process.join(60)
    assert len(kept(cache)) == 1
    assert list(cache.folder.glob(".partial*")) == []


# ---------------------------------------------------------------------- the order


def test_which_order_is_chosen(tmp_path):
    local = open_source(str(shards(tmp_path / "s", [30, 30])), 3)
    remote = open_source(f"file://{tmp_path}/s", 3)
    shapes = open_source("shapes:10", 3)
    auto, by_shards = DataConfig(), DataConfig(shuffle="shards", shuffle_shards=1, data=("shapes:10",))
    assert [chosen_shuffle(auto, source) for source in (local, remote, shapes)] == ["full", "shards", "full"]
    assert type(stream_of(auto, local, 5, 0)) is SampleStream
    assert type(stream_of(auto, remote, 5, 0, "full")) is SampleStream
    stream = stream_of(by_shards, local, 5, 0)
    assert isinstance(stream, ShardedStream)
    _, ids = stream.at(torch.arange(stream.trained))
    sides = (ids >= 30).tolist()
    assert sides.index(not sides[0]) == sides.count(sides[0])  # one shard, then the other
    with pytest.raises(UserError, match="shapes:10 has no shards"):
        chosen_shuffle(by_shards, shapes)
    assert shard_cache(auto) is None
    assert shard_cache(DataConfig(shard_cache_gib=0.5)).most_bytes == 1 << 29


def test_joined_sources_have_the_shards_of_all(tmp_path):
    both = open_sources([str(shards(tmp_path / "s", [3, 2])), "shapes:4:size=16"], 3)
    assert isinstance(both, Concatenated)
    assert shard_starts(both).tolist() == [0, 3, 5, 9]
    assert not both.is_remote
    assert open_sources(["shapes:4", f"file://{tmp_path}/s"], 3).is_remote
    assert shard_starts(open_sources(["shapes:4", "shapes:5"], 3)) is None


def test_find_shards_tells_when_a_server_hides_sizes(tmp_path):
    with served(tmp_path) as (url, _), pytest.raises(UserError, match="there is no shard"):
        find_shards(f"{url}/nothing.tar")
