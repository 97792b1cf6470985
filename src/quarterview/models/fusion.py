"""What a decoder is given of an encoder's earlier blocks: multi-level feature fusion.

Liu et al. 2023, "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (MFF, arXiv
2308.00261). Pixels want fine detail, which the last blocks would have to carry along; here
the earlier ones bring it. The fusion serves pre-training alone: features are those of the last block.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quarterview.models.vit import init_module


class Fusion(nn.Module):
    """A weighted sum of the last block's tokens and of linear projections of earlier blocks'.

    The weights are a softmax and start equal, as the authors' do.
    """

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        """
        Args:
            blocks: which ones are projected, ascending; 1 is the first.
        """
        super().__init__()
        self.projections = nn.ModuleDict({str(block): nn.Linear(width, width) for block in blocks})
        self.logits = nn.Parameter(torch.zeros(len(blocks) + 1))  # the last block's is the last
        self.apply(init_module)

    @property
    def weights(self) -> Tensor:
        """The weights of the projections, then of the last block: float [blocks + 1], their sum is 1."""
        return self.logits.softmax(dim=0)

    def forward(self, layers: Mapping[int, Tensor], last: Tensor) -> Tensor:
        """Fuse the tokens after each of the projected blocks, by its number, and after the last block.

        All are float [N, T, D], and so is what is returned.
        """
        *weights, own = self.weights.unbind()
        fused = own * last
        for weight, (block, projection) in zip(weights, self.projections.items(), strict=True):
            fused = fused + weight * projection(layers[int(block)])
        return fused
