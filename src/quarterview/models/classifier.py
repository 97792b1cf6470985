"""A vision transformer with a linear head: what a pre-trained encoder is fine-tuned as.

The parameter names are timm's. With mean pooling there is no `norm`: the patch tokens, without cls,
are averaged first and the average normalised by `fc_norm` (the official fine-tuning of He et al.
2021; timm's ``global_pool="avg", fc_norm=True``). With cls pooling the encoder's `norm` stays, and
the head reads the cls token, or the mean of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.errors import UserError, check_types
from quarterview.models.config import ViTConfig
from quarterview.models.positions import sincos_2d
from quarterview.models.vit import LAYER_NORM_EPS, Block, PatchEmbed, init_weights, patchify

Pool = Literal["mean", "cls"]
HEAD_STD = 2e-5
"""Of the head's initial weights: the official fine-tuning's."""


@dataclass(frozen=True)
class ClassifierConfig(ViTConfig):
    """What a classifier is."""

    classes: int = 1000
    """How many classes there are."""
    pool: Pool = "mean"
    """What the head reads: the mean of the patch tokens, or the cls token (of several the mean)."""
    class_names: tuple[str, ...] | None = None
    """What the classes are called, in the order of the head's rows."""

    def __post_init__(self) -> None:
        names = self.class_names
        object.__setattr__(self, "class_names", None if names is None else tuple(names))
        super().__post_init__()
        check_types(self, ClassifierConfig)
        if self.classes < 2:
            raise UserError(f"{self.classes} classes; accepted: 2 or more")


class Classifier(nn.Module):
    """A plain vision transformer that names classes."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.shape
        self.patch_size, self.grid = shape.patch_size, config.grid
        self.patch_embed = PatchEmbed(shape.patch_size, config.in_chans, shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, config.cls_tokens, shape.width))
        self.pos_embed = nn.Parameter(sincos_2d(shape.width, self.grid))  # trained, as the official code does
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.norm = norm if config.pool == "cls" else nn.Identity()
        self.fc_norm = norm if config.pool == "mean" else nn.Identity()
        self.head = nn.Linear(shape.width, config.classes)

        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)

    def encode(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """The tokens after the last block, and after the norm where the head reads the cls token.

        Args:
            images: float [B, C, H, W], normalised.
            scales: float [B, depth, 2], what the branches of each block are multiplied by: drop path.

        Returns:
            float [B, K + L, D]: K cls tokens, then the patches by row.

        Raises:
            ValueError: if the images have another shape than the model's.
        """
        expected = (self.config.in_chans, *self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {tuple(images.shape)}; accepted: (B, {', '.join(map(str, expected))})"
            )
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:]  # [B, L, D]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # one row serves all
        x = torch.cat([cls, x], dim=1)  # [B, K + L, D]
        for i, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[:, i])
        return self.norm(x)

    def features(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """What the head reads: float [B, D]."""
        tokens, cls = self.encode(images, scales), self.config.cls_tokens
        if self.config.pool == "cls":
            return tokens[:, :cls].mean(dim=1)
        return self.fc_norm(tokens[:, cls:].mean(dim=1))

    def forward(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """float [B, C, H, W], normalised -> logits, float [B, classes]."""
        features = self.features(images, scales)
        with torch.autocast(images.device.type, enabled=False):  # in bf16 the best two logits are often equal
            return self.head(features.float())


def fresh_classifier(config: ClassifierConfig, seed: int) -> Classifier:
    """A classifier with the initial weights that belong to a seed."""
    with rng.seeded(seed, "init"):
        return Classifier(config)


def drop_path_scales(uniforms: Tensor, rate: float) -> Tensor:
    """What each sample's branches are multiplied by under stochastic depth (Huang et al. 2016).

    The rate of a block grows linearly from 0 at the first to `rate` at the last; a branch is left
    out or multiplied by 1 / (1 - its rate).

    Args:
        uniforms: float [B, depth, 2] in [0, 1).
        rate: of the last block.

    Returns:
        float [B, depth, 2].
    """
    kept = 1 - torch.linspace(0, rate, uniforms.shape[1], device=uniforms.device)[None, :, None]
    return (uniforms < kept) / kept


def freeze_all_but(model: Classifier, blocks: float) -> None:
    """Leave the last blocks trainable, and what follows them, and freeze the rest (section 4.3).

    Args:
        blocks: how many, a whole number or 0.5, which is the last block's MLP alone; 0 is the head
            and its norm, and infinity trains everything.

    Raises:
        UserError: if there are not so many.
    """
    depth = len(model.blocks)
    if blocks == math.inf:
        return
    if blocks > depth:
        raise UserError(f"{blocks:g} blocks of {depth}; accepted: at most {depth}, or all")
    first = depth - int(blocks)
    trainable = ("norm.", "fc_norm.", "head.", *(f"blocks.{i}." for i in range(first, depth)))
    if blocks == 0.5:
        trainable += (f"blocks.{depth - 1}.mlp.",)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
