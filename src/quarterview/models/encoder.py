"""A vision transformer without anything around it: what is trained by comparing views.

Its parameters have the names, the shapes and the initial values of the masked autoencoder's encoder.
"""

import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.models.config import ViTConfig
from quarterview.models.positions import sincos_2d
from quarterview.models.vit import LAYER_NORM_EPS, Block, PatchEmbed, init_weights, patchify


class Encoder(nn.Module):
    """Patches, positions, blocks and the final norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        self.patch_size, self.grid = shape.patch_size, config.grid
        self.patch_embed = PatchEmbed(shape.patch_size, config.in_chans, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, config.cls_tokens, shape.width))
        self.pos_embed = nn.Parameter(sincos_2d(shape.width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)

        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised -> float [B, K + L, D]: K cls tokens, then the patches by row."""
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:]  # [B, L, D]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1).to(x.dtype)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    encode = forward


def fresh_encoder(config: ViTConfig, seed: int) -> Encoder:
    """An encoder with initial weights that belong to a seed."""
    with rng.seeded(seed, "init"):
        return Encoder(config)
