"""The arms of a study with their complete pre-training configurations, each arm once."""

import hashlib
import json
from typing import Any, NamedTuple

from quarterview import recipes
from quarterview.commands.config import PretrainConfig
from quarterview.commands.v0_1 import upgrade_flag_changes
from quarterview.config import PATH
from quarterview.errors import UserError
from quarterview.methods.config import (
    BEiTConfig,
    BYOLConfig,
    DenoisingConfig,
    MAEMethodConfig,
    MoCoV3Config,
    SimCLRConfig,
)
from quarterview.models.config import parse_model_name
from quarterview.models.flops import count_block_flops, count_flops
from quarterview.studies.config import RESERVED_FLAGS, StudyConfig
from quarterview.studies.study import Arm, Study, Table

MIN_HEAD_DIM = 32
"""Minimum width of an attention head of a decoder whose width depends on the encoder."""
TOKENIZER_FOLDER = "tokenizer"
"""Subfolder of a study with the run of its tokenizer."""


class PlannedArm(NamedTuple):
    """An arm with its complete configuration, which is run with every seed."""

    key: str
    """Name of the run's folder: the method and eight hexadecimal digits, a hash of the settings."""
    arm: Arm
    measures: tuple[str, ...]
    """The measures of all tables that contain the arm."""
    config: PretrainConfig
    """The pre-training; seed, output folder and steps are set when a run starts."""
    steps: int
    """Training steps; 0 for an arm without a pre-training, and before the budget is allocated."""


def make_base_config(study: Study, config: StudyConfig) -> PretrainConfig:
    """Return the pre-training configuration that all arms of a study start from.

    Later sources override earlier ones: the recipe --base, the study's ``base``, the flags of the study.
    """
    recipe = recipes.read_pretrain_recipe(config.base)
    flags = {
        "data": config.data,
        "device": config.device,
        "workers": config.workers,
        "model": config.model,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
    }
    set_flags = {name: value for name, value in flags.items() if value is not None}
    return recipe.with_flags(**{**upgrade_flag_changes(study.base, recipe), **set_flags})


def make_arm_config(
    base: PretrainConfig, arm: Arm, tokenizer_folder: str, config: StudyConfig
) -> PretrainConfig:
    """Return the pre-training configuration of one arm.

    Values that depend on the study are resolved: ``tokenizer: study`` is the tokenizer that the study trains,
    and ``fused_blocks: study`` is every second block except the last, as in the paper of MFF.

    Args:
        tokenizer_folder: the run of the tokenizer that the study trains.

    Raises:
        UserError: if the flags of the arm do not fit each other or the base; the message names the arm.
    """
    values = upgrade_flag_changes(arm.values, base)
    shape = parse_model_name(values.get("model", base.model.model))
    if values.get("fused_blocks") == "study":  # 1, 3, 5, 7, 9 of 12 blocks, as in MFF
        values["fused_blocks"] = tuple(range(1, shape.depth - 1, 2))
        if not values["fused_blocks"]:
            raise UserError(
                f"Arm {arm.name} fuses blocks, but the encoder has only {shape.depth}. Give a --model with 3 "
                "or more blocks."
            )
    if arm.decoder_share is not None:
        # The sine-cosine position embedding needs a width that is a multiple of 4.
        width = max(4, 4 * round(shape.width * arm.decoder_share / 4))
        values |= {"decoder_width": width, "decoder_heads": choose_num_heads(width)}
    if values.get("tokenizer") == "study":
        values["tokenizer"] = tokenizer_folder
    try:
        arm_config = base.with_flags(**values)
    except UserError as error:
        raise UserError(f"Arm {arm.name}: {error}") from None
    is_contrastive = arm_config.method.uses_two_views
    if is_contrastive and config.proj_hidden_dim is not None and "proj_hidden_dim" not in values:
        arm_config = arm_config.with_flags(proj_hidden_dim=config.proj_hidden_dim)
    return arm_config


def choose_num_heads(width: int) -> int:
    """Return the largest number of heads that divides a width into at least `MIN_HEAD_DIM` each, or 1."""
    return next(heads for heads in range(max(1, width // MIN_HEAD_DIM), 0, -1) if width % heads == 0)


def make_tokenizer_config(base: PretrainConfig, folder: str, config: StudyConfig) -> PretrainConfig:
    """Return the training configuration of the study's tokenizer."""
    flags = {"codebook_size": config.codebook_size}
    if config.tokenizer_width is not None:
        flags["tokenizer_width"] = config.tokenizer_width
    no_probe = {"probe_train": (), "probe_test": ()}  # a tokenizer has no features to probe
    return base.with_flags(method="tokenizer", out=folder, init_from=None, **no_probe, **flags)


def plan_arms(study: Study, config: StudyConfig, tokenizer_folder: str) -> list[PlannedArm]:
    """Return the arms of all tables, each once, with the measures of all tables that contain it.

    Arms with equal settings are the same arm, whatever their names.

    Args:
        tokenizer_folder: the run of the tokenizer that the study trains.
    """
    base = make_base_config(study, config)
    arms: dict[str, PlannedArm] = {}
    for table in study.tables:
        for arm in table.arms:
            arm_config = make_arm_config(base, arm, tokenizer_folder, config)
            key = make_arm_key(arm, arm_config)
            measures = select_measures(table, config)
            if key in arms:
                measures = tuple(dict.fromkeys((*arms[key].measures, *measures)))
                arms[key] = arms[key]._replace(measures=measures)
            else:
                arms[key] = PlannedArm(key, arm, measures, arm_config, 0)
    return list(arms.values())


def select_measures(table: Table, config: StudyConfig) -> tuple[str, ...]:
    """Return the measures of a table that --measures selects; all of them without --measures.

    Raises:
        UserError: if --measures selects none of them.
    """
    selected = tuple(m for m in table.measures if not config.measures or m in config.measures)
    if not selected:
        raise UserError(
            f"--measures {' '.join(config.measures)} contains no measure of the table {table.title}. Give "
            f"one or more of {', '.join(table.measures)}."
        )
    return selected


def make_arm_key(arm: Arm, config: PretrainConfig) -> str:
    """Return the folder name of an arm, which contains a hash of its settings.

    Paths are part of the hash only where the arm itself sets them, so that data and weights may be moved.
    """
    paths = config.flags_marked(PATH)
    # The number of decoding workers depends on --jobs, and does not change results.
    values = {n: v for n, v in config.flags().items() if n not in {*RESERVED_FLAGS, "workers", *paths}}
    if arm.start != "pretrain":
        values = get_encoder_flags(config)
    values |= {name: value for name, value in arm.values.items() if name in paths}
    old = {new: old for old, new in PretrainConfig.get_renamed_fields().items()}
    # Hash the field names of the first version, so that folders keep their names.
    values = {old.get(name, name): value for name, value in values.items()}
    settings = json.dumps([arm.start, arm.length, values], sort_keys=True)
    digest = hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()
    return f"{config.method.name if arm.start == 'pretrain' else arm.start}-{digest}"


def get_encoder_flags(config: PretrainConfig) -> dict[str, Any]:
    """Return the flags that define the encoder of a pre-training."""
    encoder = config.model
    return {
        "model": encoder.model,
        "image_size": encoder.image_size,
        "in_chans": encoder.in_chans,
        "cls_tokens": encoder.cls_tokens,
    }


def get_tokenizer(config: PretrainConfig) -> str | None:
    """Return the path of the tokenizer whose tokens a pre-training predicts; None if it predicts none."""
    return config.method.tokenizer if isinstance(config.method, MAEMethodConfig | BEiTConfig) else None


def compute_flops_per_image(config: PretrainConfig, codebook_size: int) -> float:
    """Compute the floating-point operations of a training step per image, counting matrix products only.

    Args:
        codebook_size: number of visual tokens, for methods that predict them.
    """
    method, encoder = config.method, config.model
    tokens, width = encoder.cls_tokens + encoder.num_patches, encoder.shape.width
    forward = encoder.shape.depth * count_block_flops(tokens, width)  # of the encoder, on all patches
    if isinstance(method, MAEMethodConfig | BEiTConfig):
        return method.masks_per_image * count_flops(config.autoencoder(codebook_size)).step
    if isinstance(method, SimCLRConfig | BYOLConfig | MoCoV3Config):
        hidden, out = method.proj_hidden_dim, method.proj_output_dim
        head = 2 * (width * hidden + hidden * out) + (
            2 * hidden * hidden if isinstance(method, MoCoV3Config) else 0
        )
        num_teachers = 0 if isinstance(method, SimCLRConfig) else 1
        student = forward + head + num_teachers * 2 * 2 * hidden * out
        return 2 * (3 * student + num_teachers * (forward + head))
    if isinstance(method, DenoisingConfig):
        decoder_width, target_dim = method.decoder_width, config.autoencoder().target_dim
        decoder = method.decoder_depth * count_block_flops(tokens, decoder_width)
        decoder += 2 * decoder_width * (tokens * width + encoder.num_patches * target_dim)
        decoder += 2 * len(method.fused_blocks) * tokens * width * width
        return 3 * (forward + decoder)
    return 3 * forward
