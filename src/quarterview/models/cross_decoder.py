"""The cheaper decoder: hidden patches read the visible ones, and not one another.

Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders" (CrossMAE, arXiv 2401.14391). The
decoder's tokens are the hidden patches alone. Each of its blocks looks at the encoder's tokens by
cross-attention, and at its own learned mixture of all the encoder's layers. What is predicted for one
patch depends on no other hidden one, so any part of them can be left out.

Letters in shapes are those of `mae.py`; Q is how many patches are predicted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quarterview.models.config import ViTShape
from quarterview.models.vit import LAYER_NORM_EPS, Mlp, Recomputable, attention, recomputed


class CrossAttention(nn.Module):
    """Tokens of one width look at tokens of another."""

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(source_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """float [N, Q, E] and what it looks at, float [N, T, D] -> float [N, Q, E]."""
        query = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [N, heads, Q, E / heads]
        key, value = self.kv(source).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(query, key, value).transpose(1, 2).flatten(2))


class CrossBlock(Recomputable):
    """Cross-attention, then an MLP, each behind a LayerNorm and added to its input.

    There is no self-attention, and no position is added to what is looked at: the encoder's tokens
    have theirs.
    """

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_source = nn.LayerNorm(source_width, eps=LAYER_NORM_EPS)
        self.attn = CrossAttention(width, heads, source_width)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """float [N, Q, E] and what it looks at, float [N, T, D] -> float [N, Q, E]."""
        if self.recompute and self.training:
            return recomputed(self._forward, x, source)
        return self._forward(x, source)

    def _forward(self, x: Tensor, source: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm_source(source))
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.ModuleList):
    """The blocks, and for each of them a weighted sum of the encoder's layers: inter-block attention.

    The layers are the embedded tokens and those after each of the encoder's blocks, the last after the
    final norm. The weights are learned and may be negative. They start xavier-uniform, which those of
    the official code do in effect; their scale is lost in the block's LayerNorm.
    """

    def __init__(self, width: int, heads: int, depth: int, encoder: ViTShape) -> None:
        super().__init__(CrossBlock(width, heads, encoder.width) for _ in range(depth))
        self.mix = nn.Parameter(torch.empty(depth, 1 + encoder.depth))
        nn.init.xavier_uniform_(self.mix)

    def forward(self, x: Tensor, layers: Sequence[Tensor]) -> Tensor:
        """float [N, Q, E] and 1 + depth layers, each float [N, T, D] -> float [N, Q, E]."""
        stacked = torch.stack(list(layers))  # [1 + depth, N, T, D]
        mixed = (self.mix @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])  # [blocks, N, T, D]
        for block, source in zip(self, mixed, strict=True):
            x = block(x, source)
        return x
