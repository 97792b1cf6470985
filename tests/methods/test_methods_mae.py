"""Tests of masked autoencoding as a method: masks per image, their random draws, and uniformity."""

import copy

import pytest
import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods.config import BEiTConfig, MAEMethodConfig
from quarterview.methods.mae import MaskedAutoencoding, compute_mean_squared_cosine
from quarterview.models import masking
from quarterview.models.create import create_model
from quarterview.models.mae import MaskedAutoencoder

SMALL = {
    "model": "mae_vit_32x2x4_patch4",
    "image_size": (16, 24),
    "decoder_width": 24,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
ARMS = {
    "paper": {},
    "cross": {"decoder": "cross"},
    "a part predicted": {"decoder": "cross", "predict_ratio": 0.4},
    "mask tokens in the encoder": {"encoder_mask_tokens": True},
    "all predicted": {"predict_all": True},
    "blocks": {"mask": "block", "mask_ratio": 0.5},
}


def make(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SMALL, **changes})


def some_batch(images: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(images) * 7 + 2
    return Batch(torch.randn(images, 3, 16, 24, generator=generator), ids, ids % 3)


def masks_of(method: MaskedAutoencoding, batch: Batch, count: int) -> Tensor:
    """The masks of the batch, bool [B, count, L]."""
    noise = method.draw_mask_noise(batch.epochs, batch.ids, count)
    return masking.mask_from_noise(noise.flatten(0, 1), method.model.num_visible).unflatten(0, (-1, count))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("arm", ARMS)
def test_the_loss_of_several_masks_is_the_mean_of_single_ones(disturbed, arm, images):
    model = disturbed(make(**ARMS[arm]))
    batch, other = some_batch(images), copy.deepcopy(model)
    together = MaskedAutoencoding(model, seed=5, masks_per_image=3).train()
    noise = together.draw_mask_noise(batch.epochs, batch.ids, 3)
    loss = together(batch).loss
    single = [other(batch.images, noise=noise[:, i]).loss for i in range(3)]
    torch.testing.assert_close(loss, torch.stack(single).mean(), rtol=1e-6, atol=1e-7)
    loss.backward()
    torch.stack(single).mean().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("arm", ARMS)
def test_the_masks_of_an_image_are_in_adjacent_rows(disturbed, arm):
    model = disturbed(make(**ARMS[arm]))
    batch = some_batch()
    noise = MaskedAutoencoding(model, seed=5).draw_mask_noise(batch.epochs, batch.ids, 2)
    out = model(batch.images, noise=noise)
    for i in range(2):
        alone = model(batch.images, noise=noise[:, i])
        assert torch.equal(out.mask[i::2], alone.mask)
        assert torch.equal(out.pred_indices[i::2], alone.pred_indices)
        torch.testing.assert_close(out.pred[i::2], alone.pred, rtol=1e-5, atol=1e-6)


def test_images_and_targets_are_not_repeated_for_several_masks():
    model, embedded, made = make(), [], []
    model.patch_embed.register_forward_pre_hook(lambda _, args: embedded.append(args[0].shape))
    model.target.register_forward_hook(lambda _module, args, out: made.append((len(args[1]), len(out))))
    MaskedAutoencoding(model, seed=5, masks_per_image=4).train()(some_batch())
    assert embedded == [(3 * 4, 6, 48)]  # only the visible patches
    assert made == [(3, 3)]


@pytest.mark.parametrize("arm", ARMS)
def test_one_mask_equals_the_first_of_several(arm):
    model, batch = make(**ARMS[arm]), some_batch()
    uniforms = rng.uniform(5, "mask", batch.epochs, batch.ids, model.num_mask_uniforms)
    expected = model(batch.images, noise=model.mask_noise(uniforms))
    assert torch.equal(MaskedAutoencoding(model, seed=5).train()(batch).loss, expected.loss)


@pytest.mark.parametrize("kind", ["random", "block"])
def test_masks_differ_and_the_first_do_not_depend_on_their_number(kind):
    method, batch = MaskedAutoencoding(make(mask=kind), seed=5), some_batch(40)
    few, many = masks_of(method, batch, 2), masks_of(method, batch, 5)
    assert torch.equal(few, many[:, :2])
    assert torch.equal(few[:, :1], masks_of(method, batch, 1))
    assert len(many.flatten(0, 1).unique(dim=0)) > 100  # of 200; few blocks fit so small a grid
    assert (~many).sum(dim=2).unique().tolist() == [6]
    again = masks_of(method, Batch(batch.images[3:5], batch.ids[3:5], batch.epochs[3:5]), 5)
    assert torch.equal(again, many[3:5])  # independent of the batch


def test_validation_uses_the_first_mask_only():
    model, batch = make(), some_batch()
    one, several = (MaskedAutoencoding(model, 5, count).eval() for count in (1, 4))
    assert torch.equal(one(batch).loss, several(batch).loss)


@pytest.mark.parametrize("kind", [MAEMethodConfig, BEiTConfig])
@pytest.mark.parametrize("masks", [0, -1])
def test_no_mask_is_an_error(kind, masks):
    with pytest.raises(UserError, match=f"--masks-per-image {masks} is out of range. .* at least 1"):
        kind(masks_per_image=masks)


@pytest.mark.parametrize("shape", [(2, 3, 24), (3, 0, 24), (3, 2, 23), (3, 2, 24, 1)])
def test_noise_of_the_wrong_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"The noise has shape .*Give shape \(3, 24\), or \(3, k, 24\)"):
        make()(some_batch().images, noise=torch.rand(shape))


# ---------------------------------------------------------------------- uniformity


def test_likeness_is_the_mean_squared_cosine_of_pairs():
    torch.manual_seed(0)
    features = torch.randn(5, 7)
    expected = [
        float(a @ b / (a.norm() * b.norm())) ** 2
        for i, a in enumerate(features)
        for j, b in enumerate(features)
        if i != j
    ]
    torch.testing.assert_close(compute_mean_squared_cosine(features).item(), sum(expected) / 20)
    torch.testing.assert_close(
        compute_mean_squared_cosine(features * torch.rand(5, 1).add(0.1)),
        compute_mean_squared_cosine(features),
    )
    torch.testing.assert_close(
        compute_mean_squared_cosine(features[torch.randperm(5)]), compute_mean_squared_cosine(features)
    )
    assert compute_mean_squared_cosine(torch.ones(4, 3)).item() == pytest.approx(1)
    assert compute_mean_squared_cosine(torch.eye(4)).item() == 0
    assert compute_mean_squared_cosine(torch.randn(500, 16)).item() == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("arm", ["paper", "cross", "mask tokens in the encoder"])
@pytest.mark.parametrize("masks", [1, 2])
def test_uniformity_uses_the_visible_patches_of_the_first_masks(disturbed, arm, masks):
    model = disturbed(make(**ARMS[arm]))
    batch = some_batch(4)
    plain = MaskedAutoencoding(model, 5, masks)(batch).loss
    method = MaskedAutoencoding(model, 5, masks, uniformity=0.3)
    out = method(batch)
    first = masks_of(method, batch, masks)[:, 0]
    features = model.encode(batch.images, first)[:, 1:].mean(dim=1)
    if arm == "mask tokens in the encoder":  # the encoder also outputs the mask tokens
        noise = method.draw_mask_noise(batch.epochs, batch.ids, masks)[:, 0]
        features = model(batch.images, noise=noise).latent[:, 1 : 1 + model.num_visible].mean(dim=1)
    torch.testing.assert_close(out.metrics["likeness"], compute_mean_squared_cosine(features))
    torch.testing.assert_close(out.loss, plain + 0.3 * compute_mean_squared_cosine(features))
    torch.testing.assert_close(out.metrics["prediction"], plain)
    out.loss.backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()
    method.eval()
    assert torch.equal(method(batch).loss, MaskedAutoencoding(model, 5).eval()(batch).loss)


def test_uniformity_spreads_features():
    batch, likely = some_batch(6), {}
    for weight in (0.0, 1.0):
        model = make()
        method = MaskedAutoencoding(model, 5, uniformity=weight)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(15):
            optimizer.zero_grad()
            method(batch).loss.backward()
            optimizer.step()
        likely[weight] = compute_mean_squared_cosine(model.encode(batch.images)[:, 1:].mean(dim=1)).item()
    assert likely[1.0] < 0.7 * likely[0.0]


@pytest.mark.parametrize("kind", [MAEMethodConfig, BEiTConfig])
def test_invalid_uniformity_is_an_error(kind):
    with pytest.raises(UserError, match=r"--uniformity -0\.1 is out of range\. Give a number of at least 0"):
        kind(uniformity=-0.1)
