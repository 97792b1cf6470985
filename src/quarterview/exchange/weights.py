"""Open our own weights: a run, a checkpoint or a file."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from quarterview.errors import UserError
from quarterview.model.classifier import Classifier, ClassifierConfig
from quarterview.model.config import MAEConfig
from quarterview.model.mae import MaskedAutoencoder
from quarterview.train import checkpoint

METADATA_KEY = "quarterview"
ACCEPTED = "accepted: a run's folder, a checkpoint folder in it, or a .safetensors file of ours"


_KINDS = {"mae": MAEConfig, "classifier": ClassifierConfig}


def metadata(config: MAEConfig | ClassifierConfig) -> dict[str, str]:
    """The header that makes a weights file of ours self-describing."""
    kind = next(name for name, its in _KINDS.items() if isinstance(config, its))
    return {METADATA_KEY: json.dumps({"kind": kind, "config": asdict(config)}), "format": "pt"}


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


def read_header(file: Path) -> MAEConfig | ClassifierConfig:
    """What the header of a weights file of ours says that it holds.

    Raises:
        UserError: if it is no such file.
    """
    try:
        with safe_open(file, "pt") as handle:
            header = (handle.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); {ACCEPTED}") from None
    if header is None:
        raise UserError(f"{file} has no header of ours, so its architecture is unknown; {ACCEPTED}")
    try:
        content = json.loads(header)
        return _KINDS[content["kind"]](**content["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the header of {file} cannot be read ({error}); was it written by a newer version?"
        ) from None


def read_config(path: str | Path, ema: bool = False) -> MAEConfig:
    """The configuration of a masked autoencoder of ours.

    Raises:
        UserError: if there is none at that path.
    """
    file = find_weights(path, ema)
    config = read_header(file)
    if not isinstance(config, MAEConfig):
        raise UserError(f"{path} is a fine-tuned classifier; accepted: a pre-trained masked autoencoder")
    return config


def load(path: str | Path, ema: bool = False) -> MaskedAutoencoder:
    """The masked autoencoder of a run, a checkpoint folder or a ``.safetensors`` file, in evaluation mode.

    Args:
        path: a run means its newest complete checkpoint.
        ema: the moving average of the weights instead of the weights.

    Raises:
        UserError: if there is no such model.
    """
    model = MaskedAutoencoder(read_config(path, ema))
    model.load_state_dict(load_file(find_weights(path, ema)))
    return model.eval()


def load_classifier(path: str | Path, ema: bool = False) -> Classifier:
    """Likewise, the classifier of a fine-tuned run.

    Raises:
        UserError: if there is no such model.
    """
    model = load_backbone(path, ema)
    if not isinstance(model, Classifier):
        raise UserError(f"{path} is no classifier; accepted: a run of quarterview finetune")
    return model


def load_backbone(path: str | Path, ema: bool = False) -> MaskedAutoencoder | Classifier:
    """Whichever of the two a path holds, in evaluation mode.

    Raises:
        UserError: if there is no model of ours.
    """
    file = find_weights(path, ema)
    config = read_header(file)
    model = MaskedAutoencoder(config) if isinstance(config, MAEConfig) else Classifier(config)
    model.load_state_dict(load_file(file))
    return model.eval()


def load_encoder(model: Classifier, path: str | Path, ema: bool = False) -> None:
    """Give a classifier the encoder of a masked autoencoder.

    The decoder stays behind, and with mean pooling the encoder's final norm too, which `fc_norm`
    replaces. The positions are computed anew, so the image size may differ.

    Raises:
        UserError: if the encoders differ, or a weight is missing or left over for another reason.
    """
    config, ours = read_config(path, ema), model.config
    if (config.model, config.in_chans) != (ours.model, ours.in_chans):
        raise UserError(
            f"{path} is {config.model} of {config.in_chans} channels; accepted: {ours.model} of "
            f"{ours.in_chans}, the classifier's"
        )
    state = load_file(find_weights(path, ema))
    if config.image_size != ours.image_size:
        state["pos_embed"] = model.pos_embed.detach()
    norms = {"norm.weight", "norm.bias"}
    left = {name for name in state if name.startswith(("decoder", "mask_token"))}
    new = {"head.weight", "head.bias"}
    if ours.pool == "mean":
        left, new = left | norms, new | {f"fc_{name}" for name in norms}
    found = model.load_state_dict(state, strict=False)
    wrong = (set(found.missing_keys) ^ new) | (set(found.unexpected_keys) ^ left)
    if wrong:
        raise UserError(f"{path} does not fit {ours.model}: {', '.join(sorted(wrong))}")


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
