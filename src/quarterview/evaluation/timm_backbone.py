"""Vision transformers of timm as backbones, for comparisons."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from quarterview.errors import UserError, unknown


class TimmConfig(NamedTuple):
    """The input and token configuration of a model of timm: a `BackboneConfig`."""

    image_size: tuple[int, ...]
    in_chans: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    cls_tokens: int = 1


class TimmBackbone(nn.Module):
    """A vision transformer of timm with the interface of `Backbone`.

    Args:
        vit: a model of timm with one prefix token, cls, and without a head.
        name: name of the model in messages.

    Raises:
        UserError: if the model has another architecture.
    """

    def __init__(self, vit: Any, name: str) -> None:
        super().__init__()
        if getattr(vit, "num_prefix_tokens", None) != 1 or not hasattr(vit, "blocks"):
            raise UserError(
                f"timm:{name} is not a plain vision transformer with one cls token. Give a model such as "
                "timm:vit_base_patch16_224."
            )
        self.vit, self.blocks = vit, vit.blocks
        cfg = vit.pretrained_cfg
        self.config = TimmConfig(
            tuple(vit.patch_embed.img_size), vit.patch_embed.proj.in_channels, cfg["mean"], cfg["std"]
        )

    def encode(self, images: Tensor) -> Tensor:
        """Encode images: float [B, C, H, W], normalised -> float [B, 1 + L, D] after the final norm, cls
        first."""
        return self.vit.forward_features(images)


def load_timm_backbone(name: str, pretrained: bool = True) -> tuple[TimmBackbone, str]:
    """Load a model of timm. Return the model in evaluation mode, and the tag of its weights.

    Raises:
        UserError: if timm has no such model, or the weights cannot be loaded.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models("*vit*"))
    try:
        vit: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # the network, the hub and their caches raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Cannot load the weights of timm:{name} ({type(error).__name__}: {reason}). Connect to a "
            "network, or put the weights into the cache of the hub."
        ) from None
    return TimmBackbone(vit, name).eval(), vit.pretrained_cfg.get("tag") or "untagged"
