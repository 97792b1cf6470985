import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quarterview.data.decode import decode
from quarterview.data.loader import Loader
from quarterview.data.pack import pack, resize_short_side, verify
from quarterview.data.pack_config import PackConfig
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import BadSampleError, open_croppable
from quarterview.data.sources.open import open_source, open_sources
from quarterview.data.sources.packed import INDEX_DTYPE, STORE_JSON, PackedSource
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import RunError, UserError

CPU = torch.device("cpu")


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """Return an image with few colors: uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twelve images of two classes: large and small, landscape and portrait, rotated, CMYK, and broken."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = [
        (60, 80),
        (80, 60),
        (20, 30),
        (40, 41),
        (9, 9),
        (33, 64),
        (64, 33),
        (48, 48),
        (40, 90),
        (100, 45),
    ]
    for number, (height, width) in enumerate(sizes):
        path = folder / ("cat", "dog")[number % 2] / f"{number}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(smooth(height, width, number)).save(path, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(50, 70, 10)).save(folder / "dog" / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(smooth(50, 70, 11)).convert("CMYK").save(folder / "dog" / "print.jpg", quality=95)
    (folder / "dog" / "1.png").write_bytes(b"no image at all")
    return folder


def packed(data, out, **options) -> PackedSource:
    options = {"short_side": 32, "shard_size": 5, "workers": 0, "max_bad_samples": 0.2} | options
    assert pack(PackConfig(data=(str(data),), out=str(out), **options)).is_complete
    return PackedSource(out, options.get("in_chans", 3))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def readable(source) -> list[int]:
    found = []
    for index in range(len(source)):
        try:
            source.image(index)
        except BadSampleError:
            continue
        found.append(index)
    return found


# ---------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_packed_images_are_those_of_the_source(photos, tmp_path, encoding):
    source = open_source(str(photos), 3)
    store = open_source(str(_out(photos, tmp_path, encoding=encoding)), 3)
    assert isinstance(store, PackedSource)
    assert len(store) == len(source) == 12
    assert store.classes == source.classes == ["cat", "dog"]
    assert [store.label(i) for i in range(12)] == [source.label(i) for i in range(12)]
    assert [store.name(i) for i in range(12)] == [source.name(i) for i in range(12)]
    assert len(readable(store)) == 11
    for index in readable(store):
        expected, stored = source.image(index), store.image(index)
        pixels = resize_short_side(expected.pixels, 32)
        assert min(pixels.shape[1:]) <= 32
        assert stored.notes == expected.notes
        assert stored.pixels.is_contiguous()
        if encoding == "jpeg":
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
            pixels = decode(file.getvalue(), 3).pixels
        assert torch.equal(stored.pixels, pixels)
    assert {note for i in readable(store) for note in store.image(i).notes} == {
        "rotated by EXIF",
        "CMYK converted to RGB",
    }


def _out(photos, tmp_path, **options) -> Path:
    packed(photos, tmp_path / "store", **options)
    return tmp_path / "store"


def test_small_images_are_not_enlarged_and_large_ones_keep_their_aspect_ratio():
    assert resize_short_side(torch.zeros(3, 20, 31), 32).shape == (3, 20, 31)
    assert resize_short_side(torch.zeros(3, 64, 128), 32).shape == (3, 32, 64)
    assert resize_short_side(torch.zeros(3, 300, 100), 32).shape == (3, 96, 32)
    assert resize_short_side(torch.zeros(3, 300, 100), None).shape == (3, 300, 100)


def test_a_broken_image_keeps_its_reason_and_index(photos, tmp_path):
    source, store = open_source(str(photos), 3), packed(photos, tmp_path / "store")
    (index,) = set(range(12)) - set(readable(store))
    assert source.name(index) == store.name(index) == "dog/1.png"
    for read in (store.image, store.croppable):
        with pytest.raises(BadSampleError, match="not an image in one of the formats"):
            read(index)
    with pytest.raises(IndexError):
        store.image(12)


def test_too_many_broken_images_stop_packing(photos, tmp_path):
    with pytest.raises(
        RunError,
        match=r"(?s)1 of 12 images are broken, .*1\.00%.*allow more with --max-bad-samples",
    ):
        packed(photos, tmp_path / "store", max_bad_samples=0.01)
    with pytest.raises(UserError, match=r"is not complete. Run the `quarterview pack` command that began it"):
        open_source(str(tmp_path / "store"), 3)
    assert len(packed(photos, tmp_path / "store")) == 12  # continues: more broken images are allowed now


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_arrays_of_any_channels_and_depth(tmp_path, channels, kind, encoding):
    values = np.random.default_rng(0).integers(0, 256, (7, 40, 50, channels)).astype(kind)
    np.savez(
        tmp_path / "x.npz", images=values if kind != np.float32 else values / 255, labels=np.arange(7) % 3
    )
    source = open_source(str(tmp_path / "x.npz"), channels)
    store = packed(tmp_path / "x.npz", tmp_path / "store", in_chans=channels, encoding=encoding)
    assert [store.label(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert store.classes is None
    for index in range(7):
        expected, stored = resize_short_side(source.image(index).pixels, 32), store.image(index).pixels
        assert stored.dtype == expected.dtype
        if encoding == "jpeg" and channels == 1 and kind == np.uint8:
            assert stored.shape == expected.shape  # noise: nothing that JPEG keeps
        else:
            assert torch.equal(stored, expected)


def test_a_gray_store_is_read_with_any_number_of_channels(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (3, 20, 30), dtype=np.uint8))
    for encoding in ("raw", "jpeg"):
        gray = packed(tmp_path / "x.npy", tmp_path / encoding, in_chans=1, encoding=encoding)
        wide = PackedSource(tmp_path / encoding, 4)
        for index in range(3):
            assert torch.equal(wide.image(index).pixels, gray.image(index).pixels.expand(4, -1, -1))
            crops = [open_croppable(s, index).crop((3, 4, 12, 20), (8, 8)).pixels for s in (gray, wide)]
            assert torch.equal(crops[1], crops[0].expand(4, -1, -1))


def test_other_channels_are_rejected(photos, tmp_path):
    packed(photos, tmp_path / "store")
    with pytest.raises(UserError, match=r"images of 3 channels, not 5. Use --in-chans 3"):
        open_source(str(tmp_path / "store"), 5)


# ---------------------------------------------------------------------- random access


@settings(max_examples=12)
@given(shard_size=st.integers(1, 14), order=st.permutations(range(12)))
def test_any_shard_size_and_any_order_give_the_same_images(photos, tmp_path_factory, shard_size, order):
    source = open_source(str(photos), 3)
    store = packed(photos, tmp_path_factory.mktemp("store"), shard_size=shard_size)
    for index in order:
        try:
            wanted = resize_short_side(source.image(index).pixels, 32)
        except BadSampleError:
            continue
        assert torch.equal(store.image(index).pixels, wanted)
        assert store.name(index) == source.name(index)


@settings(max_examples=40)
@given(st.data())
def test_a_crop_of_raw_pixels_is_that_of_the_whole_image(stores, draw):
    store = pickle.loads(pickle.dumps(stores["raw"])) if draw.draw(st.booleans()) else stores["raw"]
    index = draw.draw(st.sampled_from(readable(stores["raw"])))
    image = open_croppable(store, index)
    whole = stores["raw"].image(index)
    height, width = image.size
    assert (height, width) == whole.pixels.shape[1:]
    top, left = draw.draw(st.integers(0, height - 1)), draw.draw(st.integers(0, width - 1))
    box = (top, left, draw.draw(st.integers(1, height - top)), draw.draw(st.integers(1, width - left)))
    size = draw.draw(st.sampled_from([(16, 16), (8, 24), (40, 40)]))
    crop = image.crop(box, size)
    assert torch.equal(crop.pixels, crop_resize(whole.pixels, box, size))
    assert crop.notes == whole.notes


@pytest.fixture(scope="module")
def stores(photos, tmp_path_factory) -> dict[str, PackedSource]:
    return {
        encoding: packed(photos, tmp_path_factory.mktemp(encoding), encoding=encoding)
        for encoding in ("raw", "jpeg")
    }


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_batches_do_not_depend_on_the_number_of_workers(stores, encoding):
    def batches(workers: int):
        stream = SampleStream(12, 0, 3)
        mean, std = (0.5,) * 3, (0.2,) * 3
        reports = []
        loader = Loader(stores[encoding], stream, (16, 16), mean, std, CPU, workers, None, reports.append)
        return list(loader.iter_batches([range(i, i + 8) for i in range(0, 40, 8)])), set(reports)

    expected, reports = batches(0)
    assert {report.name for report in reports if report.broken} == {"dog/1.png"}
    for workers in (1, 2):
        found, again = batches(workers)
        assert again == reports
        for one, two in zip(expected, found, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.ids, two.ids)


# ---------------------------------------------------------------------- many writers, one store


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_the_bytes_do_not_depend_on_the_number_of_writers(photos, tmp_path, encoding):
    for workers in (0, 1, 2):
        packed(photos, tmp_path / str(workers), workers=workers, encoding=encoding)
    expected = contents(tmp_path / "0")
    assert sorted(expected) == [
        *(f"{i:05d}.{suffix}" for i in range(3) for suffix in ("bin", "json", "jsonl", "npy")),
        STORE_JSON,
    ]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == expected


def test_parts_make_the_same_store_in_any_order(photos, tmp_path):
    packed(photos, tmp_path / "whole")
    config = {"data": (str(photos),), "out": str(tmp_path / "parts"), "short_side": 32, "shard_size": 5}
    config |= {"workers": 0, "max_bad_samples": 0.2}
    assert not pack(PackConfig(**config, part="1/2")).is_complete
    with pytest.raises(UserError, match="not complete"):
        PackedSource(tmp_path / "parts", 3)
    assert not pack(PackConfig(**config, part="1/2")).is_complete  # once more changes nothing
    assert pack(PackConfig(**config, part="0/2")).is_complete
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    progress = []
    state = pack(PackConfig(**config, part="0/2"), lambda *done_and_total: progress.append(done_and_total))
    assert progress == [(0, 2), (1, 2), (2, 2)]
    assert (state.num_written_shards, state.num_shards, state.num_images) == (3, 3, 12)
    assert pack(PackConfig(**config, part="7/9")).is_complete  # nothing to do


@pytest.mark.slow
def test_a_store_of_a_killed_writer_is_completed(tmp_path):
    """Kill a real process, more than once."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (120, 90, 90, 3), dtype=np.uint8))
    packed(tmp_path / "x.npy", tmp_path / "whole", shard_size=8, short_side=64)
    store = tmp_path / "killed"

    def kill_twice() -> bool:
        """Kill two writers of a new store. Return False if one finished before."""
        shutil.rmtree(store, ignore_errors=True)
        for already in (1, 6):
            writer = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
            )
            while len(list(store.glob("*.json"))) < 1 + already and writer.poll() is None:
                time.sleep(0.001)
            os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()
            if json.loads((store / STORE_JSON).read_text())["complete"]:
                return False
        return True

    command = [sys.executable, "-m", "quarterview", "pack", str(tmp_path / "x.npy"), "--out", str(store)]
    command += ["--shard-size", "8", "--short-side", "64", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert any(kill_twice() for _ in range(10))
    for partial in (store / ".00003.bin.elsewhere-1.partial", *store.glob(".*.partial")):
        partial.write_bytes(b"cut short")
        os.utime(partial, (0, 0))  # long ago, as no writer is at it
    sealed = [path for path in store.glob("*.bin") if path.with_suffix(".json").exists()]
    untouched = {path: path.stat().st_mtime_ns for path in sealed}
    subprocess.run(command, env=environment, check=True, timeout=600)
    assert contents(store) == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == written for path, written in untouched.items())
    assert len(untouched) >= 6


def test_recent_partial_files_are_kept(photos, tmp_path):
    (tmp_path / "store").mkdir()
    young = tmp_path / "store" / ".00001.bin.elsewhere-1.partial"
    young.write_bytes(b"not yet")
    packed(photos, tmp_path / "store")
    assert young.read_bytes() == b"not yet"


@pytest.mark.parametrize("label", [-1, -2, 1 << 40])
def test_labels_that_a_store_cannot_represent_are_rejected(photos, tmp_path, label):
    paths = sorted(photos.rglob("*.jpg"))
    lines = [f"{path}\t{label if i else 1}" for i, path in enumerate(paths)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"The label of .*\.jpg is {label}. Give a label from 0 to"):
        packed(tmp_path / "list.txt", tmp_path / "store")


def test_a_sparse_file_cannot_give_an_image_of_any_size(photos, tmp_path):
    """Sparse files may be very large, but an image may not be larger than `MAX_PIXELS`."""
    packed(photos, tmp_path / "store", shard_size=1000)
    store = tmp_path / "store"
    rows = np.load(store / "00000.npy")
    rows[0]["height"] = rows[0]["width"] = side = 20_000
    rows[0]["length"], rows[0]["offset"] = side * side * 3, 0
    np.save(store / "00000.npy", rows)
    os.truncate(store / "00000.bin", side * side * 3)
    record = json.loads((store / STORE_JSON).read_text())
    record["shards"][0] |= {
        "bin_bytes": side * side * 3,
        "npy_blake2b": hashlib.blake2b((store / "00000.npy").read_bytes(), digest_size=16).hexdigest(),
    }
    (store / STORE_JSON).write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not a valid index of its shard"):
        PackedSource(store, 3)


def test_an_unreadable_record_is_reported_with_a_fix(photos, tmp_path):
    packed(photos, tmp_path / "store")
    (tmp_path / "store" / STORE_JSON).write_text("{")
    with pytest.raises(UserError, match="into a new folder"):
        PackedSource(tmp_path / "store", 3)


def test_another_source_or_setting_is_rejected_by_name(photos, tmp_path):
    packed(photos, tmp_path / "store")
    for options, message in (
        ({"short_side": 48}, "short_side is 32, not 48"),
        ({"encoding": "jpeg"}, "encoding is raw, not jpeg; quality is None, not 90"),
        ({"shard_size": 6}, "shard_size is 5, not 6"),
    ):
        with pytest.raises(
            UserError, match=f"contains a store with other settings: {message}. Use the same images"
        ):
            packed(photos, tmp_path / "store", **options)
    np.save(tmp_path / "x.npy", np.zeros((12, 40, 40, 3), np.uint8))
    with pytest.raises(UserError, match=r"source is \w+, not \w+"):
        packed(tmp_path / "x.npy", tmp_path / "store")
    with pytest.raises(UserError, match=r"contains other files, such as cat. Give a new or empty folder"):
        packed(photos, photos)
    with pytest.raises(UserError, match=r"is a file, or is inside a file. Give a folder"):
        packed(photos, tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "4/4"}, "--part is 4/4. Give INDEX/COUNT, such as 0/4"),
        ({"part": "one"}, "--part is one. Give INDEX/COUNT"),
        ({"short_side": 0}, "--short-side 0 is out of range. Give a whole number of at least 1"),
        (
            {"quality": 100},
            "--quality 100 is out of range. Give a whole number .* of at most 95",
        ),
        (
            {"encoding": "png"},
            "Unknown value of --encoding: 'png'. Did you mean 'jpeg'\\? Give one of: raw, jpeg",
        ),
        ({"workers": -1}, "--workers -1 is out of range"),
        ({"out": ""}, "A folder for the packed store is missing. Give --out STORE"),
    ],
)
def test_invalid_values_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        PackConfig(**{"data": ("x",), "out": "y", **options})


# ---------------------------------------------------------------------- damaged and hostile stores


@pytest.fixture
def store(photos, tmp_path) -> Path:
    packed(photos, tmp_path / "store")
    return tmp_path / "store"


def test_a_damaged_image_is_a_bad_sample_and_is_found_by_verify(photos, store):
    verify(store)
    source, before = PackedSource(store, 3), contents(store)
    index = readable(source)[3]
    row = source._rows[index]
    path = store / f"{index // 5:05d}.bin"
    data = bytearray(path.read_bytes())
    data[int(row["offset"] + row["length"]) - 1] ^= 1
    path.write_bytes(data)
    damaged = PackedSource(store, 3)
    for read in (damaged.image, lambda i: damaged.croppable(i).crop((0, 0, 4, 4), (4, 4))) * 2:
        with pytest.raises(BadSampleError, match="is damaged: its checksum"):
            read(index)
    assert set(readable(damaged)) == set(readable(source)) - {index}
    with pytest.raises(
        RunError, match=rf"(?s)damaged in 1 place\(s\):\n  image {index} in .*rewrites the damaged shards"
    ):
        verify(store)
    packed(photos, store)  # mends it
    assert contents(store) == before


def test_a_shard_that_shrinks_under_a_reader_gives_bad_samples(store):
    source = PackedSource(store, 3)
    assert readable(source)
    for suffix in ("bin", "jsonl"):
        os.truncate(store / f"00001.{suffix}", 10)
    assert all(index < 5 or index > 9 for index in readable(source))
    with pytest.raises(BadSampleError, match=r"00001\.bin is too short"):
        source.image(6)
    assert source.name(6) == f"{store} image 6"
    with pytest.raises(
        UserError, match=r"00001.bin has 10 bytes, expected \d+. Run the `quarterview pack` command"
    ):
        PackedSource(store, 3)
    shutil.rmtree(store)
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.image(0)


def test_a_damaged_index_is_a_user_error(photos, store):
    before = contents(store)
    for place in (3, 60, -1):
        data = bytearray(before["00001.npy"])
        data[place] ^= 0xFF
        (store / "00001.npy").write_bytes(data)
        with pytest.raises(UserError, match=r"00001.npy is damaged: its checksum"):
            PackedSource(store, 3)
    (store / "00001.npy").unlink()
    with pytest.raises(UserError, match=r"Cannot read a shard .*00001.npy"):
        PackedSource(store, 3)
    packed(photos, store)
    assert contents(store) == before
    (store / STORE_JSON).write_bytes(before[STORE_JSON][:-30])
    with pytest.raises(UserError, match="Cannot read"):
        open_source(str(store), 3)


@settings(max_examples=60)
@given(st.data())
def test_a_hostile_index_with_a_correct_checksum_is_rejected_or_harmless(photos, tmp_path_factory, draw):
    """Any values give a UserError, or images and bad samples, without more memory than the files need."""
    store = tmp_path_factory.mktemp("store")
    packed(photos, store)
    rows = np.load(store / "00001.npy")
    edges = [0, 1, 2, 255, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
    for _ in range(draw.draw(st.integers(1, 3))):
        name = draw.draw(st.sampled_from(INDEX_DTYPE.names))
        value = draw.draw(st.sampled_from(edges) | st.integers(0, 3000))
        rows[draw.draw(st.integers(0, 4))][name] = np.array([value], np.uint64).astype(INDEX_DTYPE[name])[0]
    _with_index(store, rows)
    try:
        source = open_source(str(store), 3)
    except UserError:
        return
    for index in range(len(source)):
        source.name(index)
        source.label(index)
        for read in (source.image, lambda i: open_croppable(source, i).crop((0, 0, 1, 1), (4, 4))):
            try:
                assert read(index).pixels.numel() < 100_000
            except BadSampleError:
                continue


def _with_index(store: Path, rows: np.ndarray) -> None:
    from quarterview.data.sources.packed import compute_blake2b

    file = io.BytesIO()
    np.save(file, rows, allow_pickle=rows.dtype.hasobject)
    (store / "00001.npy").write_bytes(file.getvalue())
    record = json.loads((store / STORE_JSON).read_text())
    record["shards"][1]["npy_blake2b"] = compute_blake2b(file.getvalue())
    (store / STORE_JSON).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros(4, INDEX_DTYPE),
        np.zeros((5, 1), INDEX_DTYPE),
        np.zeros(5, np.int64),
        np.array([{"a": 1}] * 5, object),
        np.asfortranarray(np.zeros((1, 5), INDEX_DTYPE)),
    ],
)
def test_an_index_of_another_dtype_is_rejected(store, rows):
    _with_index(store, rows)
    with pytest.raises(UserError, match=r"00001.npy is not a valid index of its shard"):
        PackedSource(store, 3)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "images"), 10**30),
        (("settings", "images"), -1),
        (("settings", "shard_size"), 0),
        (("settings", "channels"), 2**40),
        (("settings", "channels"), "3"),
        (("settings",), None),
        (("classes",), "catdog"),
        (("classes",), ["cat"]),
        (("shards",), []),
        (("shards", 0), {"images": 5}),
        (("shards", 0, "bin_bytes"), 2**80),
        (("shards", 0, "bin_bytes"), True),
        (("shards", 0, "npy_blake2b"), None),
        (("format",), "quarterview packed store 2"),
    ],
)
def test_a_hostile_record_is_a_user_error(store, path, value):
    record = json.loads((store / STORE_JSON).read_text())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (store / STORE_JSON).write_text(json.dumps(record))
    with pytest.raises(UserError):
        open_source(str(store), 3)


def test_a_folder_of_images_with_an_unrelated_record_is_a_folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / STORE_JSON).write_text('{"format": "something else"}')
    assert len(open_source(str(tmp_path), 3)) == 1


def test_the_fingerprint_covers_pixels_and_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    found = set()
    for number, (change, labels) in enumerate([(0, [0, 1, 0, 1]), (1, [0, 1, 0, 1]), (0, [0, 1, 1, 1])]):
        changed = images.copy()
        changed[2, 3, 3, 0] += change
        np.savez(tmp_path / f"{number}.npz", images=changed, labels=np.array(labels))
        found.add(packed(tmp_path / f"{number}.npz", tmp_path / str(number)).fingerprint())
    assert len(found) == 3
    shutil.copytree(tmp_path / "1", tmp_path / "moved")
    assert PackedSource(tmp_path / "moved", 3).fingerprint() in found


def test_stores_are_joined_like_any_source(stores, photos, tmp_path):
    joined = open_sources([str(stores["raw"].path), str(stores["jpeg"].path), str(photos)], 3)
    assert len(joined) == 36
    assert joined.classes == ["cat", "dog"]
    index = readable(stores["jpeg"])[2]
    assert torch.equal(joined.image(12 + index).pixels, stores["jpeg"].image(index).pixels)
    assert open_croppable(joined, index).size == stores["raw"].image(index).pixels.shape[1:]
