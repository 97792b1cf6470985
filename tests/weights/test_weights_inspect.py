"""Descriptions of weights, and comparisons of two sets of weights."""

import pytest
import torch

from quarterview.commands.inspect import main
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.training import checkpoint
from quarterview.weights.config import InspectConfig
from quarterview.weights.inspect import compare_weights, count_parameters, inspect_weights
from quarterview.weights.loading import make_metadata, read_weights


def save_run(folder, model):
    tensors = {"model": model.state_dict()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {"step": 1}, make_metadata(model.config))
    return str(folder)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(
        "mae_vit_tiny_patch8", image_size=32, decoder_width=32, decoder_depth=1, decoder_heads=4
    )


def describe(source):
    return " ".join(f"{name} {value}" for name, value in inspect_weights(str(source)))


def test_inspect_an_autoencoder(model, tmp_path):
    source = save_run(tmp_path / "run", model)
    shown = describe(source)
    for words in (
        "Quarterview's masked autoencoder",
        "192 wide, 12 blocks, 3 heads",
        "32×32, 3 channels, 16 patches of 8×8",
        "32 wide, 1 blocks, 4 heads",
        "4 patches visible",
        "pixels normalised by patch",
        "reconstruct",
    ):
        assert words in shown
    counted = count_parameters(read_weights(source).tensors)
    assert list(counted) == ["embedding", "blocks", "decoder"]
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


def test_inspect_a_model_that_does_not_predict_pixels(tmp_path):
    small = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
    model = create_model("mae_vit_tiny_patch8", image_size=32, **small, target="hog")
    shown = describe(save_run(tmp_path / "run", model))
    assert (
        "; not reconstruct, because oriented gradients (HOG) in cells of 8 × 8 pixels are not images" in shown
    )


def test_inspect_an_encoder_and_a_classifier(model, tmp_path):
    names = ("decoder", "mask_token")
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith(names)}, tmp_path / "x.pth")
    shown = describe(tmp_path / "x.pth")
    assert "decoder none" in shown
    assert "pretrain --init-from with a new decoder; not reconstruct" in shown
    assert "ImageNet's are assumed" in shown
    config = ClassifierConfig("mae_vit_tiny_patch8", (32, 32), classes=3, class_names=("a", "b", "c"))
    shown = describe(save_run(tmp_path / "ft", Classifier(config)))
    assert "3 classes: a, b, c, read from the mean of the patch tokens" in shown


def test_compare_equal_and_different_weights(model, tmp_path, capsys):
    one, same = save_run(tmp_path / "one", model), save_run(tmp_path / "same", model)
    difference = compare_weights(one, same)
    assert difference.is_identical
    assert difference.config_rows == difference.mismatched_tensors == []
    assert main(InspectConfig(one, same), []) == 0
    assert "what they are" not in capsys.readouterr().out
    with torch.no_grad():
        model.blocks[3].mlp.fc1.weight[5, 7] += 0.25
    other = save_run(tmp_path / "other", model)
    assert not compare_weights(one, other).is_identical
    assert main(InspectConfig(one, other), []) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "blocks" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["blocks", "145", "1", "0.25", "0"]


def test_compare_models_with_different_decoders(model, tmp_path, capsys):
    one = save_run(tmp_path / "one", model)
    torch.manual_seed(0)
    wide = {"decoder_width": 48, "decoder_depth": 2, "decoder_heads": 4, "norm_pix_loss": False}
    other = save_run(tmp_path / "other", create_model("mae_vit_tiny_patch8", image_size=32, **wide))
    assert not compare_weights(one, other).is_identical
    assert main(InspectConfig(one, other), []) == 0
    shown = capsys.readouterr().out
    assert "decoder_pred.bias" not in shown  # has the same shape in both
    assert "decoder_embed.weight: 32×192 in the first, 48×192 in the second" in shown
    assert "decoder_blocks.1.attn.proj.bias: missing in the first, 48 in the second" in shown
    assert "norm_pix_loss" in shown
