"""Open our own weights: a run, a checkpoint or a file."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from quarterview.errors import UserError
from quarterview.model.config import MAEConfig
from quarterview.model.mae import MaskedAutoencoder
from quarterview.train import checkpoint

METADATA_KEY = "quarterview"
ACCEPTED = "accepted: a run's folder, a checkpoint folder in it, or a .safetensors file of ours"


def metadata(config: MAEConfig) -> dict[str, str]:
    """The header that makes a weights file of ours self-describing."""
    return {METADATA_KEY: json.dumps({"kind": "mae", "config": asdict(config)}), "format": "pt"}


def find_weights(path: str | Path, ema: bool = False) -> Path:
    """The weights file that a path means.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; {ACCEPTED}")
    if path.is_file():
        if ema and path.stem != "ema":
            raise UserError(
                f"{path} is one file; accepted with ema: a run, a checkpoint folder, or its ema.safetensors"
            )
        return path
    folder = path if (path / "model.safetensors").is_file() else checkpoint.newest(path / "checkpoints")
    if folder is None:
        raise UserError(f"{path} holds no complete checkpoint; {ACCEPTED}")
    file = folder / ("ema.safetensors" if ema else "model.safetensors")
    if not file.is_file():
        raise UserError(f"{folder} holds no moving average; it is kept only by runs with --ema")
    return file


def read_config(path: str | Path) -> MAEConfig:
    """The configuration in the header of a weights file of ours."""
    file = find_weights(path)
    try:
        with safe_open(file, "pt") as handle:
            header = (handle.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); {ACCEPTED}") from None
    if header is None:
        raise UserError(f"{file} has no header of ours, so its architecture is unknown; {ACCEPTED}")
    try:
        return MAEConfig(**json.loads(header)["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the header of {file} cannot be read ({error}); was it written by a newer version?"
        ) from None


def load(path: str | Path, ema: bool = False) -> MaskedAutoencoder:
    """The model of a run, a checkpoint folder or a ``.safetensors`` file, in evaluation mode.

    Args:
        path: a run means its newest complete checkpoint.
        ema: the moving average of the weights instead of the weights.

    Raises:
        UserError: if there is no such model.
    """
    file = find_weights(path, ema)
    model = MaskedAutoencoder(read_config(file))
    model.load_state_dict(load_file(file))
    return model.eval()


_ARCHITECTURE = (
    *("model", "image_size", "in_chans", "decoder_width", "decoder_depth", "decoder_heads"),
    "encoder_mask_tokens",
)


def load_into(model: MaskedAutoencoder, path: str | Path) -> None:
    """Give a model the weights of another of the same architecture.

    Raises:
        UserError: if the architectures differ, naming each difference.
    """
    theirs = read_config(path)
    different = [
        f"{name} {getattr(theirs, name)} there, {getattr(model.config, name)} here"
        for name in _ARCHITECTURE
        if getattr(theirs, name) != getattr(model.config, name)
    ]
    if different:
        raise UserError(
            f"the weights in {path} are of another architecture: {'; '.join(different)}; "
            "accepted: weights of the same model, image size, channels and decoder"
        )
    model.load_state_dict(load_file(find_weights(path)))
