"""Run a study: every arm under every seed, judged, and a report that grows.

What is done is never done again: runs go on from their checkpoints, measures are kept, and the
lengths that were planned at the first start stay. After each arm the report is written anew.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from quarterview.errors import UserError, unknown
from quarterview.running import to_plain
from quarterview.studies.arm import conduct_one, place, train
from quarterview.studies.measure import (
    Images,
    StoppedError,
    check_measures,
    judge,
    open_images,
    read_judged,
)
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    AT_HAND,
    TOKENIZER,
    Planned,
    StudyConfig,
    base_of,
    planned,
    read_budget,
    time_reading,
    tokenizer_config,
    unique_arms,
)
from quarterview.studies.report import Progress, write_report
from quarterview.studies.side_by_side import conduct_many, jobs_of
from quarterview.studies.study import Study, read_study
from quarterview.train.distributed import ranks
from quarterview.train.journal import Journal, duration, metrics, replace_text
from quarterview.train.lock import lock
from quarterview.train.record import provenance

Status = Literal["complete", "SIGTERM", "SIGINT"]
_MOST_JUDGED_AT_TRIAL = 50  # updates of fine-tuning whose time is measured


class Studied(NamedTuple):
    """How a study ended."""

    status: Status
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


def conduct(name: str, config: StudyConfig, journal: Journal, argv: Sequence[str] = ()) -> Studied:
    """Run a study, or go on with one that was stopped.

    Raises:
        UserError: if the request cannot be met.
        RunError: if a run cannot go on.
    """
    if not (config.data and config.train and config.test and config.out):
        raise UserError("something is missing; accepted: study NAME --data … --train … --test … --out FOLDER")
    if ranks() > 1:
        raise UserError("a study under torchrun; accepted: without it, an arm on each GPU")
    study, out = open_study(name), Path(config.out)
    began = time.monotonic()
    with ExitStack() as held:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out, 0.0))
        images = open_images(config, base_of(study, config).in_chans)
        arms = unique_arms(study, config, str(out / TOKENIZER))
        for one in arms:
            check_measures(one.arm.start, one.measures, one.config.shape.depth)
        try:
            arms = _plan(study, config, arms, images, out, journal, began)
            _train_tokenizer(arms, config, out, journal)
            work = [(seed, one) for seed in _seeds(config) for one in arms]
            if jobs_of(config) > 1:
                journal.say(f"{study.name}: {len(work)} runs, {jobs_of(config)} at a time")
                conduct_many(work, config, out)
            for number, (seed, one) in enumerate(work if jobs_of(config) == 1 else [], 1):
                journal.say(f"{study.name}: {number} of {len(work)}, {one.arm.name}, seed {seed}")
                conduct_one(one, seed, config, images, out)
                _report(study, config, arms, out, began, argv)
        except StoppedError as stopped:
            signal: Any = stopped.signal
            journal.say(f"stopped by {signal}; the same command goes on from there")
            return Studied(signal, _report(study, config, arms, out, began, argv))
        path = _report(study, config, arms, out, began, argv, journal)
    return Studied("complete", path)


def _seeds(config: StudyConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def _train_tokenizer(arms: Sequence[Planned], config: StudyConfig, out: Path, journal: Journal) -> None:
    """The tokenizer of the arms that predict its words; it sees as many images as the longest of them."""
    folder = str(out / TOKENIZER)
    its = [one for one in arms if one.config.tokenizer == folder]
    if its:
        journal.say("the tokenizer")
        longest = max(its, key=lambda one: one.steps)
        train(replace(tokenizer_config(longest.config, folder), steps=longest.steps, seed=config.seed))


# ---------------------------------------------------------------------- the plan


def _plan(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    images: Images,
    out: Path,
    journal: Journal,
    began: float,
) -> list[Planned]:
    """The arms with their lengths: those of the first start, or made now and written down."""
    file, settings = out / "plan.json", _settings(study, config)
    if file.is_file():
        known = json.loads(file.read_text("utf-8"))
        if known["settings"] != settings:
            names = [n for n in settings if settings[n] != known["settings"].get(n)]
            raise UserError(
                f"{out} holds a study with other settings ({', '.join(names)}); accepted: the same, or "
                "another --out"
            )
        return [one._replace(steps=known["steps"][one.key]) for one in arms]
    judging: Mapping[str, float] = {}
    reading = AT_HAND
    if read_budget(config.budget)[0] == "minutes":
        journal.say("timing what the arms take, and what it takes to judge one")
        judging = _time_judging(arms, config, images, out)
        reading = time_reading(base_of(study, config))
    at_a_time = jobs_of(config) if torch.cuda.device_count() else 1  # a CPU's jobs share its cores
    made = planned(arms, config, judging, reading, time.monotonic() - began, at_a_time)
    plan = {"settings": settings, "steps": {one.key: one.steps for one in made}}
    replace_text(file, json.dumps(plan, indent=1) + "\n")
    trained = [one for one in made if one.steps]
    seen = sorted({one.steps * one.config.batch_size for one in trained if one.arm.length == 1})
    said = f"{seen[0]:,}" if len(seen) == 1 else f"{seen[0]:,} to {seen[-1]:,}"
    journal.say(f"{len(made)} arms under {config.seeds} seeds, each of which sees {said} images")
    return made


def _settings(study: Study, config: StudyConfig) -> dict[str, Any]:
    """What must stay the same when a study goes on; more seeds may be added."""
    left_out = ("out", "device", "workers", "jobs", "seeds")
    settings = {name: value for name, value in to_plain(config).items() if name not in left_out}
    return {"study": json.loads(json.dumps(asdict(study))), **settings}


def _time_judging(
    arms: Sequence[Planned], config: StudyConfig, images: Images, out: Path
) -> dict[str, float]:
    """Seconds of each measure, on random weights, whose results are kept where they are asked for."""
    measures = list(dict.fromkeys(measure for one in arms for measure in one.measures))
    few = replace(config, tune_steps=min(config.tune_steps, _MOST_JUDGED_AT_TRIAL))
    shutil.rmtree(out / "timing", ignore_errors=True)  # of a start that was stopped
    found = {}
    for measure in measures:
        began = time.monotonic()
        folder = out / "timing" / measure.replace(":", "-")
        kind = "finetune:1" if measure.startswith("finetune:") else measure
        judge(None, "random", arms[0].config, [kind], images, few, config.seed, folder)
        seconds = time.monotonic() - began
        if measure.startswith("finetune"):
            # Opening and judging take as long as they did; the updates are more.
            rate = json.loads(_last_line(folder / kind.replace(":", "-") / "metrics.jsonl"))["images_per_s"]
            batch = 64
            seconds += (config.tune_steps - few.tune_steps) * batch / rate
        found[measure] = seconds
    shutil.rmtree(out / "timing")
    return found


def _last_line(path: Path) -> str:
    return path.read_text("utf-8").splitlines()[-1]


# ---------------------------------------------------------------------- the report


def _report(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    out: Path,
    began: float,
    argv: Sequence[str],
    journal: Journal | None = None,
) -> Path | None:
    """Write what was measured so far, and say it if there is a journal."""
    right: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for one in arms:
        for seed in _seeds(config):
            for measure, told in read_judged(place(out, one.key, seed)).items():
                right.setdefault((one.key, measure), {})[seed] = told
    if not right:
        return None
    facts = {**provenance(argv), "settings": to_plain(config), "took": duration(time.monotonic() - began)}
    done = sum(len(by_seed) for by_seed in right.values())
    asked = sum(len(one.measures) for one in arms) * config.seeds
    rates = {one.key: rate for one in arms if (rate := _rate(out, one, config)) is not None}
    return write_report(study, config, arms, right, rates, Progress(done, asked), facts, out, journal)


def _rate(out: Path, one: Planned, config: StudyConfig) -> float | None:
    """Images a second that training made: the median of the rows of all seeds."""
    folders = [place(out, one.key, seed) / "pretrain" for seed in _seeds(config)]
    rates = [row["images_per_s"] for folder in folders if folder.is_dir() for row in metrics(folder)]
    return float(np.median(rates)) if rates else None
