"""Did pre-training help? Backbones beside random weights and raw pixels, by every protocol, and a verdict.

Each seed draws other labelled images, another random encoder and other batches, and within a seed
every arm gets the same images. `verdict` says what the figures allow to be said.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quarterview.commands.finetune import finetune
from quarterview.data.sources.base import Source
from quarterview.errors import UserError
from quarterview.evaluation.evaluators import Evaluator
from quarterview.evaluation.features import Backbone, Encoder, encoder_features, extract, pixel_features
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import LabelledSplit, open_split
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.predictions import correct_predictions
from quarterview.studies.compare_arms import Arm, finetuning_of, open_arms, random_twin
from quarterview.studies.compare_page import write_page
from quarterview.studies.compare_results import PIXELS, RANDOM, Results, results_of, write_record
from quarterview.studies.config import CompareConfig, labelled_count
from quarterview.training.distributed import choose_device
from quarterview.weights.config import SCRATCH

LOGGER = logging.getLogger("quarterview")
_LEAST_PER_CLASS = 2

Status = Literal["helped", "did not help", "cannot tell", "SIGTERM", "SIGINT"]
Measured = dict[tuple[str, int, str], np.ndarray]
"""What `compare_results.Correct` is, while it grows."""


class Compared(NamedTuple):
    """How a comparison ended."""

    status: Status
    """The verdict on the first arm, or the signal that stopped it."""
    results: Results | None
    """The figures, and the verdict on each arm; None if a signal came first."""
    record: Path | None
    """The figures as JSON."""
    report: Path | None
    """The page."""


def compare(config: CompareConfig, argv: Sequence[str] = ()) -> Compared:
    """Measure every arm, give the verdict, and write ``results/compare.json`` and ``report.html``.

    The runs of fine-tuning stay in ``runs/``; those that are complete are not trained again.

    Args:
        argv: the command line, for the record.

    Raises:
        UserError: if the request cannot be met: an arm that is no model, images without labels, …
        RunError: if a run of fine-tuning cannot go on.
    """
    config.check_complete()
    arms = open_arms(config)
    images = open_images(config, arms)
    measured: Measured = {}
    measure_frozen(config, arms, images, measured)
    status = measure_tuned(config, arms, images, measured, argv)
    if status != "complete":
        return Compared(status, None, None, None)

    described = {arm.name: arm.describe() for arm in arms}
    results = results_of(measured, described, config.options.worthwhile / 100)
    record = write_record(results, config, images.describe(), images.notes, argv)
    report = write_page(Path(config.run.out) / "report.html", results, record)
    return Compared(results.verdicts[0].answer, results, record, report)


# ---------------------------------------------------------------------- images


class Images(NamedTuple):
    """The labelled images of a comparison."""

    split: LabelledSplit
    counts: tuple[int, ...]
    """Numbers of labelled images, rising."""
    notes: tuple[str, ...]
    """What was left out, and why."""

    def describe(self) -> dict[str, Any]:
        """The images, for a result."""
        return {
            "train": self.split.train.fingerprint(),
            "train_images": len(self.split.train),
            "test": self.split.test.fingerprint(),
            "test_images": len(self.split.test),
            "labelled": list(self.counts),
        }


def open_images(config: CompareConfig, arms: Sequence[Arm]) -> Images:
    """Open the labelled images, and find the counts of them that can be compared.

    Raises:
        UserError: if their labels cannot be learned, or no count is left.
    """
    split = open_split(config.images.train, config.images.test, arms[0].model.config.in_chans)
    counts, notes, images = set(), [], len(split.train)
    if "finetune" in config.options.protocols:
        notes = [
            f"{arm.name} is judged frozen only: timm's are not fine-tuned" for arm in arms if not arm.tunable
        ]
    least = _LEAST_PER_CLASS * split.classes
    for given in dict.fromkeys(config.options.counts):
        count = labelled_count(given, images)
        if least <= count <= images:
            counts.add(count)
        else:
            notes.append(
                f"{given} of {images:,} labelled images were left out: that is {count:,}, and "
                f"{least:,} (two per class) to {images:,} can be compared"
            )
    for note in notes:
        LOGGER.warning(note)
    if not counts:
        raise UserError(
            f"--counts {' '.join(config.options.counts)} leaves nothing to compare. Give {least} to {images} "
            "labelled images, or shares of them."
        )
    return Images(split, tuple(sorted(counts)), tuple(notes))


# ---------------------------------------------------------------------- frozen features


def measure_frozen(config: CompareConfig, arms: Sequence[Arm], images: Images, measured: Measured) -> None:
    """Classify features of every arm, of random encoders and of raw pixels, by neighbours and linearly."""
    device = choose_device(config.compute.device)
    every: dict[str, Evaluator] = {
        "knn": Knn(config.options.k, device=device),
        "linear": LogisticRegression(config.loop.seed),
    }
    evaluators = {name: its for name, its in every.items() if name in config.options.protocols}
    if not evaluators:
        return
    split, counts = images.split, images.counts
    used = sorted({int(i) for count in counts for seed in config.seeds for i in split.choose(count, seed)})
    LOGGER.info("features of %s training and %s test images", f"{len(used):,}", f"{len(split.test):,}")
    for name, seeds, model, encoder in _encoders(config, arms):
        of = partial(_features, model, encoder, device, config.tuning.crop_pct)
        train, kept = of(split.train, used)
        test, test_kept = of(split.test, range(len(split.test)))
        truth = split.test_labels[test_kept]
        place = torch.full((len(split.train),), -1)
        place[kept] = torch.arange(len(kept))
        for count in counts:
            known: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
            for seed in seeds:
                chosen = split.choose(count, seed)
                chosen = chosen[place[chosen] >= 0]  # what could be read
                key = tuple(chosen.tolist())
                if key not in known:  # with all labels, the seeds of one encoder are alike
                    given = (train[place[chosen]], split.train_labels[chosen], test)
                    known[key] = {p: (its.predict(*given) == truth).numpy() for p, its in evaluators.items()}
                for protocol, correct in known[key].items():
                    _add(measured, (protocol, count, name), correct)
        LOGGER.info("evaluated: %s", f"{name}, seed {seeds[0]}" if name == RANDOM else name)


def _encoders(
    config: CompareConfig, arms: Sequence[Arm]
) -> Iterator[tuple[str, Sequence[int], Backbone, Encoder]]:
    """The name of each frozen encoder, the seeds that it stands for, and its network, one after the other."""
    first, pool = arms[0].model, config.tuning.pool
    for arm in arms:
        yield arm.name, config.seeds, arm.model, encoder_features(arm.model, pool)
    for seed in config.seeds:
        twin = random_twin(first, seed)
        yield RANDOM, [seed], twin, encoder_features(twin, pool)
    yield PIXELS, config.seeds, first, pixel_features


def _features(
    model: Backbone,
    encoder: Encoder,
    device: torch.device,
    crop_pct: float | None,
    source: Source,
    ids: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Features of images, float [N, D], and which of the images could be read."""
    if isinstance(model, nn.Module):
        model.to(device)
    found, kept = extract({"": encoder}, source, ids, model.config, device, crop_pct=crop_pct)
    if isinstance(model, nn.Module):
        model.cpu()
    return found[""], kept


def _add(measured: Measured, row: tuple[str, int, str], correct: np.ndarray) -> None:
    """Add what another seed classifies right, bool [M]."""
    measured[row] = np.vstack([*measured.get(row, ()), correct])


# ---------------------------------------------------------------------- fine-tuning


def measure_tuned(
    config: CompareConfig, arms: Sequence[Arm], images: Images, measured: Measured, argv: Sequence[str]
) -> Literal["complete", "SIGTERM", "SIGINT"]:
    """Fine-tune every arm and random weights, for every count and seed, if that is asked for.

    Returns:
        ``complete``, or the signal that stopped it.
    """
    tunable = [arm for arm in arms if arm.tunable]
    if "finetune" not in config.options.protocols or not tunable:
        return "complete"
    starts = {arm.name: arm.slug for arm in tunable}
    starts[SCRATCH] = f"{SCRATCH}-{tunable[0].slug}"
    plan = [(count, seed, name) for count in images.counts for seed in config.seeds for name in starts]
    for number, (count, seed, name) in enumerate(plan, 1):
        LOGGER.info(
            "fine-tuning %d of %d: %s, %s labelled images, seed %d",
            number,
            len(plan),
            name,
            f"{count:,}",
            seed,
        )
        folder = Path(config.run.out) / "runs" / f"{starts[name]}-{count}-seed{seed}"
        result = finetune(finetuning_of(config, tunable, name, count, seed, folder), argv)
        if result.run.status != "complete":
            return result.run.status
        correct = correct_predictions(result.run.folder, images.split.test_labels)
        _add(measured, ("finetune", count, name), correct)
    return "complete"
