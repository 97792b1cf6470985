"""What a study found: its tables with their figures, and what these decide."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from quarterview.studies.config import StudyConfig, parts_of
from quarterview.studies.plan import Planned, arm_config, base_of, flops_an_image, key_of, measures_of
from quarterview.studies.rule import Outcome, decide
from quarterview.studies.study import Study, Table
from quarterview.studies.verdict import Estimate, estimate

Correct = Mapping[tuple[str, str], Mapping[int, np.ndarray]]
"""By arm and measure: under each seed bool [M], which test images are classified right."""
KINDS = {
    "finetune": "fine-tuning",
    "corrupted": "fine-tuned, corrupted images",
    "linear": "linear probe",
    "knn": "nearest neighbours",
}
"""The kinds of measures in words."""


class Progress(NamedTuple):
    """How far a study is."""

    done: int
    asked: int


class TableResults(NamedTuple):
    """One table of a study, as it came out."""

    table: Table
    measures: tuple[str, ...]
    figures: Mapping[tuple[str, str], Estimate]
    """By arm's name and measure."""
    seeds: Mapping[tuple[str, str], tuple[int, ...]]
    """Likewise, in the order of the estimate's figures by seed."""
    outcomes: tuple[Outcome, ...]
    waiting: tuple[str, ...]
    """Claims whose arms were not both measured yet."""
    rates: Mapping[str, float]
    """Images a second that training made, by arm's name: the median of all rows of all seeds."""
    operations: Mapping[str, float]
    """Of a training step on an image, by closed form, by arm's name."""


def name_of(measure: str) -> str:
    """A measure in words."""
    kind, blocks, visible = parts_of(measure)
    if not blocks:
        return KINDS[kind] + (f", {visible}% visible" if visible else "")
    return f"{blocks} block{'' if blocks in ('1', '0.5') else 's'} tuned"


def tables_of(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    correct: Correct,
    rates: Mapping[str, float],
    tokenizer: str,
) -> list[TableResults]:
    """Every table with its figures and what they decide.

    Args:
        arms: as they are run.
        rates: images a second that training made, by arm's key.
        tokenizer: the folder of the tokenizer that the study trains.
    """
    base = base_of(study, config)
    known = {one.key: one for one in arms}
    found = []
    for its in study.tables:
        keys = {arm.name: key_of(arm, arm_config(base, arm, tokenizer, config)) for arm in its.arms}
        assert set(keys.values()) <= known.keys()
        measures = measures_of(its, config)
        figures = {
            (arm, measure): estimate(_stack(correct[key, measure], sorted(correct[key, measure])))
            for arm, key in keys.items()
            for measure in measures
            if (key, measure) in correct
        }
        outcomes, waiting = [], []
        for finding in its.findings:
            asked = (finding.measure, finding.second_measure or finding.measure)
            taken_off = asked if finding.over_measure is None else (finding.over_measure,) * 2
            if not {*asked, *(taken_off if finding.over else ())} <= set(measures):
                continue
            arms_and_measures = [*zip((finding.first, finding.second), asked, strict=True)]
            arms_and_measures += [*zip(finding.over or (), taken_off, strict=False)]
            figures_of = [correct.get((keys[name], measure), {}) for name, measure in arms_and_measures]
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in figures_of)))
            if not seeds:
                waiting.append(finding.claim)
                continue
            one, two, *rest = (_stack(by_seed, seeds) for by_seed in figures_of)
            outcomes.append(decide(finding, one, two, (rest[0], rest[1]) if rest else None))
        trained = {arm: known[key] for arm, key in keys.items() if known[key].steps}
        found.append(
            TableResults(
                its,
                measures,
                figures,
                {(arm, m): tuple(sorted(correct[keys[arm], m])) for arm, m in figures},
                tuple(outcomes),
                tuple(waiting),
                {arm: rates[one.key] for arm, one in trained.items() if one.key in rates},
                {arm: flops_an_image(one.config, config.vocabulary) for arm, one in trained.items()},
            )
        )
    return found


def _stack(by_seed: Mapping[int, np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """float [S, M]."""
    return np.stack([by_seed[seed] for seed in seeds]).astype(np.float64)


def costs(found: TableResults, arm: str) -> list[str]:
    """How fast an arm was trained, and its operations, as cells of a table; dashes for what was not."""
    if arm not in found.rates:
        return ["–", "–"]
    return [f"{found.rates[arm]:,.0f}", f"{found.operations[arm] / 1e9:.3g}"]
