"""How long each arm is trained, and tuned, within the budget."""

from collections.abc import Sequence
from typing import NamedTuple

from quarterview.errors import UserError
from quarterview.studies.config import StudyConfig, read_budget
from quarterview.studies.measure import TUNE_STEPS
from quarterview.studies.plan import Planned, flops_an_image
from quarterview.studies.timing import Timed

_RESERVE = 0.9  # of the minutes that are planned with: machines are noisy
_LEAST_TUNED = 30  # updates
_JUDGING = 0.5  # of the minutes, at most, where the updates of fine-tuning are ours to choose


class Lengths(NamedTuple):
    """What was chosen."""

    arms: list[Planned]
    """With their numbers of updates."""
    tune_steps: int
    """Of each fine-tuning."""


def choose_lengths(
    arms: Sequence[Planned],
    config: StudyConfig,
    timed: Timed | None = None,
    spent: float = 0.0,
    at_a_time: int = 1,
) -> Lengths:
    """Updates of every arm and of fine-tuning.

    Runs that go on side by side end at most one run apart, so that all of them take as long as their sum
    shared evenly, and the part of the longest one that the others may have to wait for.

    Args:
        timed: for a budget of minutes.
        spent: seconds that went by already.
        at_a_time: runs side by side; they were timed so.

    Raises:
        UserError: if the budget does not suffice for anything.
    """
    kind, amount = read_budget(config.budget)
    tune_steps = config.tune_steps or TUNE_STEPS
    if kind == "images":
        return Lengths([_with_images(one, amount * one.arm.length) for one in arms], tune_steps)
    if kind == "flops":
        each = [
            _with_images(one, amount * one.arm.length / flops_an_image(one.config, config.vocabulary))
            if one.arm.start == "pretrain"
            else one
            for one in arms
        ]
        return Lengths(each, tune_steps)
    assert timed is not None
    left = _RESERVE * (60 * amount - spent)

    def side_by_side(seconds: Sequence[float]) -> float:
        return config.seeds * sum(seconds) / at_a_time + max(seconds) * (1 - 1 / at_a_time)

    def beside_training(tune_steps: int) -> float:
        opening = {key: training.once for key, training in timed.training.items()}
        return timed.tokenizer.once + side_by_side(
            [timed.judged(one, tune_steps) + opening.get(one.key, 0.0) for one in arms]
        )

    if config.tune_steps is None:
        kept = (n for n in range(TUNE_STEPS, _LEAST_TUNED, -10) if beside_training(n) <= _JUDGING * left)
        tune_steps = next(kept, _LEAST_TUNED)
    seconds = {key: max(training.image, timed.reading) for key, training in timed.training.items()}
    rates = [seconds.get(one.key, 0.0) * one.arm.length for one in arms]
    rate = side_by_side(rates) + (timed.tokenizer.image and max(timed.tokenizer.image, timed.reading))
    images = (left - beside_training(tune_steps)) / rate if rate else 0.0
    least = [one.config.loop.batch_size / one.arm.length for one in arms if one.key in timed.training]
    if images < min(least, default=0.0):
        raise UserError(
            f"--budget {config.budget} is too little for {len(arms)} arms under {config.seeds} seeds, which "
            f"take {beside_training(tune_steps) / 60:.0f} minutes to be opened and judged alone. Give more, "
            "fewer --seeds, fewer --tune-steps or --measures linear."
        )
    return Lengths([_with_images(one, images * one.arm.length) for one in arms], tune_steps)


def _with_images(planned: Planned, images: float) -> Planned:
    if planned.arm.start != "pretrain":
        return planned
    return planned._replace(steps=max(1, round(images / planned.config.loop.batch_size)))
