"""Multi-level feature fusion (MFF): the decoder also reads earlier blocks of the encoder.

Liu et al. 2023, "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (arXiv 2308.00261).
Predicting pixels needs fine detail. With fusion the earlier blocks supply it, so the last blocks need not
carry it. The fusion is used in pre-training only: the features of an image are still those of the last block.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quarterview.models.vit import init_module


class MultiLevelFusion(nn.Module):
    """A weighted sum of the last block's tokens and of linear projections of earlier blocks' tokens.

    The weights are a softmax and start equal, as in the authors' code.
    """

    def __init__(self, width: int, fused_blocks: Sequence[int]) -> None:
        """
        Args:
            width: the width of the tokens.
            fused_blocks: the numbers of the projected blocks, ascending; 1 is the first block.
        """
        super().__init__()
        self.projections = nn.ModuleDict({str(block): nn.Linear(width, width) for block in fused_blocks})
        self.logits = nn.Parameter(torch.zeros(len(fused_blocks) + 1))  # the last one is the last block's
        self.apply(init_module)

    @property
    def weights(self) -> Tensor:
        """The weights of the projections, then of the last block: float [blocks + 1], with sum 1."""
        return self.logits.softmax(dim=0)

    def forward(self, block_outputs: Mapping[int, Tensor], last_output: Tensor) -> Tensor:
        """Fuse the outputs of several blocks.

        Args:
            block_outputs: the tokens after each projected block, float [N, T, D], by the block's number.
            last_output: the tokens after the last block, float [N, T, D].

        Returns:
            float [N, T, D].
        """
        *weights, last_weight = self.weights.unbind()
        fused = last_weight * last_output
        for weight, (block, projection) in zip(weights, self.projections.items(), strict=True):
            fused = fused + weight * projection(block_outputs[int(block)])
        return fused
