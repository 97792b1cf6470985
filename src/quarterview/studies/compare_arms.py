"""The arms of a comparison: pre-trained backbones, their twins with random weights, and their fine-tuning."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quarterview import rng
from quarterview.commands.config import FinetuneConfig
from quarterview.errors import UserError
from quarterview.evaluation.features import Backbone, fresh_twin
from quarterview.evaluation.timm_backbone import TimmBackbone, open_timm
from quarterview.models.classifier import Classifier
from quarterview.studies.config import CompareConfig
from quarterview.weights.config import SCRATCH
from quarterview.weights.loading import load, read

TIMM = "timm:"


class Arm(NamedTuple):
    """A pre-trained backbone that is compared."""

    name: str
    """In tables, as the user named it."""
    model: Backbone
    digest: str
    """Of its weights file, or timm's tag of the weights."""
    tunable: bool

    @property
    def slug(self) -> str:
        """A name for folders, which another arm has only if its weights are the same."""
        last = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.name).name)[-40:].strip("-.")
        return f"{last or 'arm'}-{self.digest[:8]}"

    def describe(self) -> dict[str, Any]:
        """The arm, for a result."""
        network: Any = self.model.config
        return {
            "given": self.name,
            "weights": self.digest,
            "network": getattr(network, "model", self.name),
            "image_size": list(network.image_size),
        }


def open_arms(config: CompareConfig) -> list[Arm]:
    """Load every pre-trained arm.

    Raises:
        UserError: if one of them cannot be loaded or fine-tuned, or they take images of different channels.
    """
    arms: list[Arm] = []
    for name in config.options.pretrained:
        arms.append(open_arm(name, config))
        one, other = (arm.model.config.in_chans for arm in (arms[0], arms[-1]))
        if one != other:
            raise UserError(
                f"{arms[0].name} takes images of {one} channels and {name} of {other}. Compare those that "
                "take the same."
            )
    return arms


def open_arm(name: str, config: CompareConfig) -> Arm:
    """Load one pre-trained arm.

    Raises:
        UserError: if it cannot be loaded, or shall be fine-tuned and cannot be.
    """
    if name.startswith(TIMM):
        if set(config.options.protocols) == {"finetune"}:
            raise UserError(f"{name} is not fine-tuned here. Give --protocols knn linear.")
        return Arm(name, *open_timm(name.removeprefix(TIMM)), tunable=False)
    ema = config.tuning.from_ema
    model = load(name, ema)
    if isinstance(model, Classifier) and "finetune" in config.options.protocols:
        raise UserError(
            f"{name} is a fine-tuned classifier, which is not fine-tuned again. Give a pre-trained masked "
            "autoencoder, or --protocols knn linear."
        )
    return Arm(name, model, read(name, ema).digest, tunable=True)


def random_twin(model: Backbone, seed: int) -> Backbone:
    """The same network with the initial weights that belong to a seed."""
    if not isinstance(model, TimmBackbone):
        return fresh_twin(model, seed)
    with rng.seeded(seed, "init"):
        return open_timm(model.vit.pretrained_cfg["architecture"], pretrained=False)[0]


def finetuning_of(
    config: CompareConfig, arms: Sequence[Arm], start: str, count: int, seed: int, folder: Path
) -> FinetuneConfig:
    """The fine-tuning of one arm: that of every other but for the start, and layer decay from scratch.

    Args:
        arms: all of them; from scratch the network of the first one is trained.
        start: an arm's name, or ``scratch``.
        count: how many images have labels.
        folder: of the run.
    """
    loop = config.loop
    flags: dict[str, Any] = {"labels": count, "seed": seed, "out": str(folder)}
    if loop.steps is None and loop.total_steps(count) < config.options.least_steps:
        flags |= {"steps": config.options.least_steps, "warmup_epochs": None}  # a warm-up of the same share
    if start == SCRATCH:
        network: Any = arms[0].model.config
        flags |= {
            "model": network.model,
            "image_size": config.tuning.image_size or network.image_size,
            "in_chans": network.in_chans,
            "cls_tokens": network.cls_tokens,
            "layer_decay": config.options.scratch_layer_decay,
            "from_ema": False,
        }
    return config.finetuning(start, **flags)
