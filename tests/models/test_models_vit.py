from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from quarterview.errors import UserError
from quarterview.models import vit
from quarterview.models.create import create_model
from quarterview.models.vit import Block, recompute_blocks


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
    shape = model.config.shape
    theirs = VisionTransformer(
        img_size=size,
        patch_size=shape.patch_size,
        in_chans=channels,
        num_classes=0,
        global_pool="",
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
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


@pytest.mark.parametrize("size", vit.SIZES)
def test_named_sizes_are_those_of_timm(size):
    import timm

    name = {"tiny": "vit_tiny_patch16_224", "huge": "vit_huge_patch14_224"}.get(
        size, f"vit_{size}_patch16_224"
    )
    patch = 14 if size == "huge" else 16
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        ours = create_model(f"mae_vit_{size}_patch{patch}")
    assert ours.config.shape.heads == theirs.blocks[0].attn.num_heads
    state = ours.state_dict()
    assert {k: state[k].shape for k in theirs.state_dict()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize(
    "tokens", [1, 5, 65, vit.EXPLICIT_ATTENTION_TOKENS, vit.EXPLICIT_ATTENTION_TOKENS + 1]
)
def test_attention_equals_torchs(tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 16, requires_grad=True) for _ in range(3))
    ours = vit.attention(query, key, value)
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
def test_names_are_read(name, shape):
    assert vit.parse_model_name(name) == vit.ViTShape(*shape)


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
def test_other_names_are_an_error_that_names_the_nearest(name, hint):
    with pytest.raises(UserError) as error:
        vit.parse_model_name(name)
    assert str(error.value).startswith(f"unknown model {name!r}; accepted: mae_vit_tiny_patch")
    assert hint in str(error.value)


@pytest.mark.parametrize(("width", "heads"), [(100, 3), (66, 6), (2, 1)])
def test_widths_must_divide(width, heads):
    with pytest.raises(UserError, match=rf"{width} wide with {heads} heads; accepted: widths that divide"):
        vit.parse_model_name(f"mae_vit_{width}x2x{heads}_patch4")


@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_tokens_before_the_first_are_attended_to_but_not_computed(first):
    torch.manual_seed(0)
    block, x = Block(32, 4), torch.randn(3, 9, 32)
    torch.testing.assert_close(block(x, first=first), block(x)[:, first:], atol=1e-5, rtol=0)


def test_recomputed_blocks_keep_their_input_alone_and_give_the_same_gradients():
    torch.manual_seed(0)
    blocks, x = nn.Sequential(Block(32, 4), Block(32, 4)), torch.randn(3, 9, 32, requires_grad=True)

    def gradients() -> tuple[tuple[torch.Tensor, ...], int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            out = blocks(x)
        return torch.autograd.grad(out.sum(), [x, *blocks.parameters()]), sum(sizes)

    plain, kept = gradients()
    recompute_blocks(blocks)
    again, kept_again = gradients()
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert kept_again < 0.1 * kept
