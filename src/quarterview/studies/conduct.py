"""Run a study: every arm under every seed, judged, and a report that grows.

What is done is never done again: runs go on from their checkpoints, measures are kept, and the
lengths that were planned at the first start stay. On the way the report is written anew, as often as
it takes little of the time.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from quarterview.data.config import LoaderConfig
from quarterview.errors import UserError, unknown
from quarterview.studies.arm import conduct_one, forget_images, is_done, place, train
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import StoppedError, check_measures, read_judged
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    TOKENIZER,
    Planned,
    base_of,
    flops_an_image,
    tokenizer_config,
    tokenizer_of,
    unique_arms,
)
from quarterview.studies.plan_file import lasting_settings, plan_lengths
from quarterview.studies.report import write_report
from quarterview.studies.side_by_side import Here, Piece, Workers
from quarterview.studies.study import Study, read_study
from quarterview.studies.study_results import Progress, TableResults
from quarterview.training.console import duration
from quarterview.training.distributed import ranks
from quarterview.training.lock import lock
from quarterview.training.metric_writers import read_metrics
from quarterview.training.record import provenance

LOGGER = logging.getLogger("quarterview")
Status = Literal["complete", "SIGTERM", "SIGINT"]
_REPORTING = 0.05  # of the time, at most, goes into reports on the way


class Studied(NamedTuple):
    """How a study ended."""

    status: Status
    tables: Sequence[TableResults]
    """Its tables, with their figures and what they decide, as far as they were measured."""
    report: Path | None
    """The page; None if nothing was measured yet."""


def open_study(name: str) -> Study:
    """A study by its name, or from a YAML file.

    Raises:
        UserError: if there is none.
    """
    if name in STUDIES:
        return STUDIES[name]
    if Path(name).suffix in (".yaml", ".yml"):
        return read_study(name)
    raise unknown("study", name, [*STUDIES, "FILE.yaml"])


def conduct(config: StudyConfig, argv: Sequence[str] = ()) -> Studied:
    """Run a study, or go on with one that was stopped.

    Args:
        argv: the command line, for the record.

    Raises:
        UserError: if the request cannot be met.
        RunError: if a run cannot go on.
    """
    config.check_complete()
    if ranks() > 1:
        raise UserError("A study does not run under torchrun. Start it without, and each GPU gets an arm.")
    study, out = open_study(config.name), Path(config.out)
    began = time.monotonic()
    with ExitStack() as held:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out, 0.0))
        forget_images()
        jobs = jobs_of(config)
        config = share_cores(study, config, jobs)
        arms = unique_arms(study, config, str(out / TOKENIZER))
        for one in arms:
            check_measures(one.arm.start, one.measures, one.config)
        settings = lasting_settings(study, config)  # opens the images: what is wrong with them is told now
        report = Report(study, config, arms, out, began, provenance(argv))
        try:
            with Workers(jobs) if jobs > 1 else Here() as workers:
                config, arms = plan_lengths(study, config, settings, arms, out, began, workers)
                train_tokenizer(arms, config, out)
                report = replace(report, config=config, arms=arms)
                left = work(study, config, arms, out)
                if not left:
                    report = replace(report, facts=known_facts(out) or report.facts)
                sparing = Sparing(report.write)
                for _ in workers.each(left, lambda piece: LOGGER.info(piece.name)):
                    sparing()
        except StoppedError as stopped:
            signal: Any = stopped.signal
            return Studied(signal, *report.write())
        return Studied("complete", *report.write())


def jobs_of(config: StudyConfig) -> int:
    """How many runs go on at a time: what was asked for, else one a GPU, or one."""
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return config.jobs or max(1, gpus)


def share_cores(study: Study, config: StudyConfig, jobs: int) -> StudyConfig:
    """The same, with no more decoding threads than a run has of the cores, unless someone said how many."""
    if config.workers is not None or jobs == 1 or base_of(study, config).loader.workers is not None:
        return config
    return replace(config, workers=min(LoaderConfig().threads, max(1, (os.cpu_count() or 1) // jobs)))


# ---------------------------------------------------------------------- the work


def train_tokenizer(arms: Sequence[Planned], config: StudyConfig, out: Path) -> None:
    """Train the tokenizer whose tokens some arms predict; it sees as many images as the longest of them."""
    folder = str(out / TOKENIZER)
    its = [one for one in arms if tokenizer_of(one.config) == folder]
    if its:
        LOGGER.info("the tokenizer")
        longest = max(its, key=lambda one: one.steps)
        own = tokenizer_config(longest.config, folder, config)
        train(own.with_flags(steps=longest.steps, seed=config.seed))


def work(study: Study, config: StudyConfig, arms: Sequence[Planned], out: Path) -> list[Piece]:
    """What is left to do, a seed after the other, and the long arms first, so that none is waited for."""

    def length(one: Planned) -> float:
        return one.steps * one.config.loop.batch_size * flops_an_image(one.config, config.vocabulary)

    order = sorted(arms, key=length, reverse=True)
    every = [(seed, one) for seed in config.all_seeds for one in order]
    return [
        Piece(
            f"{study.name}: {number} of {len(every)}, {one.arm.name}, seed {seed}",
            conduct_one,
            (one, seed, config, out),
        )
        for number, (seed, one) in enumerate(every, 1)
        if not is_done(one, seed, out)
    ]


# ---------------------------------------------------------------------- the report


class Sparing:
    """Write a report, unless the last one was written so lately that reports would take much of the time."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write, self.due = write, 0.0

    def __call__(self) -> None:
        began = time.monotonic()
        if began >= self.due:
            self.write()
            ended = time.monotonic()
            self.due = ended + (ended - began) / _REPORTING


@dataclass(frozen=True)
class Report:
    """What is reported of a study, as far as it has come."""

    study: Study
    config: StudyConfig
    arms: Sequence[Planned]
    out: Path
    began: float
    """By the clock of `time.monotonic`."""
    facts: Mapping[str, Any]
    """Where the figures come from."""

    def write(self) -> tuple[Sequence[TableResults], Path | None]:
        """Write what was measured so far: its tables, and the page (None if nothing was measured)."""
        correct: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        for one in self.arms:
            for seed in self.config.all_seeds:
                for measure, found in read_judged(place(self.out, one.key, seed)).items():
                    correct.setdefault((one.key, measure), {})[seed] = found
        if not correct:
            return (), None
        took = duration(time.monotonic() - self.began)
        facts = {"settings": asdict(self.config), "took": took, **self.facts}
        done = sum(len(by_seed) for by_seed in correct.values())
        asked = sum(len(one.measures) for one in self.arms) * self.config.seeds
        rates = {one.key: rate for one in self.arms if (rate := self._rate(one)) is not None}
        progress = Progress(done, asked)
        return write_report(self.study, self.config, self.arms, correct, rates, progress, facts, self.out)

    def _rate(self, one: Planned) -> float | None:
        """Images a second that training made: the median of the rows of all seeds."""
        folders = [place(self.out, one.key, seed) / "pretrain" for seed in self.config.all_seeds]
        rates = [row["images_per_s"] for folder in folders if folder.is_dir() for row in read_metrics(folder)]
        return float(np.median(rates)) if rates else None


def known_facts(out: Path) -> dict[str, Any]:
    """Where the figures of a study that is done come from: looking at it again changes nothing of that."""
    try:
        stored = json.loads((out / "study.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    names = (*provenance(()), "settings", "took")
    return {name: stored[name] for name in names} if set(names) <= stored.keys() else {}
