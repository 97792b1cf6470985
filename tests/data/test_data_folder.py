import pickle
from pathlib import Path

import pytest
from PIL import Image

from quarterview.data.sources.base import BadSampleError
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.errors import UserError


def write(root: Path, *names: str) -> None:
    """Images of one grey level each: 0, 1, 2, …"""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), level).save(root / name, "PNG")


def names(source: FolderSource | ListSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def labels(source: FolderSource | ListSource) -> list[int | None]:
    return [source.label(i) for i in range(len(source))]


def test_images_come_sorted_whatever_their_suffix_looks_like(tmp_path):
    write(tmp_path, "b.PNG", "a.jpeg", "z/deep/er/c.tif", "z/B.webp")
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path, 3)
    assert names(source) == ["a.jpeg", "b.PNG", "z/B.webp", "z/deep/er/c.tif"]
    assert [int(source.image(i).pixels[0, 0, 0]) for i in range(4)] == [1, 0, 3, 2]
    assert source.classes is None
    assert labels(source) == [None] * 4


def test_hidden_files_and_folders_are_skipped(tmp_path):
    write(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/.e.png")
    assert names(FolderSource(tmp_path, 1)) == ["a.png"]


def test_sub_folders_are_classes(tmp_path):
    write(tmp_path, "dog/2.png", "cat/1.png", "cat/more/0.png")
    source = FolderSource(tmp_path, 1)
    assert source.classes == ["cat", "dog"]
    assert names(source) == ["cat/1.png", "cat/more/0.png", "dog/2.png"]
    assert labels(source) == [0, 0, 1]


@pytest.mark.parametrize("files", [["only/a.png", "only/b.png"], ["cat/a.png", "dog/b.png", "c.png"]])
def test_one_sub_folder_or_loose_images_are_no_classes(tmp_path, files):
    write(tmp_path, *files)
    source = FolderSource(tmp_path, 1)
    assert source.classes is None
    assert labels(source) == [None] * len(files)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, "set/x/a.png", "elsewhere/b.png")
    (tmp_path / "set/x/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/itself.png").symlink_to(tmp_path / "set/itself.png")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set/y").symlink_to(tmp_path / "elsewhere")
    assert names(FolderSource(tmp_path / "set", 1)) == ["x/a.png", "y/b.png"]


def test_nothing_found_says_what_was_seen(tmp_path):
    for name in ("a.dcm", "b.DCM", "README"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        UserError, match=r"looked .* for \.jpg, .*; saw 3 other files: 2 \.dcm, 1 without suffix"
    ):
        FolderSource(tmp_path, 1)
    with pytest.raises(UserError, match="cannot read the folder"):
        FolderSource(tmp_path / "missing", 1)


def test_a_file_gone_since_is_a_bad_sample(tmp_path):
    write(tmp_path, "a.png", "b.png")
    source = FolderSource(tmp_path, 1)
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.image(1)
    with pytest.raises(IndexError):
        source.image(2)


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    write(tmp_path, "a.png", "b.png")
    first = FolderSource(tmp_path, 1).fingerprint()
    assert FolderSource(tmp_path, 1).fingerprint() == first
    assert len(first) == 16
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    second = FolderSource(tmp_path, 1).fingerprint()
    with (tmp_path / "c.png").open("ab") as file:
        file.write(b"more")
    assert len({first, second, FolderSource(tmp_path, 1).fingerprint()}) == 3


def test_sources_travel_by_pickling(tmp_path):
    write(tmp_path, "cat/ü.png", "dog/b.png")
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path, 3)))
    assert names(source) == ["cat/ü.png", "dog/b.png"]
    assert source.image(1).pixels.shape == (3, 3, 4)


def written_list(root: Path, text: str) -> Path:
    (root / "list.txt").write_text(text)
    return root / "list.txt"


def test_a_list_names_files_beside_it(tmp_path):
    write(tmp_path, "a.png", "sub/b c.png")
    source = ListSource(written_list(tmp_path, "# two images\nsub/b c.png\n\n  \na.png\r\n"), 1)
    assert names(source) == ["sub/b c.png", "a.png"]
    assert [int(source.image(i).pixels[0, 0, 0]) for i in range(2)] == [1, 0]
    assert (source.classes, labels(source)) == (None, [None, None])


def test_a_list_may_carry_labels(tmp_path):
    numbered = ListSource(written_list(tmp_path, "a.png\t7\nb.png\t 0\n"), 1)
    assert (numbered.classes, labels(numbered)) == (None, [7, 0])
    named = ListSource(written_list(tmp_path, "a.png\tdog\nb.png\tcat\nc.png\t3\n"), 1)
    assert named.classes == ["3", "cat", "dog"]
    assert labels(named) == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.png\t1\nb.png\n", "labels 1 of 2 images; accepted: all or none"), ("# nothing\n", "names no image")],
)
def test_lists_that_cannot_be_meant(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        ListSource(written_list(tmp_path, text), 1)


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="as UTF-8 text"):
        ListSource(tmp_path / "list.txt", 1)


def test_files_missing_from_a_list_are_bad_samples(tmp_path):
    source = ListSource(written_list(tmp_path, "missing.png\nnull\0byte.png\n"), 1)
    before = source.fingerprint()
    for index in range(2):
        with pytest.raises(BadSampleError, match="cannot be read"):
            source.image(index)
    write(tmp_path, "missing.png")
    assert source.fingerprint() != before
