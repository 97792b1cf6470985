"""Attention, rollout and principal components compared with timm, NumPy and closed forms."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.utils import AttentionExtract

from quarterview.errors import UserError
from quarterview.evaluation import look
from quarterview.evaluation.config import LookConfig
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.models.vit import MAX_EXPLICIT_ATTENTION_TOKENS, Attention
from quarterview.training import checkpoint
from quarterview.weights.loading import make_metadata


def tiny(**options):
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 16}
    return create_model("mae_vit_32x3x2_patch4", **{**small, **options}).eval()


def block_attention_weights(model, images):
    """Compute the attention weights of every block in one forward pass: float [B, heads, T, T] each."""
    weights = []
    hooks = [
        block.attn.register_forward_pre_hook(
            lambda layer, arguments: weights.append(look.compute_attention_weights(layer, arguments[0]))
        )
        for block in model.blocks
    ]
    with torch.no_grad():
        model.encode(images)
    for hook in hooks:
        hook.remove()
    return weights


@pytest.mark.parametrize("tokens", [1, 17, MAX_EXPLICIT_ATTENTION_TOKENS + 1])  # explicit and fused attention
@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_the_attention_weights_reproduce_the_output_of_the_layer(tokens, heads):
    torch.manual_seed(tokens)
    layer = Attention(32, heads)
    x = 3 * torch.randn(2, tokens, 32)
    weights = look.compute_attention_weights(layer, x)
    assert weights.shape == (2, heads, tokens, tokens)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(3), torch.ones(2, heads, tokens), atol=1e-5, rtol=0)
    value = layer.qkv(x)[:, :, 64:].unflatten(2, (heads, -1)).transpose(1, 2)  # [B, heads, T, d]
    output = layer.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, layer(x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_attention_of_several_cls_tokens_is_averaged(disturbed):
    model, images = disturbed(tiny(cls_tokens=3)), torch.randn(2, 3, 16, 16)
    weights = block_attention_weights(model, images)
    maps = look.compute_attention_maps(model, images)
    torch.testing.assert_close(maps.attention, weights[-1][:, :, :3, 3:].mean(2), atol=1e-5, rtol=0)
    mixed = [(each.mean(1) + torch.eye(19)) / 2 for each in weights]
    rollout = mixed[2] @ mixed[1] @ mixed[0]
    torch.testing.assert_close(maps.rollout, rollout[:, :3, 3:].mean(1), atol=1e-5, rtol=0)


def test_the_attention_weights_equal_those_of_timm(disturbed):
    model = disturbed(tiny())
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, num_classes=0
    ).eval()
    vit.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask_token"))}
    )
    for block in vit.blocks:
        block.attn.fused_attn = False  # fused attention does not return weights
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        theirs = list(AttentionExtract(vit, method="hook")(images).values())
    ours = block_attention_weights(model, images)
    assert len(theirs) == len(ours) == 3
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        look.compute_attention_maps(model, images).attention, theirs[-1][:, :, 0, 1:], atol=1e-5, rtol=0
    )


def test_the_rollout_is_the_product_of_the_attention_of_all_blocks(disturbed):
    model = disturbed(tiny(image_size=(8, 24)))
    images = torch.randn(2, 3, 8, 24)
    maps = look.compute_attention_maps(model, images)
    expected = np.eye(13)
    for weights in block_attention_weights(model, images):  # Abnar and Zuidema 2020, equation 1 and section 3
        layer = 0.5 * weights.double().numpy().mean(1) + 0.5 * np.eye(13)
        expected = layer @ expected
    np.testing.assert_allclose(expected.sum(2), 1, atol=1e-5)
    np.testing.assert_allclose(maps.rollout.numpy(), expected[:, 0, 1:], atol=1e-6)
    assert maps.tokens.shape == (2, 13, 32)
    assert maps.attention.shape == (2, 2, 12)


def test_attention_maps_leave_the_model_unchanged():
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    before = model.encode(images)
    maps = look.compute_attention_maps(model, images)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.encode(images), before)
    torch.testing.assert_close(maps.tokens, before, atol=1e-5, rtol=0)
    assert not maps.tokens.requires_grad


def test_hooks_are_removed_if_the_forward_pass_fails():
    model = tiny()
    with pytest.raises(ValueError, match="The images have shape"):
        look.compute_attention_maps(model, torch.randn(2, 3, 20, 20))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_colors_are_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 25, 12, generator=generator) * torch.linspace(5, 0.1, 12) + 7
    colors, ratio = look.compute_principal_colors(tokens)
    flat = tokens.flatten(0, 1).double().numpy()
    left, values, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for i in range(3):
        component, color = left[:, i], colors.flatten(0, 1)[:, i].double().numpy()
        low, high = np.quantile(component, [0.01, 0.99])
        expected = ((component - low) / (high - low)).clip(0, 1)
        mirrored = abs(expected - color).max() > abs(1 - expected - color).max()  # the sign is arbitrary
        np.testing.assert_allclose(color, 1 - expected if mirrored else expected, atol=1e-5)
    assert ratio == pytest.approx((values[:3] ** 2).sum() / (values**2).sum())


def test_tokens_with_fewer_than_three_components_have_colors():
    colors, ratio = look.compute_principal_colors(torch.ones(2, 9, 8))
    assert (colors == 0.5).all()
    assert ratio == 0
    colors, ratio = look.compute_principal_colors(torch.randn(1, 2, 8))
    assert colors.shape == (1, 2, 3)
    assert colors.isfinite().all()
    assert ratio == pytest.approx(1)
    assert (colors[0, 0, 0] - colors[0, 1, 0]).abs() == 1


@pytest.mark.parametrize("grid", [(4, 5), (1, 20), (2, 10)])
def test_only_the_position_is_removed(grid):
    row, column = np.meshgrid(*(np.arange(count) for count in grid), indexing="ij")
    surface = (3 + 2 * row - column + 0.5 * row * row - 0.1 * column * column + row * column).flatten()
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(6, 20, 4, generator=generator, dtype=torch.float64)
    content -= content.mean(0)  # a part that is equal in all images would be removed, too
    positions = torch.from_numpy(surface)[:, None] * torch.randn(1, 4, generator=generator)
    remaining = look.remove_position(content + positions, grid)
    torch.testing.assert_close(remaining, content, atol=1e-9, rtol=0)


def test_the_heat_map_is_bright_where_the_weight_is():
    weights = torch.zeros(2, 8)
    weights[0, 6] = 0.01  # second row, third column of 2 × 4; the second image has no weights
    heatmap = look._overlay_heatmap(torch.zeros(2, 3, 8, 16), weights, (2, 4))
    assert heatmap.shape == (2, 3, 64, 128)
    brightness = heatmap.sum(1)
    assert divmod(int(brightness[0].argmax()), 128)[0] // 32 == 1
    assert divmod(int(brightness[0].argmax()), 128)[1] // 32 == 2
    assert brightness[1].max() < 0.05


# ---------------------------------------------------------------------- figures


def size(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(("channels", "shape"), [(1, (16, 16)), (5, (8, 24))])
def test_any_shape_and_number_of_channels_is_drawn(tmp_path, channels, shape):
    model = tiny(in_chans=channels, image_size=shape)
    look.draw_look_figure(model, torch.rand(2, channels, *shape), tmp_path / "one.png", "some", heads=0)
    look.draw_look_figure(model, torch.rand(2, channels, *shape), tmp_path / "two.png", "some", heads=1)
    (width, height), (other_width, other_height) = (size(tmp_path / name) for name in ("one.png", "two.png"))
    assert width == other_width > 300
    assert (other_height - height) == pytest.approx(120 * min(2, shape[0] / shape[1]), abs=2)  # one more row


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_classifier_is_drawn_without_reconstructions(tmp_path, pool):
    config = ClassifierConfig("mae_vit_32x3x2_patch4", (16, 16), classes=4, pool=pool)
    model = Classifier(config).eval()
    images = torch.rand(3, 3, 16, 16)
    look.draw_look_figure(model, images, tmp_path / "classifier.png", heads=0)
    look.draw_look_figure(tiny(), images, tmp_path / "mae.png", heads=0)
    difference = size(tmp_path / "mae.png")[1] - size(tmp_path / "classifier.png")[1]
    assert 200 < difference < 280  # two rows of 120 pixels, and other lines of the caption
    caption = " ".join(look._make_caption(model, [0.5, 0.4], False))
    assert "does not predict pixels" in caption
    assert ("not its cls token" in caption) == (pool == "mean")


def test_images_are_read_from_files_and_data_sets(tmp_path):
    model = tiny(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config))
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.png")
    run, out = str(tmp_path / "run"), tmp_path / "out" / "look.png"
    config = LookConfig(run, (str(tmp_path / "a.png"), "shapes:2"), str(out), heads=1)
    assert look.look(config) == out
    assert size(out)[0] > 300
    first = out.read_bytes()
    look.look(config)
    assert out.read_bytes() == first
    with pytest.raises(UserError, match="--heads -1"):
        LookConfig(run, heads=-1)
    with pytest.raises(UserError, match="does not exist"):
        look.look(LookConfig(run, (str(tmp_path / "b.png"),), str(out)))
