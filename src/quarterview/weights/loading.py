"""Open weights: our own runs, checkpoints and files, and those of others.

`read` is the one door. What it finds is a configuration of ours, tensors by our names, and notes
that say what they were, what is missing and what was assumed. A model that is opened from them carries the
notes, and the logger ``quarterview`` is told; nothing is printed.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from quarterview.errors import UserError
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.tokenizer import DiscreteVAE, TokenizerConfig
from quarterview.training import checkpoint
from quarterview.weights.convert.architecture import DECODER, recognise
from quarterview.weights.convert.foreign import ACCEPTED, fetch, header_entry, read_foreign
from quarterview.weights.resize import adapt

LOGGER = logging.getLogger("quarterview")
METADATA_KEY = "quarterview"
_KINDS = {
    "mae": MAEConfig,
    "classifier": ClassifierConfig,
    "tokenizer": TokenizerConfig,
    "encoder": ViTConfig,  # last, for the first two are such, too
}
SCHEMES = ("timm:", "hf:")
"""How the names of weights begin that are not on this machine."""


class Weights(NamedTuple):
    """Weights from anywhere, in our words."""

    given: str
    """As the user called them."""
    kind: str
    """What they are."""
    config: MAEConfig | ClassifierConfig
    tensors: dict[str, Tensor]
    """By our names."""
    file: Path | None
    """Where they lie; None for timm:NAME, or where they lie in several files."""
    missing: tuple[str, ...] = ()
    """Our names of what they lack."""
    dropped: tuple[str, ...] = ()
    """Their names of what was left out."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""
    licence: str = ""
    """Of the weights, where their file or their card says it."""

    @property
    def ours(self) -> bool:
        """Whether this package wrote them."""
        return self.kind.startswith("Quarterview")

    @property
    def has_decoder(self) -> bool:
        """Whether they can reconstruct."""
        return "decoder_pred.weight" in self.tensors

    @property
    def description(self) -> str:
        """What was found, in a line."""
        return f"{self.given}: {self.kind}, {self.config.model}, {len(self.tensors)} tensors taken"

    @property
    def warnings(self) -> list[str]:
        """What was left out, what is missing, and what was assumed, a line each."""
        lines = [f"left out: {_some(self.dropped)}"] if self.dropped else []
        missing = [name for name in self.missing if not any(fnmatchcase(name, p) for p in DECODER)]
        if missing:
            lines.append(f"missing, so freshly initialised: {_some(missing)}")
        return [*lines, *self.notes]

    @property
    def manifest(self) -> list[str]:
        """What was found, what is missing and what was assumed, in a few lines."""
        return [self.description, *self.warnings]

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the weights: of the file where there is one, else of the tensors."""
        digest = hashlib.blake2b(digest_size=8)
        if self.file is not None:
            with self.file.open("rb") as content:
                return hashlib.file_digest(content, lambda: digest).hexdigest()
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read(given: str | Path, ema: bool = False, allow_partial: Sequence[str] = ()) -> Weights:
    """Read weights of ours or of others.

    Args:
        given: a run (which means its newest complete checkpoint), a checkpoint folder, a file, a
            folder of transformers or timm, ``timm:NAME``, or ``hf:OWNER/NAME``.
        ema: the moving average of a run's weights instead of the weights.
        allow_partial: patterns of names that may be missing or left out.

    Raises:
        UserError: if there are no weights, or they are not understood.
    """
    text = str(given)
    path = fetch(text) if text.startswith("hf:") else Path(text)
    if not text.startswith("timm:") and _is_ours(path):
        file = find_weights(path, ema)
        config = read_header(file)
        kind = "masked autoencoder" if isinstance(config, MAEConfig) else "classifier"
        tensors, missing = load_file(file), ()
        if isinstance(config, MAEConfig) and "decoder_pred.weight" not in tensors:
            kind, missing = "encoder", decoder_names(config)
        return Weights(
            text,
            f"Quarterview's {kind}",
            config,
            tensors,
            file,
            missing=missing,
            licence=header_entry(file, "license"),
        )
    if ema:
        raise UserError(f"{given} is no run of ours, so it holds no moving average; accepted: without it")
    try:
        found = read_foreign(text if text.startswith("timm:") else path)
        kind, config, tensors, missing, dropped, notes = recognise(found, text, allow_partial)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"what {given} or the files beside it say of the weights makes no sense ({reason}); {ACCEPTED}"
        ) from error
    return Weights(text, kind, config, tensors, found.file, missing, dropped, notes, found.licence)


def _is_ours(path: Path) -> bool:
    """Whether a path is to be opened as a run, a checkpoint or a file of ours."""
    if path.is_dir():
        file = path / "model.safetensors"
        return (path / "checkpoints").is_dir() or bool(header_entry(file, METADATA_KEY))
    return path.is_file() and bool(header_entry(path, METADATA_KEY))


# ---------------------------------------------------------------------- our own files


def metadata(config: ViTConfig | TokenizerConfig) -> dict[str, str]:
    """The header that makes a weights file of ours self-describing."""
    kind = next(name for name, its in _KINDS.items() if isinstance(config, its))
    return {METADATA_KEY: json.dumps({"kind": kind, "config": asdict(config)}), "format": "pt"}


def find_weights(path: str | Path, ema: bool = False) -> Path:
    """The weights file that a path of ours means.

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


def decoder_names(config: MAEConfig) -> tuple[str, ...]:
    """The names of a masked autoencoder's tensors that are not its encoder's."""
    with torch.device("meta"):
        names = MaskedAutoencoder(config).state_dict()
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in DECODER))


def read_header(file: Path) -> MAEConfig | ClassifierConfig:
    """What the header of a weights file of ours says that it holds.

    An encoder alone, which was trained by comparing views, is that of a masked autoencoder with a decoder
    of the usual shape.

    Raises:
        UserError: if it is no such file, or a tokenizer's.
    """
    config = read_any_header(file)
    if isinstance(config, TokenizerConfig):
        raise UserError(f"{file} is a tokenizer, which has no features; accepted: --tokenizer {file}")
    if isinstance(config, MAEConfig | ClassifierConfig):
        return config
    return MAEConfig(**asdict(config))


def read_any_header(file: Path) -> ViTConfig | TokenizerConfig:
    """What the header of a weights file of ours says that it holds, whatever was trained.

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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"the header of {file} cannot be read ({error}); was it written by a newer version?"
        ) from None


# ---------------------------------------------------------------------- models


def read_config(given: str | Path, ema: bool = False) -> MAEConfig | ClassifierConfig:
    """The configuration of weights from anywhere.

    Raises:
        UserError: as `read`.
    """
    path = Path(given)
    if not str(given).startswith(SCHEMES) and _is_ours(path):
        return read_header(find_weights(path, ema))
    return read(given, ema).config


def load(
    given: str | Path, ema: bool = False, allow_partial: Sequence[str] = ()
) -> MaskedAutoencoder | Classifier:
    """The model of a run, a checkpoint, a file, a folder of transformers or timm, or the Hub.

    A `Classifier` if the weights have a head, else a `MaskedAutoencoder`, in evaluation mode. What
    foreign weights lack, such as a decoder, is freshly initialised. What they were, what they lack and
    what was assumed of them is in the model's `notes`, and is logged: to ``quarterview``, at WARNING what
    one should know and at INFO the rest.

    Args:
        given, ema, allow_partial: as `read`.

    Raises:
        UserError: as `read`.
    """
    return open_model(read(given, ema, allow_partial))


def open_model(weights: Weights) -> MaskedAutoencoder | Classifier:
    """The model that holds weights; what they lack has the initial values that belong to seed 0.

    Of foreign weights, `notes` of the model says what they were and lack, and so does the log.

    Raises:
        UserError: if they are not those of such a model, before anything is allocated for it.
    """
    config = weights.config
    with torch.device("meta"):
        like = MaskedAutoencoder(config) if isinstance(config, MAEConfig) else Classifier(config)
    expected = {name: tensor.shape for name, tensor in like.state_dict().items()}
    missing = set(expected) - set(weights.tensors)
    if missing != set(weights.missing):
        lacks = missing ^ set(weights.missing)
        raise UserError(f"{weights.given} lacks {_some(sorted(lacks))}; accepted: whole weights")
    for name, tensor in weights.tensors.items():
        if tensor.shape != expected.get(name):
            wanted = f"{list(expected[name])} by its header" if name in expected else "unknown"
            raise UserError(f"{weights.given} has {name} of {list(tensor.shape)}, {wanted}; {ACCEPTED}")
    model = fresh_model(config, seed=0) if isinstance(config, MAEConfig) else Classifier(config)
    model.load_state_dict(weights.tensors, strict=False)
    if not weights.ours:
        model.notes = tuple(weights.manifest)
        LOGGER.info(weights.description)
        for line in weights.warnings:
            LOGGER.warning(line)
    return model.eval()


def load_autoencoder(given: str | Path, ema: bool = False) -> MaskedAutoencoder:
    """The masked autoencoder, with its decoder, of weights from anywhere; see `load`.

    Raises:
        UserError: if there is no such model.
    """
    weights = read(given, ema)
    if isinstance(weights.config, ClassifierConfig) or not weights.has_decoder:
        raise UserError(
            f"{given} is {weights.kind}, which cannot reconstruct; accepted: a masked autoencoder with "
            "its decoder"
        )
    model = open_model(weights)
    assert isinstance(model, MaskedAutoencoder)
    return model


def load_tokenizer(given: str | Path) -> DiscreteVAE:
    """The tokenizer of a run of ours, in evaluation mode.

    Raises:
        UserError: if there is none.
    """
    file = find_weights(given)
    config = read_any_header(file)
    if not isinstance(config, TokenizerConfig):
        raise UserError(f"{given} is no tokenizer; accepted: a run of quarterview tokenizer")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in DiscreteVAE(config).state_dict().items()}
    tensors = load_file(file)
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise UserError(f"{given} has other weights than its header says; accepted: a whole tokenizer")
    model = DiscreteVAE(config)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def load_classifier(given: str | Path, ema: bool = False) -> Classifier:
    """The classifier of weights from anywhere; see `load`.

    Raises:
        UserError: if there is no such model.
    """
    model = load(given, ema)
    if not isinstance(model, Classifier):
        raise UserError(f"{given} is no classifier; accepted: a run of quarterview finetune")
    return model


# ---------------------------------------------------------------------- into another model


def load_encoder(model: Classifier, given: str | Path, ema: bool = False) -> list[str]:
    """Give a classifier the encoder of a masked autoencoder, or of another classifier.

    Decoder and head stay behind, and with mean pooling the encoder's final norm too, which a new
    `fc_norm` replaces. The image size may differ.

    Returns:
        What was done, in words.

    Raises:
        UserError: if the encoders differ, or a weight is missing or left over for another reason.
    """
    weights = read(given, ema)
    theirs, ours = weights.config, model.config
    if (theirs.model, theirs.in_chans) != (ours.model, ours.in_chans):
        raise UserError(
            f"{given} is {theirs.model} of {theirs.in_chans} channels; accepted: {ours.model} of "
            f"{ours.in_chans}, the classifier's"
        )
    if theirs.cls_tokens != ours.cls_tokens:
        raise UserError(
            f"{given} has {theirs.cls_tokens} cls tokens; accepted: {ours.cls_tokens}, the classifier's"
        )
    tensors, notes = adapt(weights.tensors, theirs, ours)
    left = {
        name for name in tensors if name.startswith(("decoder", "mask_token", "target.", "head.", "fc_norm."))
    }
    new = {"head.weight", "head.bias"}
    if ours.pool == "mean":
        left |= {name for name in tensors if name.startswith("norm.")}
        new |= {"fc_norm.weight", "fc_norm.bias"}
    _fill(model, {name: tensor for name, tensor in tensors.items() if name not in left}, new, str(given))
    return [*weights.manifest, *notes] if not weights.ours else notes


def _fill(model: nn.Module, tensors: dict[str, Tensor], new: set[str], given: str) -> None:
    """Load tensors into a model in which exactly the names `new` are to be left as they are."""
    found = model.load_state_dict(tensors, strict=False)
    wrong = (set(found.missing_keys) ^ new) | set(found.unexpected_keys)
    if wrong:
        raise UserError(f"{given} does not fit {type(model).__name__}: {', '.join(sorted(wrong))}")


def load_into(model: MaskedAutoencoder, given: str | Path, allow_partial: Sequence[str] = ()) -> list[str]:
    """Give a masked autoencoder the weights of another, or of an encoder alone.

    Image size, patch size and channels may differ; see `adapt`. A decoder that is missing, or that
    differs and is named by `allow_partial`, stays as it is.

    Returns:
        What was done, in words.

    Raises:
        UserError: if the architectures differ otherwise, naming each difference.
    """
    weights, other_decoder = check_start(model.config, given, allow_partial)
    theirs, ours = weights.config, model.config
    fresh_decoder = bool(other_decoder)
    tensors, notes = adapt(weights.tensors, theirs, ours)
    parts = ("head.*", "fc_norm.*", *(DECODER if fresh_decoder else ()))
    tensors = {name: t for name, t in tensors.items() if not any(fnmatchcase(name, p) for p in parts)}
    if isinstance(theirs, ClassifierConfig):
        notes.append("the head stays behind")
    if fresh_decoder:
        notes.append(f"the decoder is freshly initialised, for theirs has {'; '.join(other_decoder)}")
    new = {name for name in model.state_dict() if name not in tensors}
    allowed = (*(DECODER if fresh_decoder or not weights.has_decoder else ()), *allow_partial)
    if isinstance(theirs, ClassifierConfig) and theirs.pool == "mean":  # it normalises the mean instead
        notes.append("the final norm is freshly initialised")
        allowed = (*allowed, "norm.*")
    _fill(model, tensors, {name for name in new if any(fnmatchcase(name, p) for p in allowed)}, str(given))
    return [*weights.manifest, *notes]


def check_start(
    ours: MAEConfig, given: str | Path, allow_partial: Sequence[str] = ()
) -> tuple[Weights, list[str]]:
    """Read weights for a masked autoencoder, and compare the architectures.

    Returns:
        The weights, and in what the decoder differs, which then is to be a fresh one.

    Raises:
        UserError: if they differ in anything else, or in the decoder and `allow_partial` does not
            name it.
    """
    weights = read(given, allow_partial=allow_partial)
    different = _differences(weights, ours)
    fresh = any(fnmatchcase("decoder_pred.weight", pattern) for pattern in allow_partial)
    if different["encoder"] or (different["decoder"] and not fresh):
        raise UserError(
            f"the weights in {given} are of another architecture: "
            f"{'; '.join(different['encoder'] + different['decoder'])}; accepted: the same width, depth, "
            "heads and cls tokens, and the same decoder or --allow-partial 'decoder*' for a new one"
        )
    return weights, different["decoder"]


def _differences(weights: Weights, ours: MAEConfig) -> dict[str, list[str]]:
    """What no adapting bridges, of the encoder and of the decoder."""

    def differ(theirs: object, ours: object, names: Sequence[str]) -> list[str]:
        return [
            f"{name} {getattr(theirs, name)} there, {getattr(ours, name)} here"
            for name in names
            if getattr(theirs, name) != getattr(ours, name)
        ]

    theirs = weights.config
    encoder = differ(theirs.shape, ours.shape, ("width", "depth", "heads"))
    encoder += differ(theirs, ours, ("cls_tokens",))
    decoder = ("decoder", "decoder_width", "decoder_depth", "decoder_heads", "encoder_mask_tokens", "target")
    decoder = (*decoder, "fused_blocks")
    if ours.target != "pixels":  # whose predictions are not those of another patch
        decoder = (*decoder, "predicted_numbers", "shape", "in_chans")
    return {"encoder": encoder, "decoder": differ(theirs, ours, decoder) if weights.has_decoder else []}
