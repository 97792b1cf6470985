"""A vision transformer with a linear classification head, for fine-tuning.

The parameter names are timm's. With mean pooling the patch tokens are averaged, and the average is normalised
by `fc_norm`; there is no `norm` (the official fine-tuning of He et al. 2021; timm's ``global_pool="avg",
fc_norm=True``). With cls pooling the encoder's `norm` is used, and the head reads the cls token, or the mean
of several cls tokens.
"""

import math

import torch
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.config import ClassifierConfig
from quarterview.models.vit import VisionTransformer

HEAD_INIT_STD = 2e-5
"""Standard deviation of the head's initial weights, as in the official fine-tuning code."""


class Classifier(VisionTransformer[ClassifierConfig]):
    """A vision transformer with a linear classification head.

    With cls pooling `encode` returns the tokens after the final norm; with mean pooling those after the last
    block, because the norm follows the pooling.
    """

    notes: tuple[str, ...] = ()
    """Remarks on converted weights (origin, missing parts, assumptions), set by `quarterview.load`."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config, init=False)
        self.pos_embed.requires_grad_(True)  # as in the official fine-tuning code
        self.fc_norm: nn.Module = nn.Identity()
        if config.pool == "mean":
            self.norm, self.fc_norm = self.fc_norm, self.norm
        self.head = nn.Linear(config.shape.width, config.classes)

        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=HEAD_INIT_STD)

    def compute_features(self, images: Tensor, drop_path_scales: Tensor | None = None) -> Tensor:
        """Return the pooled features, the input of the head: float [B, D].

        Args:
            images: float [B, C, H, W], normalised.
            drop_path_scales: float [B, depth, 2], see `vit.compute_drop_path_scales`.
        """
        tokens, cls = self.encode(images, drop_path_scales=drop_path_scales), self.config.cls_tokens
        if self.config.pool == "cls":
            return tokens[:, :cls].mean(dim=1)
        return self.fc_norm(tokens[:, cls:].mean(dim=1))

    def forward(self, images: Tensor, drop_path_scales: Tensor | None = None) -> Tensor:
        """Return the logits, float [B, classes], of normalised images, float [B, C, H, W]."""
        features = self.compute_features(images, drop_path_scales)
        with torch.autocast(
            images.device.type, enabled=False
        ):  # in bf16 the two largest logits are often equal
            return self.head(features.float())


def freeze_all_but_last_blocks(model: Classifier, num_blocks: float) -> None:
    """Freeze everything except the last blocks, the head and its norm (partial fine-tuning, section 4.3).

    Args:
        model: the classifier.
        num_blocks: the number of blocks to train. 0.5 trains the MLP of the last block, 0 the head and its
            norm only, infinity everything.

    Raises:
        UserError: if the model has fewer blocks.
    """
    depth = len(model.blocks)
    if num_blocks == math.inf:
        return
    if num_blocks > depth:
        raise UserError(
            f"--blocks is {num_blocks:g}, and the model has {depth} blocks. Give at most {depth}, or all."
        )
    first = depth - int(num_blocks)
    trainable = ("norm.", "fc_norm.", "head.", *(f"blocks.{i}." for i in range(first, depth)))
    if num_blocks == 0.5:
        trainable += (f"blocks.{depth - 1}.mlp.",)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
