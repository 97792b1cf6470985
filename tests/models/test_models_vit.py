from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from quarterview.errors import UserError
from quarterview.models import masking, vit
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MODEL_SIZES, MAEConfig, ViTConfig, ViTShape, parse_model_name
from quarterview.models.create import create_classifier, create_encoder, create_mae, create_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import Block, VisionTransformer, enable_grad_checkpointing

SMALL = {"model": "mae_vit_32x4x2_patch4", "image_size": (16, 24)}


def timms_shape(model: VisionTransformer) -> TimmVisionTransformer:
    """A timm vision transformer of the same shape, with random weights."""
    config, shape = model.config, model.config.shape
    return TimmVisionTransformer(
        img_size=config.image_size,
        patch_size=shape.patch_size,
        in_chans=config.in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("mae_vit_tiny_patch16", (64, 64), 3),
        ("mae_vit_64x3x4_patch4", (32, 32), 1),
        ("mae_vit_64x2x2_patch8", (48, 96), 5),
        ("mae_vit_48x1x3_patch7", (70, 21), 3),
    ],
)
def test_the_encoder_equals_timms_vision_transformer(disturbed, name, size, channels):
    torch.manual_seed(0)
    model = disturbed(
        create_model(name, image_size=size, in_chans=channels, decoder_depth=1, decoder_width=64)
    )
    theirs = timms_shape(model)
    state = model.state_dict()
    result = theirs.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert all(name.startswith(("decoder_", "mask_token")) for name in result.unexpected_keys)
    encoder = {k: v.shape for k, v in state.items() if k not in result.unexpected_keys}
    assert encoder == {k: v.shape for k, v in theirs.state_dict().items()}

    images = torch.randn(3, channels, *size)
    with torch.no_grad():
        ours, expected = model.encode(images), theirs.eval()(images)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_named_sizes_are_those_of_timm(size):
    import timm

    name = {"tiny": "vit_tiny_patch16_224", "huge": "vit_huge_patch14_224"}.get(
        size, f"vit_{size}_patch16_224"
    )
    patch = 14 if size == "huge" else 16
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        ours = create_model(f"mae_vit_{size}_patch{patch}")
    assert ours.config.shape.num_heads == theirs.blocks[0].attn.num_heads
    state = ours.state_dict()
    assert {k: state[k].shape for k in theirs.state_dict()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    "tokens", [1, 5, 65, vit.MAX_EXPLICIT_ATTENTION_TOKENS, vit.MAX_EXPLICIT_ATTENTION_TOKENS + 1]
)
def test_attention_equals_torch(tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 16, requires_grad=True) for _ in range(3))
    ours = vit.compute_attention(query, key, value)
    theirs = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, theirs)]
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_the_patch_embedding_equals_its_convolution():
    torch.manual_seed(0)
    model = create_model("mae_vit_32x1x2_patch4", image_size=(8, 12), in_chans=5, decoder_depth=0)
    images = torch.randn(2, 5, 8, 12)
    ours = model.patch_embed(model.patchify(images))
    theirs = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mae_vit_tiny_patch4", (192, 12, 3, 4)),
        ("mae_vit_huge_patch14", (1280, 32, 16, 14)),
        ("mae_vit_128x4x8_patch2", (128, 4, 8, 2)),
    ],
)
def test_model_names_are_parsed(name, shape):
    assert parse_model_name(name) == ViTShape(*shape)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mae_vit_bass_patch16", "Did you mean 'mae_vit_base_patch16'?"),
        ("mae_vit_tinny_patch4", "Did you mean 'mae_vit_tiny_patch4'?"),
        ("vit_large_patch16", "Did you mean 'mae_vit_large_patch16'?"),
        ("mae_vit_base_patch", "Did you mean 'mae_vit_base_patch16'?"),
        ("mae_vit_base_patch0", "mae_vit_base_patch16"),
        ("mae_vit_128x4_patch4", "mae_vit_WIDTHxDEPTHxHEADS_patch4"),
        ("mae_vit_0x4x4_patch4", "mae_vit_WIDTHxDEPTHxHEADS_patch4"),
        ("resnet50", "mae_vit_base_patch16"),
        ("", "mae_vit_base_patch16"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_name(name, hint):
    with pytest.raises(UserError) as error:
        parse_model_name(name)
    assert str(error.value).startswith(f"Unknown model {name!r}.")
    assert "Give one of: mae_vit_tiny_patch" in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(("width", "heads"), [(100, 3), (66, 6), (2, 1)])
def test_invalid_widths_are_errors(width, heads):
    with pytest.raises(UserError, match=rf"is {width}, with {heads} heads\. Give a width that is a multiple"):
        parse_model_name(f"mae_vit_{width}x2x{heads}_patch4")


@pytest.mark.parametrize("first", [0, 1, 5])
def test_tokens_before_query_start_are_keys_and_values_only(first):
    torch.manual_seed(0)
    block, x = Block(32, 4), torch.randn(3, 9, 32)
    torch.testing.assert_close(block(x, query_start=first), block(x)[:, first:], atol=1e-5, rtol=0)


def test_grad_checkpointing_stores_only_inputs_and_keeps_the_gradients():
    torch.manual_seed(0)
    blocks, x = nn.Sequential(Block(32, 4), Block(32, 4)), torch.randn(3, 9, 32, requires_grad=True)

    def gradients() -> tuple[tuple[torch.Tensor, ...], int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            out = blocks(x)
        return torch.autograd.grad(out.sum(), [x, *blocks.parameters()]), sum(sizes)

    plain, bytes_without_checkpointing = gradients()
    enable_grad_checkpointing(blocks)
    again, bytes_with_checkpointing = gradients()
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert bytes_with_checkpointing < 0.1 * bytes_without_checkpointing


# ---------------------------------------------------------------------- the encoder


def some_images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def some_mask(visible: int = 7, batch: int = 3) -> torch.Tensor:
    noise = torch.rand(batch, 24, generator=torch.Generator().manual_seed(2))
    return masking.mask_from_noise(noise, visible)


def some_encoder(**changes) -> VisionTransformer:
    return create_encoder(ViTConfig(**SMALL, **changes), 0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("indices", [(0,), (3,), (0, 2, 3), (-1,), (-4, -2)])
def test_intermediate_feature_maps_equal_timms(disturbed, indices, norm):
    model = disturbed(some_encoder())
    theirs = timms_shape(model)
    theirs.load_state_dict(model.state_dict())
    expected = theirs.eval().forward_intermediates(
        some_images(), indices=list(indices), norm=norm, intermediates_only=True
    )
    output = model.forward_intermediates(some_images(), indices, norm=norm)
    assert [each.shape for each in output] == [(3, 32, 4, 6)] * len(indices)
    for one, other in zip(output, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_intermediate_feature_maps_have_the_requested_order():
    model = some_encoder(cls_tokens=2)
    last, first = model.forward_intermediates(some_images(), (3, 0))
    again = model.forward_intermediates(some_images(), (0,))[0]
    assert torch.equal(first, again)
    assert not torch.allclose(last, first)
    # The normalised map of the last block equals `encode`.
    normed = model.forward_intermediates(some_images(), [-1], norm=True)[0]
    assert torch.equal(normed.flatten(2).transpose(1, 2), model.encode(some_images())[:, 2:])


def test_blocks_after_the_last_requested_one_are_not_run():
    model, run = some_encoder(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: run.append(i))
    model.forward_intermediates(some_images(), (1, 0))
    assert run == [0, 1]


@pytest.mark.parametrize("indices", [(), (4,), (-5,), (0, 9)])
def test_missing_blocks_are_an_error(indices):
    with pytest.raises(ValueError, match=r"a model of 4 blocks\. Give one or more from -4 to 3"):
        some_encoder().forward_intermediates(some_images(), indices)


def test_gradients_of_a_feature_map_reach_its_blocks_and_no_later_ones():
    model = some_encoder()
    model.forward_intermediates(some_images(), (1,))[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for block in model.blocks[:2] for p in block.parameters())
    assert all(p.grad is None for p in [*model.blocks[2:].parameters(), *model.norm.parameters()])


def test_tokens_are_returned_after_any_number_of_blocks():
    model = some_encoder()
    x = expected = model.embed(model.patchify(some_images()))
    last, intermediates = model.forward_blocks(x, keep_after=range(5))
    assert list(intermediates) == [0, 1, 2, 3, 4]
    assert intermediates[0] is x
    assert intermediates[4] is last
    for n, block in enumerate(model.blocks, 1):
        expected = block(expected)
        assert torch.equal(intermediates[n], expected)
        stopped, none = model.forward_blocks(x, num_blocks=n)
        assert torch.equal(stopped, expected)
        assert none == {}
    assert model.forward_blocks(x, num_blocks=0)[0] is x


@pytest.mark.parametrize("cls_tokens", [1, 3])
def test_all_models_encode_alike(disturbed, cls_tokens):
    """All images, with a mask, and with drop path."""
    shared = {**SMALL, "cls_tokens": cls_tokens}
    model = disturbed(create_mae(MAEConfig(**shared, decoder_depth=1, decoder_width=16, decoder_heads=2), 0))
    encoder = VisionTransformer(ViTConfig(**shared))
    classifier = Classifier(ClassifierConfig(**shared, classes=3, pool="cls"))
    for other in (encoder, classifier):
        other.load_state_dict(model.state_dict(), strict=False)
    scales = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(3))
    for mask in (None, some_mask()):
        for given in (None, scales):
            tokens = model.encode(some_images(), mask, given)
            assert tokens.shape == (3, cls_tokens + (24 if mask is None else 7), 32)
            assert torch.equal(encoder.encode(some_images(), mask, given), tokens)
            assert torch.equal(classifier.encode(some_images(), mask, given), tokens)
    assert torch.equal(encoder(some_images()), model.encode(some_images()))


def test_drop_path_scales_multiply_each_branch(disturbed):
    model = disturbed(some_encoder())
    whole = model.encode(some_images())
    assert torch.equal(model.encode(some_images(), drop_path_scales=torch.ones(3, 4, 2)), whole)
    embedded = model.embed(model.patchify(some_images()))
    assert torch.equal(
        model.encode(some_images(), drop_path_scales=torch.zeros(3, 4, 2)), model.norm(embedded)
    )
    one = torch.ones(3, 4, 2)
    one[1, 2, 0] = 0  # the attention branch of the second image in the third block
    output = model.encode(some_images(), drop_path_scales=one)
    assert torch.equal(output[[0, 2]], whole[[0, 2]])
    x, _ = model.forward_blocks(embedded[1:2], num_blocks=2)
    third, last = model.blocks[2], model.blocks[3]
    expected = model.norm(last(x + third.mlp(third.norm2(x))))
    torch.testing.assert_close(output[1:2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 24, 16), (2, 1, 16, 24), (3, 16, 24)])
def test_images_of_the_wrong_shape_are_an_error(shape):
    model = some_encoder()
    for call in (model, model.encode, lambda images: model.forward_intermediates(images, [0])):
        with pytest.raises(
            ValueError, match=r"The images have shape .*Give images of shape \(B, 3, 16, 24\)"
        ):
            call(torch.randn(shape))


def test_an_encoder_has_the_masked_autoencoders_parameter_names():
    encoder = list(some_encoder().state_dict())
    model = list(create_model(**SMALL, decoder_depth=1).state_dict())
    assert [name for name in model if name in encoder] == encoder
    assert all(name.startswith(("decoder_", "mask_token")) for name in model if name not in encoder)


@pytest.mark.parametrize(
    ("make", "kind", "config"),
    [
        (create_encoder, VisionTransformer, ViTConfig(**SMALL)),
        (create_mae, MaskedAutoencoder, MAEConfig(**SMALL, decoder_depth=1)),
        (create_classifier, Classifier, ClassifierConfig(**SMALL, classes=3)),
    ],
)
def test_initial_weights_depend_on_the_seed(make, kind, config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = make(config, 0), make(config, 0), make(config, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(one) is kind
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.cls_token, other.cls_token)
    assert not torch.equal(one.patch_embed.proj.weight, other.patch_embed.proj.weight)
    # Xavier-uniform, not torch's default for linear layers.
    bound = (6 / (32 + 4 * 32)) ** 0.5
    weight = one.blocks[0].mlp.fc1.weight.detach()
    assert 0.98 * bound < float(weight.abs().max()) <= bound
    assert not one.blocks[0].mlp.fc1.bias.detach().any()
