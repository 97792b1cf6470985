"""Training and evaluation of one arm of a study with one seed."""

from functools import lru_cache
from pathlib import Path

from quarterview.commands.config import PretrainConfig
from quarterview.commands.pretrain import pretrain
from quarterview.evaluation.labelled import LabeledSplit, open_split
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import StoppedError, evaluate_arm, read_evaluations
from quarterview.studies.plan import PlannedArm


def get_run_folder(out: Path, key: str, seed: int) -> Path:
    """Return the folder in which an arm with one seed is trained and evaluated."""
    return out / "runs" / f"{key}-seed{seed}"


def is_complete(planned: PlannedArm, seed: int, out: Path) -> bool:
    """Return True if all measures of an arm with this seed are evaluated."""
    return set(planned.measures) <= read_evaluations(get_run_folder(out, planned.key, seed)).keys()


def get_labeled_split(config: StudyConfig, in_chans: int) -> LabeledSplit:
    """Return the labelled training and test images of a study; each process opens them once."""
    return _open_split_once(config.train, config.test, in_chans)


_open_split_once = lru_cache(maxsize=1)(open_split)


def clear_labeled_split() -> None:
    """Clear the cache of `get_labeled_split`, since files may change between two studies of a process."""
    _open_split_once.cache_clear()


def run_arm(planned: PlannedArm, seed: int, config: StudyConfig, out: Path) -> None:
    """Pre-train one arm with one seed, if it has a pre-training, and evaluate it.

    Raises:
        StoppedError: if a signal stopped the run.
    """
    folder = get_run_folder(out, planned.key, seed)
    run = None
    if planned.arm.start == "pretrain":
        run = str(folder / "pretrain")
        run_pretraining(planned.config.with_flags(steps=planned.steps, seed=seed, out=run))
    images = get_labeled_split(config, planned.config.model.in_chans)
    evaluate_arm(run, planned.arm.start, planned.config, planned.measures, images, config, seed, folder)


def run_pretraining(config: PretrainConfig) -> None:
    """Start or resume a pre-training.

    Raises:
        StoppedError: if a signal stopped the run.
    """
    # Save only at the end, on a signal or by the clock, and evaluate only at the end: both cost time.
    status = pretrain(config.with_flags(keep_checkpoints=1, eval_every=config.loop.steps)).status
    if status != "complete":
        raise StoppedError(status)
