"""Running a study: training and evaluation of all arms with all seeds, and the report.

A study can be stopped and resumed: runs resume from their checkpoints, evaluations are stored, and the
training lengths are those of the first start. The report is rewritten while the study runs.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from quarterview.data.config import LoaderConfig
from quarterview.errors import not_supported, unknown
from quarterview.studies.arm import clear_labeled_split, get_run_folder, is_complete, run_arm, run_pretraining
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import StoppedError, check_measures, read_evaluations
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    TOKENIZER_FOLDER,
    PlannedArm,
    compute_flops_per_image,
    get_tokenizer,
    make_base_config,
    make_tokenizer_config,
    plan_arms,
)
from quarterview.studies.plan_file import collect_fixed_settings, read_or_create_plan
from quarterview.studies.report import write_report
from quarterview.studies.side_by_side import ProcessExecutor, SerialExecutor, Task
from quarterview.studies.study import Study, read_study
from quarterview.studies.study_results import StudyProgress, TableResults
from quarterview.training.console import format_duration
from quarterview.training.distributed import get_world_size
from quarterview.training.lock import lock_folder
from quarterview.training.metric_writers import read_metrics
from quarterview.training.record import collect_provenance

LOGGER = logging.getLogger("quarterview")
Status = Literal["complete", "SIGTERM", "SIGINT"]
_MAX_REPORT_FRACTION = 0.05  # of the running time that is spent on intermediate reports


class StudyResult(NamedTuple):
    """The outcome of a study: complete, or the signal that stopped it."""

    status: Status
    tables: Sequence[TableResults]
    """The results so far, one entry for each table of the study."""
    report: Path | None
    """The HTML report; None if nothing was evaluated yet."""


def open_study(name: str) -> Study:
    """Return the study of this name, or read one from a YAML file.

    Raises:
        UserError: if the name is unknown, or the file is not a valid study.
    """
    if name in STUDIES:
        return STUDIES[name]
    if Path(name).suffix in (".yaml", ".yml"):
        return read_study(name)
    raise unknown("study", name, [*STUDIES, "FILE.yaml"])


def run_study(config: StudyConfig, argv: Sequence[str] = ()) -> StudyResult:
    """Start a study, or resume it from its folder.

    Args:
        argv: the command line, for the provenance of the report.

    Raises:
        UserError: if the configuration is invalid.
        RunError: if a run fails.
    """
    config.check_complete()
    if get_world_size() > 1:
        raise not_supported(
            "A study", "torchrun", "Start it with quarterview study, which runs one arm on each GPU."
        )
    study, out = open_study(config.name), Path(config.out)
    start_time = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, 0.0):
        clear_labeled_split()
        num_jobs = get_num_jobs(config)
        config = limit_decoding_workers(study, config, num_jobs)
        arms = plan_arms(study, config, str(out / TOKENIZER_FOLDER))
        for planned in arms:
            check_measures(planned.arm.start, planned.measures, planned.config)
        settings = collect_fixed_settings(
            study, config
        )  # opens the images, so that errors in them come first
        report = StudyReport(study, config, arms, out, start_time, collect_provenance(argv))
        try:
            with ProcessExecutor(num_jobs) if num_jobs > 1 else SerialExecutor() as executor:
                config, arms = read_or_create_plan(study, config, settings, arms, out, start_time, executor)
                train_tokenizer(arms, config, out)
                report = replace(report, config=config, arms=arms)
                tasks = list_open_tasks(study, config, arms, out)
                if not tasks:
                    report = replace(report, provenance=read_stored_provenance(out) or report.provenance)
                write_throttled = ThrottledReport(report.write)
                for _ in executor.run(tasks, lambda task: LOGGER.info(task.name)):
                    write_throttled()
        except StoppedError as stopped:
            signal: Any = stopped.signal
            return StudyResult(signal, *report.write())
        return StudyResult("complete", *report.write())


def get_num_jobs(config: StudyConfig) -> int:
    """Return the number of parallel runs: --jobs, or else one for each GPU, or one on a CPU."""
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return config.jobs or max(1, gpus)


def limit_decoding_workers(study: Study, config: StudyConfig, num_jobs: int) -> StudyConfig:
    """Return the configuration with `workers` limited to a run's share of the CPU cores.

    A number of workers that the user, the study or the recipe sets is left unchanged.
    """
    if config.workers is not None or num_jobs == 1:
        return config
    if make_base_config(study, config).loader.workers is not None:
        return config
    return replace(config, workers=min(LoaderConfig().num_workers, max(1, (os.cpu_count() or 1) // num_jobs)))


# ---------------------------------------------------------------------- tasks


def train_tokenizer(arms: Sequence[PlannedArm], config: StudyConfig, out: Path) -> None:
    """Train the study's tokenizer, if any arm uses it, for as many steps as the longest of these arms."""
    folder = str(out / TOKENIZER_FOLDER)
    users = [planned for planned in arms if get_tokenizer(planned.config) == folder]
    if users:
        LOGGER.info("Training the tokenizer")
        longest = max(users, key=lambda planned: planned.steps)
        tokenizer = make_tokenizer_config(longest.config, folder, config)
        run_pretraining(tokenizer.with_flags(steps=longest.steps, seed=config.seed))


def list_open_tasks(study: Study, config: StudyConfig, arms: Sequence[PlannedArm], out: Path) -> list[Task]:
    """List the runs that are not complete, seed by seed.

    Within a seed, arms with the most operations come first, so that parallel jobs end at about the same time.
    """

    def compute_total_flops(planned: PlannedArm) -> float:
        flops = compute_flops_per_image(planned.config, config.codebook_size)
        return planned.steps * planned.config.loop.batch_size * flops

    order = sorted(arms, key=compute_total_flops, reverse=True)
    runs = [(seed, planned) for seed in config.all_seeds for planned in order]
    return [
        Task(
            f"{study.name}: {index} of {len(runs)}, {planned.arm.name}, seed {seed}",
            run_arm,
            (planned, seed, config, out),
        )
        for index, (seed, planned) in enumerate(runs, 1)
        if not is_complete(planned, seed, out)
    ]


# ---------------------------------------------------------------------- the report


class ThrottledReport:
    """A function that writes a report unless that would take more than 5% of the running time."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write, self.next_time = write, 0.0

    def __call__(self) -> None:
        start = time.monotonic()
        if start >= self.next_time:
            self.write()
            end = time.monotonic()
            self.next_time = end + (end - start) / _MAX_REPORT_FRACTION


@dataclass(frozen=True)
class StudyReport:
    """Everything that the report of a study shows, apart from the evaluations, which are read from files."""

    study: Study
    config: StudyConfig
    arms: Sequence[PlannedArm]
    out: Path
    start_time: float
    """The start of this process's work, by `time.monotonic`."""
    provenance: Mapping[str, Any]
    """Command line, versions and machine of the study."""

    def write(self) -> tuple[Sequence[TableResults], Path | None]:
        """Write a report of the evaluations so far; returns the tables and the HTML page.

        The page is None if nothing was evaluated yet.
        """
        correct: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for planned in self.arms:
            for seed in self.config.all_seeds:
                evaluations = read_evaluations(get_run_folder(self.out, planned.key, seed))
                for measure, is_correct in evaluations.items():
                    correct.setdefault((planned.key, measure), {})[seed] = is_correct
        if not correct:
            return (), None
        took = format_duration(time.monotonic() - self.start_time)
        provenance = {"settings": asdict(self.config), "took": took, **self.provenance}
        num_done = sum(len(by_seed) for by_seed in correct.values())
        num_total = sum(len(planned.measures) for planned in self.arms) * self.config.seeds
        progress = StudyProgress(num_done, num_total)
        rates = {
            planned.key: rate
            for planned in self.arms
            if (rate := self._compute_images_per_s(planned)) is not None
        }
        return write_report(
            self.study, self.config, self.arms, correct, rates, progress, provenance, self.out
        )

    def _compute_images_per_s(self, planned: PlannedArm) -> float | None:
        """Return the median training rate over the metrics of all seeds; None if the arm was not trained."""
        folders = [get_run_folder(self.out, planned.key, seed) / "pretrain" for seed in self.config.all_seeds]
        rates = [row["images_per_s"] for folder in folders if folder.is_dir() for row in read_metrics(folder)]
        return float(np.median(rates)) if rates else None


def read_stored_provenance(out: Path) -> dict[str, Any]:
    """Read the provenance from the report of a complete study; empty if the report is missing or incomplete.

    Rewriting the report of a complete study keeps it, since the results come from the earlier command.
    """
    try:
        stored = json.loads((out / "study.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    names = (*collect_provenance(()), "settings", "took")
    return {name: stored[name] for name in names} if set(names) <= stored.keys() else {}
