"""Named complete configurations.

A recipe is a table of differences from the defaults, which are the paper's, and says what it is
for, the command, and what was seen when it was run. ``--recipe FILE.yaml`` reads the same table from
a file; the ``config.yaml`` of any run is one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from quarterview.commands.finetune import FinetuneConfig
from quarterview.commands.pretrain import PretrainConfig
from quarterview.errors import UserError, unknown
from quarterview.safe_yaml import MOST_BYTES, read_yaml


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
    """The fields of the configuration that differ from the defaults."""


_NOT_RUN = "Not run here: it needs more than two cores."
_OFFICIAL_TUNE = {"batch_size": 1024}
_PAPER_TUNE = {**_OFFICIAL_TUNE, "erase": 0.0}  # table 9 has no erasing
_SCRATCH = {  # the paper's table 11, in a batch of 4096
    "erase": 0.0,
    "image_size": 224,
    "batch_size": 4096,
    "blr": 1e-4,
    "weight_decay": 0.3,
    "warmup_epochs": 20,
    "layer_decay": 1.0,
    "min_lr": 0.0,
    "beta2": 0.95,
    "ema": 0.9999,
}

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
    "pocket": Recipe(
        "Studies of many runs on two cores: a very small encoder, 64 wide, at 64 pixels.",
        "quarterview pretrain --recipe pocket --data photos --out runs/photos; as a study's --base pocket",
        "See docs/results/cpu_studies.md.",
        {
            "model": "mae_vit_64x4x2_patch8",
            "image_size": 64,
            "decoder_width": 32,
            "decoder_depth": 2,
            "decoder_heads": 1,
            "epochs": 20,
            "batch_size": 64,
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


FINETUNE_RECIPES: dict[str, Recipe] = {
    "small": Recipe(
        "Small pictures, about 32 pixels, few labels or few epochs: a small batch, a high rate, mild "
        "augmentation. With thousands of updates add --mixup 0.8 --cutmix 1.",
        "quarterview finetune RUN --recipe small --train train.parquet --test test.parquet --out runs/tuned",
        "Tuned on held-out images of CIFAR-10, from 500 labels: docs/results/cifar10_finetune.md.",
        {
            "epochs": 20,
            "batch_size": 64,
            "lr": 2e-3,
            "warmup_epochs": None,
            "randaugment": None,
            "erase": 0.0,
            "crop_min": 0.4,
            "mixup": 0.0,
            "cutmix": 0.0,
        },
    ),
    "base": Recipe(
        "The paper's fine-tuning of ViT-B (table 9).",
        "quarterview finetune RUN --recipe base --train IN1K/train --test IN1K/val --out runs/b16-tuned",
        _NOT_RUN,
        _PAPER_TUNE,
    ),
    "large": Recipe(
        "The paper's fine-tuning of ViT-L.",
        "quarterview finetune RUN --recipe large --train IN1K/train --test IN1K/val --out runs/l16-tuned",
        _NOT_RUN,
        {**_PAPER_TUNE, "epochs": 50},
    ),
    "huge": Recipe(
        "The paper's fine-tuning of ViT-H.",
        "quarterview finetune RUN --recipe huge --train IN1K/train --test IN1K/val --out runs/h14-tuned",
        _NOT_RUN,
        {**_PAPER_TUNE, "epochs": 50, "drop_path": 0.2},
    ),
    "official_base": Recipe(
        "ViT-B as the authors' PyTorch code fine-tunes it from normalised pixels, with random erasing.",
        "quarterview finetune RUN --recipe official_base --train IN1K/train --test IN1K/val --out b16-tuned",
        _NOT_RUN,
        {**_OFFICIAL_TUNE, "blr": 5e-4, "layer_decay": 0.65},
    ),
    "official_large": Recipe(
        "ViT-L, likewise.",
        "quarterview finetune RUN --recipe official_large --train IN1K/train --test IN1K/val --out l16-tuned",
        _NOT_RUN,
        {**_OFFICIAL_TUNE, "epochs": 50, "drop_path": 0.2},
    ),
    "official_huge": Recipe(
        "ViT-H, likewise.",
        "quarterview finetune RUN --recipe official_huge --train IN1K/train --test IN1K/val --out h14-tuned",
        _NOT_RUN,
        {**_OFFICIAL_TUNE, "epochs": 50, "drop_path": 0.3},
    ),
    "scratch_base": Recipe(
        "The paper's ViT-B from random weights (table 11).",
        "quarterview finetune scratch --recipe scratch_base --train IN1K/train --test IN1K/val --out b16",
        _NOT_RUN,
        {**_SCRATCH, "model": "mae_vit_base_patch16", "epochs": 300},
    ),
    "scratch_large": Recipe(
        "The paper's ViT-L from random weights.",
        "quarterview finetune scratch --recipe scratch_large --train IN1K/train --test IN1K/val --out l16",
        _NOT_RUN,
        {**_SCRATCH, "model": "mae_vit_large_patch16", "epochs": 200, "drop_path": 0.2},
    ),
    "scratch_huge": Recipe(
        "The paper's ViT-H from random weights.",
        "quarterview finetune scratch --recipe scratch_huge --train IN1K/train --test IN1K/val --out h14",
        _NOT_RUN,
        {**_SCRATCH, "model": "mae_vit_huge_patch14", "epochs": 200, "drop_path": 0.2},
    ),
}
"""Of `quarterview finetune`."""


def read(name: str) -> PretrainConfig:
    """The pre-training configuration of a recipe's name, or of a YAML file.

    Raises:
        UserError: if there is no such recipe or file, or a field in it is unknown.
    """
    return _read(name, RECIPES, PretrainConfig)


def read_finetune(name: str) -> FinetuneConfig:
    """Likewise, of fine-tuning."""
    return _read(name, FINETUNE_RECIPES, FinetuneConfig)


Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


def _read(name: str, table: Mapping[str, Recipe], kind: type[Config]) -> Config:
    if name in table:
        return kind(**table[name].values)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise unknown("recipe", name, [*table, "FILE.yaml"])
    if not path.is_file():
        raise UserError(f"recipe {name} does not exist; accepted: {', '.join(table)}, or a YAML file")
    try:
        with path.open("rb") as file:
            values = read_yaml(file.read(MOST_BYTES + 1))
    except OSError as error:
        raise UserError(f"recipe {name} cannot be read: {error}") from None
    except ValueError as error:
        raise UserError(f"recipe {name} is no YAML: {error}") from None
    return from_values(name, values, kind)


def from_values(name: str, values: object, kind: type[Config]) -> Config:
    """A configuration from what a YAML file held."""
    if not isinstance(values, dict):
        raise UserError(f"recipe {name} holds no table of fields; accepted: lines such as `mask_ratio: 0.75`")
    accepted = {field.name for field in fields(kind)}
    for key in values:
        if key not in accepted:
            raise unknown(f"field in recipe {name}:", str(key), sorted(accepted))
    for key, value in values.items():  # which YAML's aliases could make endless
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict | set) for item in items):
            raise UserError(
                f"{key} in recipe {name} is nested; accepted: a number, a text, or a list of them"
            )
    try:
        return kind(**{key: _number(value) for key, value in values.items()})
    except (TypeError, UserError) as error:
        raise UserError(f"recipe {name}: {error}") from None


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for a text; nobody who writes it means one."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
