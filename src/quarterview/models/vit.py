"""The vision transformer (ViT) of Dosovitskiy et al. 2020: pre-norm blocks, with timm's parameter names.

The parameter names are timm's (`patch_embed.proj`, `blocks.0.attn.qkv`, `norm`), so weights are exchanged
with timm without renaming. `VisionTransformer` is the encoder; the masked autoencoder (`mae.py`) and the
classifier (`classifier.py`) are subclasses.

Letters in shapes: B images, N token sequences (B, or B times the number of masks per image; the masks of an
image are adjacent), C channels, H×W pixels, p the patch size, L patches per image, V visible patches, K cls
tokens (1 in the paper), T tokens in a sequence, D the width (embedding dimension).
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
from quarterview.models.positions import get_2d_sincos_pos_embed

LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4
MAX_EXPLICIT_ATTENTION_TOKENS = 512
"""The longest sequence for which `compute_attention` builds the attention matrix explicitly on a CPU."""

Config = TypeVar("Config", bound=ViTConfig)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, float [B, C, H, W] -> [B, L, p*p*C].

    Patches are in row-major order. The values of a patch are in the order row, column, channel, as in the
    official code.
    """
    p = patch_size
    x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # [B, C, rows, p, columns, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class PatchEmbed(nn.Module):
    """The patch embedding: a p×p convolution with stride p, applied to patches that are already cut out."""

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches, float [..., p*p*C] in the order of `patchify` -> [..., D]."""
        kernel = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p*p*C] in the order of `patchify`
        return F.linear(patches, kernel, self.proj.bias)


def compute_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute softmax attention of float [N, heads, T, D / heads] tensors.

    For short sequences on a CPU, explicit matrix products are faster than the fused kernel: a training step
    of ViT-tiny/4 at 32 pixels is 1.7 times as fast (docs/log.md).
    """
    if query.device.type == "cpu" and key.shape[2] <= MAX_EXPLICIT_ATTENTION_TOKENS:
        query, key, value = (
            (query * query.shape[3] ** -0.5).contiguous(),
            key.contiguous(),
            value.contiguous(),
        )
        return (query @ key.transpose(2, 3)).softmax(dim=3) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, query_start: int = 0) -> Tensor:
        """Attend from the tokens at `query_start` and after to all tokens.

        Args:
            x: float [N, T, D].
            query_start: the index of the first query token.

        Returns:
            float [N, T - query_start, D].
        """
        if query_start == 0:
            query, key, value = self._split_heads(self.qkv(x), 3)
        else:
            weight, bias, width = self.qkv.weight, self.qkv.bias, x.shape[2]
            (query,) = self._split_heads(F.linear(x[:, query_start:], weight[:width], bias[:width]), 1)
            key, value = self._split_heads(F.linear(x, weight[width:], bias[width:]), 2)
        return self.proj(compute_attention(query, key, value).transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor, count: int) -> Tensor:
        """Split projections and heads, float [N, T, count * D] -> [count, N, heads, T, D / heads]."""
        return x.unflatten(2, (count, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class Mlp(nn.Module):
    """The MLP of a block: two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class CheckpointableBlock(nn.Module):
    """A block that can recompute its activations in the backward pass (activation checkpointing)."""

    grad_checkpointing = False


class Block(CheckpointableBlock):
    """A pre-norm transformer block: attention and an MLP, each with a LayerNorm and a residual connection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, drop_path_scale: Tensor | None = None, query_start: int = 0) -> Tensor:
        """Apply the block.

        Args:
            x: float [N, T, D].
            drop_path_scale: float [N, 2], the factors of the attention branch and the MLP branch in each
                sequence.
            query_start: the index of the first token to compute. The tokens before it serve as keys and
                values only.

        Returns:
            float [N, T - query_start, D].
        """
        if self.grad_checkpointing and self.training:
            return run_checkpointed(self._forward, x, drop_path_scale, query_start)
        return self._forward(x, drop_path_scale, query_start)

    def _forward(self, x: Tensor, drop_path_scale: Tensor | None, query_start: int) -> Tensor:
        branch = self.attn(self.norm1(x), query_start)
        x = x[:, query_start:] + (
            branch if drop_path_scale is None else drop_path_scale[:, :1, None] * branch
        )
        branch = self.mlp(self.norm2(x))
        return x + (branch if drop_path_scale is None else drop_path_scale[:, 1:, None] * branch)


class VisionTransformer(nn.Module, Generic[Config]):
    """The encoder: it turns images into tokens.

    Args:
        config: the architecture and the format of the images.
        init: whether to draw the initial weights now. A subclass that adds modules passes False and calls
            `init_weights` after adding them, because the weights are drawn in the order of the modules.
    """

    def __init__(self, config: Config, init: bool = True) -> None:
        super().__init__()
        self.config, shape = config, config.shape
        self.patch_size, self.grid = shape.patch_size, config.grid
        self.patch_embed = PatchEmbed(shape.patch_size, config.in_chans, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, config.cls_tokens, shape.width))
        self.pos_embed = nn.Parameter(get_2d_sincos_pos_embed(shape.width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.num_heads) for _ in range(shape.depth))
        self.norm: nn.Module = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        if init:
            self.init_weights()

    def init_weights(self) -> None:
        """Draw the initial weights from torch's default generator, as the official MAE code does."""
        self.apply(init_module)
        nn.init.normal_(self.cls_token, std=0.02)

    # ------------------------------------------------------------------ from images to tokens

    def encode(
        self, images: Tensor, mask: Tensor | None = None, drop_path_scales: Tensor | None = None
    ) -> Tensor:
        """Return the tokens after the final norm. Without a mask all patches are visible.

        The result does not depend on any random number.

        Args:
            images: float [B, C, H, W], normalised.
            mask: bool [B, L], True where masked, with the same number of masked patches in every row. Masked
                patches are left out.
            drop_path_scales: float [B, depth, 2], see `compute_drop_path_scales`.

        Returns:
            float [B, K + V, D]: the cls tokens, then the visible patches in row-major order.

        Raises:
            ValueError: if the images or the mask have the wrong shape.
        """
        patches, visible_indices = self.patchify(images), None
        if mask is not None:
            num_visible = masking.count_visible(mask, (len(images), self.config.num_patches))
            visible_indices, _ = masking.split_indices(mask, num_visible)
        x, _ = self.forward_blocks(self.embed(patches, visible_indices), drop_path_scales=drop_path_scales)
        return self.norm(x)

    def forward(self, images: Tensor) -> Any:
        """Return `encode(images)`. Subclasses return the output that they are trained for."""
        return self.encode(images)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: Sequence[int],
        norm: bool = False,
        drop_path_scales: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the feature maps after some blocks, for dense prediction heads.

        The result is that of timm's method of the same name with ``intermediates_only=True``. Blocks after
        the last requested one are not run.

        Args:
            images: float [B, C, H, W], normalised.
            indices: the blocks, from 0; negative indices count from the end.
            norm: whether to apply the final norm to each map.
            drop_path_scales: float [B, depth, 2], see `compute_drop_path_scales`.

        Returns:
            One map per index, float [B, D, H / p, W / p], without cls tokens.

        Raises:
            ValueError: if a block does not exist, or the images have the wrong shape.
        """
        depth, cls = len(self.blocks), self.config.cls_tokens
        if not indices or not all(-depth <= index < depth for index in indices):
            raise ValueError(
                f"The block indices are {list(indices)} in a model of {depth} blocks. "
                f"Give one or more from {-depth} to {depth - 1}."
            )
        after = [index % depth + 1 for index in indices]  # numbers of blocks, from 1
        _, intermediates = self.forward_blocks(
            self.embed(self.patchify(images)), after, drop_path_scales, num_blocks=max(after)
        )
        tokens = [self.norm(intermediates[n]) if norm else intermediates[n] for n in after]
        return [x[:, cls:].transpose(1, 2).unflatten(2, self.grid) for x in tokens]

    # ------------------------------------------------------------------ the steps of encoding

    def patchify(self, images: Tensor) -> Tensor:
        """Cut images into patches with the function `patchify`, float [B, C, H, W] -> [B, L, p*p*C].

        Raises:
            ValueError: if the images have the wrong shape.
        """
        expected = (self.config.in_chans, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"The images have shape {tuple(images.shape)}. "
                f"Give images of shape (B, {', '.join(map(str, expected))})."
            )
        return patchify(images, self.patch_size)

    def embed(self, patches: Tensor, visible_indices: Tensor | None = None) -> Tensor:
        """Return the input tokens of the first block: embedded patches plus positions.

        Args:
            patches: float [B, L, p*p*C].
            visible_indices: int64 [N, V], the patches to embed; None embeds all.

        Returns:
            float [N, K + V, D], the cls tokens first.
        """
        positions = self.pos_embed[:, 1:]
        if visible_indices is not None:
            patches = masking.gather_patches(patches, visible_indices)
            positions = masking.gather_patches(positions, visible_indices)
        x = self.patch_embed(patches) + positions
        # All cls tokens share row 0 of the positions. x.shape[0] stays symbolic in an exported graph; len(x)
        # would fix the batch size.
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], dim=1)

    def forward_blocks(
        self,
        x: Tensor,
        keep_after: Collection[int] = (),
        drop_path_scales: Tensor | None = None,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Apply the blocks. All models and methods apply them through this method.

        Args:
            x: float [N, T, D].
            keep_after: also return the tokens after these numbers of blocks: 0 (the input) to depth.
            drop_path_scales: float [N, depth, 2], see `compute_drop_path_scales`.
            num_blocks: apply only the first blocks; None applies all.

        Returns:
            The tokens after the last applied block, float [N, T, D], before the final norm; and the tokens
            that `keep_after` asks for, by number of blocks.
        """
        intermediates = {0: x} if 0 in keep_after else {}
        for n, block in enumerate(islice(self.blocks, num_blocks), 1):
            x = block(x, None if drop_path_scales is None else drop_path_scales[:, n - 1])
            if n in keep_after:
                intermediates[n] = x
        return x, intermediates


def compute_drop_path_scales(uniforms: Tensor, drop_path_rate: float) -> Tensor:
    """Compute the factors of the residual branches under stochastic depth (drop path, Huang et al. 2016).

    The rate of a block grows linearly from 0 at the first block to `drop_path_rate` at the last. A branch is
    multiplied by 0 with the probability of its block's rate, otherwise by 1 / (1 - rate).

    Args:
        uniforms: float [B, depth, 2] in [0, 1), one for each of the two branches of each block.
        drop_path_rate: the rate of the last block.

    Returns:
        float [B, depth, 2], for `VisionTransformer.forward_blocks`.
    """
    keep_prob = (
        1 - torch.linspace(0, drop_path_rate, uniforms.shape[1], device=uniforms.device)[None, :, None]
    )
    return (uniforms < keep_prob) / keep_prob


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Turn on activation checkpointing in all blocks: less memory, about a third more computation."""
    for module in model.modules():
        if isinstance(module, CheckpointableBlock):
            module.grad_checkpointing = True


def run_checkpointed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """Return ``function(*inputs)``, and store only the inputs for the backward pass.

    `function` must not draw random numbers: the state of the generators is not restored.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def init_module(module: nn.Module) -> None:
    """Initialise one module as the official MAE code does; for `nn.Module.apply`.

    The weights of linear layers are Xavier-uniform (qkv as one matrix), and their biases 0. The kernel of the
    patch embedding is Xavier-uniform as a matrix, and its bias keeps the default of a convolution. LayerNorms
    have weight 1 and bias 0.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.view(module.proj.out_channels, -1))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
