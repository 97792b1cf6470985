"""Which objective, and what belongs to each."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from quarterview.errors import UserError, check_types
from quarterview.methods.base import Objective
from quarterview.methods.contrastive import (
    ContrastiveConfig,
    ContrastiveKind,
    Gather,
    make_contrastive,
)
from quarterview.methods.denoising import Denoising, NoiseConfig
from quarterview.methods.mae import MaskedAutoencoding, MaskingConfig
from quarterview.methods.supervised import Supervised, SupervisedConfig
from quarterview.methods.tokenizer import Tokenizing, TokenizingConfig
from quarterview.models.classifier import ClassifierConfig, fresh_classifier
from quarterview.models.config import MAEConfig, ViTConfig
from quarterview.models.create import fresh_model
from quarterview.models.encoder import fresh_encoder
from quarterview.models.tokenizer import TokenizerConfig, fresh_tokenizer

ObjectiveKind = Literal["mae", "denoising", "beit", "supervised", "simclr", "byol", "mocov3", "tokenizer"]

PREDICTING = ("mae", "denoising", "beit")
"""Objectives that train a masked autoencoder, which predicts patches."""
COMPARING = get_args(ContrastiveKind)
"""Objectives that compare two views of an image."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "beit": {
        "target": "tokens",
        "encoder_mask_tokens": True,
        "decoder_depth": 0,
        "mask": "block",
        "mask_ratio": 0.4,
    },
    "supervised": {"blr": 1e-4, "weight_decay": 0.3},
    **{name: {"weight_decay": 0.1} for name in COMPARING},
    "tokenizer": {"lr": 1e-3, "weight_decay": 0.0, "vocabulary": 1024},
}
"""In what the defaults of other objectives differ from masked autoencoding's: BEiT masks 40% in blocks and
predicts tokens from a full encoder without a decoder (Bao et al. 2021); table 11; Chen et al. 2021."""

_OWNERS: Mapping[type, tuple[str, ...]] = {
    MaskingConfig: ("mae", "beit"),
    NoiseConfig: ("denoising",),
    SupervisedConfig: ("supervised",),
    ContrastiveConfig: COMPARING,
    TokenizingConfig: ("tokenizer",),
}
Part = TypeVar("Part")


@dataclass(frozen=True)
class ObjectiveConfig(MaskingConfig, NoiseConfig, SupervisedConfig, ContrastiveConfig, TokenizingConfig):
    """What is learned, and by which method."""

    objective: ObjectiveKind = "mae"
    """mae, or what the paper compares it with, on the same encoder, data and optimiser: denoising, beit,
    supervised, simclr, byol, mocov3. tokenizer learns the words for --target tokens."""

    def __post_init__(self) -> None:
        for part in _OWNERS:
            part.__post_init__(self)  # type: ignore[attr-defined]
        check_types(self, ObjectiveConfig)
        for part, owners in _OWNERS.items():
            for name in own_fields(part):
                default = part.__dataclass_fields__[name].default  # type: ignore[attr-defined]
                if self.objective not in owners and getattr(self, name) != default:
                    raise UserError(
                        f"{name} {getattr(self, name)} with --objective {self.objective}, which has no such "
                        f"thing; accepted: --objective {' or '.join(owners)}"
                    )


def own_fields(part: type) -> list[str]:
    """The fields of a configuration."""
    return [field.name for field in fields(part) if field.default is not MISSING]  # type: ignore[arg-type]


def part_of(config: Any, kind: type[Part]) -> Part:
    """The fields of one of the configurations that another is made of."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})  # type: ignore[arg-type]


ModelConfig = MAEConfig | ClassifierConfig | ViTConfig | TokenizerConfig


def model_config_of(
    config: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    class_names: tuple[str, ...] | None,
    classes: int,
    vocabulary: int,
) -> ModelConfig:
    """What is trained, once the data has been seen.

    Args:
        config: of the whole run.
        mean, std: of the channels.
        class_names, classes: of labelled images.
        vocabulary: of the tokenizer, where one is used or made.
    """
    encoder = {name: getattr(config, name) for name in ("model", "image_size", "in_chans", "cls_tokens")}
    if config.objective in PREDICTING:
        words = vocabulary if config.target == "tokens" else None
        return replace(part_of(config, MAEConfig), mean=mean, std=std, vocabulary=words)
    if config.objective == "tokenizer":
        shape = (config.shape.patch_size, config.in_chans, vocabulary)
        return TokenizerConfig(*shape, config.tokenizer_width, config.tokenizer_depth, mean, std)
    if config.objective == "supervised":
        return ClassifierConfig(**encoder, mean=mean, std=std, classes=classes, class_names=class_names)
    return ViTConfig(**encoder, mean=mean, std=std)


def fresh_objective(config: Any, model: ModelConfig, updates: int, gather: Gather) -> Objective:
    """The objective of a run at its beginning, on the CPU.

    Args:
        config: of the whole run.
        model: see `model_config_of`.
        updates: of the whole run.
        gather: what brings all ranks' rows together.
    """
    seed: int = config.seed
    if isinstance(model, MAEConfig):
        if config.objective == "denoising":
            return Denoising(fresh_model(model, seed), seed, config.noise)
        masking = (config.masks_per_image, config.uniformity, gather)
        return MaskedAutoencoding(fresh_model(model, seed), seed, *masking)
    if isinstance(model, ClassifierConfig):
        return Supervised(fresh_classifier(model, seed), part_of(config, SupervisedConfig), seed)
    if isinstance(model, TokenizerConfig):
        passes = updates * config.accum_iter
        return Tokenizing(fresh_tokenizer(model, seed), seed, config.kl_weight, passes)
    encoder = fresh_encoder(model, seed)
    return make_contrastive(
        config.objective, encoder, part_of(config, ContrastiveConfig), seed, updates, gather
    )
