"""The command, and what it says."""

import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from weights_models import autoencoder, classifier, pictures

from quarterview import cli
from quarterview.errors import UserError
from quarterview.weights import export_safetensors
from quarterview.weights.config import ExportConfig


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*words):
        try:
            code = cli.run([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


@pytest.fixture
def file(tmp_path):
    export_safetensors(autoencoder(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_timm_and_over_it_safetensors(call, file, tmp_path):
    code, said = call("export", file, "--to", "timm", "--out", tmp_path / "out")
    assert code == 0
    assert "tokens: differs from our forward by at most" in said
    assert f"timm {timm.__version__}" in said
    images = pictures(autoencoder())
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected, found = autoencoder().encode(images), theirs.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    code, _ = call("export", file, "--to", "safetensors", "--out", tmp_path / "out")
    assert code == 0
    assert files(tmp_path / "out") == ["README.md", "model.safetensors", "quarterview.json"]
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, autoencoder().state_dict()[name])


def test_parts_of_transformers(call, file, tmp_path):
    words = ("export", file, "--to", "transformers", "--out", tmp_path / "out")
    assert call(*words, "--parts", "vit")[0] == 0
    assert files(tmp_path / "out") == ["README.md", "quarterview.json", "vit"]
    code, said = call(*words, "--parts", "classifier")
    assert code == 2
    assert "accepted: the part mae or vit" in said


@pytest.mark.slow
@pytest.mark.parametrize(("to", "made"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_a_classifier_as_a_graph(call, tmp_path, to, made):
    export_safetensors(classifier(), tmp_path / "mine.safetensors")
    code, said = call("export", tmp_path / "mine.safetensors", "--to", to, "--out", tmp_path / "out")
    assert code == 0
    assert "logits: differs" in said
    assert files(tmp_path / "out") == sorted(["README.md", made, "quarterview.json"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "onx", "--out", "out"], "Did you mean 'onnx'?"),
        (["--to", "timm", "--out", "."], "holds something else than an export (mine.safetensors)"),
        (
            ["--to", "timm", "--out", "out", "--parts", "vit"],
            "--parts vit does not go with --to timm. Remove it",
        ),
        (["--to", "timm", "--out", "out", "--ema"], "accepted with ema: a run"),
    ],
)
def test_wrong_requests_end_with_2_and_write_nothing(call, file, monkeypatch, flags, words):
    monkeypatch.chdir(file.parent)
    code, said = call("export", file, *flags)
    assert code == 2
    assert words in said
    assert files(file.parent) == ["mine.safetensors"]


def test_the_configuration_checks_itself(tmp_path):
    with pytest.raises(UserError, match="unknown value of --to: 'jax'"):
        ExportConfig("run", "jax", str(tmp_path))  # type: ignore[arg-type]


def test_a_licence_that_the_start_does_not_state_is_asked_for(call, file, tmp_path):
    code, said = call("export", file, "--to", "timm", "--out", tmp_path / "out", "--licence", "MIT")
    assert code == 0
    assert "note" not in said
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("timm", "timm", "timm"),
        ("transformers", "transformers", "transformers"),
        ("onnx", "onnxruntime", "onnx"),
        ("onnx", "onnxscript", "onnx"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(call, file, tmp_path, monkeypatch, to, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # importing it then fails as if it were not there
    code, said = call("export", file, "--to", to, "--out", tmp_path / "out")
    assert code == 2
    assert f"pip install 'quarterview[{extra}]'" in said
    assert not (tmp_path / "out").exists()


def test_push_wants_an_export_and_a_name(call, file, tmp_path):
    call("export", file, "--to", "safetensors", "--out", tmp_path / "out")
    for words, said in (
        ((tmp_path, "me/mine"), "is no export; accepted: a folder that quarterview export wrote"),
        ((tmp_path / "out", "mine"), "'mine' is no name on the Hub; accepted: OWNER/NAME"),
    ):
        code, text = call("push", *words)
        assert code == 2
        assert said in text
