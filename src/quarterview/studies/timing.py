"""Time measurements of training and evaluation, from which a study's budget of minutes is allocated."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from quarterview.commands.bench import create_loader, time_reading
from quarterview.commands.config import PretrainConfig
from quarterview.studies.arm import get_labeled_split, run_pretraining
from quarterview.studies.config import FINETUNED_MEASURES, StudyConfig, parse_measure
from quarterview.studies.measure import evaluate_arm
from quarterview.studies.plan import (
    TOKENIZER_FOLDER,
    PlannedArm,
    get_encoder_flags,
    get_tokenizer,
    make_base_config,
    make_tokenizer_config,
)
from quarterview.studies.side_by_side import ProcessExecutor, SerialExecutor, Task
from quarterview.studies.study import ArmStart, Study
from quarterview.training.distributed import choose_device
from quarterview.training.metric_writers import read_metrics

_NUM_TRAIN_STEPS = 12  # steps of a timed training; only the second half is timed, after warm-up
_LOADING_SECONDS = 3.0  # minimum duration of the measurement of data loading
_NUM_TUNE_STEPS = 40  # maximum steps of a timed fine-tuning
_TUNE_BATCH_SIZE = 64  # batch size of the fine-tuning recipe `small`


class TrainingTime(NamedTuple):
    """Duration of a pre-training in seconds."""

    setup_s: float
    """Time to open the images and to write the checkpoint."""
    s_per_image: float
    """Time of a training step, divided by its images."""


@dataclass(frozen=True)
class EvaluationPart:
    """A part of the evaluation of arms that is timed once for all arms with an equal network."""

    start: ArmStart
    """``random`` for all arms with a network, else the features without a network."""
    encoder_flags: tuple[object, ...]
    """The encoder and the image size."""
    measures: tuple[str, ...]
    """All measures of frozen features, which share one pass over the images, or those of one fine-tuning."""


class FinetuningTime(NamedTuple):
    """Duration of a fine-tuning in seconds."""

    setup_s: float
    """Time to open the images, and to evaluate the test images."""
    s_per_step: float


@dataclass(frozen=True)
class StudyTimings:
    """Measured durations of all parts of a study."""

    training: dict[str, TrainingTime]
    """Pre-training times by `PlannedArm.key`."""
    tokenizer: TrainingTime
    """Training time of the study's tokenizer; zeros without one."""
    loading_s_per_image: float
    """Time to load an image; 0 if all images are cached in memory."""
    frozen_s: dict[EvaluationPart, float]
    """Evaluation times of frozen features in seconds."""
    finetuning: dict[EvaluationPart, FinetuningTime]
    """Durations of fine-tuning."""

    def estimate_evaluation_s(self, planned: PlannedArm, tune_steps: int) -> float:
        """Estimate the seconds to evaluate an arm with one seed.

        Args:
            tune_steps: steps of each fine-tuning.
        """
        frozen = sum(self.frozen_s.get(part, 0.0) for part in list_evaluation_parts(planned))
        tuned = [self.finetuning[part] for part in list_evaluation_parts(planned) if part in self.finetuning]
        return frozen + sum(part.setup_s + tune_steps * part.s_per_step for part in tuned)


def list_evaluation_parts(planned: PlannedArm) -> list[EvaluationPart]:
    """List the parts of the evaluation of an arm."""
    start: ArmStart = "random" if planned.arm.start == "pretrain" else planned.arm.start
    kinds = {measure: parse_measure(measure)[0] for measure in planned.measures}
    frozen = tuple(m for m in planned.measures if kinds[m] not in FINETUNED_MEASURES)
    full = tuple(m for m in planned.measures if m in ("finetune", "corrupted"))  # share one fine-tuning
    partial = [(m,) for m in planned.measures if kinds[m] in FINETUNED_MEASURES and m not in full]
    encoder = tuple(get_encoder_flags(planned.config).values())
    tuned = [EvaluationPart("random", encoder, measures) for measures in ([full] if full else []) + partial]
    return [*([EvaluationPart(start, encoder, frozen)] if frozen else []), *tuned]


def measure_study_timings(
    study: Study,
    arms: Sequence[PlannedArm],
    config: StudyConfig,
    out: Path,
    executor: SerialExecutor | ProcessExecutor,
) -> StudyTimings:
    """Measure the durations of all parts of a study, with as many parallel jobs as the study will have."""
    folder = out / "timing"
    shutil.rmtree(folder, ignore_errors=True)  # may be left from a start that was stopped
    tokenizer_run = str(out / TOKENIZER_FOLDER)
    trained = [planned for planned in arms if planned.arm.start == "pretrain"]
    parts = list(dict.fromkeys(part for planned in arms for part in list_evaluation_parts(planned)))
    examples = {
        part: next(planned.config for planned in arms if part in list_evaluation_parts(planned))
        for part in parts
    }
    # The tokenizer is trained in this process, as in the study, before the arms that use it are timed.
    tokenizer_user = next((one for one in trained if get_tokenizer(one.config) == tokenizer_run), None)
    timed_tokenizer = folder / TOKENIZER_FOLDER
    tokenizer_time = TrainingTime(0.0, 0.0)
    if tokenizer_user is not None:
        tokenizer_config = make_tokenizer_config(tokenizer_user.config, "", config)
        tokenizer_time = measure_training_time(tokenizer_config, timed_tokenizer)
    tasks = [Task("data loading", measure_loading_time, (make_base_config(study, config),))]
    for index, part in enumerate(parts):
        is_tuned = parse_measure(part.measures[0])[0] in FINETUNED_MEASURES
        function = measure_finetuning_time if is_tuned else measure_frozen_evaluation_time
        name = f"{part.start}, {', '.join(part.measures)}"
        tasks.append(Task(name, function, (part, examples[part], config, folder / str(index))))
    for planned in trained:
        arm_config = planned.config
        if get_tokenizer(arm_config) == tokenizer_run:
            arm_config = arm_config.with_flags(tokenizer=str(timed_tokenizer))
        tasks.append(Task(planned.arm.name, measure_training_time, (arm_config, folder / planned.key)))
    result_by_task = {id(finished.task): finished.result for finished in executor.run(tasks)}
    loading_s, *durations = [result_by_task[id(task)] for task in tasks]
    shutil.rmtree(folder, ignore_errors=True)
    evaluation = dict(zip(parts, durations[: len(parts)], strict=True))
    return StudyTimings(
        dict(zip((planned.key for planned in trained), durations[len(parts) :], strict=True)),
        tokenizer_time,
        loading_s,
        {part: value for part, value in evaluation.items() if not isinstance(value, FinetuningTime)},
        {part: value for part, value in evaluation.items() if isinstance(value, FinetuningTime)},
    )


def measure_frozen_evaluation_time(
    part: EvaluationPart, pretraining: PretrainConfig, config: StudyConfig, folder: Path
) -> float:
    """Measure the seconds to evaluate frozen features, of an encoder with random weights or no network."""
    images = get_labeled_split(config, pretraining.model.in_chans)
    start = time.perf_counter()
    evaluate_arm(None, part.start, pretraining, part.measures, images, config, config.seed, folder)
    return time.perf_counter() - start


def measure_finetuning_time(
    part: EvaluationPart, pretraining: PretrainConfig, config: StudyConfig, folder: Path
) -> FinetuningTime:
    """Measure the duration of a fine-tuning by a short one from random weights."""
    images = get_labeled_split(config, pretraining.model.in_chans)
    tune_steps = min(config.tune_steps or _NUM_TUNE_STEPS, _NUM_TUNE_STEPS)
    short = replace(config, tune_steps=tune_steps)
    start = time.perf_counter()
    with _suppress_stdout():
        evaluate_arm(None, "random", pretraining, part.measures, images, short, config.seed, folder)
    seconds = time.perf_counter() - start
    run = part.measures[0].replace("corrupted", "finetune").replace(":", "-")
    s_per_step = _TUNE_BATCH_SIZE / read_metrics(folder / run)[-1]["images_per_s"]
    return FinetuningTime(max(0.0, seconds - tune_steps * s_per_step), s_per_step)


def measure_training_time(config: PretrainConfig, folder: Path) -> TrainingTime:
    """Measure the duration of a pre-training by a short run."""
    half = _NUM_TRAIN_STEPS // 2
    short = config.with_flags(out=str(folder), steps=_NUM_TRAIN_STEPS, log_every=half, checkpoint_every=None)
    start = time.perf_counter()
    with _suppress_stdout():
        run_pretraining(short)
    seconds = time.perf_counter() - start
    s_per_image = 1 / read_metrics(folder)[-1]["images_per_s"]
    num_images = _NUM_TRAIN_STEPS * config.loop.batch_size
    return TrainingTime(max(0.0, seconds - num_images * s_per_image), s_per_image)


@contextmanager
def _suppress_stdout() -> Iterator[None]:
    """Discard standard output, since the timed runs are deleted and their messages would confuse."""
    with Path(os.devnull).open("w") as devnull, redirect_stdout(devnull):
        yield


def measure_loading_time(config: PretrainConfig) -> float:
    """Measure the seconds to load an image; returns 0 if all images are cached in memory.

    The measurement is long enough that prefetched batches do not matter.
    """
    loader = create_loader(config, choose_device(config.compute.device))
    assert loader is not None
    if loader.cache is not None:
        return 0.0
    return time_reading(loader, config, _LOADING_SECONDS) / config.loop.batch_size
