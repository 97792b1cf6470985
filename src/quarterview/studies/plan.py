"""What a study will run: its arms, each once, and how long each is trained within the budget."""

import hashlib
import json
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from quarterview import recipes
from quarterview.commands.pretrain import PretrainConfig
from quarterview.errors import UserError, check_types
from quarterview.methods.registry import COMPARING, DEFAULTS
from quarterview.models.config import MAEConfig
from quarterview.models.flops import block_flops, flops
from quarterview.models.vit import parse_model_name
from quarterview.studies.study import Arm, Study, Table, check_measure

HEAD = 32
"""Width of a decoder's head."""
TOKENIZER = "tokenizer"
"""The folder of its run."""
_NOT_PLANNED = ("out", "seed", "data", "device", "workers", "steps", "epochs", "resume", "tokenizer")

BudgetKind = Literal["minutes", "images", "flops"]


@dataclass(frozen=True)
class StudyConfig:
    """What is studied, on which images, and for how long."""

    data: tuple[str, ...] = ()
    """Required: images to pre-train on, anything that --data of pretrain takes."""
    train: tuple[str, ...] = ()
    """Required: labelled images that probes and fine-tuning learn from."""
    test: tuple[str, ...] = ()
    """Required: labelled images to be judged on. Nothing is chosen by them."""
    out: str = ""
    """Required: the study's folder; the same command goes on where it was stopped."""
    budget: str = "30m"
    """Of the whole study, minutes or hours (30m, 2h): all arms see equally many images. Or of each arm,
    images (2e6images), or operations (1e15flops): arms compute equally much."""
    seeds: int = 3
    """Runs of each arm; each draws other initial weights, another order and other labelled images."""
    seed: int = 0
    """The first of them."""
    base: str = "cifar"
    """The pre-training that all arms begin from: a recipe (see `quarterview recipes`) or a YAML file."""
    model: str | None = None
    """Another encoder than the base's."""
    image_size: tuple[int, ...] | None = None
    """Another image size than the base's: height and width, or one number for both."""
    batch_size: int | None = None
    """Another batch size of pre-training than the base's."""
    labels: int = 2000
    """Labelled images that probes and fine-tuning learn from, equally many a class; or all, if fewer."""
    tune_steps: int | None = None
    """Updates of each fine-tuning, under the recipe `small`. By default 500, or fewer (30 at least) where
    judging would take more than half of a budget of minutes."""
    head_width: int | None = None
    """Hidden width of the heads of SimCLR, BYOL and MoCo v3, which cost more than a tiny encoder."""
    vocabulary: int = 512
    """Words of the tokenizer that the study trains."""
    tokenizer_width: int | None = None
    """Channels inside that tokenizer."""
    measures: tuple[str, ...] = ()
    """Judge by these alone: finetune, finetune:K, linear, knn, linear@P or knn@P with P percent of the
    patches visible, corrupted. By default each table says."""
    workers: int | None = None
    """Processes that decode images."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    jobs: int | None = None
    """Runs at a time; by default one on each GPU, or one. On a CPU they share its cores, which small networks
    use better so."""

    def __post_init__(self) -> None:
        for name in ("data", "train", "test", "measures"):
            values = getattr(self, name)
            object.__setattr__(self, name, (values,) if isinstance(values, str) else tuple(map(str, values)))
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size,))
        check_types(self, StudyConfig)
        read_budget(self.budget)
        sizes = ("head_width", "vocabulary", "tokenizer_width")
        for name in ("seeds", "labels", "tune_steps", "batch_size", "jobs", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value}; accepted: 1 or more")
        for measure in self.measures:
            check_measure(measure)


def read_budget(text: str) -> tuple[BudgetKind, float]:
    """What a budget means: minutes of the whole study, images of each arm, or operations of each arm.

    Raises:
        UserError: if it means none of these.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)(s|m|h|images|flops)", text)
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < 1e30:
        raise UserError(f"a budget of {text!r}; accepted: such as 30m, 2h, 2e6images or 1e15flops")
    if match[2] in units:
        return "minutes", number * units[match[2]]
    return match[2], number  # type: ignore[return-value]


class Planned(NamedTuple):
    """One arm, as it will be run under every seed."""

    key: str
    """Of its folder: a name, and eight digits that stand for its settings."""
    arm: Arm
    measures: tuple[str, ...]
    """All that any of its tables asks for."""
    config: PretrainConfig
    """But for the seed, the folder and the length."""
    steps: int
    """Updates; 0 where nothing is trained."""


def base_of(study: Study, config: StudyConfig) -> PretrainConfig:
    """What all arms of a study begin from."""
    base = recipes.read(config.base)
    size = config.image_size
    asked: dict[str, Any] = {
        **{"data": config.data, "device": config.device, "workers": config.workers, "model": config.model},
        "image_size": None if size is None else tuple(size) * (3 - len(size)),
        "batch_size": config.batch_size,
    }
    return replace(base, **{name: v for name, v in {**study.base, **asked}.items() if v is not None})


def arm_config(base: PretrainConfig, arm: Arm, tokenizer: str, config: StudyConfig) -> PretrainConfig:
    """The pre-training of one arm. A tokenizer called `study` is the one that the study trains, and fused
    blocks called so are every other one but the last."""
    values: dict[str, Any] = dict(arm.values)
    shape = parse_model_name(values.get("model", base.model))
    if values.get("fused_blocks") == "study":  # the paper's 1, 3, 5, 7, 9 of twelve
        values["fused_blocks"] = tuple(range(1, shape.depth - 1, 2))
        if not values["fused_blocks"]:
            raise UserError(
                f"arm {arm.name} fuses blocks of an encoder of {shape.depth}; accepted: of 3 or more"
            )
    if values.get("objective") in COMPARING and config.head_width is not None:
        values = {"head_width": config.head_width, **values}
    if arm.decoder_share is not None:
        width = max(4, 4 * round(shape.width * arm.decoder_share / 4))  # four, for its positions
        values |= {"decoder_width": width, "decoder_heads": heads_of(width)}
    if values.get("tokenizer") == "study":
        values["tokenizer"] = tokenizer
    try:
        return replace(base, **values)
    except (TypeError, UserError) as error:
        raise UserError(f"arm {arm.name}: {error}") from None


def heads_of(width: int) -> int:
    """As many heads as there are, each 32 wide or a little more."""
    return next(heads for heads in range(max(1, width // HEAD), 0, -1) if width % heads == 0)


def tokenizer_config(base: PretrainConfig, folder: str, config: StudyConfig) -> PretrainConfig:
    """The run of the study's tokenizer."""
    values: dict[str, Any] = {**DEFAULTS["tokenizer"], "objective": "tokenizer"}
    values["vocabulary"] = config.vocabulary
    if config.tokenizer_width is not None:
        values["tokenizer_width"] = config.tokenizer_width
    values |= {"out": folder, "target": "pixels", "tokenizer": None, "init_from": None, "fused_blocks": ()}
    return replace(base, **values)


def unique_arms(study: Study, config: StudyConfig, folder: str) -> list[Planned]:
    """Every arm once, with what all its tables ask of it; arms are the same if their settings are."""
    base = base_of(study, config)
    found: dict[str, Planned] = {}
    for table in study.tables:
        for arm in table.arms:
            its = arm_config(base, arm, folder, config)
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
            f"measures {', '.join(config.measures)} for the table {table.title}; accepted: "
            f"{', '.join(table.measures)}"
        )
    return chosen


def key_of(arm: Arm, config: PretrainConfig) -> str:
    """A name for a folder that another arm has only if its settings are the same."""
    values = planned_values(config)
    if arm.start != "pretrain":
        values = {name: values[name] for name in ("model", "image_size", "in_chans", "cls_tokens")}
    mine = {name: arm.values.get(name, "study") for name in ("data", "tokenizer")}
    if config.tokenizer is not None and "tokenizer" not in arm.values:
        mine["tokenizer"] = "of the base"
    values |= {name: value for name, value in mine.items() if value != "study"}  # the study's may have moved
    told = json.dumps([arm.start, arm.length, values], sort_keys=True, default=list)
    digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
    return f"{config.objective if arm.start == 'pretrain' else arm.start}-{digest}"


def planned_values(config: PretrainConfig) -> dict[str, Any]:
    """What decides how a run goes, but for its images, its seed and its length."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_PLANNED}


def flops_an_image(config: PretrainConfig, vocabulary: int) -> float:
    """Operations of a training step on one image, by closed form: matrix products of all networks it has.

    Args:
        vocabulary: words of the tokenizer, where one is used.
    """
    tokens, width = config.cls_tokens + config.patches, config.shape.width
    whole = config.shape.depth * block_flops(tokens, width)
    if config.objective in ("mae", "beit"):
        return config.masks_per_image * flops(replace(config.part(MAEConfig), vocabulary=vocabulary)).step
    if config.objective in COMPARING:
        hidden, out = config.head_width, config.head_out
        head = 2 * (width * hidden + hidden * out) + (
            2 * hidden * hidden if config.objective == "mocov3" else 0
        )
        taught = 0 if config.objective == "simclr" else 1
        student = whole + head + taught * 2 * 2 * hidden * out
        return 2 * (3 * student + taught * (whole + head))
    if config.objective == "denoising":
        inner, numbers = config.decoder_width, config.part(MAEConfig).predicted_numbers
        decoder = config.decoder_depth * block_flops(tokens, inner)
        decoder += 2 * inner * (tokens * width + config.patches * numbers)
        decoder += 2 * len(config.fused_blocks) * tokens * width * width
        return 3 * (whole + decoder)
    return 3 * whole
