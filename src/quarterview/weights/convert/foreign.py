"""Read weights that are not ours: files, folders, timm's and the Hub's, as tensors and what is said of them.

Nothing that is read can run code: pickles are opened with ``weights_only=True``, and the one class
beyond tensors that they may hold is the `argparse.Namespace` of the official checkpoints.
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

from quarterview.errors import UserError
from quarterview.safe_yaml import read_yaml

ACCEPTED = (
    "accepted: a run, a checkpoint folder, a .safetensors or .pth file, a folder of transformers or timm, "
    "timm:NAME, or hf:OWNER/NAME"
)
_CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_PATTERNS = ["*.json", "README.md", *_FILES, "model-*.safetensors", "pytorch_model-*.bin"]


class Foreign(NamedTuple):
    """Tensors by the names that they were found under, and what was found beside them."""

    tensors: dict[str, Tensor]
    file: Path | None
    """The weights file; None for timm:NAME, or where there are several."""
    config: dict[str, Any]
    """The folder's ``config.json``; empty if there is none."""
    processor: dict[str, Any]
    """The folder's ``preprocessor_config.json``; empty if there is none."""
    args: dict[str, Any]
    """The command line that an official checkpoint carries; empty if there is none."""
    licence: str = ""
    """Of the weights, where it is stated beside them."""


def read_foreign(given: str | Path) -> Foreign:
    """Read weights from wherever they are.

    Raises:
        UserError: if nothing is there, or it holds no weights.
    """
    text = str(given)
    if text.startswith("timm:"):
        return _read_timm(text.removeprefix("timm:"))
    path = fetch(text) if text.startswith("hf:") else Path(text)
    if not path.exists():
        raise UserError(f"{path} does not exist; {ACCEPTED}")
    if path.is_dir():
        return _read_folder(path)
    tensors, args = read_tensors(path)
    return Foreign(tensors, path, {}, {}, args, header_entry(path, "license"))


# ---------------------------------------------------------------------- files


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file or of what `torch.save` wrote, and the arguments beside them.

    Raises:
        UserError: naming what the file is instead.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise UserError(f"{path} is empty; {ACCEPTED}")
    # A safetensors file begins with the length of its header, which may look like the start of a pickle.
    header = int.from_bytes(start[:8], "little")
    safe = start[8:9] == b"{" and header <= path.stat().st_size - 8
    if not safe and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return _unwrap(path, _read_pickle(path))
    if not safe and start.lstrip()[:1] in (b"{", b"["):
        raise UserError(f"{path} is JSON and holds no weights; {ACCEPTED}")
    try:
        return dict(load_file(path)), {}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is neither a safetensors file nor one of torch, or is cut short ({reason}); {ACCEPTED}"
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol that is unusual: it is read or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", str(error))
        what = f"wants to run {found[1]}" if found else "holds more than tensors"
        raise UserError(
            f"{path} {what}, which is not done: only tensors, plain values and argparse.Namespace are read; "
            "accepted: the same weights without it, or as safetensors"
        ) from None
    except Exception as error:  # whatever it is
        raise UserError(f"{path} is damaged or cut short ({_short(error)}); {ACCEPTED}") from None


def _unwrap(path: Path, found: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside what training scripts save, and their arguments."""
    args: Any = {}
    if isinstance(found, Mapping):
        args = found.get("args") or {}
        for name in _CONTAINERS:
            if isinstance(found.get(name), Mapping):
                found = found[name]
                break
        else:
            if {"state", "param_groups"} <= found.keys():
                raise UserError(f"{path} holds the state of an optimizer and no model; {ACCEPTED}")
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds a {type(found).__name__} and no state dict; {ACCEPTED}")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors; {ACCEPTED}")
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise UserError(
                f"{path} holds {name} of {list(tensor.shape)}, which is sparse, on no device or larger "
                "than the file; accepted: plain tensors"
            )
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return tensors, dict(args) if isinstance(args, Mapping) else {}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it says: one that is not could take any memory as soon as it is used."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


# ---------------------------------------------------------------------- folders


def _read_folder(folder: Path) -> Foreign:
    config, processor = (_read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config"))
    files = [folder / name for name in _FILES if (folder / name).is_file()][:1] or _shards(folder)
    if not files:
        raise UserError(f"{folder} holds no checkpoint, no {' and no '.join(_FILES)}; {ACCEPTED}")
    if not config:
        raise UserError(
            f"{folder} has no config.json, so what its weights are is unknown; accepted: the file "
            f"{files[0].name} itself if they are a plain vision transformer's"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}, which its index names; accepted: all of its files")
        tensors |= read_tensors(file)[0]
    licence = card_licence(folder) or config.get("pretrained_cfg", {}).get("license", "")
    return Foreign(tensors, files[0] if len(files) == 1 else None, config, processor, {}, licence)


def _shards(folder: Path) -> list[Path]:
    """The files that an index names, each once. Raises UserError if one lies elsewhere than in the folder."""
    for name in _FILES:
        index = _read_json(folder / f"{name}.index.json")
        if index:
            files = index.get("weight_map")
            named = set(map(str, files.values())) if isinstance(files, dict) else set()
            elsewhere = sorted(file for file in named if Path(file).name != file)
            if elsewhere:
                raise UserError(f"the index of {folder} names {elsewhere[0]!r}; accepted: files beside it")
            return [folder / file for file in sorted(named)]
    return []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {_short(error)}") from None
    return found if isinstance(found, dict) else {}


def header_entry(file: Path, key: str) -> str:
    """A text in the header of a safetensors file; empty if it has none of that name, or is another file."""
    if not file.is_file():
        return ""
    try:
        with safe_open(file, "pt") as handle:
            return (handle.metadata() or {}).get(key, "")
    except (SafetensorError, OSError):
        return ""


def card_licence(folder: Path) -> str:
    """The licence that a model card, ``README.md``, states in its header; empty if it states none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    header = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
    try:
        stated = read_yaml(header[1]) if header else None
    except ValueError:
        return ""
    stated = stated if isinstance(stated, dict) else {}
    return str(stated.get("license_name") or stated.get("license") or "")


# ---------------------------------------------------------------------- elsewhere


def _read_timm(name: str) -> Foreign:
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{name} needs timm: pip install 'quarterview[timm]'") from None
    try:
        vit: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever timm, the network, the hub and their caches come up with
        raise UserError(
            f"the weights of timm:{name} cannot be had ({_short(error)}); accepted: a name from "
            "timm.list_models, with weights in the hub's cache or a network"
        ) from None
    size = getattr(getattr(vit, "patch_embed", None), "img_size", None)
    heads = getattr(getattr(next(iter(getattr(vit, "blocks", ())), None), "attn", None), "num_heads", None)
    config = {
        "pretrained_cfg": dict(vit.pretrained_cfg),
        "img_size": size,
        "num_heads": heads,
        "global_pool": getattr(vit, "global_pool", "token"),
    }
    licence = vit.pretrained_cfg.get("license") or ""
    return Foreign(dict(vit.state_dict()), None, config, {}, {}, licence)


def fetch(given: str) -> Path:
    """The folder of a model of the Hub, ``hf:OWNER/NAME``, from its cache or the network.

    Raises:
        UserError: if it cannot be had.
    """
    name = given.removeprefix("hf:")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"hf:{name} needs huggingface_hub: pip install 'quarterview[hub]'") from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # whatever the network, the hub and their caches come up with
        raise UserError(
            f"hf:{name} cannot be had ({_short(error)}); accepted: a model of the Hub, in its cache or by a "
            "network"
        ) from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def common_prefix(names: Iterable[str], ending: str) -> str:
    """What stands before `ending` in the one name that ends so, if it stands before all; else nothing."""
    names = list(names)
    found = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    return found[0] if len(found) == 1 and all(name.startswith(found[0]) for name in names) else ""
