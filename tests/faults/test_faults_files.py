"""Tests of malicious files: nothing is executed, nothing hangs, and bad files are reported."""

import io
import json
import os
import pickle
import shutil
import socket
import struct
import tempfile
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import quarterview as qv
from quarterview import recipes
from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.base import BadSampleError, ConcatenatedSource, get_remarks
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.data.sources.open import open_source
from quarterview.errors import UserError
from quarterview.training import checkpoint
from quarterview.weights.convert.foreign import read_card_license
from quarterview.weights.loading import METADATA_KEY, make_metadata, read_weights


class Hostile:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@contextmanager
def within(seconds: float):
    """Fail if the context takes more than `seconds` of CPU time, or minutes of wall time."""
    began, worked = time.monotonic(), time.process_time()
    yield
    assert time.process_time() - worked < seconds
    assert time.monotonic() - began < 120


# ---------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"]
)
def test_yaml_tags_in_a_recipe_are_never_executed(tmp_path, tag):
    file, trace = tmp_path / "x.yaml", tmp_path / "trace"
    file.write_text(f"model: !!python/{tag} [{trace}]\n")
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor for the tag"):
        recipes.read_pretrain_recipe(str(file))
    assert not trace.exists()
    file.write_text(f"model: !!python/object/apply:os.mkdir [{trace}]\n")
    yaml.unsafe_load(file.read_text())  # it would have
    assert trace.exists()


LAUGHS = "\n".join(f"  - &x{i + 1} [{', '.join(10 * [f'*x{i}'])}]" for i in range(12))


MERGES = "\n".join(f"x{i + 1}: &x{i + 1} {{<<: [{', '.join(10 * [f'*x{i}'])}]}}" for i in range(12))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"seed:\n  - &x0 ha\n{LAUGHS}", "^Recipe .*: The value of seed is nested"),
        (f"data:\n  - &x0 ha\n{LAUGHS}", "^Recipe .*: The value of data is nested"),
        ("data: &a [*a]", "is nested"),
        ("x0: &x0 {a: 1}\n" + MERGES, "merge keys .* are not supported"),
        ("[" * 50_000, "not valid YAML"),
        ("epochs: 1" + "0" * 400, "--epochs 1000.* is out of range"),
        ("epochs: 1" + "0" * 5000, "not valid YAML"),
        ("epochs: 1e300", "--epochs .* Give a number above 0 and of at most 1e.09"),
        ("out: 2001-99-99", "not valid YAML"),
        ("out: !!binary é", "not valid YAML"),
        ("out: !!timestamp x", "not valid YAML"),
        ("compile: !!bool x", "not valid YAML"),
        ("model: mae_vit_" + "9" * 5000 + "x1x1_patch4", "Unknown model"),
        ("# " + "x" * 1_000_000, "longer than 1,000,000 bytes"),
        ("seed: 0\0", "not valid YAML"),
    ],
)
def test_a_malicious_recipe_is_refused_quickly(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text, "utf-8")
    with within(10), pytest.raises(UserError, match=said) as caught:
        recipes.read_pretrain_recipe(str(tmp_path / "x.yaml"))
    assert len(str(caught.value)) < 10_000


# ---------------------------------------------------------------------- weights


def two(**changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


FALSE_HEADERS = {
    "a length beyond the file": ({"a": two()}, 8, 10**6),
    "an enormous length": ({"a": two()}, 8, 2**60),
    "the greatest length": ({"a": two()}, 8, 2**64 - 1),
    "offsets beyond the end": ({"a": two(shape=[200], data_offsets=[0, 800])}, 8, None),
    "offsets that overlap": ({"a": two(), "b": two(data_offsets=[4, 12])}, 12, None),
    "offsets with a hole": ({"a": two(), "b": two(data_offsets=[16, 24])}, 24, None),
    "negative offsets": ({"a": two(data_offsets=[-8, 0])}, 8, None),
    "offsets in the wrong order": ({"a": two(data_offsets=[8, 0])}, 8, None),
    "a negative shape": ({"a": two(shape=[-2])}, 8, None),
    "a shape that overflows": ({"a": two(shape=[2**40, 2**40])}, 8, None),
    "an unknown type": ({"a": two(dtype="F99")}, 8, None),
    "another type than the bytes": ({"a": two(dtype="I64")}, 8, None),
    "a name twice": (b'{"a":%b,"a":%b}' % (2 * (json.dumps(two()).encode(),)), 8, None),
    "endless brackets": (b'{"a":' + b"[" * 100_000, 0, None),
    "a name that is no UTF-8": (b'{"\xff":1}', 0, None),
    "a table of positions without numbers": (
        {
            "cls_token": two(shape=[1, 1, 0], data_offsets=[0, 0]),
            "pos_embed": two(shape=[1, 10**12, 0], data_offsets=[0, 0]),
            "patch_embed.proj.weight": two(shape=[0, 3, 4, 4], data_offsets=[0, 0]),
            "blocks.0.mlp.fc1.weight": two(shape=[0, 0], data_offsets=[0, 0]),
        },
        0,
        None,
    ),
}


@pytest.mark.parametrize("what", FALSE_HEADERS)
def test_an_invalid_safetensors_header_is_refused(tmp_path, what):
    header, body, length = FALSE_HEADERS[what]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))
    with within(5), pytest.raises(UserError, match=r"x\.safetensors.*\. Give "):
        read_weights(file)


def larger(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of one number whose header claims many."""
    return torch.zeros(1).expand(shape)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["larger", "sparse", "meta"])
def test_tensors_larger_than_their_file_are_refused(tmp_path, kind):
    make = {
        "larger": lambda: larger((1_000_000, 1_000_000)),
        "sparse": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10**8, 10**8)),
        "meta": lambda: torch.empty(10**6, 10**6, device="meta"),
    }
    torch.save({"model": {"cls_token": make[kind]()}}, tmp_path / "x.pth")
    with within(5), pytest.raises(UserError, match=r"Save plain tensors\."):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "mae_vit_100000x999x10_patch16"},
        {"decoder_depth": 999, "decoder_width": 100_000},
        {"decoder_depth": 10**9},
        {"image_size": [10**6, 10**6]},
        {"in_chans": 10**9},
        {"model": "mae_vit_8x1x1_patch4"},
    ],
    ids=str,
)
def test_a_header_of_another_model_is_refused_quickly(tmp_path, changes):
    model = qv.create_model("mae_vit_4x1x1_patch4", image_size=8, decoder_width=4, decoder_heads=1)
    config = {**asdict(model.config), **changes}
    text = json.dumps(
        {"kind": json.loads(make_metadata(model.config)[METADATA_KEY])["kind"], "config": config}
    )
    save_file(model.state_dict(), tmp_path / "x.safetensors", {METADATA_KEY: text, "format": "pt"})
    with within(20), pytest.raises(UserError):
        qv.load(tmp_path / "x.safetensors")


def test_a_pipe_named_as_weights_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with within(10), pytest.raises(UserError):
        qv.load(tmp_path)


@pytest.mark.parametrize("date", ["2024-13-01", "x: &x {<<: *x}"])
def test_an_invalid_model_card_does_not_prevent_loading(tmp_path, date):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\ndate: {date}\n---\n")
    assert read_card_license(tmp_path) == ""


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "gone.safetensors"])
def test_an_index_can_only_name_files_in_its_folder(tmp_path, name):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"not in the folder\. Repair the index\.|Give all of its files\."):
        read_weights(folder)


@pytest.mark.parametrize("state", ["[]", "3", "{", "[" * 100_000, '"text"'])
def test_a_checkpoint_with_an_invalid_state_is_damaged(tmp_path, state):
    values = {"model": "mae_vit_4x1x1_patch4", "image_size": 8, "decoder_width": 4, "decoder_depth": 1}
    model = qv.create_model(**values, decoder_heads=1)
    folder = checkpoint.save(tmp_path, 3, {"model": model.state_dict()}, {"step": 3}, {})
    assert checkpoint.load(folder).state == {"step": 3}
    (folder / "state.json").write_text(state)
    with pytest.raises(UserError, match="step-00000003 is damaged"):
        checkpoint.load(folder)


# ---------------------------------------------------------------------- arrays


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_pickle_in_an_array_is_never_loaded(tmp_path, suffix):
    file, trace = tmp_path / f"x.{suffix}", tmp_path / "trace"
    objects = np.array([Hostile(trace)], object)
    np.save(file, objects) if suffix == "npy" else np.savez(file, images=objects)
    with pytest.raises(UserError, match="without pickles"):
        ArraySource(file, 3)
    assert not trace.exists()
    found = np.load(file, allow_pickle=True)
    _ = found if suffix == "npy" else found["images"]  # it would have
    assert trace.exists()


def test_a_pickle_named_as_an_array_is_never_loaded(tmp_path):
    (tmp_path / "x.npy").write_bytes(pickle.dumps(Hostile(tmp_path / "trace")))
    with pytest.raises(UserError, match="without pickles"):
        ArraySource(tmp_path / "x.npy", 3)
    assert not (tmp_path / "trace").exists()


def test_an_array_larger_than_memory_is_refused(tmp_path):
    array = io.BytesIO()
    np.save(array, np.zeros((2, 8, 8), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            member.write(array.getvalue())
        archive.filelist[0].file_size = 1 << 46  # what a bomb would honestly say
    with (
        within(1),
        pytest.raises(UserError, match="has an array of 70,368,744,177,664 bytes"),
    ):
        ArraySource(tmp_path / "x.npz", 3)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_arrays_raise_user_errors(tmp_path, suffix):
    sound = io.BytesIO()
    pixels = np.zeros((3, 4, 4), np.uint8)
    np.save(sound, pixels) if suffix == "npy" else np.savez_compressed(sound, images=pixels)
    file, dice = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(sound.getvalue())
        for place in dice.integers(0, len(data), 3):
            data[place] = dice.integers(256)
        file.write_bytes(data[: dice.integers(1, len(data) + 1)])
        try:
            source = ArraySource(file, 1)
            assert source.image(0).pixels.shape[0] == 1
        except (UserError, BadSampleError):
            continue


# ---------------------------------------------------------------------- folders


def picture(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path, "PNG")


def names(source: FolderSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def test_folders_that_link_to_one_another_are_read_once(tmp_path):
    folders = [tmp_path / f"{letter}" for letter in "abcdefghijkl"]
    for folder in folders:
        picture(folder / "x.png")
        for other in folders:
            (folder / f"to {other.name}").symlink_to(other)
    with within(5):  # there are a billion ways through them
        source = FolderSource(tmp_path, 1)
    assert len(source) == 12
    assert source.skipped == {"folder that was already read": 12 * 12 - 11 + 11}
    assert (
        get_remarks(ConcatenatedSource([source, source]))
        == [f"skipped in {tmp_path}: 144 × folder that was already read"] * 2
    )


def test_folders_may_be_nested_deeper_than_the_recursion_limit(tmp_path):
    with tempfile.TemporaryDirectory() as top:
        deepest = Path(top)
        for _ in range(1200):
            deepest = deepest / "d"
            deepest.mkdir()
        picture(deepest / "x.png")
        source = FolderSource(top, 1)
        assert len(source) == 1
        assert source.image(0).pixels.shape == (1, 8, 8)
        while deepest != Path(top):
            shutil.rmtree(deepest)
            deepest = deepest.parent


def odd(folder: Path) -> dict[str, Path]:
    """Create a pipe, a socket, a link to an endless device, and a broken link."""
    os.mkfifo(folder / "pipe.png")
    place, here = folder / "socket.png", Path.cwd()
    os.chdir(folder)  # a socket's name may be no longer than 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket.png")
    finally:
        os.chdir(here)
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    return {"a pipe": folder / "pipe.png", "a socket": place, "a device": folder / "zero.png"}


def test_special_files_in_a_folder_are_skipped_and_counted(tmp_path):
    picture(tmp_path / "x.png")
    kinds = odd(tmp_path)
    with within(5):
        source = FolderSource(tmp_path, 1)
    assert names(source) == ["x.png"]
    assert source.skipped == {**dict.fromkeys(kinds, 1), "broken link": 1}


def test_special_files_in_a_list_are_bad_samples(tmp_path):
    picture(tmp_path / "x.png")
    kinds = odd(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{path.name}\n" for path in kinds.values()) + "x.png\n")
    source = ListSource(tmp_path / "list.txt", 1)
    for index, kind in enumerate(kinds):
        reason = "No such device" if kind == "a socket" else f"it is {kind}"
        with within(5), pytest.raises(BadSampleError, match=rf"cannot be read: .*{reason}"):
            source.image(index)
    assert source.image(3).pixels.shape == (1, 8, 8)


def test_a_pipe_that_replaces_an_image_does_not_hang(tmp_path):
    picture(tmp_path / "x.png")
    source = FolderSource(tmp_path, 1)
    (tmp_path / "x.png").unlink()
    os.mkfifo(tmp_path / "x.png")
    with within(5), pytest.raises(BadSampleError, match="it is a pipe"):
        source.image(0)


@pytest.mark.parametrize("name", ["store.json", "x.parquet"])
def test_a_pipe_in_a_folder_does_not_hang(tmp_path, name):
    picture(tmp_path / "x.png")
    os.mkfifo(tmp_path / name)
    with within(5):
        assert len(open_source(str(tmp_path), 1)) == 1


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 40)  # without a byte on the disk
    with within(5), pytest.raises(BadSampleError, match="it has 1,099,511,627,776 bytes, more than"):
        FolderSource(tmp_path, 1).image(0)


def test_a_file_without_permission_is_a_bad_sample():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        picture(Path(folder) / "x.png")
        picture(Path(folder) / "y.png")
        (Path(folder) / "x.png").chmod(0)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)  # root may read anything
        try:
            source = FolderSource(folder, 1)
            with pytest.raises(BadSampleError, match="Permission denied"):
                source.image(0)
            assert source.image(1).pixels.shape == (1, 8, 8)
        finally:
            os.seteuid(before)


# ---------------------------------------------------------------------- names that are no UTF-8


def test_file_names_that_are_not_utf_8_are_supported(tmp_path, capfd):
    data = os.fsencode(tmp_path) + b"/photos \xe9"
    for number in range(24):
        folder = data + (b"/caf\xe9" if number % 2 else b"/th\xe9")
        Path(os.fsdecode(folder)).mkdir(parents=True, exist_ok=True)
        with open(folder + b"/\xff%02d.png" % number, "wb") as file:  # noqa: PTH123 (a name of bytes)
            if number != 7:
                Image.new("RGB", (16, 16), (number, 0, 0)).save(file, "PNG")
    config = qv.PretrainConfig.from_flags(
        **{"model": "mae_vit_32x1x1_patch4", "image_size": 16, "decoder_width": 32, "decoder_depth": 1},
        **{"decoder_heads": 1, "batch_size": 8, "holdout": 4, "workers": 0, "precision": "fp32", "lr": 1e-3},
        **{"data": (os.fsdecode(data),), "out": str(tmp_path / "run é")},
        **{"steps": 6, "max_bad_samples": 0.5, "cache": "none", "log_every": 1},
    )
    run = qv.pretrain(config)
    assert run.status == "complete"
    assert "\\xe9/\\xff07.png: the file is empty" in capfd.readouterr().out
    rows = [json.loads(line) for line in (run.folder / "bad_samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["name"] for row in rows] == ["caf\\xe9/\\xff07.png"]
    rows[0]["name"].encode()  # no half of a character in it
    for path in run.folder.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            path.read_bytes().decode()
    assert recipes.read_pretrain_recipe(str(run.folder / "config.yaml")) == config
    assert qv.pretrain(config) == run  # it is found again, and complete


def test_a_run_folder_that_is_not_utf_8_is_refused(tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/run \xe9")
    with pytest.raises(UserError, match=r"is not UTF-8, which TensorBoard needs\. Give --out"):
        qv.pretrain(data=("shapes:20",), out=out)
