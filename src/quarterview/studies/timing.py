"""How long the parts of a study take on this machine: what a budget of minutes is planned with."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from quarterview.commands.bench import loader_of, reading_time
from quarterview.commands.config import PretrainConfig
from quarterview.studies.arm import images_of, train
from quarterview.studies.config import TUNED, StudyConfig, parts_of
from quarterview.studies.measure import judge
from quarterview.studies.plan import (
    TOKENIZER,
    Planned,
    base_of,
    network_flags,
    tokenizer_config,
    tokenizer_of,
)
from quarterview.studies.side_by_side import Here, Piece, Workers
from quarterview.studies.study import Start, Study
from quarterview.training.distributed import choose_device
from quarterview.training.metric_writers import read_metrics

_STEPS = 12  # of training that are run, of which the second half is timed
_READ_SECONDS = 3.0
_TUNED = 40  # updates whose time is measured
_TUNED_BATCH = 64  # of the recipe `small`


class Training(NamedTuple):
    """Seconds that training takes."""

    once: float
    """To open the images and to write the checkpoint."""
    image: float


@dataclass(frozen=True)
class Judging:
    """A part of judging an arm that is timed, and kept, by itself."""

    start: Start
    """What the arm is as far as this part's time goes: `random` stands for every one that has a network."""
    network: tuple[object, ...]
    """Which one, and the size of the images."""
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

    training: dict[str, Training]
    """By arm."""
    tokenizer: Training
    """Zeros where there is none."""
    reading: float
    """Seconds to read an image, where images are not held in memory."""
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
    network = tuple(network_flags(one.config).values())
    tuned = [Judging("random", network, each) for each in ([whole] if whole else []) + partly]
    return [*([Judging(start, network, still)] if still else []), *tuned]


def time_all(
    study: Study, arms: Sequence[Planned], config: StudyConfig, out: Path, workers: Here | Workers
) -> Timed:
    """Measure everything now, as many parts at a time as there will be runs."""
    folder = out / "timing"
    shutil.rmtree(folder, ignore_errors=True)  # of a start that was stopped
    trained = [one for one in arms if one.arm.start == "pretrain"]
    judged = list(dict.fromkeys(part for one in arms for part in parts_judged(one)))
    reader = next((one for one in trained if tokenizer_of(one.config) == str(out / TOKENIZER)), None)
    sample = {part: next(one.config for one in arms if part in parts_judged(one)) for part in judged}
    numbers = count()
    tokenizer = folder / TOKENIZER
    made = Training(0.0, 0.0)
    if reader is not None:
        made = time_training(tokenizer_config(reader.config, "", config), tokenizer)  # as it will be: here
    pieces = [Piece("reading", time_reading, (base_of(study, config),))]
    pieces += [
        Piece(f"{part.start}, {', '.join(part.measures)}", function, (part, sample[part], config, its))
        for part in judged
        for its in [folder / str(next(numbers))]
        for function in [time_tuning if parts_of(part.measures[0])[0] in TUNED else time_judging]
    ]
    for one in trained:
        its = one.config
        if tokenizer_of(its) == str(out / TOKENIZER):
            its = its.with_flags(tokenizer=str(tokenizer))
        pieces.append(Piece(one.arm.name, time_training, (its, folder / one.key)))
    found = {id(done.piece): done.result for done in workers.each(pieces)}
    results = [found[id(piece)] for piece in pieces]
    shutil.rmtree(folder, ignore_errors=True)
    taken = dict(zip(judged, results[1:], strict=False))
    return Timed(
        dict(zip((one.key for one in trained), results[1 + len(judged) :], strict=True)),
        made,
        results[0],
        {part: seconds for part, seconds in taken.items() if not isinstance(seconds, Tuning)},
        {part: seconds for part, seconds in taken.items() if isinstance(seconds, Tuning)},
    )


def time_judging(part: Judging, pretraining: PretrainConfig, config: StudyConfig, folder: Path) -> float:
    """Seconds that judging frozen features takes, of random weights where it takes a network."""
    images = images_of(config, pretraining.model.in_chans)
    began = time.perf_counter()
    judge(None, part.start, pretraining, part.measures, images, config, config.seed, folder)
    return time.perf_counter() - began


def time_tuning(part: Judging, pretraining: PretrainConfig, config: StudyConfig, folder: Path) -> Tuning:
    """Seconds of fine-tuning, by a short one."""
    images = images_of(config, pretraining.model.in_chans)
    few = replace(config, tune_steps=min(config.tune_steps or _TUNED, _TUNED))
    began = time.perf_counter()
    with _silence():
        judge(None, "random", pretraining, part.measures, images, few, config.seed, folder)
    seconds = time.perf_counter() - began
    tuned = part.measures[0].replace("corrupted", "finetune").replace(":", "-")
    update = _TUNED_BATCH / read_metrics(folder / tuned)[-1]["images_per_s"]
    assert few.tune_steps is not None
    return Tuning(max(0.0, seconds - few.tune_steps * update), update)


def time_training(config: PretrainConfig, folder: Path) -> Training:
    """Seconds of training, by a short run."""
    half = _STEPS // 2
    its = config.with_flags(out=str(folder), steps=_STEPS, log_every=half, checkpoint_every=None)
    began = time.perf_counter()
    with _silence():
        train(its)
    seconds = time.perf_counter() - began
    image = 1 / read_metrics(folder)[-1]["images_per_s"]
    return Training(max(0.0, seconds - _STEPS * config.loop.batch_size * image), image)


@contextmanager
def _silence() -> Iterator[None]:
    """What a run says that is thrown away is of no use to anyone."""
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        yield


def time_reading(config: PretrainConfig) -> float:
    """Seconds to read an image, over so many that what was read ahead makes no difference; 0 from memory."""
    loader = loader_of(config, choose_device(config.compute.device))
    assert loader is not None
    if loader.cached is not None:
        return 0.0
    return reading_time(loader, config, _READ_SECONDS) / config.loop.batch_size
