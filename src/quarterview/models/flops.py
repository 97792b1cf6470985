"""How many floating-point operations a step takes, by closed form.

Matrix products alone are counted, a multiplication and an addition as two, and of those only what
the method needs: visible patches are embedded, not all; the last block of the decoder and the
prediction work on the tokens that are predicted. So a rate made of these numbers does not grow by
doing more than is needed, such as recomputing activations.
"""

from typing import NamedTuple

from quarterview.models.config import MAEConfig, keep_count
from quarterview.models.vit import MLP_RATIO


class Flops(NamedTuple):
    """Operations for one image in one forward pass."""

    patch_embedding: int
    encoder: int
    decoder: int
    prediction: int

    @property
    def forward(self) -> int:
        """Operations of a forward pass."""
        return sum(self)

    @property
    def step(self) -> int:
        """Operations of a forward and a backward pass: each product again for its input's gradient and for
        its weight's, but nothing needs the gradient of the pixels."""
        return 3 * self.forward - self.patch_embedding


def flops(config: MAEConfig) -> Flops:
    """The operations that a model takes for one image."""
    shape, patches = config.shape, config.patches
    numbers = shape.patch_size**2 * config.in_chans  # in a patch
    kept = keep_count(patches, config.mask_ratio)
    predicted = patches if config.predict_all else patches - kept
    encoded = config.cls_tokens + (patches if config.encoder_mask_tokens else kept)
    width, depth = config.decoder_width, config.decoder_depth
    if config.decoder == "cross":
        predicted = max(1, round(config.predict_share * predicted))
        decoder = depth * cross_block_flops(predicted, encoded, width, shape.width)
        decoder += 2 * depth * (1 + shape.depth) * encoded * shape.width  # the mixtures of layers
    elif depth:
        tokens = config.cls_tokens + patches
        decoder = _linear(encoded, shape.width, width) + (depth - 1) * block_flops(tokens, width)
        decoder += block_flops(tokens, width, tokens if config.predict_all else predicted)
    else:
        decoder, width = 0, shape.width
    decoder += len(config.fused_blocks) * _linear(encoded, shape.width, shape.width)
    return Flops(
        patch_embedding=_linear(kept, numbers, shape.width),
        encoder=shape.depth * block_flops(encoded, shape.width),
        decoder=decoder,
        prediction=_linear(predicted, width, config.predicted_numbers),
    )


def block_flops(tokens: int, width: int, wanted: int | None = None) -> int:
    """Operations of one transformer block: all of `tokens` are attended to, and `wanted` of them computed."""
    wanted = tokens if wanted is None else wanted
    attention = 2 * 2 * wanted * tokens * width  # scores, and the mixture of values
    keys_and_values = _linear(tokens, width, 2 * width)
    return keys_and_values + attention + _linear(wanted, width, (2 + 2 * MLP_RATIO) * width)


def cross_block_flops(queries: int, tokens: int, width: int, source_width: int) -> int:
    """Operations of one block in which queries look at tokens of another width, and not at one another."""
    attention = 2 * 2 * queries * tokens * width
    keys_and_values = _linear(tokens, source_width, 2 * width)
    return keys_and_values + attention + _linear(queries, width, (2 + 2 * MLP_RATIO) * width)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs
