import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.create import create_model
from quarterview.models.mae import MAEConfig, MaskedAutoencoder

SMALL = {
    "model": "mae_vit_32x2x4_patch4",
    "image_size": (16, 24),
    "in_chans": 5,
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
ARMS = {
    "paper": {},
    "mask tokens in the encoder": {"encoder_mask_tokens": True},
    "all predicted": {"predict_all": True},
    "mask tokens, all predicted": {"encoder_mask_tokens": True, "predict_all": True},
    "linear head": {"encoder_mask_tokens": True, "decoder_depth": 0},
    "linear head on all": {"encoder_mask_tokens": True, "decoder_depth": 0, "predict_all": True},
    "plain pixels": {"norm_pix_loss": False},
}


def make(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SMALL, **changes})


def some_images(model: MaskedAutoencoder, batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.in_chans, *model.config.image_size, generator=generator)


def some_mask(model: MaskedAutoencoder, batch: int, visible: int, seed: int = 2) -> Tensor:
    noise = torch.rand(batch, model.config.num_patches, generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1).argsort(dim=1) >= visible


def in_image_order(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> Tensor:
    """The predictions of all patches, [B, L, P], with tokens in image order as in the official code."""
    config, predictions = model.config, []
    embedded = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    for image, masked in zip(embedded, mask, strict=True):
        tokens = image + model.pos_embed[0, 1:]
        visible_mask = ~masked
        if config.encoder_mask_tokens:
            tokens = torch.where(masked[:, None], model.mask_token[0] + model.pos_embed[0, 1:], tokens)
            visible_mask = torch.ones_like(masked)
        x = torch.cat([model.cls_token[0] + model.pos_embed[0, :1], tokens[visible_mask]])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        full = torch.empty(config.num_patches, x.shape[1])
        full[visible_mask] = x[1:]
        if not config.encoder_mask_tokens:
            full[masked] = model.mask_token[0, 0]
        x = torch.cat([x[:1], full])[None]
        if config.decoder_depth or not config.encoder_mask_tokens:  # a linear decoder adds no positions
            x = x + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        predictions.append(model.decoder_pred(model.decoder_norm(x))[0, 1:])
    return torch.stack(predictions)


# ---------------------------------------------------------------------- forward and loss


@pytest.mark.parametrize("arm", ARMS)
def test_every_configuration_equals_the_official_order_of_tokens(disturbed, arm):
    model = disturbed(make(**ARMS[arm]))
    images, mask = some_images(model), some_mask(model, 3, visible=7)
    with torch.no_grad():
        out, expected = model(images, mask=mask), in_image_order(model, images, mask)
    assert torch.equal(out.mask, mask)
    masked = torch.stack([e[m] for e, m in zip(expected, mask, strict=True)])
    torch.testing.assert_close(
        out.pred, expected if model.config.predict_all else masked, rtol=1e-5, atol=1e-5
    )
    truth = model.patchify(images)
    if model.config.norm_pix_loss:
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = ((expected - truth) ** 2).mean(dim=-1)
    weight = torch.ones_like(errors) if model.config.predict_all else mask.float()
    torch.testing.assert_close(out.loss, (errors * weight).sum() / weight.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_gradients_reach_every_trained_parameter(disturbed, arm):
    model = disturbed(make(**ARMS[arm]))
    model(some_images(model), mask=some_mask(model, 3, visible=6)).loss.backward()
    for name, parameter in model.named_parameters():
        if name in ("pos_embed", "decoder_pos_embed"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("kind", "ratio"), [("random", 0.75), ("block", 0.5), ("grid", 0.75), ("random", 0.9)]
)
def test_noise_gives_the_same_result_as_its_mask(kind, ratio):
    model = make(mask=kind, mask_ratio=ratio)
    noise = model.mask_noise(torch.rand(3, model.num_mask_uniforms))
    images = some_images(model)
    with torch.no_grad():
        by_noise = model(images, noise=noise)
        by_mask = model(images, mask=by_noise.mask)
    assert (~by_noise.mask).sum(dim=1).tolist() == [int(24 * (1 - ratio))] * 3
    assert torch.equal(by_noise.pred, by_mask.pred)
    assert torch.equal(by_noise.loss, by_mask.loss)


def test_without_noise_masks_come_from_torchs_default_generator():
    model = make()
    images = some_images(model, batch=4)
    torch.manual_seed(3)
    first, second = model(images).mask, model(images).mask
    torch.manual_seed(3)
    again = model(images).mask
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@given(st.integers(1, 23), st.integers(0, 999))
def test_any_mask_with_equal_counts_works(visible, seed):
    model = make(decoder_depth=1)
    mask = some_mask(model, 2, visible, seed)
    with torch.no_grad():
        out = model(some_images(model, 2), mask=mask)
    assert torch.equal(out.mask, mask)
    assert out.pred.shape == (2, 24 - visible, 4 * 4 * 5)
    assert bool(out.loss.isfinite())


def test_an_image_does_not_depend_on_its_batch():
    model = make()
    images, mask = some_images(model), some_mask(model, 3, visible=6)
    with torch.no_grad():
        together, alone = model(images, mask=mask), model(images[1:2], mask=mask[1:2])
    torch.testing.assert_close(together.pred[1:2], alone.pred, rtol=1e-5, atol=1e-5)


def test_bf16_autocast_is_close_to_float32():
    model = make()
    images, mask = some_images(model, batch=8), some_mask(model, 8, visible=6)
    with torch.no_grad():
        exact = model(images, mask=mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images, mask=mask)
            rough_tokens = model.encode(images)
        tokens = model.encode(images)
    assert rough.loss.dtype == torch.float32
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.01)
    assert float((rough.pred.float() - exact.pred).abs().max()) < 0.1 * float(exact.pred.abs().max())
    assert 0 < float((rough_tokens.float() - tokens).abs().max()) < 0.1


# ---------------------------------------------------------------------- patches


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
def test_unpatchify_is_the_inverse_of_patchify(rows, columns, patch, channels):
    if rows * columns < 2:
        return
    model = create_model(
        f"mae_vit_4x1x1_patch{patch}",
        image_size=(rows * patch, columns * patch),
        in_chans=channels,
        mask_ratio=0.5,
        norm_pix_loss=False,
        decoder_depth=0,
    )
    images = torch.randn(2, channels, rows * patch, columns * patch)
    patches = model.patchify(images)
    assert patches.shape == (2, rows * columns, patch * patch * channels)
    assert torch.equal(model.unpatchify(patches), images)


# ---------------------------------------------------------------------- encode


def test_encode_returns_cls_and_all_patches_and_is_deterministic():
    model = make()
    images = some_images(model)
    tokens = model.encode(images)
    assert tokens.shape == (3, 1 + 24, 32)
    assert torch.equal(tokens, model.encode(images))
    assert torch.equal(tokens, model.eval().encode(images))


def test_encode_with_a_mask_returns_visible_patches_in_ascending_order(disturbed):
    model = disturbed(make())
    images, mask = some_images(model), some_mask(model, 3, visible=9)
    with torch.no_grad():
        tokens = model.encode(images, mask)
        embedded = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
        for image, row, masked in zip(embedded, tokens, mask, strict=True):
            x = torch.cat([model.cls_token[0], image[~masked]])[None]
            for block in model.blocks:
                x = block(x)
            torch.testing.assert_close(row, model.norm(x)[0], rtol=1e-5, atol=1e-5)


def test_encode_with_nothing_masked_equals_encode_without_a_mask():
    model = make()
    images = some_images(model)
    nothing = torch.zeros(3, 24, dtype=torch.bool)
    torch.testing.assert_close(model.encode(images, nothing), model.encode(images))


# ---------------------------------------------------------------------- errors


def test_images_of_the_wrong_shape_are_an_error():
    model = make()
    for shape in [(2, 5, 24, 16), (2, 3, 16, 24), (5, 16, 24), (2, 5, 16, 25)]:
        for call in (model, model.encode, model.reconstruct):
            with pytest.raises(
                ValueError, match=r"The images have shape .*Give images of shape \(B, 5, 16, 24\)"
            ):
                call(torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 23), (1, 24), (24,), (2, 24, 1)])
def test_noise_of_the_wrong_shape_is_an_error(shape):
    model = make()
    with pytest.raises(ValueError, match=r"The noise has shape .*Give shape \(2, 24\)"):
        model(some_images(model, 2), noise=torch.rand(shape))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 24), r"mask is torch.float32 of shape \(2, 24\). Give torch.bool of shape \(2, 24\)"),
        (torch.ones(2, 23, dtype=torch.bool), r"mask is torch.bool of shape \(2, 23\)"),
        (torch.ones(1, 24, dtype=torch.bool), r"mask is torch.bool of shape \(1, 24\)"),
        (torch.ones(2, 24, dtype=torch.bool), r"leave \[0\] patches visible"),
        (torch.zeros(2, 24, dtype=torch.bool), "has no masked patch"),
        (torch.arange(48).view(2, 24) < 30, r"leave \[0, 18\] patches visible"),
    ],
    ids=["dtype", "patches", "rows", "nothing visible", "nothing masked", "counts differ"],
)
def test_invalid_masks_are_errors(mask, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model(some_images(model, 2), mask=mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, r"--image-size is 30 30, and the patch size is 4\. .* multiple of 4"),
        ({"image_size": (16, 0)}, "--image-size 0 is out of range. Give whole numbers of at least 1"),
        ({"image_size": (16, 16, 16)}, "--image-size is 16 16 16"),
        ({"in_chans": 0}, "--in-chans 0 is out of range. Give a whole number of at least 1"),
        ({"mask": "blocks"}, "--mask: 'blocks'. Did you mean 'block'? Give one of: .*, grid"),
        ({"mask_ratio": 1e-17}, "mask ratio of 1e-17 leaves 24 of 24 patches visible"),
        ({"mask_ratio": 0.99}, "mask ratio of 0.99 leaves 0 of 24 patches visible"),
        ({"mask_ratio": 0.0}, "--mask-ratio 0.0 is out of range. Give a number above 0 and below 1"),
        ({"decoder_depth": -1}, "--decoder-depth -1 is out of range. Give a whole number of at least 0"),
        ({"decoder_width": 30}, "width of the decoder is 30, with 2 heads"),
        ({"decoder_heads": 5}, "width of the decoder is 24, with 5 heads"),
        ({"mean": (0.5, 0.5)}, "--mean has 2 numbers, and images have 5 channels"),
        ({"std": (1.0, 1.0, 1.0, 1.0, 0.0)}, "--std is 1.0 1.0 1.0 1.0 0.0. Give numbers above 0"),
        ({"mask_ration": 0.5}, "Unknown model option 'mask_ration'. Did you mean 'mask_ratio'?"),
        ({"model": "mae_vit_basse_patch16"}, "Did you mean 'mae_vit_base_patch16'?"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_options_of_create_model_are_errors(changes, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make(**changes)


def test_an_image_size_of_one_number_is_a_square():
    assert MAEConfig(image_size=32, model="mae_vit_tiny_patch4") == MAEConfig(
        image_size=(32, 32), model="mae_vit_tiny_patch4"
    )


# ---------------------------------------------------------------------- names and sizes


def test_parameters_have_the_names_of_timm_and_of_the_official_decoder():
    block = [
        f"{part}.{leaf}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for leaf in ("weight", "bias")
    ]
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    for stem in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"):
        expected |= {f"{stem}.weight", f"{stem}.bias"}
    for stack, index in itertools.product(("blocks", "decoder_blocks"), (0, 1)):
        expected |= {f"{stack}.{index}.{name}" for name in block}
    assert set(make().state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "count", "trained"),
    [
        ("mae_vit_base_patch16", 111_907_840, 111_655_680),
        ("mae_vit_large_patch16", 329_541_888, 329_239_296),
        ("mae_vit_huge_patch14", 657_074_508, 656_613_964),
    ],
)
def test_the_papers_models_have_the_official_number_of_parameters(name, count, trained):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


# ---------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("arm", ARMS)
def test_reconstruct_keeps_visible_patches_to_the_bit(disturbed, arm):
    model = disturbed(make(**ARMS[arm]))
    images, mask = some_images(model), some_mask(model, 3, visible=7)
    reconstruction = model.reconstruct(images, mask=mask)
    assert reconstruction.dtype == torch.float32
    before, after = model.patchify(images), model.patchify(reconstruction)
    assert torch.equal(before[~mask], after[~mask])
    assert float((before[mask] - after[mask]).abs().min(dim=1).values.max()) > 0


@pytest.mark.parametrize("arm", ["paper", "all predicted", "plain pixels", "mask tokens in the encoder"])
def test_reconstruct_does_not_read_masked_patches(disturbed, arm):
    model = disturbed(make(**ARMS[arm]))
    images, mask = some_images(model), some_mask(model, 3, visible=7)
    patches = model.patchify(images)
    patches[mask] = 100 * torch.randn(patches[mask].shape) + 50
    other = model.unpatchify(patches)
    assert torch.equal(model.reconstruct(images, mask=mask), model.reconstruct(other, mask=mask))


def test_reconstruct_returns_unnormalised_predictions_unchanged(disturbed):
    model = disturbed(make(norm_pix_loss=False))
    images, mask = some_images(model), some_mask(model, 3, visible=7)
    shown = model.patchify(model.reconstruct(images, mask=mask))
    pred = model(images, mask=mask).pred
    for row in range(3):
        assert torch.equal(shown[row][mask[row]], pred[row])


def test_reconstruct_estimates_mean_and_std_from_visible_patches(disturbed):
    model = disturbed(make())
    images, mask = some_images(model), some_mask(model, 3, visible=7)
    shown = model.patchify(model.reconstruct(images, mask=mask))
    pred, patches = model(images, mask=mask).pred, model.patchify(images)
    for row in range(3):
        visible, masked = ((~mask[row]).nonzero()[:, 0].tolist(), mask[row].nonzero()[:, 0].tolist())
        for position, i in enumerate(masked):
            near = [1 / ((i // 6 - j // 6) ** 2 + (i % 6 - j % 6) ** 2) ** 2 for j in visible]
            mean = sum(w * float(patches[row, j].mean()) for w, j in zip(near, visible, strict=True))
            std = sum(w * float(patches[row, j].std()) for w, j in zip(near, visible, strict=True))
            expected = (pred[row, position] * std + mean) / sum(near)
            torch.testing.assert_close(shown[row, i], expected, rtol=1e-4, atol=1e-4)
