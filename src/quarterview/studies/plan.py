"""What a study will run: its arms, each once, and the configuration of each."""

import hashlib
import json
from typing import Any, NamedTuple

from quarterview import recipes
from quarterview.commands.config import PretrainConfig
from quarterview.commands.v0_1 import upgrade_changes
from quarterview.config import PATH
from quarterview.errors import UserError
from quarterview.methods.config import BYOL, MAE, BEiT, Denoising, MoCoV3, SimCLR
from quarterview.models.config import parse_model_name
from quarterview.models.flops import block_flops, flops
from quarterview.studies.config import DECIDED, StudyConfig
from quarterview.studies.study import Arm, Study, Table

HEAD_WIDTH = 32
"""Width of a decoder's head."""
TOKENIZER = "tokenizer"
"""The folder of its run."""


class Planned(NamedTuple):
    """One arm, as it will be run under every seed."""

    key: str
    """The name of its folder: a word, and eight digits that stand for its settings."""
    arm: Arm
    measures: tuple[str, ...]
    """All that any of its tables asks for."""
    config: PretrainConfig
    """But for the seed, the folder and the length."""
    steps: int
    """Updates; 0 where nothing is trained."""


def base_of(study: Study, config: StudyConfig) -> PretrainConfig:
    """What all arms of a study begin from."""
    recipe = recipes.read(config.base)
    asked = {
        "data": config.data,
        "device": config.device,
        "workers": config.workers,
        "model": config.model,
        "image_size": config.image_size,
        "batch_size": config.batch_size,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    return recipe.with_flags(**{**upgrade_changes(study.base, recipe), **given})


def arm_config(base: PretrainConfig, arm: Arm, tokenizer: str, config: StudyConfig) -> PretrainConfig:
    """The pre-training of one arm.

    Args:
        tokenizer: the folder of the tokenizer that the study trains, which an arm calls `study`. Fused blocks
            that are called so are every other one but the last.

    Raises:
        UserError: naming the arm, if its flags do not fit each other or the base.
    """
    values = upgrade_changes(arm.values, base)
    shape = parse_model_name(values.get("model", base.model.model))
    if values.get("fused_blocks") == "study":  # the paper's 1, 3, 5, 7, 9 of twelve
        values["fused_blocks"] = tuple(range(1, shape.depth - 1, 2))
        if not values["fused_blocks"]:
            raise UserError(
                f"Arm {arm.name} fuses blocks of an encoder of {shape.depth}. Give a --model of 3 or more."
            )
    if arm.decoder_share is not None:
        width = max(4, 4 * round(shape.width * arm.decoder_share / 4))  # four, for its positions
        values |= {"decoder_width": width, "decoder_heads": heads_of(width)}
    if values.get("tokenizer") == "study":
        values["tokenizer"] = tokenizer
    try:
        its = base.with_flags(**values)
    except UserError as error:
        raise UserError(f"arm {arm.name}: {error}") from None
    if its.method.compares and config.head_width is not None and "head_width" not in values:
        its = its.with_flags(head_width=config.head_width)
    return its


def heads_of(width: int) -> int:
    """As many heads as there are, each 32 wide or a little more."""
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


def tokenizer_config(base: PretrainConfig, folder: str, config: StudyConfig) -> PretrainConfig:
    """The run of the study's tokenizer."""
    own = {"vocabulary": config.vocabulary}
    if config.tokenizer_width is not None:
        own["tokenizer_width"] = config.tokenizer_width
    no_probe = {"probe_train": (), "probe_test": ()}  # for it has no features
    return base.with_flags(method="tokenizer", out=folder, init_from=None, **no_probe, **own)


def unique_arms(study: Study, config: StudyConfig, tokenizer: str) -> list[Planned]:
    """Every arm once, with what all its tables ask of it; arms are the same if their settings are.

    Args:
        tokenizer: the folder of the tokenizer that the study trains.
    """
    base = base_of(study, config)
    found: dict[str, Planned] = {}
    for table in study.tables:
        for arm in table.arms:
            its = arm_config(base, arm, tokenizer, config)
            key = key_of(arm, its)
            measures = measures_of(table, config)
            if key in found:
                measures = tuple(dict.fromkeys((*found[key].measures, *measures)))
                found[key] = found[key]._replace(measures=measures)
            else:
                found[key] = Planned(key, arm, measures, its, 0)
    return list(found.values())


def measures_of(table: Table, config: StudyConfig) -> tuple[str, ...]:
    """How the arms of a table are judged: as it says, as far as the user wants it."""
    chosen = tuple(m for m in table.measures if not config.measures or m in config.measures)
    if not chosen:
        raise UserError(
            f"--measures {' '.join(config.measures)} leaves nothing of the table {table.title}. Give some of "
            f"{', '.join(table.measures)}."
        )
    return chosen


def key_of(arm: Arm, config: PretrainConfig) -> str:
    """A name for a folder that another arm has only if its settings are the same.

    Files may move, so that of images and weights only those count that the arm itself names.
    """
    paths = config.marked(PATH)
    # Threads that decode are shared out by --jobs, and change nothing.
    values = {n: v for n, v in config.flags().items() if n not in {*DECIDED, "workers", *paths}}
    if arm.start != "pretrain":
        values = network_flags(config)
    values |= {name: value for name, value in arm.values.items() if name in paths}
    settings = json.dumps([arm.start, arm.length, values], sort_keys=True)
    digest = hashlib.blake2b(settings.encode(), digest_size=4).hexdigest()
    return f"{config.method.name if arm.start == 'pretrain' else arm.start}-{digest}"


def network_flags(config: PretrainConfig) -> dict[str, Any]:
    """The flags that say which network the encoder of a pre-training is."""
    encoder = config.model
    return {
        "model": encoder.model,
        "image_size": encoder.image_size,
        "in_chans": encoder.in_chans,
        "cls_tokens": encoder.cls_tokens,
    }


def tokenizer_of(config: PretrainConfig) -> str | None:
    """The tokenizer whose tokens are predicted; None if none are."""
    return config.method.tokenizer if isinstance(config.method, MAE | BEiT) else None


def flops_an_image(config: PretrainConfig, vocabulary: int) -> float:
    """Operations of a training step on one image, by closed form: matrix products of all networks it has.

    Args:
        vocabulary: visual tokens of the tokenizer, where one is used.
    """
    method, encoder = config.method, config.model
    tokens, width = encoder.cls_tokens + encoder.patches, encoder.shape.width
    whole = encoder.shape.depth * block_flops(tokens, width)
    if isinstance(method, MAE | BEiT):
        return method.masks_per_image * flops(config.autoencoder(vocabulary)).step
    if isinstance(method, SimCLR | BYOL | MoCoV3):
        hidden, out = method.head_width, method.head_out
        head = 2 * (width * hidden + hidden * out) + (
            2 * hidden * hidden if isinstance(method, MoCoV3) else 0
        )
        taught = 0 if isinstance(method, SimCLR) else 1
        student = whole + head + taught * 2 * 2 * hidden * out
        return 2 * (3 * student + taught * (whole + head))
    if isinstance(method, Denoising):
        inner, numbers = method.decoder_width, config.autoencoder().predicted_numbers
        decoder = method.decoder_depth * block_flops(tokens, inner)
        decoder += 2 * inner * (tokens * width + encoder.patches * numbers)
        decoder += 2 * len(method.fused_blocks) * tokens * width * width
        return 3 * (whole + decoder)
    return 3 * whole
