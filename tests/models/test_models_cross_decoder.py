"""Tests of the CrossMAE decoder: comparison with a slow reference implementation, and invariants."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quarterview.errors import UserError
from quarterview.models import masking
from quarterview.models.config import parse_model_name
from quarterview.models.create import create_model
from quarterview.models.cross_decoder import CrossAttention, CrossDecoder
from quarterview.models.mae import MAEConfig, MaskedAutoencoder
from quarterview.models.vit import enable_grad_checkpointing

SMALL = {
    "model": "mae_vit_32x3x4_patch4",
    "image_size": (16, 24),
    "in_chans": 5,
    "decoder": "cross",
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
KINDS = ("random", "block", "grid")


def make(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SMALL, **changes})


def some_images(model: MaskedAutoencoder, batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, model.config.in_chans, *model.config.image_size, generator=generator)


def some_noise(model: MaskedAutoencoder, batch: int = 3, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model.mask_noise(torch.rand(batch, model.num_mask_uniforms, generator=generator))


# ---------------------------------------------------------------------- slow reference implementation


def slow_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def slow_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.einsum("ti,oi->to", x, linear.weight) + linear.bias


def slow_attention(attention: CrossAttention, x: Tensor, source: Tensor) -> Tensor:
    """Cross-attention of one image from x [Q, E] to source [T, D], one head at a time."""
    width = x.shape[1]
    size = width // attention.num_heads
    query, both = slow_linear(attention.q, x), slow_linear(attention.kv, source)
    key, value = both[:, :width], both[:, width:]
    seen = []
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum("qe,te->qt", query[:, part], key[:, part]) / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        seen.append(torch.einsum("qt,te->qe", weights, value[:, part]))
    return slow_linear(attention.proj, torch.cat(seen, dim=1))


def slow_prediction(
    model: MaskedAutoencoder, image: Tensor, masked: Tensor, pred_indices: list[int]
) -> Tensor:
    """The predictions [Q, P] of some patches of one image [C, H, W], given its mask, bool [L]."""
    embedded = model.patch_embed.proj(image[None]).flatten(2)[0].T + model.pos_embed[0, 1:]
    layers = [torch.cat([model.cls_token[0], embedded[~masked]])]
    for block in model.blocks:
        layers.append(block(layers[-1][None])[0])
    layers[-1] = slow_norm(model.norm, layers[-1])
    x = torch.stack([model.mask_token[0, 0] + model.decoder_pos_embed[0, 1 + i] for i in pred_indices])
    decoder = model.decoder_blocks
    for i, block in enumerate(decoder):
        source = torch.zeros_like(layers[0])
        for weight, layer in zip(decoder.mix[i], layers, strict=True):
            source = source + weight * layer
        seen = slow_norm(block.norm_source, source)
        x = x + slow_attention(block.attn, slow_norm(block.norm1, x), seen)
        inner = slow_linear(block.mlp.fc1, slow_norm(block.norm2, x))
        x = x + slow_linear(block.mlp.fc2, inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)
    return slow_linear(model.decoder_pred, slow_norm(model.decoder_norm, x))


def slow_loss(model: MaskedAutoencoder, images: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    errors = []
    for image, masked, pred_indices in zip(images, mask, predicted.tolist(), strict=True):
        pred = slow_prediction(model, image, masked, pred_indices)
        truth = model.patchify(image[None])[0][pred_indices]
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        errors += list((pred - truth).square().mean(dim=1))
    return torch.stack(errors).mean()


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_predictions_loss_and_gradients_equal_the_slow_reference(disturbed, share):
    model = disturbed(make(predict_ratio=share))
    images, noise = some_images(model), some_noise(model)
    other = copy.deepcopy(model)
    out = model(images, noise=noise)
    assert out.pred_indices.shape == (3, round(18 * share))
    for row in range(3):
        pred = slow_prediction(other, images[row], out.mask[row], out.pred_indices[row].tolist())
        torch.testing.assert_close(out.pred[row], pred, rtol=1e-5, atol=1e-5)
    expected = slow_loss(other, images, out.mask, out.pred_indices)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    expected.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert float(parameter.grad.abs().max()) > 0, name  # the encoder's last norm among them
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------------- independence of masked patches


def test_masked_pixels_do_not_change_predictions(disturbed):
    model = disturbed(make())
    images, noise = some_images(model), some_noise(model)
    out = model(images, noise=noise)
    patches = model.patchify(images)
    patches[out.mask] = 100 * torch.randn(patches[out.mask].shape)
    assert torch.equal(out.pred, model(model.unpatchify(patches), noise=noise).pred)
    patches = model.patchify(images)
    patches[0, (~out.mask[0]).nonzero()[0, 0]] += 1
    with torch.no_grad():
        changed = (out.pred - model(model.unpatchify(patches), noise=noise).pred).abs().amax(dim=(1, 2))
    assert changed[0] > 1e-4
    assert float(changed[1:].max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.999])
def test_predicting_a_part_gives_the_same_values_as_predicting_all(disturbed, kind, share):
    model = disturbed(make(predict_ratio=share, mask=kind))
    images, noise = some_images(model), some_noise(model)
    some, every = model.train()(images, noise=noise), model.eval()(images, noise=noise)
    assert torch.equal(some.mask, every.mask)
    assert every.pred_indices.shape == (3, 18)
    assert some.pred_indices.shape == (3, max(1, round(18 * share)))
    for row in range(3):
        positions = torch.searchsorted(every.pred_indices[row], some.pred_indices[row])
        assert torch.equal(every.pred_indices[row][positions], some.pred_indices[row])
        torch.testing.assert_close(some.pred[row], every.pred[row][positions], rtol=1e-5, atol=1e-6)
    truth = model.target(images, model.patchify(images), some.pred_indices)
    torch.testing.assert_close(some.loss, (some.pred - truth).square().mean())


def test_the_order_of_queries_and_source_tokens_does_not_matter():
    torch.manual_seed(0)
    decoder = CrossDecoder(24, 2, 3, parse_model_name("mae_vit_32x4x4_patch4"))
    x, layers = torch.randn(2, 7, 24), [torch.randn(2, 9, 32) for _ in range(5)]
    out = decoder(x, layers)
    queries, tokens = torch.randperm(7), torch.randperm(9)
    torch.testing.assert_close(decoder(x[:, queries], layers), out[:, queries], rtol=1e-5, atol=1e-6)
    moved = decoder(x, [layer[:, tokens] for layer in layers])
    torch.testing.assert_close(moved, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_each_block_reads_its_own_mixture_of_all_layers(block):
    torch.manual_seed(0)
    decoder = CrossDecoder(24, 2, 3, parse_model_name("mae_vit_32x4x4_patch4"))
    sources = []
    decoder[block].register_forward_pre_hook(lambda _, args: sources.append(args[1]))
    layers = [torch.randn(2, 9, 32) for _ in range(5)]
    decoder(torch.randn(2, 7, 24), layers)
    expected = torch.tensordot(decoder.mix[block], torch.stack(layers), dims=1)
    torch.testing.assert_close(sources[0], expected)


def test_the_last_layer_is_the_output_of_encode(disturbed):
    model = disturbed(make())
    images, seen = some_images(model), []
    model.decoder_blocks.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    out = model(images, noise=some_noise(model))
    assert len(seen) == 1 + 3
    assert torch.equal(seen[-1], model.encode(images, out.mask))
    embedded = model.patchify(images)[~out.mask].view(3, 6, -1)
    positions = model.pos_embed[0, 1:].expand(3, -1, -1)[~out.mask].view(3, 6, -1)
    torch.testing.assert_close(seen[0][:, 1:], model.patch_embed(embedded) + positions)


# ---------------------------------------------------------------------- choice of the predicted patches


@given(st.sampled_from(KINDS), st.floats(0.01, 1.0), st.integers(0, 999))
def test_every_row_predicts_the_same_number_of_masked_patches(kind, share, seed):
    patches, num_visible = 30, 11
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(4, masking.count_mask_uniforms(kind, patches), generator=generator)
    noise = masking.mask_noise(kind, uniforms, (5, 6), 0.63)
    masked = masking.split_indices(masking.mask_from_noise(noise, num_visible), num_visible)[1]
    chosen = masking.select_lowest_noise(masked, noise, share)
    assert chosen.shape == (4, max(1, round(share * 19)))
    for row, all_masked in zip(chosen.tolist(), masked.tolist(), strict=True):
        assert row == sorted(set(row))
        assert set(row) <= set(all_masked)


@pytest.mark.parametrize("kind", [*KINDS, "given"])
def test_every_masked_patch_is_predicted_equally_often(kind):
    rows, share = 4000, 1 / 3
    model = make(mask="random" if kind == "given" else kind, predict_ratio=share, mask_ratio=0.5)
    if kind == "given":
        mask, noise = (torch.arange(24) >= 12).expand(rows, -1), None
    else:
        noise = some_noise(model, rows)
        mask = masking.mask_from_noise(noise, 12)
    predicted = model._select_pred_indices(masking.split_indices(mask, 12)[1], noise)
    chosen = torch.zeros(rows, 24).scatter(1, predicted, 1.0)
    assert chosen.sum(dim=1).tolist() == [4.0] * rows
    masked = mask.sum(dim=0)
    often = chosen.sum(dim=0)[masked > 0] / masked[masked > 0]
    error = (share * (1 - share) / masked[masked > 0]).sqrt()
    assert float(((often - share).abs() / error).max()) < 5


def test_patches_that_fill_up_a_block_mask_are_predicted_as_often_as_those_in_blocks():
    """The noise that chooses the filled-up patches must not be the noise that chooses the predicted ones."""
    generator, patches, num_visible = torch.Generator().manual_seed(0), 24 * 24, 57
    uniforms = torch.rand(1000, masking.count_mask_uniforms("block", patches), generator=generator)
    noise = masking.mask_noise("block", uniforms, (24, 24), 0.9)
    mask = masking.mask_from_noise(noise, num_visible)
    blocks = masking._make_block_mask(uniforms[:, patches:-patches], (24, 24), patches - num_visible)
    assert not bool((blocks & ~mask).any())
    predicted = masking.select_lowest_noise(masking.split_indices(mask, num_visible)[1], noise, 0.5)
    chosen = torch.zeros(1000, patches).scatter(1, predicted, 1.0)
    extra = mask & ~blocks
    assert int(extra.sum()) > 100
    assert float(chosen[extra].mean()) == pytest.approx(0.5, abs=5 * 0.5 / int(extra.sum()) ** 0.5)


def test_reconstruct_predicts_all_masked_patches_in_both_modes(disturbed):
    model = disturbed(make(predict_ratio=0.2))
    images, mask = some_images(model), masking.mask_from_noise(some_noise(model), 6)
    training, evaluation = (model.train(mode).reconstruct(images, mask=mask) for mode in (True, False))
    assert torch.equal(training, evaluation)
    before, after = model.patchify(images), model.patchify(training)
    assert torch.equal(before[~mask], after[~mask])
    assert float((before[mask] - after[mask]).abs().amax(dim=1).min()) > 0


# ---------------------------------------------------------------------- parameters and precision


@torch.no_grad()
def test_the_initial_weights():
    torch.manual_seed(0)
    model = create_model(
        "mae_vit_384x12x6_patch8", image_size=32, decoder="cross", decoder_width=256, decoder_depth=12
    )
    decoder = model.decoder_blocks
    bound = math.sqrt(6 / (13 + 12))
    assert decoder.mix.shape == (12, 13)
    assert float(decoder.mix.abs().max()) <= bound
    assert float(decoder.mix.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    for block in decoder:
        for linear in (block.attn.q, block.attn.kv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            variance = 2 / sum(linear.weight.shape)  # xavier
            assert float(linear.weight.var()) == pytest.approx(variance, rel=0.05)
            assert not linear.bias.any()
        for norm in (block.norm1, block.norm_source, block.norm2):
            assert norm.eps == 1e-6
            assert bool((norm.weight == 1).all())
            assert not norm.bias.any()
    assert float(model.mask_token.std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("width", "depth"), [(24, 1), (24, 2), (64, 5)])
def test_the_number_of_parameters(width, depth):
    model, encoder = make(decoder_width=width, decoder_depth=depth), 32
    decoder = [p for n, p in model.named_parameters() if n.startswith(("decoder", "mask_token"))]
    norms = 2 * (2 * width) + 2 * encoder
    attention = (width * width + width) + (2 * width * encoder + 2 * width) + (width * width + width)
    mlp = 8 * width * width + 5 * width
    numbers = 4 * 4 * 5
    ends = (
        width + 25 * width + 2 * width + width * numbers + numbers
    )  # mask token, positions, norm, prediction layer
    expected = depth * (norms + attention + mlp) + depth * (1 + 3) + ends
    assert sum(p.numel() for p in decoder) == expected


def test_the_encoder_has_the_usual_parameter_names():
    cross, standard = make().state_dict(), make(decoder="standard").state_dict()
    assert {n for n in cross if not n.startswith("decoder")} == {
        n for n in standard if not n.startswith("decoder")
    }
    block = [f"{part}.{leaf}" for part in ("norm1", "norm_source", "norm2") for leaf in ("weight", "bias")]
    block += [f"attn.{part}.{leaf}" for part in ("q", "kv", "proj") for leaf in ("weight", "bias")]
    block += [f"mlp.{part}.{leaf}" for part in ("fc1", "fc2") for leaf in ("weight", "bias")]
    expected = {f"decoder_blocks.{i}.{name}" for i in (0, 1) for name in block}
    expected |= {"decoder_blocks.mix", "decoder_pos_embed"}
    expected |= {f"{part}.{leaf}" for part in ("decoder_norm", "decoder_pred") for leaf in ("weight", "bias")}
    assert {n for n in cross if n.startswith("decoder")} == expected


def test_a_step_in_bf16_is_finite_and_close_to_float32(disturbed):
    model = disturbed(make(predict_ratio=0.5))
    images, noise = some_images(model, batch=8), some_noise(model, batch=8)
    exact = model(images, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, noise=noise)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, rtol=0.02, atol=0)
    rough.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("predicted", "times"), [(147, 1.48), (49, 3.76)])
def test_the_default_decoder_of_vit_base_costs_less(predicted, times):
    """FLOPs of ViT-B/16 at 224 pixels, predicting all masked patches, or a quarter of all patches."""

    def cost(decoder: str, num_predicted: int) -> int:
        with torch.device("meta"):
            model = create_model("mae_vit_base_patch16", decoder=decoder)
            patches = torch.empty(1, 196, 768)
            visible, masked, some = (torch.empty(1, n, dtype=torch.int64) for n in (49, 147, num_predicted))
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            model.predict(patches, visible, masked, some)
        with FlopCounterMode(display=False) as encoder, torch.no_grad():
            model.forward_blocks(model.embed(patches, visible))
        return whole.get_total_flops() - encoder.get_total_flops()

    assert cost("standard", 147) / cost("cross", predicted) == pytest.approx(times, rel=0.02)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoder": "crossed"},
            r"--decoder:? 'crossed'\. Did you mean 'cross'\? Give one of: standard, cross",
        ),
        (
            {"decoder_depth": 0},
            "--decoder-depth 0 is not supported with --decoder cross. Give a depth of at least 1",
        ),
        ({"encoder_mask_tokens": True}, "--encoder-mask-tokens is not supported with --decoder cross"),
        ({"predict_all": True}, "--predict-all is not supported with --decoder cross"),
        (
            {"predict_ratio": 0.0},
            "--predict-ratio 0.0 is out of range. Give a number above 0 and of at most 1",
        ),
        (
            {"predict_ratio": 1.1},
            "--predict-ratio 1.1 is out of range. Give a number above 0 and of at most 1",
        ),
        (
            {"decoder": "standard", "predict_ratio": 0.5},
            "--predict-ratio 0.5 is not supported with --decoder standard. .*use --decoder cross",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_configurations_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_the_papers_decoder_is_the_default():
    assert MAEConfig().decoder == "standard"
    assert MAEConfig().predict_ratio == 1


def test_grad_checkpointing_does_not_change_gradients(disturbed):
    model = disturbed(make())
    images, noise = some_images(model), some_noise(model)
    results = []
    for again in (False, True):
        if again:
            enable_grad_checkpointing(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append(torch.autograd.grad(model(images, noise=noise).loss, trained))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
