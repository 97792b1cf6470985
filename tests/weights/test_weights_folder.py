"""The folder of an export: whole or not at all, and never over something else."""

import json

import pytest
import torch
from weights_models import autoencoder

from quarterview.errors import RunError, UserError
from quarterview.weights import export_safetensors, export_timm, export_transformers
from quarterview.weights.export import timm as to_timm
from quarterview.weights.export.verify import LIMIT, accept, difference, random_images


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_record_lists_what_was_written(tmp_path):
    done = export_timm(autoencoder(), tmp_path)
    record = json.loads((tmp_path / "quarterview.json").read_text("utf-8"))
    assert record["files"] == ["README.md", "config.json", "model.safetensors"]
    assert content(tmp_path) == sorted([*record["files"], "quarterview.json"])
    assert record["target"] == "timm"
    assert record["differences"] == done.differences
    assert record["versions"] == done.versions


def test_an_older_export_is_replaced_whole(tmp_path):
    export_transformers(autoencoder(), tmp_path)
    (tmp_path / ".quarterview.json.partial").mkdir()  # a kill left it
    (tmp_path / ".quarterview.json.partial" / "half").write_text("x")
    export_timm(autoencoder(), tmp_path)
    assert content(tmp_path) == ["README.md", "config.json", "model.safetensors", "quarterview.json"]
    assert not (tmp_path / "mae").exists()


@pytest.mark.parametrize("where", ["notes.txt", "vit/notes.txt"])
def test_nothing_else_is_ever_removed(tmp_path, where):
    export_transformers(autoencoder(), tmp_path)
    (tmp_path / where).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"holds something else than an export .{where}."):
        export_timm(autoencoder(), tmp_path)
    assert content(tmp_path) == before


def test_a_folder_of_somebody_and_a_file_are_refused(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else than an export .README\.md."):
        export_timm(autoencoder(), tmp_path)
    with pytest.raises(UserError, match="is a file; accepted: a folder"):
        export_timm(autoencoder(), tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_failure_leaves_an_older_export_and_no_new_folder(tmp_path, monkeypatch):
    export_timm(autoencoder(), tmp_path / "old")
    before = {name: (tmp_path / "old" / name).read_bytes() for name in content(tmp_path / "old")}
    wrong = {**to_timm.model_args(autoencoder()), "num_heads": 4}
    monkeypatch.setattr(to_timm, "model_args", lambda model: wrong)  # as another timm might read them
    for folder in ("old", "new"):
        with pytest.raises(RunError, match=r"the export to timm, opened again, differs .*: tokens by"):
            export_timm(autoencoder(), tmp_path / folder)
    assert {name: (tmp_path / "old" / name).read_bytes() for name in content(tmp_path / "old")} == before
    assert not (tmp_path / "new").exists()


def test_a_disk_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        export_safetensors(autoencoder(), tmp_path / "file" / "mine.safetensors")


def test_the_difference_is_a_share_of_the_largest_number():
    ours = torch.tensor([1.0, -200.0])
    assert difference(ours, ours) == 0
    assert difference(ours, ours + torch.tensor([0.0, 0.02])) == pytest.approx(1e-4, rel=1e-3)
    assert difference(torch.zeros(2), torch.full((2,), 0.5)) == 0.5
    for other in (ours[:1], ours * torch.nan, ours * torch.inf):
        assert difference(ours, other) == float("inf")


def test_what_differs_too_much_is_not_let_out():
    accept("timm", {"tokens": LIMIT})
    for value in (1.1 * LIMIT, float("inf"), float("nan")):
        with pytest.raises(RunError, match="logits by"):
            accept("timm", {"tokens": 0.0, "logits": value})


def test_the_random_images_are_the_same_every_time_and_touch_no_generator():
    state = torch.get_rng_state()
    config = autoencoder().config
    assert torch.equal(random_images(config, 3), random_images(config, 3))
    torch.manual_seed(0)
    one = torch.rand(1)
    torch.manual_seed(0)
    random_images(config, 3)
    assert torch.equal(torch.rand(1), one)
    torch.set_rng_state(state)
