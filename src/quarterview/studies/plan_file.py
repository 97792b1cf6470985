"""The plan of a study: what must stay as it was at the first start, and the lengths that were chosen then."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quarterview.config import MAY_CHANGE, field_specs
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.files import replace_text
from quarterview.studies.arm import images_of
from quarterview.studies.config import DECIDED, TUNED, StudyConfig, parts_of, read_budget
from quarterview.studies.lengths import choose_lengths
from quarterview.studies.plan import Planned, base_of, tokenizer_of
from quarterview.studies.side_by_side import Here, Workers
from quarterview.studies.study import Study
from quarterview.studies.timing import time_all

LOGGER = logging.getLogger("quarterview")


def plan_lengths(
    study: Study,
    config: StudyConfig,
    settings: dict[str, Any],
    arms: Sequence[Planned],
    out: Path,
    began: float,
    workers: Here | Workers,
) -> tuple[StudyConfig, list[Planned]]:
    """The arms with their lengths, and the configuration with that of fine-tuning.

    They are those of the first start, or chosen now and written into ``plan.json``.

    Args:
        settings: what must be as at the first start, see `lasting_settings`.
        began: when this start was, by the clock of `time.monotonic`.

    Raises:
        UserError: if the folder holds another study, or the budget does not suffice for anything.
    """
    file = out / "plan.json"
    if file.is_file():
        return known_plan(file, config, settings, arms)
    timed = None
    if read_budget(config.budget)[0] == "minutes":
        LOGGER.info("timing what the arms take, and what it takes to judge one")
        timed = time_all(study, arms, config, out, workers)
    made, tune_steps = choose_lengths(arms, config, timed, time.monotonic() - began, workers.at_a_time)
    content = {"settings": settings, "steps": {one.key: one.steps for one in made}, "tune_steps": tune_steps}
    replace_text(file, json.dumps(content, indent=1) + "\n")
    seen = sorted(
        {one.steps * one.config.loop.batch_size for one in made if one.steps and one.arm.length == 1}
    )
    images = " to ".join(f"{number:,}" for number in dict.fromkeys((*seen[:1], *seen[-1:])))
    tuned = any(parts_of(measure)[0] in TUNED for one in made for measure in one.measures)
    LOGGER.info(
        "%d arms under %d seeds%s%s",
        len(made),
        config.seeds,
        f", each of which sees {images} images" if seen else "",
        f", and {tune_steps} updates of fine-tuning" if tuned else "",
    )
    return replace(config, tune_steps=tune_steps), made


def known_plan(
    file: Path, config: StudyConfig, settings: dict[str, Any], arms: Sequence[Planned]
) -> tuple[StudyConfig, list[Planned]]:
    """The lengths that the first start wrote down.

    Raises:
        UserError: if it was another study.
    """
    known = json.loads(file.read_text("utf-8"))
    if known["settings"] != settings:
        raise UserError(
            f"--out {file.parent} holds a study with other settings "
            f"({differences(known['settings'], settings)}). Give the same, or another --out."
        )
    lost = [one.arm.name for one in arms if one.key not in known["steps"]]
    if lost:
        raise UserError(
            f"{file} says nothing of {', '.join(lost)}: another version wrote it. Give another --out."
        )
    kept = [one._replace(steps=known["steps"][one.key]) for one in arms]
    return replace(config, tune_steps=known["tune_steps"]), kept


def lasting_settings(study: Study, config: StudyConfig) -> dict[str, Any]:
    """What must stay the same when a study goes on, as JSON has it.

    Files may have moved, so that of images their fingerprints count.
    """
    base = base_of(study, config)
    images = images_of(config, base.model.in_chans)
    own = {
        name: getattr(config, name)
        for name, spec in field_specs(StudyConfig).items()
        if MAY_CHANGE not in spec.markers
    }
    free = {*DECIDED, *base.marked(MAY_CHANGE)}
    pretraining = {name: value for name, value in base.flags().items() if name not in free}
    settings = {
        "study": asdict(study),
        "pretraining": {**pretraining, "tokenizer": tokenizer_of(base)},
        "data": open_sources(config.data, base.model.in_chans).fingerprint(),
        "train": images.train.fingerprint(),
        "test": images.test.fingerprint(),
        **own,
    }
    return json.loads(json.dumps(settings))


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names of what differs between two of `lasting_settings`."""
    if known.keys() != now.keys():
        return "another version wrote them"
    names = [name for name in now if known[name] != now[name] and name != "pretraining"]
    before, after = known["pretraining"], now["pretraining"]
    flags = [name for name in after if after[name] != before.get(name)]
    return ", ".join([*names, *(f"{name} of the base" for name in flags if name not in names)])
