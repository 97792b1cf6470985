"""Adapt weights to other image sizes, patch sizes and channels, in comparison with timm."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv

import quarterview as qv
from quarterview import cli
from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.weights.loading import load_encoder_into, load_into
from quarterview.weights.resize import (
    adapt_channels,
    adapt_weights,
    compute_resize_matrix,
    resize_patch_embed,
    resize_pos_embed,
    resize_prediction_head,
)

SMALL = {"model": "mae_vit_32x2x4_patch4", "image_size": 16, "decoder_width": 32, "decoder_depth": 1}
HEADS = {"decoder_heads": 4}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- channels


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 9])
def test_rgb_kernels_are_adapted_as_in_timm(channels):
    kernel = random(8, 3, 4, 4)
    torch.testing.assert_close(adapt_channels(kernel, channels), adapt_input_conv(channels, kernel))


@settings(deadline=None, max_examples=30)
@given(before=st.integers(1, 5), times=st.integers(1, 3))
def test_images_with_equal_channels_are_embedded_as_before(before, times):
    kernel = random(8, before, 4, 4)
    ours = adapt_channels(kernel, before * times)
    image = random(1, 1, 4, 4, seed=1)
    one, other = (F.conv2d(image.expand(-1, weight.shape[1], -1, -1), weight) for weight in (kernel, ours))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (16, 14), (4, 6)])
def test_patch_embeddings_are_resized_as_in_timm(before, after):
    kernel = random(8, 3, before, before)
    torch.testing.assert_close(
        resize_patch_embed(kernel, after),
        resample_patch_embed(kernel, [after, after]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("before", "after"), [(4, 8), (4, 6), (8, 12)])
def test_an_enlarged_patch_is_embedded_as_before(before, after):
    kernel, patch = random(8, 3, before, before).double(), random(5, 3, before, before, seed=1).double()
    larger = (compute_resize_matrix(before, after) @ patch.flatten(2)[..., None])[..., 0].view(
        5, 3, after, after
    )
    torch.testing.assert_close(F.conv2d(larger, resize_patch_embed(kernel, after)), F.conv2d(patch, kernel))


def test_the_resize_matrix_is_that_of_torch():
    patch = random(1, 1, 4, 4)
    expected = F.interpolate(patch, (6, 6), mode="bicubic", antialias=True)
    found = (compute_resize_matrix(4, 6).float() @ patch.flatten()).view(1, 1, 6, 6)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("channels", "after"), [(3, 8), (1, 4), (1, 8), (6, 4)])
def test_the_resized_head_predicts_the_resized_patch(channels, after):
    weight, bias, token = random(4 * 4 * 3, 10), random(4 * 4 * 3, seed=1), random(10, seed=2)
    before = (weight @ token + bias).view(4, 4, 3).permute(2, 0, 1)  # [3, 4, 4]
    found = resize_prediction_head(weight, 4, 3, after, channels) @ token
    found = found + resize_prediction_head(bias, 4, 3, after, channels)
    expected = before.mean(dim=0, keepdim=True) if channels == 1 else before.repeat(channels // 3, 1, 1)
    if after != 4:
        expected = F.interpolate(expected[None], (after, after), mode="bicubic", antialias=True)[0]
    picture = found.view(after, after, channels).permute(2, 0, 1)
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- positions


def test_sincos_positions_are_recomputed_and_learned_ones_interpolated_as_in_timm():
    fixed, how = resize_pos_embed(get_2d_sincos_pos_embed(32, (4, 4)), (4, 4), (3, 7))
    assert how == "computed anew"
    assert torch.equal(fixed, get_2d_sincos_pos_embed(32, (3, 7)))
    table = random(1, 17, 32)
    found, how = resize_pos_embed(table, (4, 4), (3, 7))
    assert how == "interpolated"
    torch.testing.assert_close(found, resample_abs_pos_embed(table, [3, 7]))
    assert torch.equal(found[:, 0], table[:, 0])


def test_equal_configurations_change_nothing():
    model = create_model(**SMALL, **HEADS)
    tensors, notes = adapt_weights(dict(model.state_dict()), model.config, model.config)
    assert notes == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())


@settings(deadline=None, max_examples=25)
@given(
    patch=st.sampled_from([2, 4, 6, 8]),
    rows=st.integers(2, 5),
    columns=st.integers(2, 5),
    channels=st.integers(1, 5),
)
def test_all_combinations_of_changes_fit(patch, rows, columns, channels):
    theirs = create_model(**SMALL, **HEADS)
    changed = {
        "model": f"mae_vit_32x2x4_patch{patch}",
        "image_size": (rows * patch, columns * patch),
        "in_chans": channels,
    }
    ours = MAEConfig(**{**SMALL, **HEADS, **changed})
    tensors, _ = adapt_weights(dict(theirs.state_dict()), theirs.config, ours)
    model = MaskedAutoencoder(ours)
    model.load_state_dict(tensors)
    assert model(random(2, channels, *ours.image_size)).loss.isfinite()


# ---------------------------------------------------------------------- into an existing model


def save_state_dict(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


def test_the_encoder_of_a_classifier_is_loaded_without_its_head(tmp_path):
    torch.manual_seed(0)
    config = ClassifierConfig("mae_vit_tiny_patch4", (16, 16), classes=5)
    source = save_state_dict(Classifier(config), tmp_path / "x.pt")
    ours = create_model("mae_vit_tiny_patch4", image_size=16, decoder_width=32, decoder_depth=1, **HEADS)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    notes = load_into(ours, source)
    assert "the classification head is not loaded" in notes
    assert "the final norm is randomly initialised" in notes
    theirs = torch.load(source, weights_only=True)
    for name, tensor in ours.state_dict().items():
        expected = theirs[name] if name.startswith(("blocks", "patch_embed", "cls", "pos")) else before[name]
        assert torch.equal(tensor, expected), name

    other = Classifier(ClassifierConfig("mae_vit_tiny_patch4", (24, 16), classes=3))
    notes = load_encoder_into(other, source)
    assert any("4×4 -> 6×4 patches, computed anew" in note for note in notes)
    assert torch.equal(other.blocks[3].mlp.fc1.weight, theirs["blocks.3.mlp.fc1.weight"])


def test_another_decoder_is_rejected_unless_allowed(tmp_path):
    theirs = create_model(**{**SMALL, "decoder_depth": 2}, **HEADS, mean=(0.5,) * 3, std=(0.2,) * 3)
    source = save_run(theirs, tmp_path)
    ours = create_model(**SMALL, **HEADS)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError, match=r"decoder_depth is 2, not 1.*--allow-partial"):
        load_into(ours, source)
    notes = load_into(ours, source, ["decoder*"])
    assert any("the decoder is randomly initialised, not loaded" in note for note in notes)
    fresh = {name for name in before if name.startswith(("decoder", "mask_token"))}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, (before if name in fresh else theirs.state_dict())[name]), name


def save_run(model, folder):
    from quarterview.training import checkpoint
    from quarterview.weights.loading import make_metadata

    checkpoint.save(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config)
    )
    return str(folder)


# ---------------------------------------------------------------------- continued pre-training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained for 150 steps on generated shapes."""
    folder = tmp_path_factory.mktemp("runs") / "start"
    words = f"pretrain --data shapes:300:size=16 --out {folder} --model mae_vit_32x2x4_patch4 --image-size 16"
    words += " --decoder-width 32 --decoder-depth 1 --decoder-heads 4 --steps 150 --batch-size 32 --lr 3e-3"
    assert cli.run([*words.split(), "--device", "cpu", "--workers", "0", "--holdout", "64"]) == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ("", ""),
        ("--image-size 24", "4×4 -> 6×6 patches, computed anew"),
        ("--image-size 16 24", "4×4 -> 4×6 patches, computed anew"),
        ("--image-size 24 --model mae_vit_32x2x4_patch6", "4 -> 6 pixels"),
        ("--in-chans 1", "3 -> 1, summed in the kernel"),
        ("--image-size 24 --model mae_vit_32x2x4_patch6 --in-chans 1", "4 -> 6 pixels"),
    ],
)
def test_continued_training_starts_with_a_lower_loss_than_random_weights(
    run, tmp_path, capsys, changes, note
):
    first = {}
    for name, start in (("fresh", ""), ("continued", f"--init-from {run}")):
        words = f"pretrain --data shapes:300:size=16 --out {tmp_path / name} {start} {changes} --steps 1"
        if not start:
            words += " --decoder-width 32 --decoder-depth 1 --decoder-heads 4 --model mae_vit_32x2x4_patch4"
            words = words if "--model" not in changes else words.replace(" --model mae_vit_32x2x4_patch4", "")
            words += "" if "--image-size" in changes else " --image-size 16"
        flags = ["--lr", "1e-9", "--device", "cpu", "--workers", "0", "--holdout", "64", "--batch-size", "32"]
        assert cli.run([*words.split(), *flags]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        first[name] = rows[-1]["val_loss"]
    assert note in capsys.readouterr().out.replace("\n", " ")
    assert first["continued"] < 0.97 * first["fresh"]


def test_architecture_mean_and_std_are_those_of_init_from(run, tmp_path):
    words = f"pretrain --data shapes:100:size=16 --out {tmp_path / 'x'} --init-from {run} --steps 1"
    assert cli.run([*words.split(), "--batch-size", "8", "--device", "cpu", "--workers", "0"]) == 0
    start, now = qv.load(run).config, qv.load(tmp_path / "x").config
    assert now == start


def test_a_resumed_run_does_not_need_its_initial_weights(run, tmp_path):
    import shutil

    start = shutil.copytree(run, tmp_path / "start")
    words = f"pretrain --data shapes:100:size=16 --out {tmp_path / 'x'} --init-from {start} --batch-size 8"
    words += " --device cpu --workers 0 --steps"
    assert cli.run([*words.split(), "1"]) == 0
    shutil.rmtree(start)
    assert cli.run([*words.split(), "1"]) == 0  # the run is complete, so nothing is trained
