"""A vision transformer with a linear head: what a pre-trained encoder is fine-tuned as.

The parameter names are timm's. With mean pooling there is no `norm`: the patch tokens, without cls,
are averaged first and the average normalised by `fc_norm` (the official fine-tuning of He et al.
2021; timm's ``global_pool="avg", fc_norm=True``). With cls pooling the encoder's `norm` stays, and
the head reads the cls token, or the mean of them.
"""

import math

import torch
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.config import ClassifierConfig
from quarterview.models.vit import VisionTransformer

HEAD_STD = 2e-5
"""Standard deviation of the head's initial weights, as in the official fine-tuning."""


class Classifier(VisionTransformer[ClassifierConfig]):
    """A plain vision transformer that names classes.

    Its `encode` gives the tokens after the norm where the head reads the cls token, else those after the last
    block.
    """

    notes: tuple[str, ...] = ()
    """What foreign weights were and lacked, and what was assumed of them; set by `quarterview.load`."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, init=False)
        self.pos_embed.requires_grad_(True)  # as the official code does
        self.fc_norm: nn.Module = nn.Identity()
        if config.pool == "mean":
            self.norm, self.fc_norm = self.fc_norm, self.norm
        self.head = nn.Linear(config.shape.width, config.classes)

        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)

    def features(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """What the head reads: float [B, D].

        Args:
            images: float [B, C, H, W], normalised.
            scales: float [B, depth, 2], drop path: see `vit.drop_path_scales`.
        """
        tokens, cls = self.encode(images, scales=scales), self.config.cls_tokens
        if self.config.pool == "cls":
            return tokens[:, :cls].mean(dim=1)
        return self.fc_norm(tokens[:, cls:].mean(dim=1))

    def forward(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """float [B, C, H, W], normalised -> logits, float [B, classes]."""
        features = self.features(images, scales)
        with torch.autocast(images.device.type, enabled=False):  # in bf16 the best two logits are often equal
            return self.head(features.float())


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
