import pickle
from pathlib import Path

import pytest
from PIL import Image

from quarterview.data.sources.base import BadSampleError
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.errors import UserError


def write(root: Path, *names: str) -> None:
    """Write images of one gray level each: 0, 1, 2, …"""
    for level, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3), level).save(root / name, "PNG")


def get_names(source: FolderSource | ListSource) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def get_labels(source: FolderSource | ListSource) -> list[int | None]:
    return [source.label(i) for i in range(len(source))]


def test_images_are_sorted_and_suffixes_are_case_insensitive(tmp_path):
    write(tmp_path, "b.PNG", "a.jpeg", "z/deep/er/c.tif", "z/B.webp")
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path, 3)
    assert get_names(source) == ["a.jpeg", "b.PNG", "z/B.webp", "z/deep/er/c.tif"]
    assert [int(source.image(i).pixels[0, 0, 0]) for i in range(4)] == [1, 0, 3, 2]
    assert source.classes is None
    assert get_labels(source) == [None] * 4


def test_hidden_files_and_folders_are_skipped(tmp_path):
    write(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/.e.png")
    assert get_names(FolderSource(tmp_path, 1)) == ["a.png"]


def test_sub_folders_are_classes(tmp_path):
    write(tmp_path, "dog/2.png", "cat/1.png", "cat/more/0.png")
    source = FolderSource(tmp_path, 1)
    assert source.classes == ["cat", "dog"]
    assert get_names(source) == ["cat/1.png", "cat/more/0.png", "dog/2.png"]
    assert get_labels(source) == [0, 0, 1]


@pytest.mark.parametrize("files", [["only/a.png", "only/b.png"], ["cat/a.png", "dog/b.png", "c.png"]])
def test_single_sub_folder_or_images_in_the_root_give_no_classes(tmp_path, files):
    write(tmp_path, *files)
    source = FolderSource(tmp_path, 1)
    assert source.classes is None
    assert get_labels(source) == [None] * len(files)


def test_links_are_followed_but_cycles_are_not(tmp_path):
    write(tmp_path, "set/x/a.png", "elsewhere/b.png")
    (tmp_path / "set/x/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/itself.png").symlink_to(tmp_path / "set/itself.png")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "set/y").symlink_to(tmp_path / "elsewhere")
    assert get_names(FolderSource(tmp_path / "set", 1)) == ["x/a.png", "y/b.png"]


def test_error_for_no_images_lists_the_other_files(tmp_path):
    for name in ("a.dcm", "b.DCM", "README"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        UserError, match=r"but 3 other files \(2 \.dcm, 1 without suffix\)\. Give .* types: \.jpg, "
    ):
        FolderSource(tmp_path, 1)
    with pytest.raises(UserError, match="Cannot read the folder"):
        FolderSource(tmp_path / "missing", 1)


def test_removed_file_is_a_bad_sample(tmp_path):
    write(tmp_path, "a.png", "b.png")
    source = FolderSource(tmp_path, 1)
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadSampleError, match="cannot be read"):
        source.image(1)
    with pytest.raises(IndexError):
        source.image(2)


def test_fingerprint_changes_with_names_and_sizes(tmp_path):
    write(tmp_path, "a.png", "b.png")
    first = FolderSource(tmp_path, 1).fingerprint()
    assert FolderSource(tmp_path, 1).fingerprint() == first
    assert len(first) == 16
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    second = FolderSource(tmp_path, 1).fingerprint()
    with (tmp_path / "c.png").open("ab") as file:
        file.write(b"more")
    assert len({first, second, FolderSource(tmp_path, 1).fingerprint()}) == 3


def test_pickled_source_is_equal(tmp_path):
    write(tmp_path, "cat/ü.png", "dog/b.png")
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path, 3)))
    assert get_names(source) == ["cat/ü.png", "dog/b.png"]
    assert source.image(1).pixels.shape == (3, 3, 4)


def write_list(root: Path, text: str) -> Path:
    (root / "list.txt").write_text(text)
    return root / "list.txt"


def test_list_paths_are_relative_to_the_list(tmp_path):
    write(tmp_path, "a.png", "sub/b c.png")
    source = ListSource(write_list(tmp_path, "# two images\nsub/b c.png\n\n  \na.png\r\n"), 1)
    assert get_names(source) == ["sub/b c.png", "a.png"]
    assert [int(source.image(i).pixels[0, 0, 0]) for i in range(2)] == [1, 0]
    assert (source.classes, get_labels(source)) == (None, [None, None])


def test_list_with_labels(tmp_path):
    numbered = ListSource(write_list(tmp_path, "a.png\t7\nb.png\t 0\n"), 1)
    assert (numbered.classes, get_labels(numbered)) == (None, [7, 0])
    named = ListSource(write_list(tmp_path, "a.png\tdog\nb.png\tcat\nc.png\t3\n"), 1)
    assert named.classes == ["3", "cat", "dog"]
    assert get_labels(named) == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.png\t1\nb.png\n", "labels for 1 of 2 images. Label all"), ("# nothing\n", "names no image")],
)
def test_invalid_lists_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        ListSource(write_list(tmp_path, text), 1)


def test_list_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="as UTF-8 text"):
        ListSource(tmp_path / "list.txt", 1)


def test_files_missing_from_a_list_are_bad_samples(tmp_path):
    source = ListSource(write_list(tmp_path, "missing.png\nnull\0byte.png\n"), 1)
    before = source.fingerprint()
    for index in range(2):
        with pytest.raises(BadSampleError, match="cannot be read"):
            source.image(index)
    write(tmp_path, "missing.png")
    assert source.fingerprint() != before
