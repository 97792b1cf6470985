"""To timm. Our parameters have timm's names, so the weights go over as they are."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier
from quarterview.models.config import SIZES
from quarterview.models.vit import MLP_RATIO
from quarterview.training.checkpoint import save_weights
from quarterview.weights.convert.architecture import CLS_TOKENS
from quarterview.weights.export.folder import write_folder
from quarterview.weights.export.model_card import Target
from quarterview.weights.export.verify import Exported, Model, accept, compare
from quarterview.weights.facts import Facts
from quarterview.weights.preprocessing import for_timm, preprocessing_of

_ENTRIES = {  # timm's names of the shapes; every number is in model_args, so any would do
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
_POOLING = (
    "`global_pool` may be `token`, `avg` or empty; keep `fc_norm` false, as the norm is in its usual place. "
    "The decoder is not here."
)
_SEVERAL = (
    "The first {0} tokens are cls tokens, of which timm calls all but one registers; Quarterview's feature "
    "`cls` is their mean, while `token` gives the first alone."
)
_WITHOUT_DECODER = ("decoder", "mask_token", "target.")


def export_timm(model: Model, folder: str | Path, facts: Facts | None = None) -> Exported:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

    The encoder of a masked autoencoder becomes a model without a head, its final norm where ours has
    it (``fc_norm=False``), so that any `global_pool` gives our tokens; the decoder stays behind. A
    fine-tuned classifier keeps its head; if it reads the mean of the patch tokens, ``fc_norm=True``.
    Of several cls tokens timm calls all but the first registers.

    Args:
        facts: where the weights come from, for the card.

    Raises:
        UserError: if timm cannot hold the model, or is not installed (the extra
            ``quarterview[timm]``), or the folder holds something else.
        RunError: if timm's forward differs from ours; then nothing is written.
    """
    _check_expressible(model)
    try:
        import timm  # noqa: F401
    except ImportError:
        raise UserError("exporting to timm needs it: pip install 'quarterview[timm]'") from None
    facts = facts or Facts()
    return write_folder(model, folder, facts, target(model), partial(_write, model, facts))


def _check_expressible(model: Model) -> None:
    """Raises UserError unless timm can hold a model."""
    if not timm_holds(model):
        raise UserError(
            f"timm cannot hold a head that reads the mean of {model.config.cls_tokens} cls tokens (it reads "
            "the first); accepted: onnx, torch-export or safetensors"
        )


def timm_holds(model: Model) -> bool:
    """Whether timm can hold a model: all but a head that reads several cls tokens."""
    return not (model.config.cls_tokens > 1 and isinstance(model, Classifier) and model.config.pool == "cls")


def model_args(model: Model) -> dict[str, Any]:
    """The arguments of timm's ``VisionTransformer`` that make it ours."""
    config, shape = model.config, model.config.shape
    mean_pooled = isinstance(model, Classifier) and model.config.pool == "mean"
    pool = "avg" if mean_pooled or config.cls_tokens > 1 else "token"  # which would be one of several
    return {
        "img_size": list(config.image_size),
        "patch_size": shape.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": MLP_RATIO,
        "qkv_bias": True,
        "class_token": True,
        **({"reg_tokens": config.cls_tokens - 1} if config.cls_tokens > 1 else {}),
        "num_classes": model.config.classes if isinstance(model, Classifier) else 0,
        "global_pool": pool,
        "fc_norm": mean_pooled,
    }


def _write(model: Model, facts: Facts, folder: Path) -> Mapping[str, float]:
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith(_WITHOUT_DECODER)
    }
    if model.config.cls_tokens > 1:
        weights |= _registers(weights)
    save_weights(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model, facts), indent=1) + "\n", "utf-8")
    differences = _compare(model, folder)
    accept("timm", differences)
    return differences


def _registers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Several cls tokens as timm has them: one, registers, and a row of positions for each."""
    tokens, positions = weights["cls_token"], weights["pos_embed"]
    rows = positions[:, :1].expand(-1, tokens.shape[1], -1)
    return {
        "cls_token": tokens[:, :1].contiguous(),
        "reg_token": tokens[:, 1:].contiguous(),
        "pos_embed": torch.cat([rows, positions[:, 1:]], dim=1),
    }


def _config(model: Model, facts: Facts) -> dict[str, Any]:
    config, arguments = model.config, model_args(model)
    cfg: dict[str, Any] = {
        **for_timm(preprocessing_of(config, facts.crop_pct)),
        "num_classes": arguments["num_classes"],
        "pool_size": None,
        # Before 1.0.31 timm takes any kernel named here for one of three channels, and adapts it.
        "first_conv": "patch_embed.proj" if config.in_chans == 3 else None,
        "classifier": "head",
        **({"license": facts.licence} if facts.licence else {}),
    }
    if isinstance(model, Classifier) and model.config.class_names:
        cfg["label_names"] = list(model.config.class_names)
    return {
        "architecture": _entry(model),
        "num_classes": arguments["num_classes"],
        "num_features": config.shape.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        **({CLS_TOKENS: config.cls_tokens} if config.cls_tokens > 1 else {}),
        "pretrained_cfg": cfg,
    }


def _entry(model: Model) -> str:
    shape = model.config.shape
    named = (name for name, numbers in SIZES.items() if numbers == (shape.width, shape.depth, shape.heads))
    return _ENTRIES[next(named, "base")]


def _compare(model: Model, folder: Path) -> dict[str, float]:
    import timm

    opened: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def theirs(images: Tensor) -> Mapping[str, Tensor]:
        tokens = opened.forward_features(images)
        logits = {"logits": opened.forward_head(tokens)} if isinstance(model, Classifier) else {}
        return {"tokens": tokens, **logits}

    return compare(model, theirs)


def target(model: Model) -> Target:
    """What a card says of an export to timm."""
    classifies = isinstance(model, Classifier)
    call = "logits = model(images)" if classifies else "tokens = model.forward_features(images)"
    several = model.config.cls_tokens
    shape = "classes" if classifies else f"{several} + patches, width"
    return Target(
        name="timm",
        library="timm",
        load="import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME\n'
        f"{call}  # float [B, {shape}]",
        packages=("timm",),
        notes=(
            "`timm.data.create_transform(**timm.data.resolve_data_config(model=model))` prepares pictures.",
            *(() if classifies else (_POOLING,)),
            *((_SEVERAL.format(several),) if several > 1 and not classifies else ()),
        ),
    )
