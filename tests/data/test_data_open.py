import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.data.sources.open import open_source, open_sources
from quarterview.data.sources.parquet import ParquetSource
from quarterview.data.sources.shapes import ShapesSource
from quarterview.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """Return a folder with one data set of each type."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "PNG")
    for folder in ("photos", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(file.getvalue())
    (tmp_path / "list.txt").write_text("photos/a.png\n")
    np.save(tmp_path / "array.npy", np.zeros((2, 4, 4), np.uint8))
    np.savez(tmp_path / "arrays.NPZ.npz", images=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "shards" / "README.md").write_text("about")
    for shard in range(2):
        pq.write_table(pa.table({"image": [file.getvalue()]}), tmp_path / "shards" / f"train-{shard}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "kind", "length"),
    [
        ("photos", FolderSource, 1),
        ("list.txt", ListSource, 1),
        ("array.npy", ArraySource, 2),
        ("arrays.NPZ.npz", ArraySource, 2),
        ("shards", ParquetSource, 2),
        ("shards/train-0.parquet", ParquetSource, 1),
        ("shards/train-*.parquet", ParquetSource, 2),
    ],
)
def test_source_type_of_a_path(root, spec, kind, length):
    source = open_source(str(root / spec), 3)
    assert isinstance(source, kind)
    assert len(source) == length
    assert source.image(0).pixels.shape[0] == 3


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("shapes", (10_000, 0, 32)),
        ("shapes:20000", (20_000, 0, 32)),
        ("shapes:2000:seed=1", (2000, 1, 32)),
        ("shapes:2000:size=64:seed=3", (2000, 3, 64)),
        ("shapes:seed=1", (10_000, 1, 32)),
    ],
)
def test_shapes_specs(spec, settings):
    source = open_source(spec, 3)
    assert isinstance(source, ShapesSource)
    assert (source.count, source.seed, source.size) == settings


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes:many", "'many' in 'shapes:many' is not a whole number"),
        ("shapes:10:sead=1", "Unknown setting of shapes 'sead'.*Did you mean 'seed'"),
        ("shapes:10:20", "Unknown setting of shapes '20'"),
        ("torchvision", "Give torchvision:NAME"),
        ("torchvision:STL10:train:more", "Give torchvision:NAME"),
        ("torchvision:STL11", "Unknown torchvision .*'STL11'.*Did you mean 'STL10'"),
    ],
)
def test_invalid_specs_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foto", r"foto does not exist; \S+ contains 'photos'\. Give a folder"),
        ("phtoos/dogs/a.png", r"contains 'photos'"),
        ("zzzzzzzz", r"contains no 'zzzzzzzz'"),
        ("photos/a.png", r"is a single image\. Give the folder that contains it, \S+photos"),
        ("shards/README.md", r"unknown suffix '\.md'\. Give a folder"),
        ("photos/*.png", r"does not exist"),
    ],
)
def test_unreadable_paths_are_refused_with_a_suggestion(root, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(str(root / spec), 3)


def test_folder_with_images_and_parquet_is_a_folder_of_images(root):
    (root / "shards" / "a.png").write_bytes((root / "photos" / "a.png").read_bytes())
    assert isinstance(open_source(str(root / "shards"), 3), FolderSource)


def test_several_specs_are_concatenated(root):
    both = open_sources([str(root / "photos"), "shapes:5"], 3)
    assert len(both) == 6
    assert both.name(5) == "shapes seed 0, image 4"
    assert isinstance(open_sources(["shapes:5"], 3), ShapesSource)
    with pytest.raises(UserError, match="No images are given"):
        open_sources([], 3)
