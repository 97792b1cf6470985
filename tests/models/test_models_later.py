"""Tests of fused blocks (MFF) and several cls tokens: comparison with formulas, and invariants."""

import pytest
import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.create import create_mae, create_model
from quarterview.models.fusion import MultiLevelFusion
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import VisionTransformer, enable_grad_checkpointing

SMALL = {
    "model": "mae_vit_32x4x2_patch4",
    "image_size": (16, 24),
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
WAYS = {
    "standard": {},
    "cross": {"decoder": "cross"},
    "mask tokens": {"encoder_mask_tokens": True},
    "all": {"predict_all": True},
    "head": {"encoder_mask_tokens": True, "decoder_depth": 0},
}


def make(**changes) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return create_model(**{**SMALL, **changes})


def some_images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def some_noise(batch: int = 3) -> Tensor:
    return torch.rand(batch, 24, generator=torch.Generator().manual_seed(2))


def disturb_fusion(model: MaskedAutoencoder) -> MaskedAutoencoder:
    with torch.no_grad():
        model.decoder_fusion.logits.copy_(torch.tensor([1.0, -0.5, 0.25]))
    return model


# ---------------------------------------------------------------------- MultiLevelFusion alone


def test_the_fusion_equals_its_formula():
    fusion = MultiLevelFusion(2, (1, 3))
    with torch.no_grad():
        fusion.projections["1"].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))  # swaps
        fusion.projections["1"].bias.copy_(torch.tensor([10.0, 0.0]))
        fusion.projections["3"].weight.copy_(2 * torch.eye(2))
        fusion.logits.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    layers = {1: torch.tensor([[[1.0, 2.0]]]), 3: torch.tensor([[[3.0, 4.0]]])}
    # 0.5 * (2 + 10, 1) + 0.25 * (6, 8) + 0.25 * (20, 40)
    torch.testing.assert_close(fusion(layers, torch.tensor([[[20.0, 40.0]]])), torch.tensor([[[12.5, 12.5]]]))


def test_the_weights_start_equal_and_sum_to_one():
    fusion = MultiLevelFusion(8, (1, 2, 5))
    torch.testing.assert_close(fusion.weights, torch.full((4,), 0.25))
    with torch.no_grad():
        fusion.logits.add_(torch.randn(4))
    torch.testing.assert_close(fusion.weights.sum(), torch.tensor(1.0))


# ---------------------------------------------------------------------- fused blocks


@pytest.mark.parametrize("way", ["standard", "mask tokens", "all", "head"])
def test_the_decoder_reads_the_fused_sum_after_the_norm(disturbed, way):
    model = disturb_fusion(disturbed(make(fused_blocks=(1, 3), **WAYS[way])))
    outputs, normed = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    model.norm.register_forward_hook(lambda _m, given, out: normed.append((given[0], out)))
    out = model(some_images(), noise=some_noise())
    first, _, third, last = outputs
    weights = torch.tensor([1.0, -0.5, 0.25]).softmax(0)
    one, three = (model.decoder_fusion.projections[name] for name in "13")
    expected = weights[0] * one(first) + weights[1] * three(third) + weights[2] * last
    torch.testing.assert_close(normed[0][0], expected)
    assert torch.equal(out.latent, normed[0][1])


def test_features_are_those_of_the_last_block(disturbed):
    plain, fused = disturbed(make()), disturbed(make(fused_blocks=(1, 2)))
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[:, 5:] = True
    for given in (None, mask):
        assert torch.equal(plain.encode(some_images(), given), fused.encode(some_images(), given))
    first, second = (model(some_images(), noise=some_noise()) for model in (plain, fused))
    assert not torch.allclose(first.pred, second.pred)


def test_initial_weights_are_the_same_with_and_without_fusion():
    for seed in (0, 1):
        plain, fused = (
            create_mae(MAEConfig(**SMALL, fused_blocks=blocks), seed).state_dict() for blocks in ((), (2, 3))
        )
        extra = {name for name in fused if name not in plain}
        assert extra == {
            "decoder_fusion.logits",
            *(f"decoder_fusion.projections.{i}.{leaf}" for i in (2, 3) for leaf in ("weight", "bias")),
        }
        assert all(torch.equal(value, fused[name]) for name, value in plain.items())


def test_without_fused_blocks_there_is_no_fusion_module():
    assert make().decoder_fusion is None
    assert not any("fusion" in name for name in make().state_dict())


def test_all_weight_on_the_last_block_equals_a_model_without_fusion(disturbed):
    plain, fused = disturbed(make()), disturbed(make(fused_blocks=(1, 3)))
    with torch.no_grad():
        fused.decoder_fusion.logits.copy_(torch.tensor([-200.0, -200.0, 0.0]))
    for model in (plain, fused):
        model.zero_grad()
    losses = [model(some_images(), noise=some_noise()).loss for model in (plain, fused)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("recomputing", [False, True])
def test_gradients_reach_the_projections_and_the_blocks_before_them(recomputing):
    model = make(fused_blocks=(1, 3)).train()
    if recomputing:
        enable_grad_checkpointing(model)
    model(some_images(), noise=some_noise()).loss.backward()
    for name, parameter in model.decoder_fusion.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    # The last block gets weight 0, so gradients can only flow through the fusion.
    model.zero_grad()
    with torch.no_grad():
        model.decoder_fusion.logits.copy_(torch.tensor([0.0, -200.0, -200.0]))
    model(some_images(), noise=some_noise()).loss.backward()
    assert model.blocks[0].mlp.fc2.weight.grad.abs().sum() > 0
    assert not any(p.grad is not None and p.grad.any() for p in model.blocks[1].parameters())


def test_masked_pixels_do_not_reach_the_fusion(disturbed):
    model = disturbed(make(fused_blocks=(1, 2, 3), cls_tokens=2))
    out = model(some_images(), noise=some_noise())
    patches = model.patchify(some_images())
    patches[out.mask] = 100 * torch.randn(patches[out.mask].shape)
    assert torch.equal(out.pred, model(model.unpatchify(patches), noise=some_noise()).pred)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fused_blocks": (0, 1)},
            "--fused-blocks 0 1 does not fit an encoder of 4 blocks. Give different numbers from 1 to 3",
        ),
        ({"fused_blocks": (1, 4)}, "--fused-blocks 1 4 does not fit .* The last block is always included"),
        ({"fused_blocks": (2, 2)}, "different numbers"),
        ({"fused_blocks": (3, 1)}, "ascending"),
        ({"fused_blocks": (-1,)}, "1 to 3"),
        ({"fused_blocks": ("a",)}, "--fused-blocks a is of the wrong type. Give whole numbers"),
        ({"fused_blocks": (1,), "model": "mae_vit_32x1x2_patch4"}, "an encoder of 1 block. Remove it"),
        ({"fused_blocks": (1,), "decoder": "cross"}, "not supported with --decoder cross. Remove one"),
        ({"cls_tokens": 0}, "--cls-tokens 0 is out of range. Give .* of at least 1 and below 1000"),
        ({"cls_tokens": 1000}, "--cls-tokens 1000 is out of range"),
        ({"cls_tokens": 1.5}, "--cls-tokens 1.5 is of the wrong type. Give a whole number"),
    ],
)
def test_invalid_configurations_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_single_fused_block_may_be_a_number():
    assert MAEConfig(**SMALL, fused_blocks=2).fused_blocks == (2,)
    assert MAEConfig(**SMALL, fused_blocks=[1, 3]).fused_blocks == (1, 3)


# ---------------------------------------------------------------------- cls tokens


@pytest.mark.parametrize("way", WAYS)
def test_shapes_with_several_cls_tokens(way):
    model = make(cls_tokens=3, **WAYS[way])
    out = model(some_images(), noise=some_noise())
    assert model.cls_token.shape == (1, 3, 32)
    assert model.pos_embed.shape == (1, 25, 32)
    assert out.mask.sum().item() == 3 * 18
    encoded = 24 if "mask" in way or way == "head" else 6
    assert out.latent.shape == (3, 3 + encoded, 32)
    assert out.pred.shape == (3, 24 if way == "all" else 18, 48)
    assert model.encode(some_images()).shape == (3, 3 + 24, 32)
    assert model.encode(some_images(), out.mask).shape == (3, 3 + 6, 32)
    assert model.reconstruct(some_images()).shape == (3, 3, 16, 24)
    assert len(model.cls_token[0].unique(dim=0)) == 3


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_order_of_cls_tokens_does_not_change_patch_tokens(disturbed, way):
    """So no cls token is masked, has a position of its own, or is treated as a patch."""
    model = disturbed(make(cls_tokens=4, **WAYS[way]))
    order = torch.tensor([2, 0, 3, 1])
    before, tokens = model(some_images(), noise=some_noise()), model.encode(some_images())
    model.cls_token.copy_(model.cls_token[:, order])
    after, moved = model(some_images(), noise=some_noise()), model.encode(some_images())
    torch.testing.assert_close(after.pred, before.pred, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[:, :4], tokens[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[:, 4:], tokens[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_equal_cls_tokens_stay_equal_and_different_ones_differ(disturbed, way):
    model = disturbed(make(cls_tokens=3, **WAYS[way]))
    model.cls_token[:, 2] = model.cls_token[:, 0]
    latent = model(some_images(), noise=some_noise()).latent
    torch.testing.assert_close(latent[:, 2], latent[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(latent[:, 1], latent[:, 0], atol=1e-2)


@torch.no_grad()
def test_predictions_belong_to_their_patches(disturbed):
    """With mask tokens in the encoder and a linear decoder, a prediction comes from its patch's token."""
    model = disturbed(make(cls_tokens=3, predict_all=True, **WAYS["head"]))
    out = model(some_images(), noise=some_noise())
    visible = (~out.mask[0]).nonzero()[:, 0]
    own = model.decoder_pred(out.latent[0, 3 : 3 + len(visible)])
    torch.testing.assert_close(out.pred[0][visible], own)
    masked = out.mask[0].nonzero()[:, 0]
    torch.testing.assert_close(out.pred[0][masked], model.decoder_pred(out.latent[0, 3 + len(visible) :]))


@torch.no_grad()
def test_decoder_positions_belong_to_their_patches(disturbed):
    model, given = disturbed(make(cls_tokens=3)), []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    for parameter in (model.decoder_embed.weight, model.decoder_embed.bias, model.mask_token):
        parameter.zero_()
    out = model(some_images(), noise=some_noise())
    table = model.decoder_pos_embed[0]
    for row, mask in enumerate(out.mask):
        order = torch.cat([(~mask).nonzero()[:, 0], mask.nonzero()[:, 0]])
        assert not given[0][row, :3].any()
        assert torch.equal(given[0][row, 3:], table[1 + order])


@torch.no_grad()
def test_encoder_and_classifier_equal_the_masked_autoencoders_encoder(disturbed):
    model = disturbed(make(cls_tokens=3))
    shared = {"model": SMALL["model"], "image_size": SMALL["image_size"], "cls_tokens": 3}
    encoder = VisionTransformer(ViTConfig(**shared))
    encoder.load_state_dict({name: model.state_dict()[name] for name in encoder.state_dict()})
    assert torch.equal(encoder(some_images()), model.encode(some_images()))
    for pool in ("cls", "mean"):
        classifier = Classifier(ClassifierConfig(**shared, classes=5, pool=pool))
        classifier.load_state_dict(model.state_dict(), strict=False)
        tokens = classifier.encode(some_images())
        assert tokens.shape == (3, 27, 32)
        if pool == "cls":
            torch.testing.assert_close(tokens, model.encode(some_images()))
            expected = tokens[:, :3].mean(1)
        else:
            torch.testing.assert_close(model.norm(tokens), model.encode(some_images()))
            expected = classifier.fc_norm(tokens[:, 3:].mean(1))
        torch.testing.assert_close(classifier.compute_features(some_images()), expected)
        classifier.head.weight.normal_()
        torch.testing.assert_close(classifier(some_images()), classifier.head(expected))
