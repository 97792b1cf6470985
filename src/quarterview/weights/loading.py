"""Load weights: runs, checkpoints and files of this package, and weights of other libraries.

`read_weights` reads every supported source. It returns a configuration of this package, tensors under the
names of this package, and notes on the source, on missing tensors and on assumptions. `build_model` stores
the notes in the model and logs them to the logger ``quarterview``; nothing is printed.
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

from quarterview.config import get_renamed_fields, use_new_names
from quarterview.errors import UserError, unreadable
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.create import create_mae
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.tokenizer import DiscreteVAE, TokenizerConfig
from quarterview.training import checkpoint
from quarterview.weights.convert.architecture import DECODER_PATTERNS, convert_weights
from quarterview.weights.convert.foreign import (
    SOURCES_HINT,
    download_from_hub,
    read_foreign_weights,
    read_header_entry,
)
from quarterview.weights.resize import adapt_weights

LOGGER = logging.getLogger("quarterview")
METADATA_KEY = "quarterview"
_CONFIG_CLASSES = {
    "mae": MAEConfig,
    "classifier": ClassifierConfig,
    "tokenizer": TokenizerConfig,
    "encoder": ViTConfig,  # last, because MAEConfig and ClassifierConfig are subclasses of ViTConfig
}
"""The configuration class for each value of ``kind`` in the header of a weights file."""
REMOTE_PREFIXES = ("timm:", "hf:")
"""Prefixes of sources that are not paths."""


class Weights(NamedTuple):
    """Weights of any source, with a configuration and tensor names of this package."""

    source: str
    """The path or name that the user gave."""
    kind: str
    """The type of model and its origin, such as "encoder of timm or the official code"."""
    config: MAEConfig | ClassifierConfig
    tensors: dict[str, Tensor]
    """Tensors by their names in this package."""
    file: Path | None
    """The weights file; None for timm:NAME and for sharded weights."""
    missing_keys: tuple[str, ...] = ()
    """Names, in this package, of the parameters that the source lacks."""
    dropped_keys: tuple[str, ...] = ()
    """Names, in the source, of the tensors that were not used."""
    notes: tuple[str, ...] = ()
    """Assumptions made where the source records nothing."""
    license: str = ""
    """License of the weights, if their file or model card states one."""

    @property
    def is_native(self) -> bool:
        """True if this package wrote the weights."""
        return self.kind.startswith("Quarterview")

    @property
    def has_decoder(self) -> bool:
        """True if the weights include a trained decoder."""
        return "decoder_pred.weight" in self.tensors

    @property
    def description(self) -> str:
        """One line: the source, the type of model, its name and the number of tensors."""
        return f"{self.source}: {self.kind}, {self.config.model}, {len(self.tensors)} tensors"

    @property
    def warnings(self) -> list[str]:
        """One line each: unused tensors, missing parameters, and every assumption."""
        lines = [f"not used: {_join_names(self.dropped_keys)}"] if self.dropped_keys else []
        missing = [
            name for name in self.missing_keys if not any(fnmatchcase(name, p) for p in DECODER_PATTERNS)
        ]
        if missing:
            lines.append(f"missing, so randomly initialised: {_join_names(missing)}")
        return [*lines, *self.notes]

    @property
    def summary_lines(self) -> list[str]:
        """The description, followed by the warnings."""
        return [self.description, *self.warnings]

    @property
    def digest(self) -> str:
        """BLAKE2b digest of the weights file, or of the tensors if there is no single file: 16 hex digits."""
        digest = hashlib.blake2b(digest_size=8)
        if self.file is not None:
            with self.file.open("rb") as content:
                return hashlib.file_digest(content, lambda: digest).hexdigest()
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_weights(source: str | Path, ema: bool = False, allow_partial: Sequence[str] = ()) -> Weights:
    """Read weights of this package or of another library.

    Args:
        source: a run (its newest complete checkpoint is read), a checkpoint folder, a file, a folder of
            transformers or timm, ``timm:NAME``, or ``hf:OWNER/NAME``.
        ema: read the moving average of a run's weights instead of the weights.
        allow_partial: patterns of tensor names that may be missing, or that may be ignored.

    Raises:
        UserError: if there are no weights, or their architecture is not supported.
    """
    text = str(source)
    path = download_from_hub(text) if text.startswith("hf:") else Path(text)
    if not text.startswith("timm:") and _is_native(path):
        file = find_weights_file(path, ema)
        config = read_header_config(file)
        kind = "masked autoencoder" if isinstance(config, MAEConfig) else "classifier"
        tensors, missing = load_file(file), ()
        if isinstance(config, MAEConfig) and "decoder_pred.weight" not in tensors:
            kind, missing = "encoder", get_decoder_keys(config)
        return Weights(
            text,
            f"Quarterview's {kind}",
            config,
            tensors,
            file,
            missing_keys=missing,
            license=read_header_entry(file, "license"),
        )
    if ema:
        raise UserError(
            f"{source} is not a Quarterview run, so it has no moving average of the weights. Use the weights "
            "themselves, without --ema or --from-ema."
        )
    try:
        foreign = read_foreign_weights(text if text.startswith("timm:") else path)
        kind, config, tensors, missing, dropped, notes = convert_weights(foreign, text, allow_partial)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise unreadable(
            source, f"the weights or the files beside them are inconsistent ({reason})", SOURCES_HINT
        ) from error
    return Weights(text, kind, config, tensors, foreign.file, missing, dropped, notes, foreign.license)


def _is_native(path: Path) -> bool:
    """Return True if a path is a run, a checkpoint or a weights file of this package."""
    if path.is_dir():
        file = path / "model.safetensors"
        return (path / "checkpoints").is_dir() or bool(read_header_entry(file, METADATA_KEY))
    return path.is_file() and bool(read_header_entry(path, METADATA_KEY))


# ---------------------------------------------------------------------- files of this package


def make_metadata(config: ViTConfig | TokenizerConfig) -> dict[str, str]:
    """Return the metadata for the header of a safetensors file, with the model's configuration as JSON."""
    kind = next(name for name, config_class in _CONFIG_CLASSES.items() if isinstance(config, config_class))
    return {METADATA_KEY: json.dumps({"kind": kind, "config": asdict(config)}), "format": "pt"}


def find_weights_file(path: str | Path, ema: bool = False) -> Path:
    """Return the weights file of a run, of a checkpoint folder, or the file itself.

    Raises:
        UserError: if there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise unreadable(path, "it does not exist", SOURCES_HINT)
    if path.is_file():
        if ema and path.stem != "ema":
            raise UserError(
                f"{path} is a single weights file, without a moving average. Give a run, a checkpoint folder "
                "or an ema.safetensors file."
            )
        return path
    folder = path if (path / "model.safetensors").is_file() else checkpoint.find_newest(path / "checkpoints")
    if folder is None:
        raise unreadable(path, "it has no complete checkpoint", SOURCES_HINT)
    file = folder / ("ema.safetensors" if ema else "model.safetensors")
    if not file.is_file():
        raise UserError(
            f"{folder} has no moving average of the weights: its run was trained without --ema. Use the "
            "weights themselves."
        )
    return file


def get_decoder_keys(config: MAEConfig) -> tuple[str, ...]:
    """Return the names of a masked autoencoder's tensors that do not belong to its encoder."""
    with torch.device("meta"):
        names = MaskedAutoencoder(config).state_dict()
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in DECODER_PATTERNS))


def read_header_config(file: Path) -> MAEConfig | ClassifierConfig:
    """Read a model's configuration from the header of a weights file of this package.

    For an encoder without a decoder, as contrastive methods train it, return the configuration of a masked
    autoencoder with the default decoder.

    Raises:
        UserError: if the file has no such header, or contains a tokenizer.
    """
    config = read_any_header_config(file)
    if isinstance(config, TokenizerConfig):
        raise UserError(f"{file} is a tokenizer, which has no features. Use it as --tokenizer {file}.")
    if isinstance(config, MAEConfig | ClassifierConfig):
        return config
    return MAEConfig(**asdict(config))


def read_any_header_config(file: Path) -> ViTConfig | TokenizerConfig:
    """Read a model's or a tokenizer's configuration from the header of a weights file of this package.

    Raises:
        UserError: if the file has no such header.
    """
    try:
        with safe_open(file, "pt") as handle:
            header = (handle.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, f"it is not a safetensors file ({error})", SOURCES_HINT) from None
    if header is None:
        raise unreadable(
            file, "its header has no configuration, so its architecture is unknown", SOURCES_HINT
        )
    try:
        content = json.loads(header)
        config_class = _CONFIG_CLASSES[content["kind"]]
        return config_class(**use_new_names(content["config"], get_renamed_fields(config_class), warn=False))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(
            f"the header of {file}", error, "A newer version of quarterview may have written it."
        ) from None


# ---------------------------------------------------------------------- models


def read_config(source: str | Path, ema: bool = False) -> MAEConfig | ClassifierConfig:
    """Return the configuration of weights of any source, without reading the tensors where possible.

    Raises:
        UserError: as for `read_weights`.
    """
    path = Path(source)
    if not str(source).startswith(REMOTE_PREFIXES) and _is_native(path):
        return read_header_config(find_weights_file(path, ema))
    return read_weights(source, ema).config


def load(
    source: str | Path, ema: bool = False, allow_partial: Sequence[str] = ()
) -> MaskedAutoencoder | Classifier:
    """Load a model from a run, a checkpoint, a file, a folder of transformers or timm, timm or the Hub.

    Args:
        source, ema, allow_partial: as for `read_weights`.

    Returns:
        A `Classifier` if the weights have a head, else a `MaskedAutoencoder`, in evaluation mode. Parameters
        that the source lacks, such as a decoder, are randomly initialised. For weights of other libraries,
        the model's `notes` describe the source, missing parameters and assumptions. They are also logged to
        ``quarterview``: the description at level INFO, the others at level WARNING.

    Raises:
        UserError: as for `read_weights`.
    """
    return build_model(read_weights(source, ema, allow_partial))


def build_model(weights: Weights) -> MaskedAutoencoder | Classifier:
    """Build the model of some weights and load them; missing parameters are initialised with seed 0.

    For weights of other libraries, `notes` of the model and the log describe the source and what it lacks.

    Raises:
        UserError: if names or shapes do not fit the configuration; checked before memory is allocated.
    """
    config = weights.config
    with torch.device("meta"):
        meta_model = MaskedAutoencoder(config) if isinstance(config, MAEConfig) else Classifier(config)
    expected = {name: tensor.shape for name, tensor in meta_model.state_dict().items()}
    missing = set(expected) - set(weights.tensors)
    if missing != set(weights.missing_keys):
        incomplete = missing ^ set(weights.missing_keys)
        raise unreadable(
            weights.source, f"it lacks {_join_names(sorted(incomplete))}", "Give complete weights."
        )
    for name, tensor in weights.tensors.items():
        if tensor.shape != expected.get(name):
            reason = f"not {list(expected[name])}" if name in expected else "which its configuration has not"
            raise unreadable(
                weights.source, f"it has {name} of shape {list(tensor.shape)}, {reason}", SOURCES_HINT
            )
    model = create_mae(config, seed=0) if isinstance(config, MAEConfig) else Classifier(config)
    model.load_state_dict(weights.tensors, strict=False)
    if not weights.is_native:
        model.notes = tuple(weights.summary_lines)
        LOGGER.info(weights.description)
        for line in weights.warnings:
            LOGGER.warning(line)
    return model.eval()


def load_autoencoder(source: str | Path, ema: bool = False) -> MaskedAutoencoder:
    """Load a masked autoencoder with a trained decoder from any source; see `load`.

    Raises:
        UserError: if the source is not a masked autoencoder with its decoder.
    """
    weights = read_weights(source, ema)
    if isinstance(weights.config, ClassifierConfig) or not weights.has_decoder:
        raise UserError(
            f"{source} cannot reconstruct images: its type is {weights.kind}. Give a masked autoencoder "
            "with its decoder."
        )
    model = build_model(weights)
    assert isinstance(model, MaskedAutoencoder)
    return model


def load_tokenizer(path: str | Path) -> DiscreteVAE:
    """Load the tokenizer of a run of `quarterview tokenizer`, in evaluation mode, with frozen parameters.

    Raises:
        UserError: if the path is not such a run.
    """
    file = find_weights_file(path)
    config = read_any_header_config(file)
    if not isinstance(config, TokenizerConfig):
        raise UserError(f"{path} is not a tokenizer. Give a run of quarterview tokenizer.")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in DiscreteVAE(config).state_dict().items()}
    tensors = load_file(file)
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise unreadable(path, "its tensors do not match its header", "Give a complete tokenizer.")
    model = DiscreteVAE(config)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def load_classifier(source: str | Path, ema: bool = False) -> Classifier:
    """Load a classifier from any source; see `load`.

    Raises:
        UserError: if the source has no classification head.
    """
    model = load(source, ema)
    if not isinstance(model, Classifier):
        raise UserError(f"{source} is not a classifier. Give a run of quarterview finetune.")
    return model


# ---------------------------------------------------------------------- into an existing model


def load_encoder_into(model: Classifier, source: str | Path, ema: bool = False) -> list[str]:
    """Load the encoder of a masked autoencoder, or of another classifier, into a classifier.

    Decoder and head are not loaded. With mean pooling the encoder's final norm is not loaded either, because
    a new `fc_norm` replaces it. The image size may differ.

    Returns:
        Notes on what was adapted and assumed.

    Raises:
        UserError: if the encoders differ, or if another tensor is missing or unexpected.
    """
    weights = read_weights(source, ema)
    source_config, config = weights.config, model.config
    if (source_config.model, source_config.in_chans) != (config.model, config.in_chans):
        raise UserError(
            f"{source} is {source_config.model} with {source_config.in_chans} channels, but the classifier "
            f"is {config.model} with {config.in_chans}. Give weights of the same architecture."
        )
    if source_config.cls_tokens != config.cls_tokens:
        raise UserError(
            f"{source} has {source_config.cls_tokens} cls tokens, but the classifier has "
            f"{config.cls_tokens}. Give weights with the same number."
        )
    tensors, notes = adapt_weights(weights.tensors, source_config, config)
    skipped = {
        name for name in tensors if name.startswith(("decoder", "mask_token", "target.", "head.", "fc_norm."))
    }
    new = {"head.weight", "head.bias"}
    if config.pool == "mean":
        skipped |= {name for name in tensors if name.startswith("norm.")}
        new |= {"fc_norm.weight", "fc_norm.bias"}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    _load_state_dict(model, tensors, new, str(source))
    return [*weights.summary_lines, *notes] if not weights.is_native else notes


def _load_state_dict(
    model: nn.Module, tensors: dict[str, Tensor], expected_missing: set[str], source: str
) -> None:
    """Load tensors into a model, and check that exactly the expected parameters are missing."""
    result = model.load_state_dict(tensors, strict=False)
    wrong = (set(result.missing_keys) ^ expected_missing) | set(result.unexpected_keys)
    if wrong:
        raise UserError(
            f"{source} does not fit {type(model).__name__}: missing or unexpected are "
            f"{', '.join(sorted(wrong))}. Give weights of the same architecture."
        )


def load_into(model: MaskedAutoencoder, source: str | Path, allow_partial: Sequence[str] = ()) -> list[str]:
    """Load the weights of another masked autoencoder, or of an encoder alone, into a masked autoencoder.

    Image size, patch size and channels may differ; see `adapt_weights`. The model keeps its own decoder if
    the source has none, or has a different one and `allow_partial` names the decoder.

    Returns:
        Notes on what was adapted and assumed.

    Raises:
        UserError: if the architectures differ in anything else; the message names each difference.
    """
    weights, decoder_differences = read_initial_weights(model.config, source, allow_partial)
    source_config = weights.config
    keep_decoder = bool(decoder_differences)
    tensors, notes = adapt_weights(weights.tensors, source_config, model.config)
    skipped = ("head.*", "fc_norm.*", *(DECODER_PATTERNS if keep_decoder else ()))
    tensors = {name: t for name, t in tensors.items() if not any(fnmatchcase(name, p) for p in skipped)}
    if isinstance(source_config, ClassifierConfig):
        notes.append("the classification head is not loaded")
    if keep_decoder:
        notes.append(f"the decoder is randomly initialised, not loaded: {'; '.join(decoder_differences)}")
    new = {name for name in model.state_dict() if name not in tensors}
    allowed = (*(DECODER_PATTERNS if keep_decoder or not weights.has_decoder else ()), *allow_partial)
    if isinstance(source_config, ClassifierConfig) and source_config.pool == "mean":
        # A classifier with mean pooling has no final norm: fc_norm normalises the mean instead.
        notes.append("the final norm is randomly initialised")
        allowed = (*allowed, "norm.*")
    expected_missing = {name for name in new if any(fnmatchcase(name, p) for p in allowed)}
    _load_state_dict(model, tensors, expected_missing, str(source))
    return [*weights.summary_lines, *notes]


def read_initial_weights(
    config: MAEConfig, source: str | Path, allow_partial: Sequence[str] = ()
) -> tuple[Weights, list[str]]:
    """Read weights to start a masked autoencoder from, and check that the architectures agree.

    Returns:
        The weights, and the differences of the decoder. If there are any, the decoder must not be loaded.

    Raises:
        UserError: if the encoders differ, or the decoders differ and `allow_partial` does not name the
            decoder.
    """
    weights = read_weights(source, allow_partial=allow_partial)
    encoder_differences, decoder_differences = _compare_architectures(weights, config)
    decoder_may_differ = any(fnmatchcase("decoder_pred.weight", pattern) for pattern in allow_partial)
    if encoder_differences or (decoder_differences and not decoder_may_differ):
        raise UserError(
            f"The architecture of {source} differs: {'; '.join(encoder_differences + decoder_differences)}. "
            "Give weights with the same width, depth, heads and cls tokens. If the decoder differs, add "
            "--allow-partial 'decoder*' to train a new one."
        )
    return weights, decoder_differences


def _compare_architectures(weights: Weights, config: MAEConfig) -> tuple[list[str], list[str]]:
    """Return the differences of encoder and of decoder that `adapt_weights` cannot adapt."""

    def compare(first: object, second: object, names: Sequence[str]) -> list[str]:
        return [
            f"{name} is {getattr(first, name)}, not {getattr(second, name)}"
            for name in names
            if getattr(first, name) != getattr(second, name)
        ]

    source_config = weights.config
    encoder = compare(source_config.shape, config.shape, ("width", "depth", "num_heads"))
    encoder += compare(source_config, config, ("cls_tokens",))
    decoder = ("decoder", "decoder_width", "decoder_depth", "decoder_heads", "encoder_mask_tokens", "target")
    decoder = (*decoder, "fused_blocks")
    if config.target != "pixels":  # only predicted pixels can be resized to another patch size
        decoder = (*decoder, "target_dim", "shape", "in_chans")
    return encoder, compare(source_config, config, decoder) if weights.has_decoder else []
