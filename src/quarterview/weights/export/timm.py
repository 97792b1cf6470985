"""Export to timm. Our parameters have timm's names, so the weights are written unchanged."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quarterview.errors import not_supported
from quarterview.models.classifier import Classifier
from quarterview.models.config import MODEL_SIZES
from quarterview.models.vit import MLP_RATIO
from quarterview.training.checkpoint import save_weights
from quarterview.weights.convert.architecture import CLS_TOKENS_KEY
from quarterview.weights.export.folder import write_folder
from quarterview.weights.export.model_card import FormatInfo
from quarterview.weights.export.verify import ExportResult, Model, check_tolerance, compare_outputs
from quarterview.weights.facts import ModelInfo
from quarterview.weights.preprocessing import get_preprocessing, to_timm_cfg

_TIMM_ARCHITECTURES = {  # only a label: model_args overrides every hyperparameter of these
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
}
_POOLING_NOTE = (
    "`global_pool` may be `token`, `avg` or empty. Keep `fc_norm=False`: the final norm is before the "
    "pooling. The decoder is not included."
)
_CLS_TOKENS_NOTE = (
    "The first {0} tokens are cls tokens; timm calls all but the first register tokens. Quarterview's "
    "feature `cls` is their mean, but `global_pool=token` returns the first alone."
)
_DECODER_PREFIXES = ("decoder", "mask_token", "target.")


def export_timm(model: Model, folder: str | Path, info: ModelInfo | None = None) -> ExportResult:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

    The encoder of a masked autoencoder becomes a model without a head, whose final norm is before the pooling
    (``fc_norm=False``), so that the tokens are the same for every `global_pool`. The decoder is not exported.
    A classifier keeps its head; if it reads the mean of the patch tokens, ``fc_norm=True``. If there are
    several cls tokens, all but the first become register tokens.

    Args:
        model: the model to export.
        folder: new, empty, or an earlier export.
        info: how the model was trained, for the model card.

    Raises:
        UserError: if timm does not support the model, or the folder contains other files.
        RunError: if timm's outputs differ from those of `model`. Nothing is then written.
    """
    _check_supported(model)
    info = info or ModelInfo()
    return write_folder(model, folder, info, describe_format(model), partial(_write_and_verify, model, info))


def _check_supported(model: Model) -> None:
    """Check that timm supports a model; raise UserError if not."""
    if not is_supported_by_timm(model):
        raise not_supported(
            f"A head that reads the mean of {model.config.cls_tokens} cls tokens",
            "--to timm, whose heads read the first cls token",
            "Use onnx, torch-export or safetensors.",
        )


def is_supported_by_timm(model: Model) -> bool:
    """Return True if timm supports a model: all models but classifiers that read several cls tokens."""
    return not (model.config.cls_tokens > 1 and isinstance(model, Classifier) and model.config.pool == "cls")


def make_model_args(model: Model) -> dict[str, Any]:
    """Return the arguments of timm's ``VisionTransformer`` for the architecture of a model."""
    config, shape = model.config, model.config.shape
    mean_pooled = isinstance(model, Classifier) and model.config.pool == "mean"
    pool = "avg" if mean_pooled or config.cls_tokens > 1 else "token"  # token reads the first cls token only
    return {
        "img_size": list(config.image_size),
        "patch_size": shape.patch_size,
        "in_chans": config.in_chans,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": MLP_RATIO,
        "qkv_bias": True,
        "class_token": True,
        **({"reg_tokens": config.cls_tokens - 1} if config.cls_tokens > 1 else {}),
        "num_classes": model.config.classes if isinstance(model, Classifier) else 0,
        "global_pool": pool,
        "fc_norm": mean_pooled,
    }


def _write_and_verify(model: Model, info: ModelInfo, folder: Path) -> Mapping[str, float]:
    weights = {
        name: value for name, value in model.state_dict().items() if not name.startswith(_DECODER_PREFIXES)
    }
    if model.config.cls_tokens > 1:
        weights |= _split_cls_tokens(weights)
    save_weights(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_make_config(model, info), indent=1) + "\n", "utf-8")
    differences = _compare_with_timm(model, folder)
    check_tolerance("timm", differences)
    return differences


def _split_cls_tokens(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split several cls tokens into timm's cls token and registers, each with a position of its own."""
    tokens, pos_embed = weights["cls_token"], weights["pos_embed"]
    cls_positions = pos_embed[:, :1].expand(-1, tokens.shape[1], -1)
    return {
        "cls_token": tokens[:, :1].contiguous(),
        "reg_token": tokens[:, 1:].contiguous(),
        "pos_embed": torch.cat([cls_positions, pos_embed[:, 1:]], dim=1),
    }


def _make_config(model: Model, info: ModelInfo) -> dict[str, Any]:
    config, arguments = model.config, make_model_args(model)
    cfg: dict[str, Any] = {
        **to_timm_cfg(get_preprocessing(config, info.crop_pct)),
        "num_classes": arguments["num_classes"],
        "pool_size": None,
        # Before version 1.0.31, timm assumes that a kernel named here has three channels, and adapts it.
        "first_conv": "patch_embed.proj" if config.in_chans == 3 else None,
        "classifier": "head",
        **({"license": info.license} if info.license else {}),
    }
    if isinstance(model, Classifier) and model.config.class_names:
        cfg["label_names"] = list(model.config.class_names)
    return {
        "architecture": _get_architecture_name(model),
        "num_classes": arguments["num_classes"],
        "num_features": config.shape.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        **({CLS_TOKENS_KEY: config.cls_tokens} if config.cls_tokens > 1 else {}),
        "pretrained_cfg": cfg,
    }


def _get_architecture_name(model: Model) -> str:
    shape = model.config.shape
    size = (shape.width, shape.depth, shape.num_heads)
    names = (name for name, model_size in MODEL_SIZES.items() if model_size == size)
    return _TIMM_ARCHITECTURES[next(names, "base")]


def _compare_with_timm(model: Model, folder: Path) -> dict[str, float]:
    import timm

    opened: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run_exported(images: Tensor) -> Mapping[str, Tensor]:
        tokens = opened.forward_features(images)
        logits = {"logits": opened.forward_head(tokens)} if isinstance(model, Classifier) else {}
        return {"tokens": tokens, **logits}

    return compare_outputs(model, run_exported)


def describe_format(model: Model) -> FormatInfo:
    """Return the model card's description of the format."""
    is_classifier = isinstance(model, Classifier)
    call = "logits = model(images)" if is_classifier else "tokens = model.forward_features(images)"
    num_cls_tokens = model.config.cls_tokens
    shape = "classes" if is_classifier else f"{num_cls_tokens} + patches, width"
    return FormatInfo(
        name="timm",
        library="timm",
        load_code="import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:OWNER/NAME\n'
        f"{call}  # float [B, {shape}]",
        packages=("timm",),
        notes=(
            "Preprocessing: `timm.data.create_transform(**timm.data.resolve_data_config(model=model))`.",
            *(() if is_classifier else (_POOLING_NOTE,)),
            *((_CLS_TOKENS_NOTE.format(num_cls_tokens),) if num_cls_tokens > 1 and not is_classifier else ()),
        ),
    )
