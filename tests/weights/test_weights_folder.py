"""The folder of an export: written completely or not at all, and never over other files."""

import json

import pytest
import torch
from weights_models import autoencoder

from quarterview.errors import RunError, UserError
from quarterview.weights import export_safetensors, export_timm, export_transformers
from quarterview.weights.export import timm as to_timm
from quarterview.weights.export.verify import (
    TOLERANCE,
    check_tolerance,
    compute_relative_difference,
    make_random_images,
)


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_record_lists_the_written_files(tmp_path):
    result = export_timm(autoencoder(), tmp_path)
    record = json.loads((tmp_path / "quarterview.json").read_text("utf-8"))
    assert record["files"] == ["README.md", "config.json", "model.safetensors"]
    assert list_files(tmp_path) == sorted([*record["files"], "quarterview.json"])
    assert record["target"] == "timm"
    assert record["differences"] == result.differences
    assert record["versions"] == result.versions


def test_an_earlier_export_is_replaced_completely(tmp_path):
    export_transformers(autoencoder(), tmp_path)
    (tmp_path / ".quarterview.json.partial").mkdir()  # left behind by a killed export
    (tmp_path / ".quarterview.json.partial" / "half").write_text("x")
    export_timm(autoencoder(), tmp_path)
    assert list_files(tmp_path) == ["README.md", "config.json", "model.safetensors", "quarterview.json"]
    assert not (tmp_path / "mae").exists()


@pytest.mark.parametrize("name", ["notes.txt", "vit/notes.txt"])
def test_other_files_in_the_folder_are_never_removed(tmp_path, name):
    export_transformers(autoencoder(), tmp_path)
    (tmp_path / name).write_text("mine")
    before = list_files(tmp_path)
    with pytest.raises(UserError, match=f"contains files that are not of an export, such as {name}\\."):
        export_timm(autoencoder(), tmp_path)
    assert list_files(tmp_path) == before


def test_a_folder_with_other_files_and_a_file_are_rejected(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"contains files that are not of an export, such as README\.md\."):
        export_timm(autoencoder(), tmp_path)
    with pytest.raises(UserError, match=r"is a file\. Give a new folder"):
        export_timm(autoencoder(), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_failure_keeps_an_earlier_export_and_creates_no_folder(tmp_path, monkeypatch):
    export_timm(autoencoder(), tmp_path / "old")
    before = {name: (tmp_path / "old" / name).read_bytes() for name in list_files(tmp_path / "old")}
    wrong = {**to_timm.make_model_args(autoencoder()), "num_heads": 4}
    # As if another version of timm used another number of heads.
    monkeypatch.setattr(to_timm, "make_model_args", lambda model: wrong)
    for folder in ("old", "new"):
        with pytest.raises(RunError, match=r"The outputs of the export to timm differ .*: tokens by"):
            export_timm(autoencoder(), tmp_path / folder)
    assert {name: (tmp_path / "old" / name).read_bytes() for name in list_files(tmp_path / "old")} == before
    assert not (tmp_path / "new").exists()


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write the export"):
        export_safetensors(autoencoder(), tmp_path / "file" / "mine.safetensors")


def test_the_difference_is_relative_to_the_largest_value():
    ours = torch.tensor([1.0, -200.0])
    assert compute_relative_difference(ours, ours) == 0
    assert compute_relative_difference(ours, ours + torch.tensor([0.0, 0.02])) == pytest.approx(
        1e-4, rel=1e-3
    )
    assert compute_relative_difference(torch.zeros(2), torch.full((2,), 0.5)) == 0.5
    for other in (ours[:1], ours * torch.nan, ours * torch.inf):
        assert compute_relative_difference(ours, other) == float("inf")


def test_differences_above_the_tolerance_are_an_error():
    check_tolerance("timm", {"tokens": TOLERANCE})
    for value in (1.1 * TOLERANCE, float("inf"), float("nan")):
        with pytest.raises(RunError, match="logits by"):
            check_tolerance("timm", {"tokens": 0.0, "logits": value})


def test_random_images_are_reproducible_and_leave_the_global_generator_unchanged():
    state = torch.get_rng_state()
    config = autoencoder().config
    assert torch.equal(make_random_images(config, 3), make_random_images(config, 3))
    torch.manual_seed(0)
    one = torch.rand(1)
    torch.manual_seed(0)
    make_random_images(config, 3)
    assert torch.equal(torch.rand(1), one)
    torch.set_rng_state(state)
