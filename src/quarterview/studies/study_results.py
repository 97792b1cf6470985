"""Results of a study: accuracies and decided findings of each table."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from quarterview.studies.config import StudyConfig, parse_measure
from quarterview.studies.plan import (
    PlannedArm,
    compute_flops_per_image,
    make_arm_config,
    make_arm_key,
    make_base_config,
    select_measures,
)
from quarterview.studies.rule import FindingResult, decide_finding
from quarterview.studies.study import Study, Table
from quarterview.studies.verdict import Estimate, estimate_mean

StudyEvaluations = Mapping[tuple[str, str], Mapping[int, np.ndarray]]
"""(arm key, measure) -> seed -> bool [M]: is each of M test images classified correctly?"""
MEASURE_NAMES = {
    "finetune": "fine-tuning",
    "corrupted": "fine-tuned, corrupted images",
    "linear": "linear probe",
    "knn": "nearest neighbours",
}
"""Kinds of measures, with their names in reports."""


class StudyProgress(NamedTuple):
    """The progress of a study, in evaluations: one for each arm, measure and seed."""

    num_done: int
    num_total: int


class TableResults(NamedTuple):
    """The results of one table of a study."""

    table: Table
    measures: tuple[str, ...]
    estimates: Mapping[tuple[str, str], Estimate]
    """(arm name, measure) -> accuracy."""
    seeds: Mapping[tuple[str, str], tuple[int, ...]]
    """(arm name, measure) -> the evaluated seeds, in the order of `Estimate.by_seed`."""
    finding_results: tuple[FindingResult, ...]
    """The findings whose arms are evaluated, with their decisions."""
    pending_claims: tuple[str, ...]
    """The claims of findings whose arms are not all evaluated yet."""
    images_per_s: Mapping[str, float]
    """Arm name -> training images per second, the median over the metrics of all seeds."""
    flops_per_image: Mapping[str, float]
    """Arm name -> computed floating-point operations of a training step per image."""


def format_measure(measure: str) -> str:
    """Return the name of a measure in reports."""
    kind, blocks, visible = parse_measure(measure)
    if not blocks:
        return MEASURE_NAMES[kind] + (f", {visible}% visible" if visible else "")
    return f"{blocks} block{'' if blocks in ('1', '0.5') else 's'} tuned"


def compute_table_results(
    study: Study,
    config: StudyConfig,
    arms: Sequence[PlannedArm],
    correct: StudyEvaluations,
    images_per_s: Mapping[str, float],
    tokenizer: str,
) -> list[TableResults]:
    """Compute the accuracies of all tables, and decide their findings.

    Args:
        arms: the planned arms of the study.
        images_per_s: arm key -> training images per second.
        tokenizer: folder of the tokenizer that the study trains.
    """
    base = make_base_config(study, config)
    planned_arms = {planned.key: planned for planned in arms}
    results = []
    for table in study.tables:
        keys = {
            arm.name: make_arm_key(arm, make_arm_config(base, arm, tokenizer, config)) for arm in table.arms
        }
        assert set(keys.values()) <= planned_arms.keys()
        measures = select_measures(table, config)
        estimates = {
            (arm, measure): estimate_mean(_stack_seeds(correct[key, measure], sorted(correct[key, measure])))
            for arm, key in keys.items()
            for measure in measures
            if (key, measure) in correct
        }
        finding_results, pending_claims = [], []
        for finding in table.findings:
            arm_measures = (finding.measure, finding.second_measure or finding.measure)
            baseline_measures = arm_measures if finding.over_measure is None else (finding.over_measure,) * 2
            if not {*arm_measures, *(baseline_measures if finding.over else ())} <= set(measures):
                continue  # --measures leaves out a measure of this finding
            arms_and_measures = [*zip((finding.first, finding.second), arm_measures, strict=True)]
            arms_and_measures += [*zip(finding.over or (), baseline_measures, strict=False)]
            evaluations = [correct.get((keys[name], measure), {}) for name, measure in arms_and_measures]
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in evaluations)))
            if not seeds:
                pending_claims.append(finding.claim)
                continue
            first, second, *baselines = (_stack_seeds(by_seed, seeds) for by_seed in evaluations)
            finding_results.append(
                decide_finding(finding, first, second, (baselines[0], baselines[1]) if baselines else None)
            )
        trained = {arm: planned_arms[key] for arm, key in keys.items() if planned_arms[key].steps}
        results.append(
            TableResults(
                table,
                measures,
                estimates,
                {(arm, m): tuple(sorted(correct[keys[arm], m])) for arm, m in estimates},
                tuple(finding_results),
                tuple(pending_claims),
                {
                    arm: images_per_s[planned.key]
                    for arm, planned in trained.items()
                    if planned.key in images_per_s
                },
                {
                    arm: compute_flops_per_image(planned.config, config.codebook_size)
                    for arm, planned in trained.items()
                },
            )
        )
    return results


def _stack_seeds(by_seed: Mapping[int, np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """Stack the evaluations of seeds: float [S, M]."""
    return np.stack([by_seed[seed] for seed in seeds]).astype(np.float64)


def format_costs(results: TableResults, arm_name: str) -> list[str]:
    """Return two table cells, images per second and GFLOP per image; dashes for an arm without training."""
    if arm_name not in results.images_per_s:
        return ["–", "–"]
    return [f"{results.images_per_s[arm_name]:,.0f}", f"{results.flops_per_image[arm_name] / 1e9:.3g}"]
