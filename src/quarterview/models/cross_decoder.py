"""The cross-attention decoder of CrossMAE: masked patches attend to visible ones, and not to one another.

Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders" (arXiv 2401.14391). The decoder's tokens
are the masked patches alone. Each block attends to a mixture of the outputs of all encoder blocks, with
learned weights of its own. The prediction of a patch does not depend on the other masked patches, so it is
enough to predict some of them.

Letters in shapes are those of `mae.py`: N masks, Q predicted patches, T encoder tokens, D the encoder's
width, E the decoder's width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quarterview.models.config import ViTShape
from quarterview.models.vit import (
    LAYER_NORM_EPS,
    CheckpointableBlock,
    Mlp,
    compute_attention,
    run_checkpointed,
)


class CrossAttention(nn.Module):
    """Multi-head cross-attention between tokens of different widths."""

    def __init__(self, width: int, num_heads: int, source_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Attend from x, float [N, Q, E], to source, float [N, T, D]. Returns float [N, Q, E]."""
        query = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, Q, E / heads]
        key, value = self.kv(source).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(compute_attention(query, key, value).transpose(1, 2).flatten(2))


class CrossBlock(CheckpointableBlock):
    """A pre-norm block of cross-attention and an MLP, without self-attention.

    No positions are added to the source: the encoder's tokens already have theirs.
    """

    def __init__(self, width: int, num_heads: int, source_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_source = nn.LayerNorm(source_width, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(width, num_heads, source_width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Apply the block to x, float [N, Q, E], with source, float [N, T, D]. Returns float [N, Q, E]."""
        if self.grad_checkpointing and self.training:
            return run_checkpointed(self._forward, x, source)
        return self._forward(x, source)

    def _forward(self, x: Tensor, source: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_source(source))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.ModuleList):
    """The blocks of the decoder, each with a learned weighted sum of the encoder's outputs as its source.

    The paper calls this inter-block attention. The sum is over the embedded tokens and the tokens after each
    encoder block, the last ones after the final norm. The weights are unconstrained. Their initial values are
    Xavier-uniform, in effect as in the official code; a LayerNorm follows, so their scale does not matter.
    """

    def __init__(self, width: int, num_heads: int, depth: int, encoder_shape: ViTShape) -> None:
        super().__init__(CrossBlock(width, num_heads, encoder_shape.width) for _ in range(depth))
        self.mix = nn.Parameter(torch.empty(depth, 1 + encoder_shape.depth))
        nn.init.xavier_uniform_(self.mix)

    def forward(self, x: Tensor, layers: Sequence[Tensor]) -> Tensor:
        """Decode the queries.

        Args:
            x: float [N, Q, E], the queries.
            layers: the 1 + depth outputs of the encoder, each float [N, T, D].

        Returns:
            float [N, Q, E].
        """
        stacked = torch.stack(list(layers))  # [1 + depth, N, T, D]
        mixed = (self.mix @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])  # [blocks, N, T, D]
        for block, source in zip(self, mixed, strict=True):
            x = block(x, source)
        return x
