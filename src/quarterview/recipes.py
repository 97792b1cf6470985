"""Recipes: named complete configurations of pre-training and fine-tuning, for ``--recipe NAME``.

A recipe is a function that returns a configuration. The docstring gives its purpose, the command and the
results; ``quarterview recipes`` prints it. ``--recipe FILE.yaml`` reads a configuration from a file instead,
such as the ``config.yaml`` of a run.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from quarterview.commands.config import FinetuneConfig, PretrainConfig
from quarterview.config import ComposedConfig
from quarterview.errors import UserError, unknown, unreadable
from quarterview.safe_yaml import MAX_YAML_BYTES, read_yaml

# ---------------------------------------------------------------------- pre-training


def cifar() -> PretrainConfig:
    """Small images of equal size, about 32 pixels, such as CIFAR: ViT-tiny/4, on a laptop.

    Command::

        quarterview pretrain --recipe cifar --data train.parquet --out runs/cifar

    Results: docs/results/cifar10.md.
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
    """Studies with many runs on two CPU cores: a very small encoder, 64 wide with 4 blocks, at 64 pixels.

    Command::

        quarterview study mask-ratio --base pocket --data photos --train train --test test --out ratio

    Results: docs/results/cpu_studies.md.
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
    """A few thousand photographs, two to eight CPU cores: ViT-tiny/8 at 96 pixels.

    Command::

        quarterview pretrain --recipe laptop --data photos --out runs/photos

    Results: not measured yet.
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
    """Ten thousand to a million photographs, one GPU: ViT-small/16 at 224 pixels.

    Command::

        quarterview pretrain --recipe gpu --data photos --out runs/photos

    Results: not measured yet.
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
    """ViT-B/16 of the MAE paper on ImageNet, 1600 epochs (He et al. 2021, table 8).

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_base --data IN1K --out runs/b16

    Results: not measured yet.
    """
    return PretrainConfig.from_flags(
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_large() -> PretrainConfig:
    """ViT-L/16 of the MAE paper on ImageNet, 1600 epochs (He et al. 2021, table 8).

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_large --data IN1K --out runs/l16

    Results: not measured yet.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_large_patch16",
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_huge() -> PretrainConfig:
    """ViT-H/14 of the MAE paper on ImageNet, 1600 epochs (He et al. 2021, table 8).

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_huge --data IN1K --out runs/h14

    Results: not measured yet.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_huge_patch14",
        epochs=1600,
        warmup_epochs=40,
        batch_size=4096,
    )


def paper_ablation() -> PretrainConfig:
    """Default of the ablations in the MAE paper: ViT-L/16, 800 epochs, pixels without normalization.

    Command::

        torchrun --nproc-per-node 8 -m quarterview pretrain --recipe paper_ablation --data IN1K --out r

    Results: not measured yet.
    """
    return PretrainConfig.from_flags(
        model="mae_vit_large_patch16",
        norm_pix_loss=False,
        epochs=800,
        batch_size=4096,
    )


# ---------------------------------------------------------------------- fine-tuning


def finetune_small() -> FinetuneConfig:
    """Small images, about 32 pixels, with few labels or few epochs: a small batch, a high learning rate.

    The augmentation is mild. For thousands of steps, add --mixup 0.8 --cutmix 1.

    Command::

        quarterview finetune RUN --recipe small --train train.parquet --test test.parquet --out runs/tuned

    Results: docs/results/cifar10_finetune.md. Chosen on held-out images of CIFAR-10, with 500 labels.
    """
    return FinetuneConfig.from_flags(
        epochs=20,
        batch_size=64,
        lr=0.002,
        warmup_epochs=None,
        randaugment=None,
        erase_prob=0.0,
        crop_min=0.4,
        mixup=0.0,
        cutmix=0.0,
    )


def finetune_base() -> FinetuneConfig:
    """Fine-tuning of ViT-B in the MAE paper (He et al. 2021, table 9).

    Command::

        quarterview finetune RUN --recipe base --train IN1K/train --test IN1K/val --out runs/b16-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase_prob=0.0,
    )


def finetune_large() -> FinetuneConfig:
    """Fine-tuning of ViT-L in the MAE paper (He et al. 2021, table 9).

    Command::

        quarterview finetune RUN --recipe large --train IN1K/train --test IN1K/val --out runs/l16-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase_prob=0.0,
        epochs=50,
    )


def finetune_huge() -> FinetuneConfig:
    """Fine-tuning of ViT-H in the MAE paper (He et al. 2021, table 9).

    Command::

        quarterview finetune RUN --recipe huge --train IN1K/train --test IN1K/val --out runs/h14-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        erase_prob=0.0,
        epochs=50,
        drop_path=0.2,
    )


def finetune_official_base() -> FinetuneConfig:
    """Fine-tuning of ViT-B in the official PyTorch code (facebookresearch/mae), with random erasing.

    The pre-training predicts normalized pixels.

    Command::

        quarterview finetune RUN --recipe official_base --train IN1K/train --test IN1K/val --out b16-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        blr=0.0005,
        layer_decay=0.65,
    )


def finetune_official_large() -> FinetuneConfig:
    """Fine-tuning of ViT-L in the official PyTorch code (facebookresearch/mae), with random erasing.

    The pre-training predicts normalized pixels.

    Command::

        quarterview finetune RUN --recipe official_large --train IN1K/train --test IN1K/val --out l16-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        epochs=50,
        drop_path=0.2,
    )


def finetune_official_huge() -> FinetuneConfig:
    """Fine-tuning of ViT-H in the official PyTorch code (facebookresearch/mae), with random erasing.

    The pre-training predicts normalized pixels.

    Command::

        quarterview finetune RUN --recipe official_huge --train IN1K/train --test IN1K/val --out h14-tuned

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        batch_size=1024,
        epochs=50,
        drop_path=0.3,
    )


def finetune_scratch_base() -> FinetuneConfig:
    """Supervised training of ViT-B from random weights in the MAE paper (He et al. 2021, table 11).

    Command::

        quarterview finetune scratch --recipe scratch_base --train IN1K/train --test IN1K/val --out b16

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        erase_prob=0.0,
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
    """Supervised training of ViT-L from random weights in the MAE paper (He et al. 2021, table 11).

    Command::

        quarterview finetune scratch --recipe scratch_large --train IN1K/train --test IN1K/val --out l16

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        erase_prob=0.0,
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
    """Supervised training of ViT-H from random weights in the MAE paper (He et al. 2021, table 11).

    Command::

        quarterview finetune scratch --recipe scratch_huge --train IN1K/train --test IN1K/val --out h14

    Results: not measured yet.
    """
    return FinetuneConfig.from_flags(
        erase_prob=0.0,
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
"""Recipes of ``quarterview pretrain`` by name."""

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
"""Recipes of ``quarterview finetune`` by name."""

ConfigT = TypeVar("ConfigT", bound=ComposedConfig)


def read_pretrain_recipe(name: str) -> PretrainConfig:
    """Return the pre-training recipe of this name, or read a configuration from a YAML file.

    Raises:
        UserError: if the recipe or file does not exist, or a field in it is unknown or invalid.
    """
    return RECIPES[name]() if name in RECIPES else read_config_file(name, PretrainConfig, RECIPES)


def read_finetune_recipe(name: str) -> FinetuneConfig:
    """Return the fine-tuning recipe of this name, or read a configuration from a YAML file.

    Raises:
        UserError: if the recipe or file does not exist, or a field in it is unknown or invalid.
    """
    if name in FINETUNE_RECIPES:
        return FINETUNE_RECIPES[name]()
    return read_config_file(name, FinetuneConfig, FINETUNE_RECIPES)


def read_config_file(name: str, config_class: type[ConfigT], recipes: Mapping[str, object]) -> ConfigT:
    """Read a configuration from a YAML file: nested by parts, as in the ``config.yaml`` of a run, or flat.

    Args:
        recipes: names of the recipes, for error messages.

    Raises:
        UserError: if the file cannot be read, or is not a valid configuration.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise unknown("recipe", name, [*recipes, "FILE.yaml"])
    if not path.is_file():
        names = ", ".join(recipes)
        raise UserError(f"The recipe {name} does not exist. Give one of {names}, or the path of a YAML file.")
    try:
        with path.open("rb") as file:
            values = read_yaml(file.read(MAX_YAML_BYTES + 1))
    except OSError as error:
        raise unreadable(f"recipe {name}", error) from None
    except ValueError as error:
        raise unreadable(f"recipe {name}", f"not valid YAML: {error}") from None
    return create_config(f"Recipe {name}", values, config_class)


def create_config(source: str, values: object, config_class: type[ConfigT]) -> ConfigT:
    """Create a configuration from the content of a YAML file.

    Args:
        source: names the file at the beginning of error messages.
        values: the content, which must be a mapping of fields.

    Raises:
        UserError: if the content is not a valid configuration.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: not a mapping of fields. Write lines such as `mask_ratio: 0.75`.")
    try:
        flags = config_class.flatten(values, warn=True)
        _check_not_nested(flags)
        return config_class.from_flags(**{key: parse_yaml_number(value) for key, value in flags.items()})
    except (TypeError, UserError) as error:
        raise UserError(f"{source}: {error}") from None


def _check_not_nested(flags: Mapping[str, Any]) -> None:
    """Raise UserError if a value is nested: with aliases of YAML, such a value can be endless."""
    for key, value in flags.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list | dict | set) for item in items):
            raise UserError(f"The value of {key} is nested. Give a number, a text, or a list of these.")


def get_changed_flags(config: ComposedConfig) -> dict[str, Any]:
    """Return the flags of a configuration whose values differ from the defaults of its class."""
    default = type(config)().flags()
    return {name: value for name, value in config.flags().items() if default.get(name) != value}


def parse_yaml_number(value: Any) -> Any:
    """Convert texts such as ``1e-3``, also in a list, to floats; other values are returned unchanged.

    YAML 1.1 reads a number without a decimal point and a signed exponent as a text.
    """
    if isinstance(value, list):
        return [parse_yaml_number(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    return value
