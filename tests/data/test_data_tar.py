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
from quarterview.data.shuffle import create_shard_cache, create_stream, resolve_shuffle
from quarterview.data.sources import shards as shard_files
from quarterview.data.sources import tar_index
from quarterview.data.sources.base import (
    BadSampleError,
    ConcatenatedSource,
    get_remarks,
    get_shard_starts,
    open_croppable,
)
from quarterview.data.sources.open import open_source, open_sources
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.data.sources.shards import ShardFile, expand_braces, find_shards
from quarterview.data.sources.tar import TarSource
from quarterview.errors import RunError, UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Use a cache folder of the test's own, and no delays between retries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "_RETRY_DELAYS", (0.0, 0.0))


def levels(source) -> list[int]:
    return [int(source.image(i).pixels[0, 0, 0]) for i in range(len(source))]


# ---------------------------------------------------------------------- samples


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
    assert open_croppable(source, 4).crop((0, 0, 16, 16), (8, 8)).pixels.shape == (3, 8, 8)
    for out_of_range in (-1, 5):
        for read in (source.image, source.label, source.name):
            with pytest.raises(IndexError):
                read(out_of_range)


def test_webdataset_names(tmp_path):
    entries = [
        ("./a/x.depth.png", png(1)),  # the key of x.PNG, whose suffix is directly after the key
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
        "1 in tar shards: images of a key that already has an image (a.tar: byte 512)",
        "1 in tar shards: labels (.cls) that are not integers (a.tar: word.cls)",
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
    with pytest.raises(BadSampleError, match="not an image in one of the formats"):
        source.image(1)
    assert source.name(2) == "evil.tar/caf\\xe9\\n.png"
    assert source.name(3) == "evil.tar/" + "long/" * 40 + "b.png"
    assert {line.partition(" (")[0] for line in get_remarks(source)} == {
        "2 in tar shards: names with ..",
        "1 in tar shards: absolute names",
        "1 in tar shards: symbolic links",
        "1 in tar shards: hard links",
        "1 in tar shards: character devices",
        "1 in tar shards: pickles, which are never read",
        "1 in tar shards: images that are empty or of more than 1 GiB",
        "1 in tar shards: images of a key that already has an image",
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
    with pytest.raises(UserError, match=r"Cannot read the shard \S+005.tar"):
        open_source(str(tmp_path), 3)
    (tmp_path / "005.tar").unlink()
    source = open_source(str(tmp_path), 3)
    assert 8 < len(source) < 12
    assert len(set(levels(source))) == len(source)
    assert {line.partition(" (")[0].partition(": ")[2] for line in source.remarks()} == {
        "cut off before its end", "empty shards", "damaged header; the rest of the shard is not read",
    }  # fmt: skip


def test_shards_without_images_raise_with_their_faults(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + b"gzip" * 1000)
    with pytest.raises(
        UserError, match=r"The 1 tar shards of .* contain no image\..*\n.*damaged header.*a\.tar: byte 0"
    ):
        open_source(str(tmp_path / "a.tar"), 3)


# ---------------------------------------------------------------------- find_shards


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
    with pytest.raises(
        UserError,
        match=r"names more than 1000000 shards\. Give at most|is not valid\. Give \{first\.\.last\}",
    ):
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
        "s/{000..009}.tar": r"Cannot read the shard \S+003.tar",
        "s/9.tar": "does not exist",
    }.items():
        with pytest.raises(UserError, match=match):
            open_source(str(tmp_path / spec), 3)


def test_the_fingerprint_depends_on_contents_and_not_on_location(tmp_path):
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
    """Record the sizes of the shards that are scanned from now on."""
    scanned, real = [], tar_index.scan_shard
    monkeypatch.setattr(tar_index, "scan_shard", lambda read, size: scanned.append(size) or real(read, size))
    return scanned


def test_shards_are_scanned_once_and_again_when_they_change(tmp_path, monkeypatch):
    shards(tmp_path / "s", [3, 2])
    scanned, messages = scans(monkeypatch), []
    for _ in range(2):
        open_source(str(tmp_path / "s"), 3, log=messages.append)
    assert len(scanned) == 2
    assert messages == ["Indexing 2 of 2 tar shards, 0.0 GiB, by their headers."]
    shutil.copy(tmp_path / "s" / "000.tar", tmp_path / "s" / "002.tar")
    assert len(open_source(str(tmp_path / "s"), 3)) == 8
    assert len(scanned) == 3  # only the new shard
    os.utime(tmp_path / "s" / "001.tar", (1, 1))
    open_source(str(tmp_path / "s"), 3)
    assert len(scanned) == 4


@pytest.mark.parametrize("name", ["samples.npy", "labels.npy", "names.npy", "index.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_index_is_built_again(tmp_path, name, damage):
    source = open_source(str(shards(tmp_path / "s", [3, 2])), 3)
    path = source._folder / name
    data = bytearray(path.read_bytes())
    data[-1 if name != "index.json" else len(data) // 2] ^= 255
    path.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-1]), "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    messages = []
    again = open_source(str(tmp_path / "s"), 3, log=messages.append)
    assert len(messages) == 1
    assert "is damaged" in messages[0]
    assert "Building it again" in messages[0]
    assert levels(again) == [0, 1, 2, 3, 4]
    assert [again.label(i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_damaged_shard_index_is_built_again(tmp_path, monkeypatch):
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
        tar_index.read_shard_index(first)
    first.write_bytes(b"")
    assert tar_index.read_shard_index(first) is None


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


def test_a_shard_that_changes_during_a_run_gives_bad_samples(tmp_path):
    shards(tmp_path / "s", [3, 3])
    source = open_source(str(tmp_path / "s"), 3)
    with (tmp_path / "s" / "001.tar").open("r+b") as file:  # the same members, another content
        file.seek(700)
        file.write(b"x")
    with pytest.raises(BadSampleError, match="the shard has changed since it was indexed"):
        source.image(3)
    shard(tmp_path / "s" / "000.tar", [(f"{i}.png", png(i, 40)) for i in range(3)])
    (tmp_path / "s" / "001.tar").write_bytes(b"short")
    for index in (1, 5):
        with pytest.raises(BadSampleError, match="the shard has changed since it was indexed"):
            source.image(index)
    (tmp_path / "s" / "001.tar").unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.image(5)
    assert source.name(5).startswith("001.tar")


def test_pickled_sources_are_small_and_keep_no_open_files(tmp_path):
    source = open_source(str(shards(tmp_path / "s", [30, 30])), 3)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert levels(pickle.loads(sent)) == levels(source)
    handles = len(list(Path("/proc/self/fd").iterdir()))
    assert levels(source)
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


# ---------------------------------------------------------------------- remote shards


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
        ((path, byte_range),) = server.requests  # only the image and its header; no request for the name
        begin, end = map(int, byte_range.removeprefix("bytes=").split("-"))
        assert path == "/s/001.tar"
        assert end - begin + 1 == 512 + source._index.samples[7]["bytes"]


def test_folders_and_globs_over_http_equal_local_ones(tmp_path):
    shards(tmp_path / "s", [2, 3, 1])
    (tmp_path / "s" / "002.tar").rename(tmp_path / "s" / "extra.tar")
    with served(tmp_path) as (url, _):
        for spec in ("s", "s/0*.tar", "s/{extra,0*}.tar", "s/{0*,extra}.tar"):
            local, remote = open_source(f"{tmp_path}/{spec}", 3), open_source(f"{url}/{spec}", 3)
            assert [shard.name for shard in remote.shards] == [shard.name for shard in local.shards], spec
            assert remote.fingerprint() == local.fingerprint()


def test_finding_shards_on_a_failing_server_is_retried(tmp_path):
    shards(tmp_path / "s", [3])
    with served(tmp_path) as (url, server):
        for spec in ("s/000.tar", "s"):
            server.kind.failures = 2
            assert len(open_source(f"{url}/{spec}", 3)) == 3
        server.kind.failures = 10**6
        with pytest.raises(RunError, match="Give the same command to continue"):
            open_source(f"{url}/s/000.tar", 3)
        server.kind.failures = 0
        with pytest.raises(UserError, match=r"The shard \S+ does not exist"):
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


def test_missing_shards_and_packages_are_errors(tmp_path, monkeypatch):
    shards(tmp_path / "s", [1])
    missing = pytest.raises(UserError, match=r"The shard http\S+001.tar does not exist")
    with served(tmp_path) as (url, _), missing:
        open_source(f"{url}/s/{{000..001}}.tar", 3)
    with pytest.raises(UserError, match="s3fs"):
        open_source("s3://bucket/a.tar", 3)
    with pytest.raises(UserError, match="nonsense"):
        open_source("nonsense://a.tar", 3)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match=r"quarterview\[remote\]"):
        open_source("http://127.0.0.1/a.tar", 3)


def test_a_failing_network_is_retried_and_then_ends_the_run(tmp_path):
    shards(tmp_path / "s", [3])
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/000.tar", 3)
        server.kind.failures = 2
        assert source.image(1).pixels.shape == (3, 16, 16)
        server.kind.failures = 3
        with pytest.raises(RunError, match=r"Cannot read http.*503"):
            source.image(1)
        (tmp_path / "s" / "000.tar").unlink()
        with pytest.raises(RunError, match="does not exist any more"):
            source.image(1)


def test_a_server_without_ranges_is_refused(tmp_path):
    shards(tmp_path / "s", [3], side=300)
    with served(tmp_path, serves_ranges=False) as (url, _):
        source = open_source(f"{url}/s/000.tar", 3)  # so small that one request reads it as a whole
        with pytest.raises(RunError, match="ignores byte ranges"):
            source.image(1)


# ---------------------------------------------------------------------- copies


def cached_names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.glob("[!.]*.shard")} if cache.folder.exists() else set()


def test_shards_are_copied_once_several_images_are_read(tmp_path):
    shards(tmp_path / "s", [12, 12])
    cache = ShardCache(tmp_path / "copies", 1 << 30)
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/{{000..001}}.tar", 3, cache)
        server.requests.clear()
        for index in (0, 1, 2, 3):
            source.image(index)
        assert cached_names(cache) == set()
        assert levels(source) == list(range(24))
        assert len(cached_names(cache)) == 2
        assert all(path.read_bytes() == (tmp_path / "s" / name).read_bytes() for path, name in copies(source))
        assert len(server.requests) == 2 * (4 + 1)  # four images of each shard, then the whole shard
        server.requests.clear()
        assert levels(pickle.loads(pickle.dumps(source))) == list(range(24))
        assert server.requests == []


def copies(source: TarSource) -> list[tuple[Path, str]]:
    assert source._reader.cache is not None
    return [(source._reader.cache._path(file), file.name) for file in source.shards]


def test_copies_stay_within_the_limit_and_the_oldest_is_removed_first(tmp_path):
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
    assert cached_names(cache) == {cache._path(file).name for file in (files[0], files[2])}
    assert cache.read(files[1], 0, 5) is None
    assert not ShardCache(tmp_path / "copies", size - 1).fetch(files[3])
    assert mine.exists()
    stale = cache.folder / ".partial-0123456789abcdef.shard"
    stale.write_bytes(bytes(2 * size))
    with locked_by_another_process(stale):
        assert not cache.fetch(files[3])  # removing all copies would not free enough space
        assert cached_names(cache) == {cache._path(file).name for file in (files[0], files[2])}
    assert cache.fetch(files[3])
    assert not stale.exists()


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    """Lock a partial copy in another process, as if that process wrote it."""
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


def test_reading_works_when_a_copy_cannot_be_made(tmp_path):
    shards(tmp_path / "s", [12])
    (tmp_path / "file").write_text("no folder")
    source = open_source(f"file://{tmp_path}/s", 3, ShardCache(tmp_path / "file", 1 << 30))
    assert levels(source) == list(range(12))
    short = ShardFile(f"file://{tmp_path}/s/000.tar", 10**6, "x")
    cache = ShardCache(tmp_path / "copies", 1 << 30)
    assert not cache.fetch(short)  # the file has fewer bytes than `short` states
    assert cached_names(cache) == set()
    assert list(cache.folder.glob(".partial*")) == []


def _fetch_all(url: str, cache: ShardCache, results) -> None:
    source = open_source(url, 3, cache)
    results.put(levels(source))


def test_several_processes_share_the_copies(tmp_path):
    shards(tmp_path / "s", [12] * 3)
    size = (tmp_path / "s" / "000.tar").stat().st_size
    cache = ShardCache(
        tmp_path / "copies", int(size * 1.5)
    )  # so small that processes evict each other's copies
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with served(tmp_path) as (url, _):
        spec = f"{url}/s/{{000..002}}.tar"
        open_source(spec, 3)
        processes = [context.Process(target=_fetch_all, args=(spec, cache, results)) for _ in range(3)]
        for process in processes:
            process.start()
        assert [results.get(timeout=60) for _ in processes] == [list(range(36))] * 3
        for process in processes:
            process.join(60)
    assert len(cached_names(cache)) == 1
    assert list(cache.folder.glob(".partial*")) == []


# ---------------------------------------------------------------------- the order


def test_resolve_shuffle(tmp_path):
    local = open_source(str(shards(tmp_path / "s", [30, 30])), 3)
    remote = open_source(f"file://{tmp_path}/s", 3)
    shapes = open_source("shapes:10", 3)
    auto, by_shards = DataConfig(), DataConfig(shuffle="shards", shuffle_shards=1, data=("shapes:10",))
    assert [resolve_shuffle(auto, source) for source in (local, remote, shapes)] == ["full", "shards", "full"]
    assert type(create_stream(auto, local, 5, 0)) is SampleStream
    assert type(create_stream(auto, remote, 5, 0, "full")) is SampleStream
    stream = create_stream(by_shards, local, 5, 0)
    assert isinstance(stream, ShardedStream)
    _, ids = stream.get_samples(torch.arange(stream.num_train))
    sides = (ids >= 30).tolist()
    assert sides.index(not sides[0]) == sides.count(sides[0])  # one shard, then the other
    with pytest.raises(
        UserError,
        match=r"--shuffle shards is not supported with shapes:10, which has no shards. Use --shuffle full",
    ):
        resolve_shuffle(by_shards, shapes)
    assert create_shard_cache(auto) is None
    assert create_shard_cache(DataConfig(shard_cache_gib=0.5)).max_bytes == 1 << 29


def test_concatenated_sources_have_the_shards_of_all(tmp_path):
    both = open_sources([str(shards(tmp_path / "s", [3, 2])), "shapes:4:size=16"], 3)
    assert isinstance(both, ConcatenatedSource)
    assert get_shard_starts(both).tolist() == [0, 3, 5, 9]
    assert not both.is_remote
    assert open_sources(["shapes:4", f"file://{tmp_path}/s"], 3).is_remote
    assert get_shard_starts(open_sources(["shapes:4", "shapes:5"], 3)) is None


def test_find_shards_raises_when_a_shard_does_not_exist(tmp_path):
    with served(tmp_path) as (url, _), pytest.raises(UserError, match=r"The shard \S+ does not exist"):
        find_shards(f"{url}/nothing.tar")
