"""The commands export and push: their output, exit codes and error messages."""

import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from weights_models import autoencoder, classifier, random_images

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


def test_export_to_timm_is_replaced_by_export_to_safetensors(call, file, tmp_path):
    code, output = call("export", file, "--to", "timm", "--out", tmp_path / "out")
    assert code == 0
    assert "tokens: differs from our model's by at most" in output
    assert f"timm {timm.__version__}" in output
    images = random_images(autoencoder())
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected, found = autoencoder().encode(images), theirs.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    code, _ = call("export", file, "--to", "safetensors", "--out", tmp_path / "out")
    assert code == 0
    assert files(tmp_path / "out") == ["README.md", "model.safetensors", "quarterview.json"]
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, autoencoder().state_dict()[name])


def test_parts_of_an_export_to_transformers(call, file, tmp_path):
    words = ("export", file, "--to", "transformers", "--out", tmp_path / "out")
    assert call(*words, "--parts", "vit")[0] == 0
    assert files(tmp_path / "out") == ["README.md", "quarterview.json", "vit"]
    code, output = call(*words, "--parts", "classifier")
    assert code == 2
    assert "Use --parts mae or vit, or --to timm" in output


@pytest.mark.slow
@pytest.mark.parametrize(("to", "made"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_export_a_classifier_to_onnx_and_torch_export(call, tmp_path, to, made):
    export_safetensors(classifier(), tmp_path / "mine.safetensors")
    code, output = call("export", tmp_path / "mine.safetensors", "--to", to, "--out", tmp_path / "out")
    assert code == 0
    assert "logits: differs" in output
    assert files(tmp_path / "out") == sorted(["README.md", made, "quarterview.json"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "onx", "--out", "out"], "Did you mean 'onnx'?"),
        (
            ["--to", "timm", "--out", "."],
            "contains files that are not of an export, such as mine.safetensors",
        ),
        (
            ["--to", "timm", "--out", "out", "--parts", "vit"],
            "--parts vit is not supported with --to timm. Remove it, or use",
        ),
        (["--to", "timm", "--out", "out", "--ema"], "without a moving average. Give a run"),
    ],
)
def test_invalid_arguments_exit_with_2_and_write_nothing(call, file, monkeypatch, flags, words):
    monkeypatch.chdir(file.parent)
    code, output = call("export", file, *flags)
    assert code == 2
    assert words in output
    assert files(file.parent) == ["mine.safetensors"]


def test_export_config_rejects_unknown_formats(tmp_path):
    with pytest.raises(UserError, match="Unknown value of --to: 'jax'"):
        ExportConfig("run", "jax", str(tmp_path))  # type: ignore[arg-type]


def test_the_license_flag_is_written_to_the_model_card(call, file, tmp_path):
    code, output = call("export", file, "--to", "timm", "--out", tmp_path / "out", "--license", "MIT")
    assert code == 0
    assert "note" not in output
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("transformers", "transformers", "transformers"),
        ("onnx", "onnxruntime", "onnx"),
        ("onnx", "onnxscript", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(call, file, tmp_path, monkeypatch, to, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    code, output = call("export", file, "--to", to, "--out", tmp_path / "out")
    assert code == 2
    assert f"pip install 'quarterview[{extra}]'" in output
    assert not (tmp_path / "out").exists()


def test_push_needs_an_export_and_a_repository_name(call, file, tmp_path):
    call("export", file, "--to", "safetensors", "--out", tmp_path / "out")
    for words, message in (
        ((tmp_path, "me/mine"), "is not an export. Give a folder that quarterview export wrote."),
        ((tmp_path / "out", "mine"), "The name of the Hub repository is 'mine'. Give OWNER/NAME."),
    ):
        code, text = call("push", *words)
        assert code == 2
        assert message in text
