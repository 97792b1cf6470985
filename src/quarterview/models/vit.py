"""The one vision transformer (Dosovitskiy et al. 2020): pre-norm, with timm's parameter names.

Nothing is renamed on the way to or from timm: `patch_embed.proj`, `blocks.0.attn.qkv`, `norm`, …
`VisionTransformer` is the encoder as it stands; the masked autoencoder (`mae.py`) and the classifier
(`classifier.py`) extend it.

Letters in shapes: B images, N sequences of tokens (B, or a multiple of it where each image has several
masks, which follow one another), C channels, H×W pixels, p the patch size, L patches, V visible ones,
K cls tokens (the paper's is one), T tokens of any kind, D the width.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quarterview.models import masking
from quarterview.models.config import ViTConfig
from quarterview.models.positions import sincos_2d

LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4
EXPLICIT_ATTENTION_TOKENS = 512
"""Up to how many tokens a CPU holds the matrix of attention weights."""

Config = TypeVar("Config", bound=ViTConfig)


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
    """Multi-head self-attention."""

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
    """Two linear layers with a GELU between them."""

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


class VisionTransformer(nn.Module, Generic[Config]):
    """The encoder: images or patches in, tokens out.

    Args:
        config: what it is, and what images it takes.
        init: subclasses that add modules pass False and call `init_weights` when they have added them,
            because initial weights are drawn in the order of the modules, after all of them are made.
    """

    def __init__(self, config: Config, init: bool = True) -> None:
        super().__init__()
        self.config, shape = config, config.shape
        self.patch_size, self.grid = shape.patch_size, config.grid
        self.patch_embed = PatchEmbed(shape.patch_size, config.in_chans, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, config.cls_tokens, shape.width))
        self.pos_embed = nn.Parameter(sincos_2d(shape.width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        if init:
            self.init_weights()

    def init_weights(self) -> None:
        """Draw the official initial weights of all modules, and of the cls tokens, from torch's generator."""
        self.apply(init_module)
        nn.init.normal_(self.cls_token, std=0.02)

    # ------------------------------------------------------------------ from images to tokens

    def encode(self, images: Tensor, mask: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """The tokens after the final norm; nothing is hidden unless a mask says so. Deterministic.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True where hidden, with equal counts in every row. Hidden patches are never
                embedded.
            scales: float [B, depth, 2], see `forward_blocks`.

        Returns:
            float [B, K + V, D]: cls, then the visible patches in ascending patch index, which is by row.

        Raises:
            ValueError: if the images or the mask have another shape than the model's.
        """
        patches, visible = self.patchify(images), None
        if mask is not None:
            kept = masking.count_visible(mask, (len(images), self.config.patches))
            visible, _ = masking.split(mask, kept)
        x, _ = self.forward_blocks(self.embed(patches, visible), scales=scales)
        return self.norm(x)

    def forward(self, images: Tensor) -> Any:
        """`encode`; subclasses return what they are trained for."""
        return self.encode(images)

    def forward_intermediates(
        self, images: Tensor, indices: Sequence[int], norm: bool = False, scales: Tensor | None = None
    ) -> list[Tensor]:
        """Feature maps after some of the blocks, for dense heads; no block after those is run.

        As timm's method of the same name gives them with ``intermediates_only=True``.

        Args:
            images: float [B, C, H, W], normalised.
            indices: which blocks, from 0; negative ones count from the end.
            norm: whether the final norm is applied to each map.
            scales: float [B, depth, 2], see `forward_blocks`.

        Returns:
            For each index float [B, D, H / p, W / p], without cls tokens.

        Raises:
            ValueError: if there is no such block, or the images have another shape than the model's.
        """
        depth, cls = len(self.blocks), self.config.cls_tokens
        if not indices or not all(-depth <= index < depth for index in indices):
            raise ValueError(
                f"block indices {list(indices)} for {depth} blocks. "
                f"Give one or more from {-depth} to {depth - 1}."
            )
        after = [index % depth + 1 for index in indices]
        _, kept = self.forward_blocks(self.embed(self.patchify(images)), after, scales, stop=max(after))
        tokens = [self.norm(kept[n]) if norm else kept[n] for n in after]
        return [x[:, cls:].transpose(1, 2).unflatten(2, self.grid) for x in tokens]

    # ------------------------------------------------------------------ its steps

    def patchify(self, images: Tensor) -> Tensor:
        """float [B, C, H, W] -> float [B, L, p*p*C]: patches by row, numbers by row, column, channel.

        Raises:
            ValueError: if the images have another shape than the model's.
        """
        expected = (self.config.in_chans, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)}; accepted: (B, {', '.join(map(str, expected))})"
            )
        return patchify(images, self.patch_size)

    def embed(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """The tokens that go into the first block, positions added.

        Args:
            patches: float [B, L, p*p*C].
            visible: int64 [N, V], the patches to embed; None means all.

        Returns:
            float [N, K + V, D], cls first.
        """
        positions = self.pos_embed[:, 1:]
        if visible is not None:
            patches, positions = masking.take(patches, visible), masking.take(positions, visible)
        x = self.patch_embed(patches) + positions
        # All cls tokens share row 0 of the positions. len(x) would fix the batch size of an exported graph.
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1)

    def forward_blocks(
        self,
        x: Tensor,
        keep: Collection[int] = (),
        scales: Tensor | None = None,
        stop: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Apply the blocks: the one place where that is done, whatever is trained.

        Args:
            x: float [N, T, D].
            keep: after how many blocks the tokens are wanted, too: 0 (as they came) to depth.
            scales: float [N, depth, 2], what the two branches of each block are multiplied by in each
                sequence: drop path.
            stop: how many blocks to apply; None means all.

        Returns:
            float [N, T, D] after the last block, before the final norm; and those of `keep`, by number.
        """
        kept = {0: x} if 0 in keep else {}
        for n, block in enumerate(islice(self.blocks, stop), 1):
            x = block(x, None if scales is None else scales[:, n - 1])
            if n in keep:
                kept[n] = x
        return x, kept


def drop_path_scales(uniforms: Tensor, rate: float) -> Tensor:
    """What each sample's branches are multiplied by under stochastic depth (Huang et al. 2016).

    The rate of a block grows linearly from 0 at the first to `rate` at the last; a branch is left
    out or multiplied by 1 / (1 - its rate).

    Args:
        uniforms: float [B, depth, 2] in [0, 1).
        rate: the last block's.

    Returns:
        float [B, depth, 2], for `VisionTransformer.forward_blocks`.
    """
    kept = 1 - torch.linspace(0, rate, uniforms.shape[1], device=uniforms.device)[None, :, None]
    return (uniforms < kept) / kept


def recompute_blocks(model: nn.Module) -> None:
    """Train with less memory and about a third more work: each block keeps its input alone."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recompute = True


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """``function(*inputs)``, of which only the inputs are kept for the backward pass.

    Nothing in `function` may be random.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def init_module(module: nn.Module) -> None:
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
