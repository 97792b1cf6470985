"""One arm under one seed: train it, and judge it."""

from dataclasses import replace
from pathlib import Path

from quarterview.pretraining import PretrainConfig, pretrain
from quarterview.studies.measure import Images, StoppedError, judge, read_judged
from quarterview.studies.plan import Planned, StudyConfig


def place(out: Path, key: str, seed: int) -> Path:
    """The folder of an arm under a seed."""
    return out / "runs" / f"{key}-seed{seed}"


def conduct_one(one: Planned, seed: int, config: StudyConfig, images: Images, out: Path) -> None:
    """Train one arm under one seed and judge it.

    Raises:
        StoppedError: if a signal came.
    """
    folder = place(out, one.key, seed)
    if all(measure in read_judged(folder) for measure in one.measures):
        return
    run = None
    if one.arm.start == "pretrain":
        run = str(folder / "pretrain")
        train(replace(one.config, steps=one.steps, seed=seed, out=run))
    judge(run, one.arm.start, one.config, one.measures, images, config, seed, folder)


def train(config: PretrainConfig) -> None:
    """Pre-train, or go on. Raises StoppedError if a signal came."""
    # One checkpoint at the end, unless a signal or the clock asks for more; few looks on the way.
    status = pretrain(replace(config, keep_checkpoints=1, eval_every=config.steps)).status
    if status != "complete":
        raise StoppedError(status)
