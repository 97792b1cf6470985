"""The number of floating-point operations (FLOPs) of a training step, in closed form.

Only matrix products are counted; a multiplication and an addition are two operations. Only operations that
the method needs are counted: visible patches alone are embedded, and the last decoder block and the
prediction layer process the predicted patches alone. So needless work, such as recomputed activations, does
not raise a rate (FLOP/s) that is made from these numbers.
"""

from typing import NamedTuple

from quarterview.models.config import MAEConfig, compute_num_visible
from quarterview.models.vit import MLP_RATIO


class Flops(NamedTuple):
    """The FLOPs of one forward pass for one image, by part of the model."""

    patch_embedding: int
    encoder: int
    decoder: int
    prediction: int

    @property
    def forward(self) -> int:
        """The FLOPs of a forward pass."""
        return sum(self)

    @property
    def step(self) -> int:
        """The FLOPs of a forward and a backward pass.

        The backward pass repeats each product twice, for the gradients of its input and of its weight. The
        gradient of the pixels is not needed.
        """
        return 3 * self.forward - self.patch_embedding


def count_flops(config: MAEConfig) -> Flops:
    """Count the FLOPs of a masked autoencoder for one image."""
    shape, num_patches = config.shape, config.num_patches
    patch_dim = shape.patch_size**2 * config.in_chans
    num_visible = compute_num_visible(num_patches, config.mask_ratio)
    num_predicted = num_patches if config.predict_all else num_patches - num_visible
    num_encoded = config.cls_tokens + (num_patches if config.encoder_mask_tokens else num_visible)
    width, depth = config.decoder_width, config.decoder_depth
    if config.decoder == "cross":
        num_predicted = max(1, round(config.predict_ratio * num_predicted))
        decoder = depth * count_cross_block_flops(num_predicted, num_encoded, width, shape.width)
        decoder += 2 * depth * (1 + shape.depth) * num_encoded * shape.width  # sums of the encoder's outputs
    elif depth:
        num_tokens = config.cls_tokens + num_patches
        decoder = _count_linear_flops(num_encoded, shape.width, width)
        decoder += (depth - 1) * count_block_flops(num_tokens, width)
        decoder += count_block_flops(num_tokens, width, num_tokens if config.predict_all else num_predicted)
    else:
        decoder, width = 0, shape.width
    decoder += len(config.fused_blocks) * _count_linear_flops(num_encoded, shape.width, shape.width)
    return Flops(
        patch_embedding=_count_linear_flops(num_visible, patch_dim, shape.width),
        encoder=shape.depth * count_block_flops(num_encoded, shape.width),
        decoder=decoder,
        prediction=_count_linear_flops(num_predicted, width, config.target_dim),
    )


def count_block_flops(num_tokens: int, width: int, num_queries: int | None = None) -> int:
    """Count the FLOPs of a transformer block that computes `num_queries` of its `num_tokens` tokens."""
    num_queries = num_tokens if num_queries is None else num_queries
    attention = 2 * 2 * num_queries * num_tokens * width  # attention scores, and weighted sums of values
    keys_and_values = _count_linear_flops(num_tokens, width, 2 * width)
    return keys_and_values + attention + _count_linear_flops(num_queries, width, (2 + 2 * MLP_RATIO) * width)


def count_cross_block_flops(num_queries: int, num_tokens: int, width: int, source_width: int) -> int:
    """Count the FLOPs of a cross-attention block whose queries attend to tokens of another width."""
    attention = 2 * 2 * num_queries * num_tokens * width
    keys_and_values = _count_linear_flops(num_tokens, source_width, 2 * width)
    return keys_and_values + attention + _count_linear_flops(num_queries, width, (2 + 2 * MLP_RATIO) * width)


def _count_linear_flops(num_tokens: int, in_features: int, out_features: int) -> int:
    return 2 * num_tokens * in_features * out_features
