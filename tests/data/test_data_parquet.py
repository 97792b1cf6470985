import io
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tar_shards import served

from quarterview.data.sampler import ShardedStream
from quarterview.data.sources import parquet
from quarterview.data.sources import shards as shard_files
from quarterview.data.sources.base import BadSampleError
from quarterview.data.sources.open import open_source
from quarterview.data.sources.parquet import ParquetSource
from quarterview.data.sources.shard_cache import ShardCache
from quarterview.errors import RunError, UserError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, levels: range, features: dict | None = None, column: str = "img") -> Path:
    """Write a shard as on the Hub: structs of bytes and path, and labels that are the levels modulo 2."""
    images = [{"bytes": png(level), "path": f"{level}.png"} for level in levels]
    table = pa.table({column: images, "label": pa.array([level % 2 for level in levels], pa.int64())})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path)
    return path


def levels_of(source: ParquetSource) -> list[int]:
    return [int(source.image(i).pixels[0, 0, 0]) for i in range(len(source))]


NAMES_AS_LIST = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
NAMES_BY_NUMBER = {"label": {"dtype": {"class_label": {"names": {"1": "dog", "0": "cat"}}}}}


@pytest.mark.parametrize("features", [NAMES_AS_LIST, NAMES_BY_NUMBER])
def test_one_file(tmp_path, features):
    source = ParquetSource(write(tmp_path / "train.parquet", range(5), features), 3)
    assert source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(5)] == [0, 1, 0, 1, 0]
    assert levels_of(source) == list(range(5))
    assert source.name(3).endswith("train.parquet row 3")


@pytest.mark.parametrize("note", [None, {}, {"label": {"_type": "Value"}}, {"label": {"names": 3}}])
def test_without_class_names_there_are_still_labels(tmp_path, note):
    source = ParquetSource(write(tmp_path / "a.parquet", range(2), note), 3)
    assert source.classes is None
    assert source.label(1) == 1


def test_shards_of_a_folder_or_a_glob_come_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "train-00001-of-00002.parquet", range(3, 5))
    write(tmp_path / "train-00000-of-00002.parquet", range(3))
    assert levels_of(ParquetSource(tmp_path, 3)) == [0, 1, 2, 3, 4]
    write(tmp_path / "test-00000-of-00001.parquet", range(9))
    assert levels_of(ParquetSource(tmp_path / "train-*.parquet", 3)) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="several data sets: test, train"):
        ParquetSource(tmp_path, 3)


def test_binary_columns(tmp_path):
    pq.write_table(pa.table({"photo": [png(7), None, b"rubbish"]}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet", 3)
    assert int(source.image(0).pixels[0, 0, 0]) == 7
    assert source.label(0) is None
    for index, reason in ((1, "no image"), (2, "not an image in one of the formats")):
        with pytest.raises(BadSampleError, match=reason):
            source.image(index)


def test_which_of_several_binary_columns(tmp_path):
    pq.write_table(pa.table({"mask": [b""], "image": [png(7)]}), tmp_path / "a.parquet")
    assert levels_of(ParquetSource(tmp_path / "a.parquet", 3)) == [7]
    pq.write_table(pa.table({"mask": [b""], "photo": [png(7)]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"2 columns that could hold the images, .* photo \(binary\)"):
        ParquetSource(tmp_path / "b.parquet", 3)
    pq.write_table(pa.table({"text": ["no image"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="0 columns that could hold the images"):
        ParquetSource(tmp_path / "c.parquet", 3)


def test_missing_and_negative_labels_are_none(tmp_path):
    table = pa.table({"image": [png(0)] * 3, "fine_label": [-1, None, 4], "coarse_label": [1, 1, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet", 3)
    assert [source.label(i) for i in range(3)] == [None, None, 4]


def test_unreadable_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="as Parquet"):
        ParquetSource(tmp_path / "a.parquet", 3)
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "missing.parquet", "x*.parquet"):
        with pytest.raises(UserError, match="no Parquet file"):
            ParquetSource(tmp_path / nothing, 3)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no rows"):
        ParquetSource(tmp_path / "b.parquet", 3)


def test_shards_that_do_not_fit_together(tmp_path):
    write(tmp_path / "train-0.parquet", range(2))
    write(tmp_path / "train-1.parquet", range(2), column="other")
    with pytest.raises(UserError, match="other columns"):
        ParquetSource(tmp_path, 3)


def test_the_pickled_source_does_not_contain_the_table(tmp_path):
    levels = range(3)
    source = ParquetSource(write(tmp_path / "a.parquet", levels), 3)
    small = len(pickle.dumps(source))
    assert levels_of(source) == list(levels)
    assert source.label(1) == 1
    assert len(pickle.dumps(source)) == small
    copy = pickle.loads(pickle.dumps(source))
    assert levels_of(copy) == list(levels)
    assert np.array_equal(copy.image(2).pixels, source.image(2).pixels)


def test_the_fingerprint_follows_the_shards(tmp_path):
    first = ParquetSource(write(tmp_path / "a.parquet", range(3)), 3).fingerprint()
    assert ParquetSource(tmp_path / "a.parquet", 3).fingerprint() == first
    assert ParquetSource(write(tmp_path / "a.parquet", range(4)), 3).fingerprint() != first


# ---------------------------------------------------------------------- row groups


def grouped(path: Path, sizes: list[int]) -> Path:
    """Write a file with row groups of `sizes` noise images, of about 3 KiB each, labeled in order."""
    first = 0
    generator = np.random.default_rng(0)
    schema = pa.schema({"image": pa.binary(), "label": pa.uint8()})
    with pq.ParquetWriter(path, schema) as writer:
        for size in sizes:
            images = []
            for _ in range(size):
                file = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
                images.append(file.getvalue())
            labels = pa.array(range(first, first + size), pa.uint8())
            writer.write_table(pa.table({"image": images, "label": labels}, schema=schema))
            first += size
    return path


def test_row_groups_are_read_on_demand_and_cached_up_to_the_limit(tmp_path, monkeypatch):
    for shard, sizes in (("a", [5, 3]), ("b", [1, 7, 4])):
        grouped(tmp_path / f"{shard}.parquet", sizes)
    table = pa.concat_tables([pq.read_table(tmp_path / f"{shard}.parquet") for shard in "ab"])
    monkeypatch.setattr(parquet, "MAX_CACHED_BYTES", 30_000)
    source = ParquetSource(tmp_path / "*.parquet", 3)
    read, real = [], ParquetSource._read_column
    monkeypatch.setattr(
        ParquetSource, "_read_column", lambda self, *args: read.append(args[1:]) or real(self, *args)
    )
    assert source.shard_starts().tolist() == [0, 5, 8, 9, 16, 20]
    for index in np.random.default_rng(0).permutation(20).tolist():
        assert source._read_image(index) == table["image"][index].as_py()
        assert source.label(index) == table["label"][index].as_py()
        assert source._count_cached_bytes() <= 30_000
    assert len(read) > 7  # some more than once
    read.clear()
    for index in range(20):
        source._read_image(index)
    assert len(read) <= 5
    assert all(len(args) == 2 for args in read)  # a row group at a time
    (remark,) = source.remarks()
    assert "--shuffle shards" in remark
    for out_of_range in (-1, 20):
        with pytest.raises(IndexError):
            source.image(out_of_range)


def test_a_data_set_that_fits_the_cache_is_read_once(tmp_path, monkeypatch):
    source = ParquetSource(grouped(tmp_path / "a.parquet", [5, 3, 9]), 3)
    read, real = [], ParquetSource._read_column
    monkeypatch.setattr(
        ParquetSource, "_read_column", lambda self, *args: read.append(args[1:]) or real(self, *args)
    )
    for index in 2 * np.random.default_rng(0).permutation(17).tolist():
        source._read_image(index)
    assert len(read) == 3
    assert source.remarks() == []


def test_shuffling_by_shards_reads_each_row_group_once_an_epoch(tmp_path, monkeypatch):
    source = ParquetSource(grouped(tmp_path / "a.parquet", [6] * 12), 3)
    monkeypatch.setattr(parquet, "MAX_CACHED_BYTES", 2 * 6 * 3200 + 2000)  # two of them
    stream = ShardedStream(source.shard_starts(), 0, 0, 2)
    read, real = [], ParquetSource._read_column
    monkeypatch.setattr(
        ParquetSource, "_read_column", lambda self, *args: read.append(args[2]) or real(self, *args)
    )
    for index in stream.get_samples(torch.arange(stream.num_train))[1].tolist():
        source._read_image(index)
    assert sorted(read) == list(range(12))


# ---------------------------------------------------------------------- remote files


def test_parquet_is_read_over_http_by_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_RETRY_DELAYS", ())
    folder = tmp_path / "s"
    folder.mkdir()
    for index in range(2):
        grouped(folder / f"train-{index}.parquet", [40, 40, 40])
    local = ParquetSource(folder, 3)
    with served(tmp_path) as (url, server):
        source = open_source(f"{url}/s/train-{{0..1}}.parquet", 3)
        assert isinstance(source, ParquetSource)
        assert source.is_remote
        assert not local.is_remote
        assert source.fingerprint() == local.fingerprint()
        assert source.name(3) == f"{url}/s/train-{{0..1}}.parquet row 3"
        server.requests.clear()
        copy = pickle.loads(pickle.dumps(source))
        assert copy.image(170).pixels.equal(local.image(170).pixels)
        assert [copy.label(i) for i in (0, 170, 239)] == [local.label(i) for i in (0, 170, 239)]
        ranges = [
            list(map(int, byte_range[6:].split("-"))) for path, byte_range in server.requests if "-1" in path
        ]
        size = (folder / "train-1.parquet").stat().st_size
        read = sum(end - begin + 1 for begin, end in ranges)
        assert read < size / 3 + 3 * 65536  # a row group; and the footer, of which Arrow reads 64 KiB, twice

        cached = open_source(f"{url}/s/train-{{0..1}}.parquet", 3, ShardCache(tmp_path / "copies", 1 << 30))
        for index in range(0, 240, 7):
            assert cached.image(index).pixels.equal(local.image(index).pixels)
        assert len(list((tmp_path / "copies").rglob("*.shard"))) == 2
        server.kind.failures = 10**6
        with pytest.raises(RunError, match="503"):
            pickle.loads(pickle.dumps(source)).image(0)
        assert pickle.loads(pickle.dumps(cached)).image(0).pixels.equal(local.image(0).pixels)
        server.kind.failures = 0
        (folder / "train-0.parquet").write_bytes(b"PAR1, but not really")
        with pytest.raises(UserError, match=r"Cannot read http\S+ as Parquet"):
            open_source(f"{url}/s/train-0.parquet", 3)
    with pytest.raises(UserError, match=r"no \.parquet file at"):
        open_source(f"file://{tmp_path}/t/*.parquet", 3)
