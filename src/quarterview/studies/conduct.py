"""Run a study: every arm under every seed, judged, and a report that grows.

What is done is never done again: runs go on from their checkpoints, measures are kept, and the
lengths that were planned at the first start stay. On the way the report is written anew, as often as
it takes little of the time.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from quarterview.commands.pretrain import MAY_CHANGE as PRETRAINING_MAY_CHANGE
from quarterview.data.loader import LoadConfig
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError, unknown
from quarterview.studies.arm import conduct_one, forget_images, images_of, is_done, place, train
from quarterview.studies.lengths import choose_lengths
from quarterview.studies.measure import StoppedError, check_measures, read_judged
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    TOKENIZER,
    Planned,
    StudyConfig,
    base_of,
    flops_an_image,
    planned_values,
    read_budget,
    tokenizer_config,
    unique_arms,
)
from quarterview.studies.report import Progress, write_report
from quarterview.studies.side_by_side import Here, Piece, Workers
from quarterview.studies.study import TUNED, Study, parts_of, read_study
from quarterview.studies.timing import time_all
from quarterview.training.distributed import ranks
from quarterview.training.lock import lock
from quarterview.training.logging import Journal, duration, metrics, replace_text
from quarterview.training.record import provenance
from quarterview.training.run import MAY_CHANGE, to_plain

Status = Literal["complete", "SIGTERM", "SIGINT"]
_REPORTING = 0.05  # of the time, at most, goes into reports on the way


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
        forget_images()
        jobs = jobs_of(config)
        config = _share_cores(study, config, jobs)
        arms = unique_arms(study, config, str(out / TOKENIZER))
        for one in arms:
            check_measures(one.arm.start, one.measures, one.config)
        settings = _settings(study, config)  # opens the images: what is wrong with them is told now
        try:
            with Workers(jobs) if jobs > 1 else Here() as workers:
                config, arms = _plan(study, config, settings, arms, out, journal, began, workers)
                _train_tokenizer(arms, config, out, journal)
                left = _work(study, config, arms, out)
                facts = provenance(argv) if left else _known_facts(out) or provenance(argv)
                report = _Sparing(partial(_report, study, config, arms, out, began, facts))
                for _ in workers.each(left, lambda piece: journal.say(piece.name)):
                    report()
        except StoppedError as stopped:
            signal: Any = stopped.signal
            journal.say(f"stopped by {signal}; the same command goes on from there")
            return Studied(signal, _report(study, config, arms, out, began, provenance(argv)))
        path = _report(study, config, arms, out, began, facts, journal)
    return Studied("complete", path)


def _share_cores(study: Study, config: StudyConfig, jobs: int) -> StudyConfig:
    """The same, with no more decoding threads than a run has of the cores, unless someone said how many."""
    if config.workers is not None or jobs == 1 or base_of(study, config).workers is not None:
        return config
    return replace(config, workers=min(LoadConfig().threads, max(1, (os.cpu_count() or 1) // jobs)))


def jobs_of(config: StudyConfig) -> int:
    """How many runs go on at a time: what was asked for, else one a GPU, or one."""
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return config.jobs or max(1, gpus)


def _seeds(config: StudyConfig) -> range:
    return range(config.seed, config.seed + config.seeds)


def _work(study: Study, config: StudyConfig, arms: Sequence[Planned], out: Path) -> list[Piece]:
    """What is left to do, a seed after the other, and the long arms first, so that none is waited for."""

    def length(one: Planned) -> float:
        return one.steps * one.config.batch_size * flops_an_image(one.config, config.vocabulary)

    order = sorted(arms, key=length, reverse=True)
    every = [(seed, one) for seed in _seeds(config) for one in order]
    return [
        Piece(
            f"{study.name}: {number} of {len(every)}, {one.arm.name}, seed {seed}",
            conduct_one,
            (one, seed, config, out),
        )
        for number, (seed, one) in enumerate(every, 1)
        if not is_done(one, seed, out)
    ]


class _Sparing:
    """Write a report, unless the last one was written so lately that reports would take much of the time."""

    def __init__(self, write: Callable[[], object]) -> None:
        self.write, self.due = write, 0.0

    def __call__(self) -> None:
        began = time.monotonic()
        if began >= self.due:
            self.write()
            ended = time.monotonic()
            self.due = ended + (ended - began) / _REPORTING


def _train_tokenizer(arms: Sequence[Planned], config: StudyConfig, out: Path, journal: Journal) -> None:
    """The tokenizer of the arms that predict its words; it sees as many images as the longest of them."""
    folder = str(out / TOKENIZER)
    its = [one for one in arms if one.config.tokenizer == folder]
    if its:
        journal.say("the tokenizer")
        longest = max(its, key=lambda one: one.steps)
        train(
            replace(tokenizer_config(longest.config, folder, config), steps=longest.steps, seed=config.seed)
        )


# ---------------------------------------------------------------------- the plan


def _plan(
    study: Study,
    config: StudyConfig,
    settings: dict[str, Any],
    arms: Sequence[Planned],
    out: Path,
    journal: Journal,
    began: float,
    workers: Here | Workers,
) -> tuple[StudyConfig, list[Planned]]:
    """The arms with their lengths, and the configuration with that of fine-tuning: those of the first
    start, or chosen now and written down."""
    file = out / "plan.json"
    if file.is_file():
        known = json.loads(file.read_text("utf-8"))
        if known["settings"] != settings:
            raise UserError(
                f"{out} holds a study with other settings ({_differences(known['settings'], settings)}); "
                "accepted: the same, or another --out"
            )
        lost = [one.arm.name for one in arms if one.key not in known["steps"]]
        if lost:
            raise UserError(
                f"{file} says nothing of {', '.join(lost)}: another version wrote it; accepted: another --out"
            )
        kept = [one._replace(steps=known["steps"][one.key]) for one in arms]
        return replace(config, tune_steps=known["tune_steps"]), kept
    timed = None
    if read_budget(config.budget)[0] == "minutes":
        journal.say("timing what the arms take, and what it takes to judge one")
        timed = time_all(study, arms, config, out, workers)
    made, tune_steps = choose_lengths(arms, config, timed, time.monotonic() - began, workers.at_a_time)
    plan = {"settings": settings, "steps": {one.key: one.steps for one in made}, "tune_steps": tune_steps}
    replace_text(file, json.dumps(plan, indent=1) + "\n")
    trained = [one for one in made if one.steps]
    seen = sorted({one.steps * one.config.batch_size for one in trained if one.arm.length == 1})
    said = " to ".join(f"{images:,}" for images in dict.fromkeys((*seen[:1], *seen[-1:])))
    tuned = any(parts_of(measure)[0] in TUNED for one in made for measure in one.measures)
    journal.say(
        f"{len(made)} arms under {config.seeds} seeds"
        + (f", each of which sees {said} images" if seen else "")
        + (f", and {tune_steps} updates of fine-tuning" if tuned else "")
    )
    return replace(config, tune_steps=tune_steps), made


def _settings(study: Study, config: StudyConfig) -> dict[str, Any]:
    """What must stay the same when a study goes on; more seeds may be added, and files may have moved."""
    left_out = ("out", "device", "workers", "jobs", "seeds", "data", "train", "test", "base")
    settings = {name: value for name, value in to_plain(config).items() if name not in left_out}
    base = base_of(study, config)
    images = images_of(config, base.in_chans)
    prints = {
        "data": open_sources(config.data, base.in_chans).fingerprint(),
        "train": images.train.fingerprint(),
        "test": images.test.fingerprint(),
    }
    free = {*MAY_CHANGE, *PRETRAINING_MAY_CHANGE}
    lasting = {name: value for name, value in planned_values(base).items() if name not in free}
    lasting["tokenizer"] = base.tokenizer
    told = {"study": asdict(study), "pretraining": lasting, **prints, **settings}
    return json.loads(json.dumps(told))


def _differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names of what differs."""
    if known.keys() != now.keys():
        return "another version wrote them"
    names = [name for name in now if known[name] != now[name] and name != "pretraining"]
    before, after = known["pretraining"], now["pretraining"]
    fields = [name for name in after if after[name] != before.get(name)]
    return ", ".join([*names, *(f"{name} of the base" for name in fields if name not in names)])


# ---------------------------------------------------------------------- the report


def _report(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    out: Path,
    began: float,
    facts: Mapping[str, Any],
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
    facts = {"settings": to_plain(config), "took": duration(time.monotonic() - began), **facts}
    done = sum(len(by_seed) for by_seed in right.values())
    asked = sum(len(one.measures) for one in arms) * config.seeds
    rates = {one.key: rate for one in arms if (rate := _rate(out, one, config)) is not None}
    return write_report(study, config, arms, right, rates, Progress(done, asked), facts, out, journal)


def _known_facts(out: Path) -> dict[str, Any]:
    """Of a study that is done: where its figures come from. Looking at it again changes nothing of that."""
    try:
        stored = json.loads((out / "study.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    names = (*provenance(()), "settings", "took")
    return {name: stored[name] for name in names} if set(names) <= stored.keys() else {}


def _rate(out: Path, one: Planned, config: StudyConfig) -> float | None:
    """Images a second that training made: the median of the rows of all seeds."""
    folders = [place(out, one.key, seed) / "pretrain" for seed in _seeds(config)]
    rates = [row["images_per_s"] for folder in folders if folder.is_dir() for row in metrics(folder)]
    return float(np.median(rates)) if rates else None
