"""One arm under one seed: train it, and judge it."""

from functools import lru_cache
from pathlib import Path

from quarterview.commands.config import PretrainConfig
from quarterview.commands.pretrain import pretrain
from quarterview.evaluation.labelled import LabelledSplit, open_split
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import StoppedError, judge, read_judged
from quarterview.studies.plan import Planned


def place(out: Path, key: str, seed: int) -> Path:
    """The folder of an arm under a seed."""
    return out / "runs" / f"{key}-seed{seed}"


def is_done(one: Planned, seed: int, out: Path) -> bool:
    """Whether an arm was judged under a seed by all that is asked."""
    return set(one.measures) <= read_judged(place(out, one.key, seed)).keys()


def images_of(config: StudyConfig, channels: int) -> LabelledSplit:
    """The labelled images of a study, opened once in a process."""
    return _opened(config.train, config.test, channels)


_opened = lru_cache(maxsize=1)(open_split)


def forget_images() -> None:
    """Open them anew: they may have changed since another study."""
    _opened.cache_clear()


def conduct_one(one: Planned, seed: int, config: StudyConfig, out: Path) -> None:
    """Train one arm under one seed and judge it.

    Raises:
        StoppedError: if a signal came.
    """
    folder = place(out, one.key, seed)
    run = None
    if one.arm.start == "pretrain":
        run = str(folder / "pretrain")
        train(one.config.with_flags(steps=one.steps, seed=seed, out=run))
    images = images_of(config, one.config.model.in_chans)
    judge(run, one.arm.start, one.config, one.measures, images, config, seed, folder)


def train(config: PretrainConfig) -> None:
    """Pre-train, or go on. Raises StoppedError if a signal came."""
    # One checkpoint at the end, unless a signal or the clock asks for more; few looks on the way.
    status = pretrain(config.with_flags(keep_checkpoints=1, eval_every=config.loop.steps)).status
    if status != "complete":
        raise StoppedError(status)
