"""How long the parts of a study take on this machine: what a budget of minutes is planned with."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quarterview.data.loader import Batch
from quarterview.model.mae import MaskedAutoencoder
from quarterview.model.targets import TokenTarget
from quarterview.objectives.choice import COMPARING, fresh_objective, model_config_of
from quarterview.pretraining import PretrainConfig
from quarterview.speed.bench import loader_of, reading_time
from quarterview.studies.arm import images_of
from quarterview.studies.measure import judge
from quarterview.studies.plan import TOKENIZER, Planned, StudyConfig, base_of, tokenizer_config
from quarterview.studies.side_by_side import Here, Piece, Workers
from quarterview.studies.study import TUNED, Start, Study, parts_of
from quarterview.train.distributed import World, choose_device
from quarterview.train.loop import precision_context, usable_precision
from quarterview.train.optim import adamw
from quarterview.train.step import Step

_TIMED = 3  # steps
_READ_SECONDS = 3.0
_TUNED = 40  # updates whose time is measured
_TUNED_BATCH = 64  # of the recipe `small`


class Reading(NamedTuple):
    """Seconds that reading the pre-training images takes, beside training."""

    once: float
    """At the beginning of a run: all are read where they are then held in memory."""
    image: float
    """For each image as often as it is seen."""


@dataclass(frozen=True)
class Judging:
    """A part of judging an arm that is timed, and kept, by itself."""

    start: Start
    """What the arm is as far as this part's time goes: `random` stands for every network."""
    measures: tuple[str, ...]
    """Of frozen features all that are asked for, in one pass; of fine-tuning those of one run."""


class Tuning(NamedTuple):
    """Seconds that fine-tuning takes."""

    once: float
    """To open the images, and to judge the test images."""
    update: float


@dataclass(frozen=True)
class Timed:
    """What was measured."""

    steps: dict[str, float]
    """Seconds of a training step for one image, by arm."""
    tokenizer: float
    """Likewise of the tokenizer; 0 where there is none."""
    reading: Reading
    judging: dict[Judging, float]
    """Seconds of judging frozen features."""
    tuning: dict[Judging, Tuning]

    def judged(self, one: Planned, tune_steps: int) -> float:
        """Seconds of judging an arm once."""
        frozen = sum(self.judging.get(part, 0.0) for part in parts_judged(one))
        tuned = [self.tuning[part] for part in parts_judged(one) if part in self.tuning]
        return frozen + sum(part.once + tune_steps * part.update for part in tuned)


def parts_judged(one: Planned) -> list[Judging]:
    """What judging an arm consists of."""
    start: Start = "random" if one.arm.start == "pretrain" else one.arm.start
    kinds = {measure: parts_of(measure)[0] for measure in one.measures}
    still = tuple(m for m in one.measures if kinds[m] not in TUNED)
    whole = tuple(m for m in one.measures if m in ("finetune", "corrupted"))  # of which one run is judged
    partly = [(m,) for m in one.measures if kinds[m] in TUNED and m not in whole]
    tuned = [Judging("random", each) for each in ([whole] if whole else []) + partly]
    return [*([Judging(start, still)] if still else []), *tuned]


def time_all(
    study: Study, arms: Sequence[Planned], config: StudyConfig, out: Path, workers: Here | Workers
) -> Timed:
    """Measure everything now, as many parts at a time as there will be runs."""
    folder = out / "timing"
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was stopped
    trained = [one for one in arms if one.arm.start == "pretrain"]
    judged = list(dict.fromkeys(part for one in arms for part in parts_judged(one)))
    reader = next((one for one in trained if one.config.tokenizer == str(out / TOKENIZER)), None)
    sample = {part: next(one.config for one in arms if part in parts_judged(one)) for part in judged}
    numbers = count()
    pieces = [Piece("reading", time_reading, (base_of(study, config),))]
    pieces += [
        Piece(f"{part.start}, {', '.join(part.measures)}", function, (part, sample[part], config, its))
        for part in judged
        for its in [folder / str(next(numbers))]
        for function in [time_tuning if parts_of(part.measures[0])[0] in TUNED else time_judging]
    ]
    pieces += [Piece(one.arm.name, seconds_an_image, (one.config, config.vocabulary)) for one in trained]
    if reader is not None:
        made = tokenizer_config(reader.config, "", config)
        pieces.append(Piece("tokenizer", seconds_an_image, (made, config.vocabulary)))
    found = {id(done.piece): done.result for done in workers.each(pieces)}
    results = [found[id(piece)] for piece in pieces]
    shutil.rmtree(folder, ignore_errors=True)
    taken = dict(zip(judged, results[1:], strict=False))
    steps = results[1 + len(judged) :]
    return Timed(
        {one.key: seconds for one, seconds in zip(trained, steps, strict=False)},
        steps[-1] if reader is not None else 0.0,
        results[0],
        {part: seconds for part, seconds in taken.items() if not isinstance(seconds, Tuning)},
        {part: seconds for part, seconds in taken.items() if isinstance(seconds, Tuning)},
    )


def time_judging(part: Judging, pretraining: PretrainConfig, config: StudyConfig, folder: Path) -> float:
    """Seconds that judging frozen features takes, of random weights where it takes a network."""
    images = images_of(config, pretraining.in_chans)
    began = time.perf_counter()
    judge(None, part.start, pretraining, part.measures, images, config, config.seed, folder)
    return time.perf_counter() - began


def time_tuning(part: Judging, pretraining: PretrainConfig, config: StudyConfig, folder: Path) -> Tuning:
    """Seconds of fine-tuning, by a short one."""
    images = images_of(config, pretraining.in_chans)
    few = replace(config, tune_steps=min(config.tune_steps or _TUNED, _TUNED))
    began = time.perf_counter()
    judge(None, "random", pretraining, part.measures, images, few, config.seed, folder)
    seconds = time.perf_counter() - began
    tuned = part.measures[0].replace("corrupted", "finetune").replace(":", "-")
    metrics = folder / tuned / "metrics.jsonl"
    rate = json.loads(metrics.read_text("utf-8").splitlines()[-1])["images_per_s"]
    update = _TUNED_BATCH / rate
    assert few.tune_steps is not None
    return Tuning(max(0.0, seconds - few.tune_steps * update), update)


def time_reading(config: PretrainConfig) -> Reading:
    """Seconds that reading takes."""
    device = choose_device(config.device)
    began = time.perf_counter()
    loader = loader_of(config, device)
    assert loader is not None
    once = time.perf_counter() - began
    if loader.cached is not None:
        return Reading(once, 0.0)
    return Reading(once, reading_time(loader, config, _READ_SECONDS) / config.batch_size)


def seconds_an_image(config: PretrainConfig, vocabulary: int) -> float:
    """How long a training step takes for an image that is at hand, measured now.

    Args:
        vocabulary: words of the tokenizer, where one is used or made.
    """
    world = World(choose_device(config.device))
    precision = usable_precision(config.precision, world.device)
    blank = ((0.0,) * config.in_chans, (1.0,) * config.in_chans)
    model_config = model_config_of(config, *blank, class_names=None, classes=10, vocabulary=vocabulary)
    objective = fresh_objective(config, model_config, 100, world.gather)
    assert isinstance(objective, nn.Module)
    objective.to(world.device).train()
    if isinstance(objective.model, MaskedAutoencoder) and isinstance(objective.model.target, TokenTarget):
        objective.model.target.use(_AnyWords(vocabulary, config.patches))
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
    return sum(times[1:]) / _TIMED / size


class _AnyWords:
    """A tokenizer whose words nobody asked for, to see how long predicting them takes."""

    def __init__(self, vocabulary: int, patches: int) -> None:
        self.vocabulary, self.patches = vocabulary, patches

    def tokens(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), self.patches, dtype=torch.int64, device=images.device)
