"""The file ``plan.json`` of a study: its fixed settings, and the numbers of steps of its first start."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quarterview.commands.config import PretrainConfig
from quarterview.config import MAY_CHANGE, get_field_specs
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.files import write_text_atomic
from quarterview.studies.arm import get_labeled_split
from quarterview.studies.config import (
    FINETUNED_MEASURES,
    RESERVED_FLAGS,
    StudyConfig,
    parse_budget,
    parse_measure,
)
from quarterview.studies.lengths import allocate_budget
from quarterview.studies.plan import PlannedArm, get_tokenizer, make_base_config
from quarterview.studies.side_by_side import ProcessExecutor, SerialExecutor
from quarterview.studies.study import Study
from quarterview.studies.timing import measure_study_timings

LOGGER = logging.getLogger("quarterview")


def read_or_create_plan(
    study: Study,
    config: StudyConfig,
    settings: dict[str, Any],
    arms: Sequence[PlannedArm],
    out: Path,
    start_time: float,
    executor: SerialExecutor | ProcessExecutor,
) -> tuple[StudyConfig, list[PlannedArm]]:
    """Return the numbers of steps from ``plan.json``; the first start chooses them and writes the file.

    Args:
        settings: the result of `collect_fixed_settings`, compared with those of the first start.
        start_time: the start of the study's process, by `time.monotonic`.

    Returns:
        The configuration with its fine-tuning steps, and the arms with their training steps.

    Raises:
        UserError: if the folder holds another study, or the budget is too small.
    """
    file = out / "plan.json"
    if file.is_file():
        return read_plan(file, config, settings, arms)
    timings = None
    if parse_budget(config.budget)[0] == "minutes":
        LOGGER.info("Timing the training and the evaluation of the arms")
        timings = measure_study_timings(study, arms, config, out, executor)
    elapsed_s = time.monotonic() - start_time
    planned_arms, tune_steps = allocate_budget(arms, config, timings, elapsed_s, executor.num_jobs)
    steps = {planned.key: planned.steps for planned in planned_arms}
    content = {"settings": settings, "steps": steps, "tune_steps": tune_steps}
    write_text_atomic(file, json.dumps(content, indent=1) + "\n")
    _log_plan(planned_arms, tune_steps, config.seeds)
    return replace(config, tune_steps=tune_steps), planned_arms


def _log_plan(arms: Sequence[PlannedArm], tune_steps: int, num_seeds: int) -> None:
    """Log the number of arms, the images of each full-length training, and the fine-tuning steps."""
    num_images = sorted(
        {
            planned.steps * planned.config.loop.batch_size
            for planned in arms
            if planned.steps and planned.arm.length == 1
        }
    )
    images = " to ".join(f"{count:,}" for count in dict.fromkeys((*num_images[:1], *num_images[-1:])))
    has_finetuning = any(
        parse_measure(measure)[0] in FINETUNED_MEASURES for planned in arms for measure in planned.measures
    )
    LOGGER.info(
        "%d arms, %d seeds%s%s",
        len(arms),
        num_seeds,
        f", {images} training images each" if num_images else "",
        f", {tune_steps} fine-tuning steps" if has_finetuning else "",
    )


def read_plan(
    file: Path, config: StudyConfig, settings: dict[str, Any], arms: Sequence[PlannedArm]
) -> tuple[StudyConfig, list[PlannedArm]]:
    """Read the numbers of steps that the first start of a study wrote.

    Returns:
        The configuration with its fine-tuning steps, and the arms with their training steps.

    Raises:
        UserError: if the file belongs to a study with other settings.
    """
    stored = json.loads(file.read_text("utf-8"))
    stored["settings"] = _rename_fields(stored["settings"])
    if stored["settings"] != settings:
        raise UserError(
            f"--out {file.parent} holds a study with other settings: "
            f"{describe_differences(stored['settings'], settings)}. Give the same settings, or another --out."
        )
    missing = [planned.arm.name for planned in arms if planned.key not in stored["steps"]]
    if missing:
        raise UserError(
            f"{file} has no numbers of steps for the arms {', '.join(missing)}: another version wrote it. "
            "Give another --out."
        )
    planned_arms = [planned._replace(steps=stored["steps"][planned.key]) for planned in arms]
    return replace(config, tune_steps=stored["tune_steps"]), planned_arms


def collect_fixed_settings(study: Study, config: StudyConfig) -> dict[str, Any]:
    """Return the settings that must not change when a study is resumed, as plain JSON values.

    Image sets are represented by their fingerprints, so that files may be moved.
    """
    base = make_base_config(study, config)
    images = get_labeled_split(config, base.model.in_chans)
    study_flags = {
        name: getattr(config, name)
        for name, spec in get_field_specs(StudyConfig).items()
        if MAY_CHANGE not in spec.markers
    }
    changeable = {*RESERVED_FLAGS, *base.flags_marked(MAY_CHANGE)}
    pretraining = {name: value for name, value in base.flags().items() if name not in changeable}
    settings = {
        "study": asdict(study),
        "pretraining": {**pretraining, "tokenizer": get_tokenizer(base)},
        "data": open_sources(config.data, base.model.in_chans).fingerprint(),
        "train": images.train.fingerprint(),
        "test": images.test.fingerprint(),
        **study_flags,
    }
    return json.loads(json.dumps(settings))


def _rename_fields(content: Any) -> Any:
    """Return settings of an earlier version with the present names of their fields."""
    if isinstance(content, list):
        return [_rename_fields(item) for item in content]
    if not isinstance(content, dict):
        return content
    renamed = {**PretrainConfig.get_renamed_fields(), **StudyConfig.RENAMED}
    return {renamed.get(name, name): _rename_fields(value) for name, value in content.items()}


def describe_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return the names of the settings that differ between two results of `collect_fixed_settings`."""
    if stored.keys() != current.keys():
        return "another version wrote them"
    names = [name for name in current if stored[name] != current[name] and name != "pretraining"]
    old_flags, new_flags = stored["pretraining"], current["pretraining"]
    flags = [name for name in new_flags if new_flags[name] != old_flags.get(name)]
    return ", ".join([*names, *(f"{name} of the base" for name in flags if name not in names)])
