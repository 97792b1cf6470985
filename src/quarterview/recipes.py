"""Named complete configurations.

A recipe is a table of differences from the defaults, which are the paper's, and says what it is
for, the command, and what was seen when it was run. ``--recipe FILE.yaml`` reads the same table from
a file; the ``config.yaml`` of any run is one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from quarterview.errors import UserError, unknown
from quarterview.pretraining import PretrainConfig


@dataclass(frozen=True)
class Recipe:
    """A configuration with a name."""

    purpose: str
    """When to use it."""
    command: str
    """How to run it."""
    seen: str
    """Time and result of a run, with hardware and date; or that none was made."""
    values: Mapping[str, Any]
    """The fields of `PretrainConfig` that differ from the defaults."""


_NOT_RUN = "Not run here: it needs more than two cores."

RECIPES: dict[str, Recipe] = {
    "cifar": Recipe(
        "Small pictures of one size, about 32 pixels: CIFAR and its like, on a laptop.",
        "quarterview pretrain --recipe cifar --data train.parquet --out runs/cifar",
        "See docs/results/cifar10.md.",
        {
            "model": "mae_vit_tiny_patch4",
            "image_size": 32,
            "decoder_width": 128,
            "decoder_depth": 2,
            "decoder_heads": 4,
            "epochs": 20,
            "lr": 1e-3,
        },
    ),
    "laptop": Recipe(
        "A few thousand photographs, two to eight cores: ViT-tiny at 96 pixels.",
        "quarterview pretrain --recipe laptop --data photos --out runs/photos",
        _NOT_RUN,
        {
            "model": "mae_vit_tiny_patch8",
            "image_size": 96,
            "decoder_width": 128,
            "decoder_depth": 2,
            "decoder_heads": 4,
            "epochs": 100,
            "lr": 1e-3,
        },
    ),
    "gpu": Recipe(
        "Ten thousand to a million photographs, one GPU: ViT-small at 224 pixels.",
        "quarterview pretrain --recipe gpu --data photos --out runs/photos",
        _NOT_RUN,
        {
            "model": "mae_vit_small_patch16",
            "decoder_width": 256,
            "decoder_depth": 4,
            "decoder_heads": 8,
            "epochs": 400,
            "batch_size": 1024,
        },
    ),
    "paper_base": Recipe(
        "The paper's ViT-B/16 for ImageNet, headline length (He et al. 2021, table 8).",
        "torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_base --data IN1K --out runs/b16",
        _NOT_RUN,
        {"epochs": 1600, "warmup_epochs": 40, "batch_size": 4096},
    ),
    "paper_large": Recipe(
        "The paper's ViT-L/16, headline length.",
        "torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_large --data IN1K --out runs/l16",
        _NOT_RUN,
        {"model": "mae_vit_large_patch16", "epochs": 1600, "warmup_epochs": 40, "batch_size": 4096},
    ),
    "paper_huge": Recipe(
        "The paper's ViT-H/14, headline length.",
        "torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_huge --data IN1K --out runs/h14",
        _NOT_RUN,
        {"model": "mae_vit_huge_patch14", "epochs": 1600, "warmup_epochs": 40, "batch_size": 4096},
    ),
    "paper_ablation": Recipe(
        "The default of the paper's ablations: ViT-L/16, 800 epochs, pixels not normalised.",
        "torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_ablation --data IN1K --out r",
        _NOT_RUN,
        {"model": "mae_vit_large_patch16", "norm_pix_loss": False, "epochs": 800, "batch_size": 4096},
    ),
}


def read(name: str) -> PretrainConfig:
    """The configuration of a recipe's name, or of a YAML file.

    Raises:
        UserError: if there is no such recipe or file, or a field in it is unknown.
    """
    if name in RECIPES:
        return PretrainConfig(**RECIPES[name].values)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise unknown("recipe", name, [*RECIPES, "FILE.yaml"])
    if not path.is_file():
        raise UserError(f"recipe {name} does not exist; accepted: {', '.join(RECIPES)}, or a YAML file")
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name} is no YAML: {' '.join(str(error).split())}") from None
    return from_values(name, values)


def from_values(name: str, values: object) -> PretrainConfig:
    """A configuration from what a YAML file held."""
    if not isinstance(values, dict):
        raise UserError(f"recipe {name} holds no table of fields; accepted: lines such as `mask_ratio: 0.75`")
    accepted = {field.name for field in fields(PretrainConfig)}
    for key in values:
        if key not in accepted:
            raise unknown(f"field in recipe {name}:", str(key), sorted(accepted))
    try:
        return PretrainConfig(**{key: _number(value) for key, value in values.items()})
    except (TypeError, UserError) as error:
        raise UserError(f"recipe {name}: {error}") from None


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for a text; nobody who writes it means one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
