"""What foreign weights are: recognised by their names, renamed to ours, measured by their shapes.

The official code and timm have our names. Of transformers both generations are known, before and
since version 5. Nothing is taken or left in silence: a tensor that is not understood is an error,
unless the caller names it.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import SIZES, MAEConfig
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.positions import sincos_2d
from quarterview.models.vit import LAYER_NORM_EPS, MLP_RATIO
from quarterview.weights.convert.foreign import ACCEPTED, Foreign, common_prefix

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER = ("decoder*", "mask_token", "target.*")
"""The names of a decoder's tensors."""
CLS_TOKENS = "quarterview_cls_tokens"
"""Says in the ``config.json`` of our exports to timm how many cls tokens there are, registers among them."""
_OTHERS = {  # how networks are recognised that are not ours to read, by a part of a name
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


class Recognised(NamedTuple):
    """Foreign weights in our words."""

    kind: str
    """What they are."""
    config: MAEConfig | ClassifierConfig
    tensors: dict[str, Tensor]
    """By our names."""
    missing: tuple[str, ...]
    """Our names of what they lack, which stays freshly initialised."""
    dropped: tuple[str, ...]
    """Their names of what was left out."""
    notes: tuple[str, ...]
    """What had to be assumed."""


def recognise(found: Foreign, given: str, allow_partial: Sequence[str] = ()) -> Recognised:
    """Say what weights are, and give them our names.

    Args:
        given: how the user called them, for errors.
        allow_partial: patterns of names that may be missing or left out.

    Raises:
        UserError: if they are no plain vision transformer's, or some are missing or not understood.
    """
    family, tensors = _to_our_names(found.tensors, given)
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    if registers and found.config.get(CLS_TOKENS) == 1 + registers:
        tensors |= _cls_tokens(tensors.pop("reg_token"), tensors)
    dropped = [name for name in tensors if _matches(name, _NEEDLESS)]
    notes: list[str] = []
    if "head.weight" in tensors and not _head_is_ours(found.config, tensors):
        dropped += [name for name in tensors if name.startswith("head.")]
        notes.append("the head reads tokens that ours cannot, so it is left out")
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    config = _configuration(found, kept, given, notes)
    missing, strange = _check(kept, config, given, allow_partial)
    dropped += strange
    kept = {name: tensor for name, tensor in kept.items() if name not in strange}
    what = "classifier" if isinstance(config, ClassifierConfig) else "masked autoencoder"
    if missing and set(missing) >= {"mask_token", "decoder_pred.weight"}:
        what = "encoder"
        notes.append("there is no decoder: it is freshly initialised")
    return Recognised(f"{what} of {family}", config, kept, missing, tuple(dropped), tuple(notes))


def _cls_tokens(registers: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Several cls tokens as we have them: with one row of positions for all, which was each one's."""
    tokens = torch.cat([tensors["cls_token"], registers], dim=1)  # [1, K, D]
    rows = tensors["pos_embed"][:, : tokens.shape[1]]
    return {
        "cls_token": tokens + (rows - rows[:, -1:]),  # which timm may have trained apart
        "pos_embed": tensors["pos_embed"][:, tokens.shape[1] - 1 :].contiguous(),
    }


_NEEDLESS = ("pooler.*", "embeddings.mask_token")


# ---------------------------------------------------------------------- names


def _to_our_names(tensors: Mapping[str, Tensor], given: str) -> tuple[str, dict[str, Tensor]]:
    """The family that the names are of, and the tensors by ours."""
    names = list(tensors)
    if any(name.endswith("embeddings.cls_token") for name in names):
        return "transformers", _from_transformers(tensors)
    if any(name.endswith("cls_token") for name in names):
        prefix = common_prefix(names, "cls_token")  # such as `module.` of DDP or `_orig_mod.` of compile
        plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if "patch_embed.proj.weight" in plain:
            return "timm or the official code", plain
    raise UserError(f"{given} holds no plain vision transformer: {_guess(names)}; {ACCEPTED}")


def _guess(names: Sequence[str]) -> str:
    """What names look like, in words."""
    looks = next((f"that is {what}; " for part, what in _OTHERS.items() if part in " ".join(names)), "")
    return f"{looks}its tensors are called {', '.join(sorted(names)[:3])}, …"


def _from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        ours, third = _our_name(name)
        if third is None:
            renamed[ours] = tensor
        else:
            thirds.setdefault(ours, {})[third] = tensor
    for name, parts in thirds.items():
        if len(parts) == 3:
            renamed[name] = torch.cat([parts[i] for i in range(3)])
    return renamed


def _our_name(theirs: str) -> tuple[str, int | None]:
    """Our name of a tensor of transformers, and which third of it that is where it is one of q, k, v.

    What has no name of ours keeps its own.
    """
    block = _BLOCK.fullmatch(theirs)
    if block is not None:
        stack = "decoder_blocks" if block["decoder"] else "blocks"
        part, third = _PARTS.get(block["part"], (None, None))
        return (theirs, None) if part is None else (f"{stack}.{block['index']}.{part}.{block['leaf']}", third)
    plain = theirs.removeprefix("vit.")
    if plain in _PLAIN:
        return _PLAIN[plain], None
    stem, _, leaf = plain.rpartition(".")
    if stem in _PLAIN:
        return f"{_PLAIN[stem]}.{leaf}", None
    return plain, None


_BLOCK = re.compile(  # transformers 5 reads decoders under the first name and writes them under the second
    r"(?:vit\.)?(?:(?P<decoder>decoder\.(?:decoder_layers|decoder_encoder\.layer))|encoder\.layer|layers)"
    r"\.(?P<index>\d+)\.(?P<part>.+)\.(?P<leaf>weight|bias)"
)
_PLAIN = {
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
_PARTS: dict[str, tuple[str | None, int | None]] = {  # of a block: as transformers 4 says, then as 5 does
    "layernorm_before": ("norm1", None),
    "layernorm_after": ("norm2", None),
    **{f"attention.attention.{x}": ("attn.qkv", i) for i, x in enumerate(("query", "key", "value"))},
    "attention.output.dense": ("attn.proj", None),
    "intermediate.dense": ("mlp.fc1", None),
    "output.dense": ("mlp.fc2", None),
    **{f"attention.{x}_proj": ("attn.qkv", i) for i, x in enumerate("qkv")},
    "attention.o_proj": ("attn.proj", None),
    "mlp.fc1": ("mlp.fc1", None),
    "mlp.fc2": ("mlp.fc2", None),
}


# ---------------------------------------------------------------------- shapes


def _configuration(
    found: Foreign, tensors: Mapping[str, Tensor], given: str, notes: list[str]
) -> MAEConfig | ClassifierConfig:
    said = _said(found)
    try:
        kernel, positions = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
        hidden = tensors["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise UserError(f"{given} is no plain vision transformer: it has no {error.args[0]}") from None
    width, channels, patch, patch_width = kernel.shape if kernel.ndim == 4 else (0, 0, 0, 1)
    if positions.ndim != 3 or positions.shape[2] != width or not kernel.numel():
        raise UserError(
            f"{given} has positions {list(positions.shape)} and patches {list(kernel.shape)}; accepted: "
            "positions [1, 1 + patches, width]"
        )
    if patch != patch_width or len(hidden) != MLP_RATIO * width:
        raise UserError(
            f"{given} has patches of {tuple(kernel.shape)} and an MLP of {len(hidden)}; accepted: square "
            f"patches, and an MLP {MLP_RATIO} times as wide as the tokens"
        )
    depth = _depth(tensors, "blocks")
    heads = said.get("heads") or _heads(width, depth, notes)
    size = next((name for name, shape in SIZES.items() if shape == (width, depth, heads)), None)
    rows, columns = _grid(positions, said.get("image_size"), patch, given)
    mean, std = said.get("mean"), said.get("std")
    if (mean is None or std is None) and channels == 3:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        notes.append("mean and std are not recorded: ImageNet's are assumed")
    shared: dict[str, Any] = {
        "model": f"mae_vit_{size or f'{width}x{depth}x{heads}'}_patch{patch}",
        "image_size": (rows * patch, columns * patch),
        "in_chans": channels,
        "mean": mean if mean is not None and len(mean) == channels else None,
        "std": std if std is not None and len(std) == channels else None,
        "cls_tokens": tensors["cls_token"].shape[1] if tensors["cls_token"].ndim == 3 else 1,
    }
    if said.get("eps") not in (None, LAYER_NORM_EPS):
        notes.append(f"its LayerNorms add {said['eps']:g} to the variance, ours {LAYER_NORM_EPS:g}")
    if "head.weight" in tensors:
        classes, names = len(tensors["head.weight"]), said.get("class_names")
        names = names if names and len(names) == classes else None
        pool = "mean" if "fc_norm.weight" in tensors else "cls"
        return ClassifierConfig(**shared, classes=classes, pool=pool, class_names=names)
    return MAEConfig(**shared, **_decoder(said, tensors, notes))


def _decoder(said: Mapping[str, Any], tensors: Mapping[str, Tensor], notes: list[str]) -> dict[str, Any]:
    """The fields of a decoder and its task; nothing where there is no decoder."""
    first = {"standard": "decoder_embed.weight", "cross": "decoder_blocks.0.attn.q.weight"}
    kind = next((kind for kind, name in first.items() if name in tensors), None)
    if kind is None:
        return {}
    width = len(tensors[first[kind]])
    heads = said.get("decoder_heads")
    if heads is None:
        heads = MAEConfig.decoder_heads if width % MAEConfig.decoder_heads == 0 else max(1, width // 64)
        notes.append(f"the decoder's heads are not recorded: {heads} are assumed")
    if said.get("norm_pix_loss") is None:
        notes.append("whether pixels were normalised by patch is not recorded: it is assumed")
    fields = {
        "decoder": kind,
        "fused_blocks": _fused(tensors),
        "decoder_width": width,
        "decoder_depth": _depth(tensors, "decoder_blocks"),
        "decoder_heads": heads,
        "norm_pix_loss": said.get("norm_pix_loss"),
        "mask_ratio": said.get("mask_ratio"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _fused(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The earlier blocks that the decoder is given, by the names of their projections."""
    found = (re.fullmatch(r"decoder_fusion\.projections\.(\d{1,3})\.weight", name) for name in tensors)
    return tuple(sorted(int(match[1]) for match in found if match))


def _said(found: Foreign) -> dict[str, Any]:
    """What stands beside the tensors, in one vocabulary, of whichever family it is."""
    config, args, processor = found.config, found.args, found.processor
    timm = {**config, **config.get("model_args", {})}
    cfg = config.get("pretrained_cfg", {})
    labels = config.get("id2label")
    size = config.get("image_size") or timm.get("img_size") or args.get("input_size")
    if size is None and cfg.get("input_size"):
        size = cfg["input_size"][1:]
    return {
        "heads": config.get("num_attention_heads") or timm.get("num_heads"),
        "image_size": (size, size) if isinstance(size, int) else size,
        "mean": _tuple(processor.get("image_mean") or cfg.get("mean")),
        "std": _tuple(processor.get("image_std") or cfg.get("std")),
        "eps": config.get("layer_norm_eps"),
        "decoder_heads": config.get("decoder_num_attention_heads"),
        "norm_pix_loss": config.get("norm_pix_loss", args.get("norm_pix_loss")),
        "mask_ratio": config.get("mask_ratio", args.get("mask_ratio")),
        "class_names": tuple(str(labels[key]) for key in sorted(labels, key=int))
        if labels
        else _tuple(config.get("label_names") or cfg.get("label_names")),
    }


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _head_is_ours(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a head reads the cls token after `norm`, or the mean after `fc_norm`."""
    pool = {**config, **config.get("model_args", {})}.get("global_pool", "token")
    return "fc_norm.weight" in tensors or pool in ("token", "", None)


def _depth(tensors: Mapping[str, Tensor], stack: str) -> int:
    indices = (name.split(".")[1] for name in tensors if name.startswith(f"{stack}."))
    return len({index for index in indices if index.isdigit()})


def _heads(width: int, depth: int, notes: list[str]) -> int:
    named = next((heads for w, d, heads in SIZES.values() if (w, d) == (width, depth)), None)
    if named is None:
        named = max(1, width // 64)
        notes.append(f"the number of heads is not recorded: {named} are assumed, one for 64 of the width")
    return named


def _grid(positions: Tensor, image_size: Any, patch: int, given: str) -> tuple[int, int]:
    """Rows and columns of patches, of which only the number is seen in the positions [1, 1 + L, D].

    What stands beside the tensors goes first; then the sine-cosine table that the positions are;
    then the square.
    """
    patches = positions.shape[1] - 1
    if image_size is not None:
        rows, columns = (int(side) // patch for side in image_size)
        if rows * columns == patches:
            return rows, columns
    for rows in range(1, patches + 1):
        if patches % rows == 0 and is_sincos(positions, (rows, patches // rows)):
            return rows, patches // rows
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(
            f"{given} has positions of {patches} patches, which are no square, and does not say of which "
            "image size; accepted: weights with a config.json that says it"
        )
    return side, side


def is_sincos(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Whether a position table [1, 1 + L, D] is the fixed one of a grid."""
    width = positions.shape[2]
    if width % 4 or positions.shape[1] != 1 + grid[0] * grid[1]:
        return False
    return torch.allclose(positions.float(), sincos_2d(width, grid), atol=1e-5)


# ---------------------------------------------------------------------- the check


def _check(
    tensors: Mapping[str, Tensor],
    config: MAEConfig | ClassifierConfig,
    given: str,
    allow_partial: Sequence[str],
) -> tuple[tuple[str, ...], list[str]]:
    """Compare names and shapes with those of our model.

    Returns:
        The names that are missing, and those that are to be left out, as `allow_partial` allows.

    Raises:
        UserError: naming what else is missing, unexpected or of another shape. A decoder that is
            missing whole is allowed always.
    """
    with torch.device("meta"):
        model = MaskedAutoencoder(config) if isinstance(config, MAEConfig) else Classifier(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = {
        name: f"{name} is unexpected"
        if name not in expected
        else f"{name} is {tuple(tensor.shape)} and should be {expected[name]}"
        for name, tensor in tensors.items()
        if expected.get(name) != tuple(tensor.shape)
    }
    strange = [name for name in wrong if _matches(name, allow_partial)]
    missing = [name for name in expected if name not in tensors or name in strange]
    headless = not any(name.startswith("decoder") for name in tensors)
    allowed = (*allow_partial, *(DECODER if headless else ()))
    wrong |= {name: f"{name} is missing" for name in missing if not _matches(name, allowed)}
    reasons = [reason for name, reason in wrong.items() if name not in strange]
    if reasons:
        looks = next((f" (that is {w})" for part, w in _OTHERS.items() if part in " ".join(tensors)), "")
        more = f" and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise UserError(
            f"{given} is not {config.model}{looks}: {', '.join(reasons[:4])}{more}; accepted: a plain vision "
            "transformer, or --allow-partial with the names that may be missing or left out"
        )
    return tuple(missing), strange


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
