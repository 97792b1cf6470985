"""Numbers of training and fine-tuning steps of the arms of a study, chosen to meet its budget."""

from collections.abc import Sequence
from typing import NamedTuple

from quarterview.errors import UserError
from quarterview.studies.config import StudyConfig, parse_budget
from quarterview.studies.measure import DEFAULT_TUNE_STEPS
from quarterview.studies.plan import PlannedArm, compute_flops_per_image
from quarterview.studies.timing import StudyTimings

_PLANNED_FRACTION = 0.9  # fraction of the remaining time that is planned; the rest allows for noisy timings
_MIN_TUNE_STEPS = 30  # lower limit of the fine-tuning steps that are chosen here
_MAX_EVALUATION_FRACTION = 0.5  # of the time; fine-tuning is shortened to keep evaluation below it


class BudgetAllocation(NamedTuple):
    """Numbers of steps within the budget of a study."""

    arms: list[PlannedArm]
    """The arms with their numbers of training steps."""
    tune_steps: int
    """Steps of each fine-tuning."""


def allocate_budget(
    arms: Sequence[PlannedArm],
    config: StudyConfig,
    timings: StudyTimings | None = None,
    elapsed_s: float = 0.0,
    num_jobs: int = 1,
) -> BudgetAllocation:
    """Choose the training steps of each arm and the steps of fine-tuning.

    In a budget of minutes all arms train on equally many images, times `Arm.length`. The duration of runs in
    `num_jobs` parallel jobs is bounded by the sum of the runs over `num_jobs`, plus ``1 - 1 / num_jobs`` of
    the longest run, for which the other jobs may have to wait at the end.

    Args:
        timings: measured with the same number of parallel jobs; required for a budget of minutes.
        elapsed_s: seconds of the budget that are already spent.
        num_jobs: number of runs at a time.

    Raises:
        UserError: if the budget is too small for one step of each arm.
    """
    kind, amount = parse_budget(config.budget)
    tune_steps = config.tune_steps or DEFAULT_TUNE_STEPS
    if kind == "images":
        planned_arms = [_set_num_steps(planned, amount * planned.arm.length) for planned in arms]
        return BudgetAllocation(planned_arms, tune_steps)
    if kind == "flops":
        planned_arms = [
            _set_num_steps(
                planned,
                amount * planned.arm.length / compute_flops_per_image(planned.config, config.codebook_size),
            )
            if planned.arm.start == "pretrain"
            else planned
            for planned in arms
        ]
        return BudgetAllocation(planned_arms, tune_steps)
    assert timings is not None
    remaining_s = _PLANNED_FRACTION * (60 * amount - elapsed_s)
    loading_s = timings.loading_s_per_image

    def estimate_parallel_s(arm_seconds: Sequence[float]) -> float:
        return config.seeds * sum(arm_seconds) / num_jobs + max(arm_seconds) * (1 - 1 / num_jobs)

    def estimate_fixed_s(tune_steps: int) -> float:
        """Estimate the seconds of everything but training steps."""
        setup_s = {key: training.setup_s for key, training in timings.training.items()}
        return timings.tokenizer.setup_s + estimate_parallel_s(
            [
                timings.estimate_evaluation_s(planned, tune_steps) + setup_s.get(planned.key, 0.0)
                for planned in arms
            ]
        )

    if config.tune_steps is None:
        max_fixed_s = _MAX_EVALUATION_FRACTION * remaining_s
        candidates = range(DEFAULT_TUNE_STEPS, _MIN_TUNE_STEPS, -10)
        tune_steps = next((n for n in candidates if estimate_fixed_s(n) <= max_fixed_s), _MIN_TUNE_STEPS)
    # Images are loaded while the device computes, so that the slower of the two counts.
    s_per_image = {key: max(training.s_per_image, loading_s) for key, training in timings.training.items()}
    tokenizer_s = timings.tokenizer.s_per_image
    study_s_per_image = estimate_parallel_s(
        [s_per_image.get(planned.key, 0.0) * planned.arm.length for planned in arms]
    ) + (tokenizer_s and max(tokenizer_s, loading_s))
    num_images = (
        (remaining_s - estimate_fixed_s(tune_steps)) / study_s_per_image if study_s_per_image else 0.0
    )
    min_images = [
        planned.config.loop.batch_size / planned.arm.length
        for planned in arms
        if planned.key in timings.training
    ]
    if num_images < min(min_images, default=0.0):
        raise UserError(
            f"--budget {config.budget} is too small for {len(arms)} arms and {config.seeds} seeds: without "
            f"any training, setup and evaluation take {estimate_fixed_s(tune_steps) / 60:.0f} minutes. Give "
            "a larger --budget, fewer --seeds, fewer --tune-steps or --measures linear."
        )
    planned_arms = [_set_num_steps(planned, num_images * planned.arm.length) for planned in arms]
    return BudgetAllocation(planned_arms, tune_steps)


def _set_num_steps(planned: PlannedArm, num_images: float) -> PlannedArm:
    """Return a copy that trains on about so many images; arms without a pre-training stay at 0 steps."""
    if planned.arm.start != "pretrain":
        return planned
    return planned._replace(steps=max(1, round(num_images / planned.config.loop.batch_size)))
