"""Flags that ``pretrain --init-from`` takes from the initial weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quarterview.commands.config import PretrainConfig
from quarterview.models.config import MAEConfig
from quarterview.training import checkpoint
from quarterview.weights.loading import read_weights

_ENCODER = ("model", "image_size", "in_chans", "cls_tokens")
_DECODER = (
    *("decoder", "decoder_width", "decoder_depth", "decoder_heads", "encoder_mask_tokens", "fused_blocks"),
    *("target", "norm_pix_loss", "pca_components", "codebook_size"),
)


def read_initial_flags(
    init_from: str, out: str, allow_partial: Sequence[str], config: PretrainConfig
) -> dict[str, Any]:
    """Return the default flags of a run that starts from weights: architecture, decoder and target.

    Args:
        init_from: the initial weights.
        out: the run's folder. If it has a checkpoint, that is read, and the initial weights are not needed.
        allow_partial: see `InitConfig`.
        config: the configuration; only flags of its method are returned.

    Raises:
        UserError: if the weights cannot be read.
    """
    resumed = checkpoint.find_newest(Path(out) / "checkpoints") if out else None
    weights = read_weights(resumed or init_from, allow_partial=allow_partial)
    names = list(_ENCODER)
    if isinstance(weights.config, MAEConfig) and weights.has_decoder:
        names += [name for name in _DECODER if name in config.specs()]
    return {name: getattr(weights.config, name) for name in names}
