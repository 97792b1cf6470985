"""A vision transformer of timm's, to be judged beside ours."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from quarterview.errors import UserError, unknown


class TimmConfig(NamedTuple):
    """What there is to know of the images of timm's model."""

    image_size: tuple[int, ...]
    in_chans: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    cls_tokens: int = 1


class TimmBackbone(nn.Module):
    """A vision transformer of timm's as a backbone of ours, which it resembles down to the names.

    Args:
        vit: with one prefix token, cls, and without a head.

    Raises:
        UserError: if it is anything else.
    """

    def __init__(self, vit: Any, name: str) -> None:
        super().__init__()
        if getattr(vit, "num_prefix_tokens", None) != 1 or not hasattr(vit, "blocks"):
            raise UserError(f"timm:{name} is no plain vision transformer; accepted: such as timm:vit_base_*")
        self.vit, self.blocks = vit, vit.blocks
        cfg = vit.pretrained_cfg
        self.config = TimmConfig(
            tuple(vit.patch_embed.img_size), vit.patch_embed.proj.in_channels, cfg["mean"], cfg["std"]
        )

    def encode(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised -> float [B, 1 + L, D] after the final norm, cls first."""
        return self.vit.forward_features(images)


def open_timm(name: str, pretrained: bool = True) -> tuple[TimmBackbone, str]:
    """A model of timm's in evaluation mode, and the tag of its weights.

    Raises:
        UserError: if timm is not installed, knows no such model, or its weights cannot be had.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{name} needs timm: pip install 'quarterview[timm]'") from None
    if not timm.is_model(name):
        raise unknown("model of timm's", name, timm.list_models("*vit*"))
    try:
        vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # whatever the network, the hub and their caches come up with
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights of timm:{name} cannot be had ({type(error).__name__}: {reason}); accepted: "
            "weights in the hub's cache, or a network"
        ) from None
    return TimmBackbone(vit, name).eval(), vit.pretrained_cfg.get("tag") or "untagged"
