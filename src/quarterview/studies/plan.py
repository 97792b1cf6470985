"""What a study will run: its arms, each once, and how long each is trained within the budget."""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from quarterview import recipes
from quarterview.data.loader import Batch
from quarterview.errors import UserError, check_types
from quarterview.model.config import MAEConfig
from quarterview.model.flops import block_flops, flops
from quarterview.model.mae import MaskedAutoencoder
from quarterview.model.targets import TokenTarget
from quarterview.objectives.choice import COMPARING, DEFAULTS, fresh_objective, model_config_of
from quarterview.pretraining import PretrainConfig
from quarterview.speed.bench import loader_of, reading_time
from quarterview.studies.study import Arm, Study, Table, check_measure
from quarterview.train.distributed import World, choose_device
from quarterview.train.loop import precision_context, usable_precision
from quarterview.train.optim import adamw
from quarterview.train.step import Step

VOCABULARY = 512
"""Words of the tokenizer that a study trains."""
TOKENIZER = "tokenizer"
"""The folder of its run."""
_TIMED = 3  # steps
_READ_SECONDS = 3.0
_RESERVE = 0.9  # of the minutes that are planned with: machines are noisy
_NEWER: Mapping[str, Any] = {"cls_tokens": 1, "fused_blocks": ()}
"""Fields that came later, and what they were before: an arm without them keeps its folder."""
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
    tune_steps: int = 500
    """Updates of each fine-tuning, under the recipe `small`."""
    measures: tuple[str, ...] = ()
    """Judge by these alone: finetune, finetune:K, linear, knn. By default each table says."""
    workers: int | None = None
    """Processes that decode images."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    jobs: int | None = None
    """Runs at a time; by default one on each GPU, or one."""

    def __post_init__(self) -> None:
        for name in ("data", "train", "test", "measures"):
            values = getattr(self, name)
            object.__setattr__(self, name, (values,) if isinstance(values, str) else tuple(map(str, values)))
        if isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", (self.image_size,))
        check_types(self, StudyConfig)
        read_budget(self.budget)
        for name in ("seeds", "labels", "tune_steps", "batch_size", "jobs"):
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


def arm_config(base: PretrainConfig, arm: Arm, tokenizer: str) -> PretrainConfig:
    """The pre-training of one arm. A tokenizer called `study` is the one that the study trains."""
    values = dict(arm.values)
    if values.get("tokenizer") == "study":
        values["tokenizer"] = tokenizer
    try:
        return replace(base, **values)
    except (TypeError, UserError) as error:
        raise UserError(f"arm {arm.name}: {error}") from None


def tokenizer_config(base: PretrainConfig, folder: str) -> PretrainConfig:
    """The run of the study's tokenizer."""
    values: dict[str, Any] = {**DEFAULTS["tokenizer"], "vocabulary": VOCABULARY, "objective": "tokenizer"}
    values |= {"out": folder, "target": "pixels", "tokenizer": None, "init_from": None, "fused_blocks": ()}
    return replace(base, **values)


def unique_arms(study: Study, config: StudyConfig, folder: str) -> list[Planned]:
    """Every arm once, with what all its tables ask of it; arms are the same if their settings are."""
    base = base_of(study, config)
    found: dict[str, Planned] = {}
    for table in study.tables:
        for arm in table.arms:
            its = arm_config(base, arm, folder)
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
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_PLANNED}
    if arm.start != "pretrain":
        values = {name: values[name] for name in ("model", "image_size", "in_chans", "cls_tokens")}
    values = {name: value for name, value in values.items() if name not in _NEWER or value != _NEWER[name]}
    told = json.dumps([arm.start, arm.length, values], sort_keys=True, default=list)
    digest = hashlib.blake2b(told.encode(), digest_size=4).hexdigest()
    return f"{config.objective if arm.start == 'pretrain' else arm.start}-{digest}"


# ---------------------------------------------------------------------- length


class Reading(NamedTuple):
    """What it takes to have the images at hand."""

    once: float
    """Seconds at the beginning of each run, to open the set and, if it is held on the device, decode it."""
    image: float
    """Seconds an image, where it is decoded whenever it is seen."""


AT_HAND = Reading(0.0, 0.0)


def time_reading(config: PretrainConfig) -> Reading:
    """Measure it now."""
    device = choose_device(config.device)
    began = time.perf_counter()
    loader = loader_of(config, device)
    assert loader is not None
    once = time.perf_counter() - began
    if loader.cached is not None:
        return Reading(once, 0.0)
    return Reading(once, reading_time(loader, config, _READ_SECONDS) / config.batch_size)


def planned(
    arms: Sequence[Planned],
    config: StudyConfig,
    judging: Mapping[str, float],
    reading: Reading = AT_HAND,
    spent: float = 0.0,
    at_a_time: int = 1,
) -> list[Planned]:
    """The same arms with their numbers of updates.

    Args:
        judging: seconds that each measure takes once.
        reading: see `time_reading`.
        spent: seconds that went by already.
        at_a_time: arms that run without slowing one another.

    Raises:
        UserError: if the budget does not suffice for anything.
    """
    kind, amount = read_budget(config.budget)
    trained = [p for p in arms if p.arm.start == "pretrain"]
    if kind == "images":
        return [_with_images(p, amount * p.arm.length) for p in arms]
    if kind == "flops":
        return [_with_images(p, amount * p.arm.length / flops_an_image(p.config)) for p in arms]
    rates = [(seconds_an_image(p.config) + reading.image) * p.arm.length for p in trained]
    reader = next((p for p in trained if p.config.tokenizer), None)
    if reader is not None:
        its = seconds_an_image(tokenizer_config(reader.config, "")) + reading.image
        rates.append(its / config.seeds)
    judged = config.seeds * sum(judging[m] for p in arms for m in p.measures)
    judged += config.seeds * len(trained) * reading.once
    left = at_a_time * _RESERVE * (60 * amount - spent) - judged
    images = left / (config.seeds * sum(rates)) if rates else 0.0
    if left <= 0 or images < min(p.config.batch_size / p.arm.length for p in trained):
        raise UserError(
            f"a budget of {config.budget} for {len(arms)} arms under {config.seeds} seeds, which take "
            f"{judged / 60:.0f} minutes to be judged alone; accepted: more, fewer --seeds, fewer "
            "--tune-steps or --measures linear"
        )
    return [_with_images(p, images * p.arm.length) for p in arms]


def _with_images(planned: Planned, images: float) -> Planned:
    if planned.arm.start != "pretrain":
        return planned
    return planned._replace(steps=max(1, round(images / planned.config.batch_size)))


def flops_an_image(config: PretrainConfig) -> float:
    """Operations of a training step on one image, by closed form: matrix products of all networks it has."""
    tokens, width = config.cls_tokens + config.patches, config.shape.width
    whole = config.shape.depth * block_flops(tokens, width)
    if config.objective in ("mae", "beit"):
        vocabulary = config.vocabulary or VOCABULARY
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


def seconds_an_image(config: PretrainConfig) -> float:
    """How long a training step takes for an image that is at hand, measured now."""
    world = World(_device(config))
    precision = usable_precision(config.precision, world.device)
    blank = ((0.0,) * config.in_chans, (1.0,) * config.in_chans)
    words = config.vocabulary or VOCABULARY
    model_config = model_config_of(config, *blank, class_names=None, classes=10, vocabulary=words)
    objective = fresh_objective(config, model_config, 100, world.gather)
    assert isinstance(objective, nn.Module)
    objective.to(world.device).train()
    if isinstance(objective.model, MaskedAutoencoder) and isinstance(objective.model.target, TokenTarget):
        objective.model.target.use(_AnyWords(words, config.patches))
    if config.compile:
        objective.model.compile()
    step = Step(
        objective, adamw(objective, config.weight_decay), world, precision_context(precision, world.device)
    )
    size = config.batch_size
    images = torch.randn(2, size, config.in_chans, *config.image_size, device=world.device)
    ids = torch.arange(size, device=world.device)
    second = images[1] if config.objective in COMPARING else None
    batch = Batch(images[0], ids, torch.zeros_like(ids), ids % 10, second)
    times = []
    for _ in range(1 + _TIMED):
        began = time.perf_counter()
        loss, _ = step.gradients(batch)
        step.apply(loss)
        loss.item()  # so that the device is done
        times.append(time.perf_counter() - began)
    return min(times[1:]) / size


def _device(config: PretrainConfig) -> torch.device:
    return choose_device(config.device)


class _AnyWords:
    """A tokenizer whose words nobody asked for, to see how long predicting them takes."""

    def __init__(self, vocabulary: int, patches: int) -> None:
        self.vocabulary, self.patches = vocabulary, patches

    def tokens(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.patches, dtype=torch.int64, device=images.device)
