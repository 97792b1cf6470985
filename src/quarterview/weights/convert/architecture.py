"""Convert weights of other libraries: infer the architecture, and rename the tensors.

The official code and timm use the same names as this package. Names of transformers are converted, those
before version 5 and those since. Every tensor is accounted for: one that is unknown or missing raises an
error, unless `allow_partial` matches its name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MODEL_SIZES, MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.positions import get_2d_sincos_pos_embed
from quarterview.models.vit import LAYER_NORM_EPS, MLP_RATIO
from quarterview.weights.convert.foreign import SOURCES_HINT, ForeignWeights, find_common_prefix

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER_PATTERNS = ("decoder*", "mask_token", "target.*")
"""Patterns of the names of a decoder's tensors."""
CLS_TOKENS_KEY = "quarterview_cls_tokens"
"""The key in the ``config.json`` of our exports to timm for the number of cls tokens, registers included."""
_UNSUPPORTED_NETWORKS = {  # part of a tensor name -> the network that has such tensors
    "layer1.0.conv1": "a ResNet",
    "visual.": "CLIP",
    "text_model.": "CLIP",
    "vision_model.": "CLIP's or SigLIP's vision transformer",
    "class_embedding": "CLIP's vision transformer",
    "norm_pre.": "CLIP's vision transformer, with a norm before its blocks",
    "relative_position": "a vision transformer with relative positions, such as BEiT or Swin",
    "gamma": "a vision transformer with layer scale, such as BEiT or DINOv2",
    "lambda1": "a vision transformer with layer scale, such as DINOv2",
    "reg_token": "a vision transformer with registers",
    "register_tokens": "a vision transformer with registers",
    "dist_token": "a distilled vision transformer (DeiT)",
    "q_norm.": "a vision transformer that normalises queries and keys",
    "stages.": "a network in stages, such as ConvNeXt",
}


class ConvertedWeights(NamedTuple):
    """Weights of another library, with a configuration and tensor names of this package."""

    kind: str
    """The type of model and its origin, such as "encoder of timm or the official code"."""
    config: MAEConfig | ClassifierConfig
    tensors: dict[str, Tensor]
    """Tensors by their names in this package."""
    missing_keys: tuple[str, ...]
    """Names, in this package, of missing parameters, which stay randomly initialised."""
    dropped_keys: tuple[str, ...]
    """Names of the tensors that were not used."""
    notes: tuple[str, ...]
    """Assumptions made where the source records nothing."""


def convert_weights(
    foreign: ForeignWeights, source: str, allow_partial: Sequence[str] = ()
) -> ConvertedWeights:
    """Infer the architecture of weights, and rename their tensors.

    Args:
        foreign: the weights of another library.
        source: the path or name that the user gave, for error messages.
        allow_partial: patterns of tensor names that may be missing, or that may be ignored.

    Raises:
        UserError: if the weights are not a plain vision transformer's, or tensors are missing or unknown.
    """
    family, tensors = _rename_tensors(foreign.tensors, source)
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if registers and foreign.config.get(CLS_TOKENS_KEY) == 1 + registers:
        tensors |= _merge_registers(tensors.pop("reg_token"), tensors)
    dropped = [name for name in tensors if _matches_any(name, _UNUSED_PATTERNS)]
    notes: list[str] = []
    if "head.weight" in tensors and not _is_head_supported(foreign.config, tensors):
        dropped += [name for name in tensors if name.startswith("head.")]
        notes.append("the head is not used, because its pooling is not supported")
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    config = _infer_config(foreign, kept, source, notes)
    missing, ignored = _check_names_and_shapes(kept, config, source, allow_partial)
    dropped += ignored
    kept = {name: tensor for name, tensor in kept.items() if name not in ignored}
    kind = "classifier" if isinstance(config, ClassifierConfig) else "masked autoencoder"
    if missing and set(missing) >= {"mask_token", "decoder_pred.weight"}:
        kind = "encoder"
        notes.append("there is no decoder: it is randomly initialised")
    return ConvertedWeights(f"{kind} of {family}", config, kept, missing, tuple(dropped), tuple(notes))


def _merge_registers(registers: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge timm's cls token and registers into several cls tokens [1, K, D] that share one position.

    In timm each has a position of its own, and training may have made them different. The difference from the
    last one is added to the token, so that token plus position stays the same.
    """
    tokens = torch.cat([tensors["cls_token"], registers], dim=1)  # [1, K, D]
    positions = tensors["pos_embed"][:, : tokens.shape[1]]
    return {
        "cls_token": tokens + (positions - positions[:, -1:]),
        "pos_embed": tensors["pos_embed"][:, tokens.shape[1] - 1 :].contiguous(),
    }


_UNUSED_PATTERNS = ("pooler.*", "embeddings.mask_token")
"""Patterns of tensors of transformers' ViT models that no model of this package has."""


# ---------------------------------------------------------------------- names


def _rename_tensors(tensors: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Return the library that the tensor names belong to, and the tensors by their names in this package."""
    names = list(tensors)
    if any(name.endswith("embeddings.cls_token") for name in names):
        return "transformers", _rename_from_transformers(tensors)
    if any(name.endswith("cls_token") for name in names):
        prefix = find_common_prefix(names, "cls_token")  # `module.` of DDP, `_orig_mod.` of torch.compile
        plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if "patch_embed.proj.weight" in plain:
            return "timm or the official code", plain
    raise UserError(f"{source} is not a plain vision transformer: {_describe_names(names)}. {SOURCES_HINT}")


def _describe_names(names: Sequence[str]) -> str:
    """Describe tensor names for an error message, with the network that they probably belong to."""
    network = _guess_network(names)
    return f"{network and f'it looks like {network}; '}its tensors are {', '.join(sorted(names)[:3])}, …"


def _guess_network(names: Iterable[str]) -> str:
    """Return the unsupported network that has such tensor names; empty if none is known."""
    text = " ".join(names)
    return next((network for part, network in _UNSUPPORTED_NETWORKS.items() if part in text), "")


def _rename_from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    qkv: dict[str, dict[int, Tensor]] = {}  # query, key and value, which this package and timm concatenate
    for name, tensor in tensors.items():
        native_name, qkv_index = _get_native_name(name)
        if qkv_index is None:
            renamed[native_name] = tensor
        else:
            qkv.setdefault(native_name, {})[qkv_index] = tensor
    for name, parts in qkv.items():
        if len(parts) == 3:
            renamed[name] = torch.cat([parts[i] for i in range(3)])
    return renamed


def _get_native_name(name: str) -> tuple[str, int | None]:
    """Return the name in this package of a tensor of transformers, and its index in qkv (0, 1, 2) or None.

    A tensor that has no such name keeps its own.
    """
    block = _BLOCK_PATTERN.fullmatch(name)
    if block is not None:
        stack = "decoder_blocks" if block["decoder"] else "blocks"
        if block["part"] not in _BLOCK_NAMES:
            return name, None
        part, qkv_index = _BLOCK_NAMES[block["part"]]
        return f"{stack}.{block['index']}.{part}.{block['leaf']}", qkv_index
    plain = name.removeprefix("vit.")
    if plain in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[plain], None
    stem, _, leaf = plain.rpartition(".")
    if stem in _TOP_LEVEL_NAMES:
        return f"{_TOP_LEVEL_NAMES[stem]}.{leaf}", None
    return plain, None


_BLOCK_PATTERN = re.compile(
    # transformers 5 reads a decoder's blocks as decoder_layers, and writes them as decoder_encoder.layer
    r"(?:vit\.)?(?:(?P<decoder>decoder\.(?:decoder_layers|decoder_encoder\.layer))|encoder\.layer|layers)"
    r"\.(?P<index>\d+)\.(?P<part>.+)\.(?P<leaf>weight|bias)"
)
_TOP_LEVEL_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_BLOCK_NAMES: dict[str, tuple[str, int | None]] = {
    # transformers 4, and the norms of both versions
    "layernorm_before": ("norm1", None),
    "layernorm_after": ("norm2", None),
    **{f"attention.attention.{x}": ("attn.qkv", i) for i, x in enumerate(("query", "key", "value"))},
    "attention.output.dense": ("attn.proj", None),
    "intermediate.dense": ("mlp.fc1", None),
    "output.dense": ("mlp.fc2", None),
    # transformers 5
    **{f"attention.{x}_proj": ("attn.qkv", i) for i, x in enumerate("qkv")},
    "attention.o_proj": ("attn.proj", None),
    "mlp.fc1": ("mlp.fc1", None),
    "mlp.fc2": ("mlp.fc2", None),
}


# ---------------------------------------------------------------------- configuration


def _infer_config(
    foreign: ForeignWeights, tensors: Mapping[str, Tensor], source: str, notes: list[str]
) -> MAEConfig | ClassifierConfig:
    recorded = _read_recorded_fields(foreign)
    try:
        kernel, pos_embed = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
        hidden = tensors["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UserError(
            f"{source} is not a plain vision transformer: it has no {error.args[0]}. {SOURCES_HINT}"
        ) from None
    width, in_chans, patch_size, patch_width = kernel.shape if kernel.ndim == 4 else (0, 0, 0, 1)
    if pos_embed.ndim != 3 or pos_embed.shape[2] != width or not kernel.numel():
        raise UserError(
            f"{source} has pos_embed of shape {list(pos_embed.shape)} and a patch embedding of shape "
            f"{list(kernel.shape)}. Give weights with pos_embed [1, 1 + patches, width]."
        )
    if patch_size != patch_width or len(hidden) != MLP_RATIO * width:
        raise UserError(
            f"{source} has a patch embedding of shape {list(kernel.shape)} and an MLP of width "
            f"{len(hidden)}. Give weights with square patches and an MLP {MLP_RATIO} times as wide."
        )
    depth = _count_blocks(tensors, "blocks")
    heads = recorded.get("heads") or _infer_num_heads(width, depth, notes)
    size = next((name for name, shape in MODEL_SIZES.items() if shape == (width, depth, heads)), None)
    rows, columns = _infer_grid(pos_embed, recorded.get("image_size"), patch_size, source)
    mean, std = recorded.get("mean"), recorded.get("std")
    if (mean is None or std is None) and in_chans == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes.append("mean and std are not recorded: ImageNet's are assumed")
    shared: dict[str, Any] = {
        "model": f"mae_vit_{size or f'{width}x{depth}x{heads}'}_patch{patch_size}",
        "image_size": (rows * patch_size, columns * patch_size),
        "in_chans": in_chans,
        "mean": mean if mean is not None and len(mean) == in_chans else None,
        "std": std if std is not None and len(std) == in_chans else None,
        "cls_tokens": tensors["cls_token"].shape[1] if tensors["cls_token"].ndim == 3 else 1,
    }
    if recorded.get("eps") not in (None, LAYER_NORM_EPS):
        notes.append(
            f"LayerNorm's eps was {recorded['eps']:g} in training, but {LAYER_NORM_EPS:g} is used here"
        )
    if "head.weight" in tensors:
        classes, names = len(tensors["head.weight"]), recorded.get("class_names")
        names = names if names and len(names) == classes else None
        pool = "mean" if "fc_norm.weight" in tensors else "cls"
        return ClassifierConfig(**shared, classes=classes, pool=pool, class_names=names)
    return MAEConfig(**shared, **_infer_decoder_fields(recorded, tensors, notes))


def _infer_decoder_fields(
    recorded: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]
) -> dict[str, Any]:
    """Return the fields of MAEConfig that describe the decoder and its task; empty without a decoder."""
    first_weights = {"standard": "decoder_embed.weight", "cross": "decoder_blocks.0.attn.q.weight"}
    kind = next((kind for kind, name in first_weights.items() if name in tensors), None)
    if kind is None:
        return {}
    width = len(tensors[first_weights[kind]])
    heads = recorded.get("decoder_heads")
    if heads is None:
        heads = MAEConfig.decoder_heads if width % MAEConfig.decoder_heads == 0 else max(1, width // 64)
        notes.append(f"the decoder's number of heads is not recorded: {heads} are assumed")
    if recorded.get("norm_pix_loss") is None:
        notes.append("norm_pix_loss is not recorded: true is assumed")
    fields = {
        "decoder": kind,
        "fused_blocks": _infer_fused_blocks(tensors),
        "decoder_width": width,
        "decoder_depth": _count_blocks(tensors, "decoder_blocks"),
        "decoder_heads": heads,
        "norm_pix_loss": recorded.get("norm_pix_loss"),
        "mask_ratio": recorded.get("mask_ratio"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _infer_fused_blocks(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the indices of the encoder blocks that the decoder fuses, from their projections' names."""
    matches = (re.fullmatch(r"decoder_fusion\.projections\.(\d{1,3})\.weight", name) for name in tensors)
    return tuple(sorted(int(match[1]) for match in matches if match))


def _read_recorded_fields(foreign: ForeignWeights) -> dict[str, Any]:
    """Return what the files beside the tensors record, under common names for all libraries."""
    config, args, processor = foreign.config, foreign.args, foreign.preprocessor_config
    timm = {**config, **config.get("model_args", {})}
    cfg = config.get("pretrained_cfg", {})
    labels = config.get("id2label")
    size = config.get("image_size") or timm.get("img_size") or args.get("input_size")
    if size is None and cfg.get("input_size"):
        size = cfg["input_size"][1:]
    return {
        "heads": config.get("num_attention_heads") or timm.get("num_heads"),
        "image_size": (size, size) if isinstance(size, int) else size,
        "mean": _to_tuple(processor.get("image_mean") or cfg.get("mean")),
        "std": _to_tuple(processor.get("image_std") or cfg.get("std")),
        "eps": config.get("layer_norm_eps"),
        "decoder_heads": config.get("decoder_num_attention_heads"),
        "norm_pix_loss": config.get("norm_pix_loss", args.get("norm_pix_loss")),
        "mask_ratio": config.get("mask_ratio", args.get("mask_ratio")),
        "class_names": tuple(str(labels[key]) for key in sorted(labels, key=int))
        if labels
        else _to_tuple(config.get("label_names") or cfg.get("label_names")),
    }


def _to_tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _is_head_supported(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Return True if a head reads the cls token after `norm`, or the mean after `fc_norm`."""
    pool = {**config, **config.get("model_args", {})}.get("global_pool", "token")
    return "fc_norm.weight" in tensors or pool in ("token", "", None)


def _count_blocks(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = (name.split(".")[1] for name in tensors if name.startswith(f"{stack}."))
    return len({index for index in indices if index.isdigit()})


def _infer_num_heads(width: int, depth: int, notes: list[str]) -> int:
    num_heads = next((heads for w, d, heads in MODEL_SIZES.values() if (w, d) == (width, depth)), None)
    if num_heads is None:
        num_heads = max(1, width // 64)
        notes.append(f"the number of heads is not recorded: {num_heads} are assumed, each 64 wide")
    return num_heads


def _infer_grid(pos_embed: Tensor, image_size: Any, patch_size: int, source: str) -> tuple[int, int]:
    """Return rows and columns of the patches of a position embedding [1, 1 + L, D].

    Uses the recorded image size if there is one, else the grid whose sine-cosine embedding equals the
    positions, else a square.

    Raises:
        UserError: if none of these fits the number of patches.
    """
    patches = pos_embed.shape[1] - 1
    if image_size is not None:
        rows, columns = (int(side) // patch_size for side in image_size)
        if rows * columns == patches:
            return rows, columns
    for rows in range(1, patches + 1):
        if patches % rows == 0 and is_sincos(pos_embed, (rows, patches // rows)):
            return rows, patches // rows
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(
            f"{source} has {patches} patch positions, not a square number, and records no image size. Give "
            "weights with a config.json that states it."
        )
    return side, side


def is_sincos(pos_embed: Tensor, grid: tuple[int, int]) -> bool:
    """Return True if a position embedding [1, 1 + L, D] is the fixed sine-cosine embedding of a grid."""
    width = pos_embed.shape[2]
    if width % 4 or pos_embed.shape[1] != 1 + grid[0] * grid[1]:
        return False
    return torch.allclose(pos_embed.float(), get_2d_sincos_pos_embed(width, grid), atol=1e-5)


# ---------------------------------------------------------------------- check of names and shapes


def _check_names_and_shapes(
    tensors: Mapping[str, Tensor],
    config: MAEConfig | ClassifierConfig,
    source: str,
    allow_partial: Sequence[str],
) -> tuple[tuple[str, ...], list[str]]:
    """Check the names and shapes of tensors against the model of a configuration.

    A decoder may be missing completely. Everything else that is missing, unexpected or of another shape must
    match `allow_partial`.

    Returns:
        The names of missing parameters, and the names of tensors to ignore.

    Raises:
        UserError: for other missing or unexpected tensors and for other shapes; the message names them.
    """
    with torch.device("meta"):
        model = MaskedAutoencoder(config) if isinstance(config, MAEConfig) else Classifier(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = {
        name: f"{name} is unexpected"
        if name not in expected
        else f"{name} has shape {tuple(tensor.shape)}, not {expected[name]}"
        for name, tensor in tensors.items()
        if expected.get(name) != tuple(tensor.shape)
    }
    ignored = [name for name in wrong if _matches_any(name, allow_partial)]
    missing = [name for name in expected if name not in tensors or name in ignored]
    has_decoder = any(name.startswith("decoder") for name in tensors)
    allowed = (*allow_partial, *(() if has_decoder else DECODER_PATTERNS))
    wrong |= {name: f"{name} is missing" for name in missing if not _matches_any(name, allowed)}
    reasons = [reason for name, reason in wrong.items() if name not in ignored]
    if reasons:
        network = _guess_network(tensors)
        hint = f" (it looks like {network})" if network else ""
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise UserError(
            f"{source} is not {config.model}{hint}: {', '.join(reasons[:4])}{more}. Give a plain vision "
            "transformer, or --allow-partial with the names that may be missing or ignored."
        )
    return tuple(missing), ignored


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
