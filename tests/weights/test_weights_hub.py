"""Push to a folder with the layout of huggingface_hub's cache, and load from there."""

import hashlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from transformers import ViTModel
from weights_models import autoencoder, random_images

from quarterview.errors import UserError
from quarterview.weights import export_timm, export_transformers, push


@dataclass
class LocalHub:
    """A Hub in a folder: ``models--OWNER--NAME/{blobs,refs,snapshots}``."""

    folder: Path
    requests: list = field(default_factory=list)

    def create_repo(self, repo_id, *, private, exist_ok):
        self.requests.append((repo_id, private, exist_ok))
        (self.folder / f"models--{repo_id.replace('/', '--')}" / "refs").mkdir(
            parents=True, exist_ok=exist_ok
        )

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        repository = self.folder / f"models--{repo_id.replace('/', '--')}"
        commit = hashlib.sha1(commit_message.encode()).hexdigest()
        for name in allow_patterns:
            blob = repository / "blobs" / hashlib.sha256((Path(folder_path) / name).read_bytes()).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(folder_path) / name, blob)
            link = repository / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (repository / "refs" / "main").write_text(commit)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@torch.no_grad()
def test_timm_loads_a_pushed_export(tmp_path):
    model, hub = autoencoder(), LocalHub(tmp_path / "hub")
    export_timm(model, tmp_path / "out")
    files = push(tmp_path / "out", "me/mine", client=hub)
    assert files == ["README.md", "config.json", "model.safetensors", "quarterview.json"]
    assert hub.requests == [("me/mine", False, True)]
    theirs = timm.create_model("hf-hub:me/mine", pretrained=True, cache_dir=tmp_path / "hub").eval()
    tokens = model.encode(random_images(model))
    torch.testing.assert_close(theirs.forward_features(random_images(model)), tokens, rtol=0, atol=1e-5)


@torch.no_grad()
def test_transformers_loads_a_part_of_a_pushed_export(tmp_path):
    model, hub = autoencoder(), LocalHub(tmp_path / "hub")
    export_transformers(model, tmp_path / "out")
    push(tmp_path / "out", "me/mine.v1", private=True, client=hub)
    assert hub.requests == [("me/mine.v1", True, True)]
    theirs = ViTModel.from_pretrained(
        "me/mine.v1",
        subfolder="vit",
        add_pooling_layer=False,
        cache_dir=tmp_path / "hub",
        local_files_only=True,
    ).eval()
    tokens = model.encode(random_images(model))
    found = theirs(random_images(model)).last_hidden_state
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)


def test_only_files_of_the_export_are_uploaded(tmp_path):
    hub = LocalHub(tmp_path / "hub")
    export_timm(autoencoder(), tmp_path / "out")
    (tmp_path / "out" / "secret.txt").write_text("mine")
    push(tmp_path / "out", "me/mine", client=hub)
    assert not list((tmp_path / "hub").rglob("secret.txt"))


@pytest.mark.parametrize("name", ["mine", "me/", "/mine", "me/my/mine", "me/mi ne", "../mine", "me/.."])
def test_an_invalid_repository_name_is_rejected_before_any_request(tmp_path, name):
    hub = LocalHub(tmp_path / "hub")
    export_timm(autoencoder(), tmp_path / "out")
    with pytest.raises(UserError, match=r"Give OWNER/NAME\."):
        push(tmp_path / "out", name, client=hub)
    assert hub.requests == []


def test_an_incomplete_export_is_rejected(tmp_path):
    export_timm(autoencoder(), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"The export in .* lacks model\.safetensors"):
        push(tmp_path / "out", "me/mine", client=LocalHub(tmp_path / "hub"))


def test_the_local_hub_has_the_signatures_of_huggingface_hub():
    """The local stand-in has the signatures of HfApi."""
    import inspect

    for name in ("create_repo", "upload_folder"):
        wanted = set(inspect.signature(getattr(LocalHub, name)).parameters)
        assert wanted <= set(inspect.signature(getattr(HfApi, name)).parameters)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    export_timm(autoencoder(), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'quarterview\[hub\]'"):
        push(tmp_path / "out", "me/mine")
