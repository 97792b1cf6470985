"""Named complete configurations: functions that return one.

The text of each says what it is for, the command, and what was seen when it was run.
``--recipe FILE.yaml`` reads one from a file instead; the ``config.yaml`` of any run is such a file.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from quarterview.commands.config import FinetuneConfig, PretrainConfig
from quarterview.config import Composed
from quarterview.errors import UserError, unknown
from quarterview.safe_yaml import MOST_BYTES, read_yaml

# ---------------------------------------------------------------------- pre-training


def cifar() -> PretrainConfig:
    """Small pictures of one size, about 32 pixels: CIFAR and its like, on a laptop.

    Command::

        quarterview pretrain --recipe cifar --data train.parquet --out runs/cifar

    Seen: See docs/results/cifar10.md.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_tiny_patch4",
        image_size=32,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        epochs=20,
        lr=0.001,
    )


def pocket() -> PretrainConfig:
    """Studies of many runs on two cores: a very small encoder, 64 wide, at 64 pixels.

    Command::

        quarterview pretrain --recipe pocket --data photos --out runs/photos  # or --base pocket of a study

    Seen: See docs/results/cpu_studies.md.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_64x4x2_patch8",
        image_size=64,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=1,
        epochs=20,
        batch_size=64,
        lr=0.001,
    )


def laptop() -> PretrainConfig:
    """A few thousand photographs, two to eight cores: ViT-tiny at 96 pixels.

    Command::

        quarterview pretrain --recipe laptop --data photos --out runs/photos

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_tiny_patch8",
        image_size=96,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        epochs=100,
        lr=0.001,
    )


def gpu() -> PretrainConfig:
    """Ten thousand to a million photographs, one GPU: ViT-small at 224 pixels.

    Command::

        quarterview pretrain --recipe gpu --data photos --out runs/photos

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_small_patch16",
        decoder_width=256,
        decoder_depth=4,
        decoder_heads=8,
        epochs=400,
        batch_size=1024,
    )


def paper_base() -> PretrainConfig:
    """The paper's ViT-B/16 for ImageNet, headline length (He et al. 2021, table 8).

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_base --data IN1K --out runs/b16

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_large() -> PretrainConfig:
    """The paper's ViT-L/16, headline length.

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_large --data IN1K --out runs/l16

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_large_patch16",
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_huge() -> PretrainConfig:
    """The paper's ViT-H/14, headline length.

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_huge --data IN1K --out runs/h14

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_huge_patch14",
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_ablation() -> PretrainConfig:
    """The default of the paper's ablations: ViT-L/16, 800 epochs, pixels not normalised.

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_ablation --data IN1K --out r

    Seen: Not run here: it needs more than two cores.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_large_patch16",
        norm_pix_loss=False,
        epochs=800,
        batch_size=4096,
    )


# ---------------------------------------------------------------------- fine-tuning


def finetune_small() -> FinetuneConfig:
    """Small pictures, about 32 pixels, few labels or few epochs: a small batch, a high rate.

    Augmentation is mild. With thousands of updates add --mixup 0.8 --cutmix 1.

    Command::

        quarterview finetune RUN --recipe small --train train.parquet --test test.parquet --out runs/tuned

    Seen: Tuned on held-out images of CIFAR-10, from 500 labels: docs/results/cifar10_finetune.md.
    """
    return FinetuneConfig.from_flags(
        epochs=20,
        batch_size=64,
        lr=0.002,
        warmup_epochs=None,
        randaugment=None,
        erase=0.0,
        crop_min=0.4,
        mixup=0.0,
        cutmix=0.0,
    )


def finetune_base() -> FinetuneConfig:
    """The paper's fine-tuning of ViT-B (table 9).

    Command::

        quarterview finetune RUN --recipe base --train IN1K/train --test IN1K/val --out runs/b16-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase=0.0,
    )


def finetune_large() -> FinetuneConfig:
    """The paper's fine-tuning of ViT-L.

    Command::

        quarterview finetune RUN --recipe large --train IN1K/train --test IN1K/val --out runs/l16-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase=0.0,
        epochs=50,
    )


def finetune_huge() -> FinetuneConfig:
    """The paper's fine-tuning of ViT-H.

    Command::

        quarterview finetune RUN --recipe huge --train IN1K/train --test IN1K/val --out runs/h14-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase=0.0,
        epochs=50,
        drop_path=0.2,
    )


def finetune_official_base() -> FinetuneConfig:
    """ViT-B as the authors' PyTorch code fine-tunes it from normalised pixels, with random erasing.

    Command::

        quarterview finetune RUN --recipe official_base --train IN1K/train --test IN1K/val --out b16-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        blr=0.0005,
        layer_decay=0.65,
    )


def finetune_official_large() -> FinetuneConfig:
    """ViT-L, likewise.

    Command::

        quarterview finetune RUN --recipe official_large --train IN1K/train --test IN1K/val --out l16-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        epochs=50,
        drop_path=0.2,
    )


def finetune_official_huge() -> FinetuneConfig:
    """ViT-H, likewise.

    Command::

        quarterview finetune RUN --recipe official_huge --train IN1K/train --test IN1K/val --out h14-tuned

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        epochs=50,
        drop_path=0.3,
    )


def finetune_scratch_base() -> FinetuneConfig:
    """The paper's ViT-B from random weights (table 11).

    Command::

        quarterview finetune scratch --recipe scratch_base --train IN1K/train --test IN1K/val --out b16

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        erase=0.0,
        image_size=224,
        batch_size=4096,
        blr=0.0001,
        weight_decay=0.3,
        warmup_epochs=20,
        layer_decay=1.0,
        min_lr=0.0,
        beta2=0.95,
        ema=0.9999,
        model="mae_vit_base_patch16",
        epochs=300,
    )


def finetune_scratch_large() -> FinetuneConfig:
    """The paper's ViT-L from random weights.

    Command::

        quarterview finetune scratch --recipe scratch_large --train IN1K/train --test IN1K/val --out l16

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        erase=0.0,
        image_size=224,
        batch_size=4096,
        blr=0.0001,
        weight_decay=0.3,
        warmup_epochs=20,
        layer_decay=1.0,
        min_lr=0.0,
        beta2=0.95,
        ema=0.9999,
        model="mae_vit_large_patch16",
        epochs=200,
        drop_path=0.2,
    )


def finetune_scratch_huge() -> FinetuneConfig:
    """The paper's ViT-H from random weights.

    Command::

        quarterview finetune scratch --recipe scratch_huge --train IN1K/train --test IN1K/val --out h14

    Seen: Not run here: it needs more than two cores.
    """
    return FinetuneConfig.from_flags(
        erase=0.0,
        image_size=224,
        batch_size=4096,
        blr=0.0001,
        weight_decay=0.3,
        warmup_epochs=20,
        layer_decay=1.0,
        min_lr=0.0,
        beta2=0.95,
        ema=0.9999,
        model="mae_vit_huge_patch14",
        epochs=200,
        drop_path=0.2,
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "cifar": cifar,
    "pocket": pocket,
    "laptop": laptop,
    "gpu": gpu,
    "paper_base": paper_base,
    "paper_large": paper_large,
    "paper_huge": paper_huge,
    "paper_ablation": paper_ablation,
}
"""Recipes of ``quarterview pretrain``."""

FINETUNE_RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "small": finetune_small,
    "base": finetune_base,
    "large": finetune_large,
    "huge": finetune_huge,
    "official_base": finetune_official_base,
    "official_large": finetune_official_large,
    "official_huge": finetune_official_huge,
    "scratch_base": finetune_scratch_base,
    "scratch_large": finetune_scratch_large,
    "scratch_huge": finetune_scratch_huge,
}
"""Recipes of ``quarterview finetune``."""

Config = TypeVar("Config", bound=Composed)


def read(name: str) -> PretrainConfig:
    """The pre-training configuration of a recipe's name, or of a YAML file.

    Raises:
        UserError: if there is no such recipe or file, or a field in it is unknown.
    """
    return RECIPES[name]() if name in RECIPES else read_file(name, PretrainConfig, RECIPES)


def read_finetune(name: str) -> FinetuneConfig:
    """The fine-tuning configuration of a recipe's name, or of a YAML file.

    Raises:
        UserError: if there is no such recipe or file, or a field in it is unknown.
    """
    if name in FINETUNE_RECIPES:
        return FINETUNE_RECIPES[name]()
    return read_file(name, FinetuneConfig, FINETUNE_RECIPES)


def read_file(name: str, kind: type[Config], table: Mapping[str, object]) -> Config:
    """The configuration in a YAML file: nested by parts, as ``config.yaml`` of a run is, or flat.

    Args:
        table: the recipes that there are, for the error.

    Raises:
        UserError: if it cannot be read, or holds something else.
    """
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
    """A configuration from what a YAML file held.

    Raises:
        UserError: naming the file, if that is no configuration.
    """
    if not isinstance(values, dict):
        raise UserError(f"recipe {name} holds no table of fields; accepted: lines such as `mask_ratio: 0.75`")
    try:
        flags = kind.flat(values)
        _check_plain(flags)
        return kind.from_flags(**{key: as_number(value) for key, value in flags.items()})
    except (TypeError, UserError) as error:
        raise UserError(f"recipe {name}: {error}") from None


def _check_plain(flags: Mapping[str, Any]) -> None:
    """Raises UserError if a value is nested, which YAML's aliases could make endless."""
    for key, value in flags.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict | set) for item in items):
            raise UserError(f"{key} is nested; accepted: a number, a text, or a list of them")


def differences(config: Composed) -> dict[str, Any]:
    """The flags of a configuration whose values differ from the defaults."""
    default = type(config)().flags()
    return {name: value for name, value in config.flags().items() if default.get(name) != value}


def as_number(value: Any) -> Any:
    """YAML takes 1e-3 and 5e-1 for texts; nobody who writes them means one."""
    if isinstance(value, list):
        return [as_number(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value
