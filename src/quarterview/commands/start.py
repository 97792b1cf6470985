"""What the weights to start from say of a configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quarterview.commands.config import PretrainConfig
from quarterview.models.config import MAEConfig
from quarterview.training import checkpoint
from quarterview.weights.loading import read

_ENCODER = ("model", "image_size", "in_chans", "cls_tokens")
_DECODER = (
    *("decoder", "decoder_width", "decoder_depth", "decoder_heads", "encoder_mask_tokens", "fused_blocks"),
    *("target", "norm_pix_loss", "pca_components", "vocabulary"),
)


def flags_of_start(
    init_from: str, out: str, allow_partial: Sequence[str], config: PretrainConfig
) -> dict[str, Any]:
    """The flags that weights to start from decide, where nothing else is said.

    Args:
        out: the run's folder. Once there is a checkpoint in it, that is asked, and the start is no
            longer needed.
        config: whose method has some of the flags.

    Raises:
        UserError: if the weights cannot be read.
    """
    begun = checkpoint.newest(Path(out) / "checkpoints") if out else None
    weights = read(begun or init_from, allow_partial=allow_partial)
    names = list(_ENCODER)
    if isinstance(weights.config, MAEConfig) and weights.has_decoder:
        names += [name for name in _DECODER if name in config.specs()]
    return {name: getattr(weights.config, name) for name in names}
