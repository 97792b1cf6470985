"""Read weights of other libraries from files, folders, timm and the Hub, with the metadata beside them.

Reading never runs code: pickles are loaded with ``weights_only=True``, and the only class allowed beside
tensors is the `argparse.Namespace` of the official checkpoints.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quarterview.errors import missing_package, unreadable
from quarterview.safe_yaml import read_yaml

SOURCES_HINT = (
    "Give a run, a checkpoint folder, a .safetensors or .pth file, a folder of transformers or timm, "
    "timm:NAME, or hf:OWNER/NAME."
)
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""The keys under which training scripts save a state dict."""
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_PATTERNS = ["*.json", "README.md", *_WEIGHTS_FILES, "model-*.safetensors", "pytorch_model-*.bin"]


class ForeignWeights(NamedTuple):
    """Tensors under their original names, with the metadata that was beside them."""

    tensors: dict[str, Tensor]
    file: Path | None
    """The weights file; None for timm:NAME and for sharded weights."""
    config: dict[str, Any]
    """The folder's ``config.json``; empty if there is none."""
    preprocessor_config: dict[str, Any]
    """The folder's ``preprocessor_config.json``; empty if there is none."""
    args: dict[str, Any]
    """The command-line arguments in an official checkpoint; empty if there are none."""
    license: str = ""
    """License of the weights, if a file or model card states one."""


def read_foreign_weights(source: str | Path) -> ForeignWeights:
    """Read weights from a file, a folder, timm or the Hub.

    Raises:
        UserError: if the source does not exist or has no weights.
    """
    text = str(source)
    if text.startswith("timm:"):
        return _read_timm(text.removeprefix("timm:"))
    path = download_from_hub(text) if text.startswith("hf:") else Path(text)
    if not path.exists():
        raise unreadable(path, "it does not exist", SOURCES_HINT)
    if path.is_dir():
        return _read_folder(path)
    tensors, args = read_tensors(path)
    return ForeignWeights(tensors, path, {}, {}, args, read_header_entry(path, "license"))


# ---------------------------------------------------------------------- files


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file, or a file of `torch.save`: the tensors, and the arguments saved with them.

    Raises:
        UserError: if the file is something else; the message says what it is.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise unreadable(path, "the file is empty", SOURCES_HINT)
    # A safetensors file begins with the length of its header, which may equal the first bytes of a pickle.
    header_length = int.from_bytes(start[:8], "little")
    is_safetensors = start[8:9] == b"{" and header_length <= path.stat().st_size - 8
    if not is_safetensors and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return _extract_state_dict(path, _read_pickle(path))
    if not is_safetensors and start.lstrip()[:1] in (b"{", b"["):
        raise unreadable(path, "the file is JSON and has no weights", SOURCES_HINT)
    try:
        return dict(load_file(path)), {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise unreadable(
            path, f"not a safetensors or PyTorch file, or truncated ({reason})", SOURCES_HINT
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", str(error))
        reason = f"its pickle would run {match[1]}" if match else "its pickle has more than tensors"
        raise unreadable(
            path,
            f"{reason}; only tensors, plain values and argparse.Namespace are allowed",
            "Save the weights alone, or as safetensors.",
        ) from None
    except Exception as error:  # damaged files raise errors of many types
        raise unreadable(path, f"damaged or truncated ({_format_error(error)})", SOURCES_HINT) from None


def _extract_state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict inside the checkpoint of a training script, and the script's arguments."""
    args: Any = {}
    if isinstance(content, Mapping):
        args = content.get("args") or {}
        for name in _STATE_DICT_KEYS:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
        else:
            if {"state", "param_groups"} <= content.keys():
                raise unreadable(path, "it has the state of an optimizer and no model", SOURCES_HINT)
    if not isinstance(content, Mapping):
        raise unreadable(path, f"it has a {type(content).__name__} and no state dict", SOURCES_HINT)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise unreadable(path, "it has no tensors", SOURCES_HINT)
    for name, tensor in tensors.items():
        if not _is_plain_tensor(tensor):
            raise unreadable(
                path,
                f"{name} of shape {list(tensor.shape)} is sparse, quantized, on no device or truncated",
                "Save plain tensors.",
            )
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return tensors, dict(args) if isinstance(args, Mapping) else {}


def _is_plain_tensor(tensor: Tensor) -> bool:
    """Return True for a dense CPU tensor that its storage fully contains; others may use unbounded memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


# ---------------------------------------------------------------------- folders


def _read_folder(folder: Path) -> ForeignWeights:
    config, preprocessor_config = (
        _read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config")
    )
    files = [folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()][:1] or _find_shards(
        folder
    )
    if not files:
        raise unreadable(folder, f"it has no checkpoint and no {' or '.join(_WEIGHTS_FILES)}", SOURCES_HINT)
    if not config:
        raise unreadable(
            folder,
            "it has no config.json, so the architecture is unknown",
            f"For a plain vision transformer, give the file {files[0].name} itself.",
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise unreadable(
                folder, f"it has no {file.name}, which its index lists", "Give all of its files."
            )
        tensors |= read_tensors(file)[0]
    license = read_card_license(folder) or config.get("pretrained_cfg", {}).get("license", "")
    return ForeignWeights(
        tensors, files[0] if len(files) == 1 else None, config, preprocessor_config, {}, license
    )


def _find_shards(folder: Path) -> list[Path]:
    """Return the weights files that a folder's index lists, each once.

    Raises:
        UserError: if the index lists a file outside the folder.
    """
    for name in _WEIGHTS_FILES:
        index = _read_json(folder / f"{name}.index.json")
        if index:
            files = index.get("weight_map")
            names = set(map(str, files.values())) if isinstance(files, dict) else set()
            outside = sorted(name for name in names if Path(name).name != name)
            if outside:
                raise unreadable(
                    folder, f"its index lists {outside[0]!r}, which is not in the folder", "Repair the index."
                )
            return [folder / name for name in sorted(names)]
    return []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"it is not JSON ({_format_error(error)})") from None
    return content if isinstance(content, dict) else {}


def read_header_entry(file: Path, key: str) -> str:
    """Return an entry of a safetensors header; empty if there is none, or the file is not safetensors."""
    if not file.is_file():
        return ""
    try:
        with safe_open(file, "pt") as handle:
            return (handle.metadata() or {}).get(key, "")
    except (SafetensorError, OSError):
        return ""


def read_card_license(folder: Path) -> str:
    """Return the license in the YAML header of a model card, ``README.md``; empty if there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    header = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        fields = read_yaml(header[1]) if header else None
    except ValueError:
        return ""
    fields = fields if isinstance(fields, dict) else {}
    return str(fields.get("license_name") or fields.get("license") or "")


# ---------------------------------------------------------------------- timm and the Hub


def _read_timm(name: str) -> ForeignWeights:
    import timm

    try:
        vit: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the network and the Hub's cache raise errors of many types
        raise unreadable(
            f"timm:{name}",
            _format_error(error),
            "Give a name of timm.list_models, and check the network or the Hub's cache.",
        ) from None
    size = getattr(getattr(vit, "patch_embed", None), "img_size", None)
    heads = getattr(getattr(next(iter(getattr(vit, "blocks", ())), None), "attn", None), "num_heads", None)
    config = {
        "pretrained_cfg": dict(vit.pretrained_cfg),
        "img_size": size,
        "num_heads": heads,
        "global_pool": getattr(vit, "global_pool", "token"),
    }
    license = vit.pretrained_cfg.get("license") or ""
    return ForeignWeights(dict(vit.state_dict()), None, config, {}, {}, license)


def download_from_hub(source: str) -> Path:
    """Return the local folder of a Hub model, ``hf:OWNER/NAME``; download the files that are not cached.

    Raises:
        UserError: if the download fails.
    """
    name = source.removeprefix("hf:")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_package("huggingface_hub", f"hf:{name}", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # the network and the Hub's cache raise errors of many types
        raise unreadable(
            f"hf:{name}", _format_error(error), "Check the name, and the network or the Hub's cache."
        ) from None


def _format_error(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def find_common_prefix(names: Iterable[str], suffix: str) -> str:
    """Return the prefix that all names share, taken from the only name that ends with `suffix`; else "".

    For example "module." of DistributedDataParallel, from "module.cls_token" and the suffix "cls_token".
    """
    names = list(names)
    prefixes = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return prefixes[0] if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in names) else ""
