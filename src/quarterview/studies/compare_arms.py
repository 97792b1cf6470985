"""Arms of a comparison: pre-trained backbones, their untrained copies, and fine-tuning configurations."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quarterview import rng
from quarterview.commands.config import FinetuneConfig
from quarterview.errors import UserError, not_supported
from quarterview.evaluation.features import Backbone, create_untrained_copy
from quarterview.evaluation.timm_backbone import TimmBackbone, load_timm_backbone
from quarterview.models.classifier import Classifier
from quarterview.studies.config import CompareConfig
from quarterview.weights.config import SCRATCH
from quarterview.weights.loading import load, read_weights

TIMM_PREFIX = "timm:"


class PretrainedArm(NamedTuple):
    """A pre-trained backbone in a comparison."""

    name: str
    """Name in tables: the text that the user gave, such as a path or ``timm:NAME``."""
    model: Backbone
    digest: str
    """Digest of the weights file, or timm's tag of the weights."""
    is_finetunable: bool

    @property
    def slug(self) -> str:
        """The arm's part of a folder name: its name and digest, so that arms with other weights differ."""
        last = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.name).name)[-40:].strip("-.")
        return f"{last or 'arm'}-{self.digest[:8]}"

    def describe(self) -> dict[str, Any]:
        """Describe the arm for the results file."""
        model_config: Any = self.model.config
        return {
            "given": self.name,
            "weights": self.digest,
            "network": getattr(model_config, "model", self.name),
            "image_size": list(model_config.image_size),
        }


def load_arms(config: CompareConfig) -> list[PretrainedArm]:
    """Load all pre-trained arms.

    Raises:
        UserError: if an arm cannot be loaded or fine-tuned, or the arms have different numbers of input
            channels.
    """
    arms: list[PretrainedArm] = []
    for name in config.options.pretrained:
        arms.append(load_arm(name, config))
        first, last = (arm.model.config.in_chans for arm in (arms[0], arms[-1]))
        if first != last:
            raise UserError(
                f"{arms[0].name} has {first} input channels, but {name} has {last}. Give models with the "
                "same number of input channels."
            )
    return arms


def load_arm(name: str, config: CompareConfig) -> PretrainedArm:
    """Load one pre-trained arm.

    Raises:
        UserError: if the model cannot be loaded, or --protocols has finetune but it cannot be fine-tuned.
    """
    if name.startswith(TIMM_PREFIX):
        if set(config.options.protocols) == {"finetune"}:
            raise not_supported(name, "--protocols finetune", "Give --protocols knn linear.")
        return PretrainedArm(name, *load_timm_backbone(name.removeprefix(TIMM_PREFIX)), is_finetunable=False)
    ema = config.tuning.from_ema
    model = load(name, ema)
    if isinstance(model, Classifier) and "finetune" in config.options.protocols:
        raise not_supported(
            f"{name}, a fine-tuned classifier,",
            "--protocols finetune",
            "Give a pre-trained masked autoencoder, or --protocols knn linear.",
        )
    return PretrainedArm(name, model, read_weights(name, ema).digest, is_finetunable=True)


def create_untrained_backbone(model: Backbone, seed: int) -> Backbone:
    """Return a model of the same architecture with the initial weights of a seed."""
    if not isinstance(model, TimmBackbone):
        return create_untrained_copy(model, seed)
    with rng.seeded(seed, "init"):
        return load_timm_backbone(model.vit.pretrained_cfg["architecture"], pretrained=False)[0]


def make_arm_finetune_config(
    config: CompareConfig, arms: Sequence[PretrainedArm], start: str, num_labels: int, seed: int, folder: Path
) -> FinetuneConfig:
    """Return the configuration to fine-tune one arm; only the start and scratch's layer decay differ by arm.

    Args:
        arms: all arms that are fine-tuned; random weights use the architecture of the first one.
        start: name of the arm, or ``scratch`` for random weights.
        num_labels: number of labelled training images.
        folder: folder of the run.
    """
    loop = config.loop
    flags: dict[str, Any] = {"labels": num_labels, "seed": seed, "out": str(folder)}
    if loop.steps is None and loop.total_steps(num_labels) < config.options.min_steps:
        # The default warm-up is a fraction of the steps; --warmup-epochs would not fit the longer training.
        flags |= {"steps": config.options.min_steps, "warmup_epochs": None}
    if start == SCRATCH:
        model_config: Any = arms[0].model.config
        flags |= {
            "model": model_config.model,
            "image_size": config.tuning.image_size or model_config.image_size,
            "in_chans": model_config.in_chans,
            "cls_tokens": model_config.cls_tokens,
            "layer_decay": config.options.scratch_layer_decay,
            "from_ema": False,
        }
    return config.make_finetune_config(start, **flags)
