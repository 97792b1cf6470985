"""A plain vision transformer (Dosovitskiy et al. 2020), pre-norm, with timm's parameter names.

Nothing is renamed on the way to or from timm: `patch_embed.proj`, `blocks.0.attn.qkv`, `norm`, …
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quarterview.errors import UserError, unknown

LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4
EXPLICIT_ATTENTION_TOKENS = 512
"""Up to how many tokens a CPU holds the matrix of attention weights."""

SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and heads of the encoders that have a name."""


@dataclass(frozen=True)
class ViTShape:
    """The numbers behind a model name."""

    width: int
    depth: int
    heads: int
    patch_size: int


def parse_model_name(name: str) -> ViTShape:
    """Read ``mae_vit_{size}_patch{N}``.

    `size` is a name of `SIZES`, or the numbers themselves: ``mae_vit_128x4x4_patch4`` is 128 wide
    with 4 blocks of 4 heads. There may be 999 blocks.

    Raises:
        UserError: if the name is none of these.
    """
    match = re.fullmatch(r"mae_vit_(\w+?)_patch([1-9]\d{0,8})", name)
    custom = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,2})x([1-9]\d{0,5})", match[1]) if match else None
    if match is None or (custom is None and match[1] not in SIZES):
        patch = match[2] if match else "16"
        raise unknown(
            "model", name, [f"mae_vit_{size}_patch{patch}" for size in (*SIZES, "WIDTHxDEPTHxHEADS")]
        )
    width, depth, heads = (int(n) for n in custom.groups()) if custom else SIZES[match[1]]
    check_width(f"model {name!r}", width, heads)
    return ViTShape(width, depth, heads, patch_size=int(match[2]))


def check_width(what: str, width: int, heads: int) -> None:
    """Raises UserError unless `heads` divide `width`, and 4 does, as the positions need."""
    if heads < 1 or width < 4 or width % heads or width % 4:
        raise UserError(
            f"{what}: {width} wide with {heads} heads; accepted: widths that divide by 4 and by the heads"
        )


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """float [B, C, H, W] -> float [B, L, p*p*C]: patches by row, numbers by row, column, channel."""
    p = patch_size
    x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, C, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """Holds the stride-p p×p convolution of timm, and applies it to patches already cut out."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """float [..., p*p*C] (row, column, channel) -> float [..., D]."""
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p*p*C], in the patches' order
        return F.linear(patches, kernel, self.proj.bias)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over float [B, heads, T, d].

    On a CPU and for short sequences plain matrix products are faster than the fused kernel
    (1.7× for a whole training step of ViT-tiny/4 at 32 pixels, docs/log.md).
    """
    if query.device.type == "cpu" and key.shape[2] <= EXPLICIT_ATTENTION_TOKENS:
        query, key, value = (
            (query * query.shape[3] ** -0.5).contiguous(),
            key.contiguous(),
            value.contiguous(),
        )
        return (query @ key.transpose(2, 3)).softmax(dim=3) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """float [B, T, D] -> [B, T - first, D]: what the tokens from `first` on take from all."""
        if first == 0:
            query, key, value = self._split_heads(self.qkv(x), 3)
        else:
            weight, bias, width = self.qkv.weight, self.qkv.bias, x.shape[2]
            (query,) = self._split_heads(F.linear(x[:, first:], weight[:width], bias[:width]), 1)
            key, value = self._split_heads(F.linear(x, weight[width:], bias[width:]), 2)
        return self.proj(attention(query, key, value).transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor, count: int) -> Tensor:
        """float [B, T, count * D] -> [count, B, heads, T, D / heads]."""
        return x.unflatten(2, (count, self.heads, -1)).permute(2, 0, 3, 1, 4)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Recomputable(nn.Module):
    """A block that can keep its inputs alone for the backward pass, and compute the rest again there."""

    recompute = False


class Block(Recomputable):
    """Attention, then an MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, scale: Tensor | None = None, first: int = 0) -> Tensor:
        """float [B, T, D] -> the same, or [B, T - first, D].

        Args:
            scale: float [B, 2], what each sample's two branches are multiplied by: drop path.
            first: the first of the tokens that are wanted; those before it are only attended to.
        """
        if self.recompute and self.training:
            return recomputed(self._forward, x, scale, first)
        return self._forward(x, scale, first)

    def _forward(self, x: Tensor, scale: Tensor | None, first: int) -> Tensor:
        branch = self.attn(self.norm1(x), first)
        x = x[:, first:] + (branch if scale is None else scale[:, :1, None] * branch)
        branch = self.mlp(self.norm2(x))
        return x + (branch if scale is None else scale[:, 1:, None] * branch)


def recompute_blocks(model: nn.Module) -> None:
    """Train with less memory and about a third more work: each block keeps its input alone."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = True


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """What `function` makes of its inputs, of which nothing else is kept; nothing in it may be random."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def init_weights(module: nn.Module) -> None:
    """The official initialisation of one module; for `nn.Module.apply`.

    Linear layers are xavier-uniform without bias (qkv as the one matrix it is), so is the patch
    embedding's kernel seen as a matrix; its bias keeps the default of a convolution. LayerNorms
    are the identity.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.view(module.proj.out_channels, -1))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
