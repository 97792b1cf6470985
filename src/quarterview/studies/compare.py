"""Comparison of pre-trained backbones with random weights and raw pixels, and a verdict on each backbone.

Each seed draws other labelled images, other random weights and other batches. With the same seed, all arms
get the same images. The module `verdict` decides if pre-training helped.
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
from quarterview.evaluation.evaluators import FeatureEvaluator
from quarterview.evaluation.features import (
    Backbone,
    Encoder,
    compute_pixel_features,
    extract_features,
    make_encoder,
)
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import LabeledSplit, open_split
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.predictions import read_correct_predictions
from quarterview.studies.compare_arms import (
    PretrainedArm,
    create_untrained_backbone,
    load_arms,
    make_arm_finetune_config,
)
from quarterview.studies.compare_page import write_page
from quarterview.studies.compare_results import (
    RANDOM_ENCODER,
    RAW_PIXELS,
    CompareEvaluations,
    CompareStatistics,
    compute_statistics,
    write_statistics,
)
from quarterview.studies.config import CompareConfig, parse_num_labels
from quarterview.training.distributed import choose_device
from quarterview.weights.config import SCRATCH

LOGGER = logging.getLogger("quarterview")
_MIN_IMAGES_PER_CLASS = 2

CompareStatus = Literal["helped", "did not help", "cannot tell", "SIGTERM", "SIGINT"]


class CompareResult(NamedTuple):
    """The outcome of a comparison: a verdict, or the signal that stopped it."""

    status: CompareStatus
    """The verdict on the first arm, or the signal that stopped it."""
    statistics: CompareStatistics | None
    """Accuracies, differences, and the verdict on each arm; None if a signal stopped the comparison."""
    results_file: Path | None
    """The statistics as JSON; None if a signal stopped the comparison."""
    report: Path | None
    """The HTML report; None if a signal stopped the comparison."""


def compare(config: CompareConfig, argv: Sequence[str] = ()) -> CompareResult:
    """Evaluate all arms, decide the verdicts, and write ``results/compare.json`` and ``report.html``.

    The fine-tuning runs stay in ``runs/``; complete ones are not trained again.

    Args:
        argv: the command line, which is stored with the results.

    Raises:
        UserError: if the configuration is invalid, such as an arm that is no model or images without labels.
        RunError: if a fine-tuning run fails.
    """
    config.check_complete()
    arms = load_arms(config)
    images = open_images(config, arms)
    correct: CompareEvaluations = {}
    evaluate_frozen_arms(config, arms, images, correct)
    status = finetune_arms(config, arms, images, correct, argv)
    if status != "complete":
        return CompareResult(status, None, None, None)

    descriptions = {arm.name: arm.describe() for arm in arms}
    statistics = compute_statistics(correct, descriptions, config.options.min_difference / 100)
    results_file = write_statistics(statistics, config, images.describe(), images.notes, argv)
    report = write_page(Path(config.run.out) / "report.html", statistics, results_file)
    return CompareResult(statistics.verdicts[0].answer, statistics, results_file, report)


# ---------------------------------------------------------------------- images


class CompareImages(NamedTuple):
    """The labelled images of a comparison."""

    split: LabeledSplit
    label_counts: tuple[int, ...]
    """The numbers of labelled training images to compare with, in ascending order."""
    notes: tuple[str, ...]
    """Sentences that say what is left out of the comparison, and why."""

    def describe(self) -> dict[str, Any]:
        """Describe the images for the results file: fingerprints and numbers of images."""
        return {
            "train": self.split.train.fingerprint(),
            "train_images": len(self.split.train),
            "test": self.split.test.fingerprint(),
            "test_images": len(self.split.test),
            "labelled": list(self.label_counts),
        }


def open_images(config: CompareConfig, arms: Sequence[PretrainedArm]) -> CompareImages:
    """Open the labelled images, and select the numbers of labels in --counts that can be compared.

    Raises:
        UserError: if the labels are missing or invalid, or no number of labels can be compared.
    """
    split = open_split(config.images.train, config.images.test, arms[0].model.config.in_chans)
    counts, notes, num_images = set(), [], len(split.train)
    if "finetune" in config.options.protocols:
        notes = [
            f"{arm.name} is not fine-tuned: models of timm are evaluated by frozen features only"
            for arm in arms
            if not arm.is_finetunable
        ]
    min_labels = _MIN_IMAGES_PER_CLASS * split.num_train_classes
    for text in dict.fromkeys(config.options.counts):
        count = parse_num_labels(text, num_images)
        if min_labels <= count <= num_images:
            counts.add(count)
        else:
            notes.append(
                f"--counts {text} is left out: of {num_images:,} labelled images that is {count:,}, but a "
                f"comparison needs {min_labels:,} (two per class) to {num_images:,}"
            )
    for note in notes:
        LOGGER.warning(note)
    if not counts:
        raise UserError(
            f"--counts {' '.join(config.options.counts)} leaves nothing to compare. Give {min_labels} to "
            f"{num_images} labelled images, or percentages of them."
        )
    return CompareImages(split, tuple(sorted(counts)), tuple(notes))


# ---------------------------------------------------------------------- frozen features


def evaluate_frozen_arms(
    config: CompareConfig, arms: Sequence[PretrainedArm], images: CompareImages, correct: CompareEvaluations
) -> None:
    """Evaluate frozen features of all arms, of random encoders and of raw pixels, by k-NN and linear probe.

    Args:
        correct: the evaluations, to which those of this function are added.
    """
    device = choose_device(config.compute.device)
    all_evaluators: dict[str, FeatureEvaluator] = {
        "knn": Knn(config.options.k, device=device),
        "linear": LogisticRegression(config.loop.seed),
    }
    evaluators = {
        protocol: evaluator
        for protocol, evaluator in all_evaluators.items()
        if protocol in config.options.protocols
    }
    if not evaluators:
        return
    split, counts = images.split, images.label_counts
    used_ids = sorted(
        {int(i) for count in counts for seed in config.seeds for i in split.choose_labeled(count, seed)}
    )
    LOGGER.info(
        "Extracting features of %s training and %s test images", f"{len(used_ids):,}", f"{len(split.test):,}"
    )
    for name, seeds, model, encoder in _iter_encoders(config, arms):
        extract = partial(_extract_features, model, encoder, device, config.tuning.crop_pct)
        train, train_ids = extract(split.train, used_ids)
        test, test_ids = extract(split.test, range(len(split.test)))
        test_labels = split.test_labels[test_ids]
        row_of_id = torch.full((len(split.train),), -1)  # -1: the image is unused or could not be read
        row_of_id[train_ids] = torch.arange(len(train_ids))
        for count in counts:
            # With all labels, every seed chooses the same images, so that an encoder is evaluated once.
            cache: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
            for seed in seeds:
                chosen = split.choose_labeled(count, seed)
                chosen = chosen[row_of_id[chosen] >= 0]
                key = tuple(chosen.tolist())
                if key not in cache:
                    inputs = (train[row_of_id[chosen]], split.train_labels[chosen], test)
                    cache[key] = {
                        protocol: (evaluator.predict(*inputs) == test_labels).numpy()
                        for protocol, evaluator in evaluators.items()
                    }
                for protocol, is_correct in cache[key].items():
                    _append_seed(correct, (protocol, count, name), is_correct)
        LOGGER.info("Evaluated %s", f"{name}, seed {seeds[0]}" if name == RANDOM_ENCODER else name)


def _iter_encoders(
    config: CompareConfig, arms: Sequence[PretrainedArm]
) -> Iterator[tuple[str, Sequence[int], Backbone, Encoder]]:
    """Iterate over the frozen encoders, so that only one random network at a time is in memory.

    Yields:
        The name of the arm, the seeds for which the encoder is used, the backbone and the encoder.
    """
    first, pool = arms[0].model, config.tuning.pool
    for arm in arms:
        yield arm.name, config.seeds, arm.model, make_encoder(arm.model, pool)
    for seed in config.seeds:
        untrained = create_untrained_backbone(first, seed)
        yield RANDOM_ENCODER, [seed], untrained, make_encoder(untrained, pool)
    yield RAW_PIXELS, config.seeds, first, compute_pixel_features


def _extract_features(
    model: Backbone,
    encoder: Encoder,
    device: torch.device,
    crop_pct: float | None,
    source: Source,
    ids: Sequence[int],
) -> tuple[Tensor, list[int]]:
    """Return features, float [N, D], and the ids of the N images that could be read."""
    if isinstance(model, nn.Module):
        model.to(device)
    features, read_ids = extract_features({"": encoder}, source, ids, model.config, device, crop_pct=crop_pct)
    if isinstance(model, nn.Module):
        model.cpu()
    return features[""], read_ids


def _append_seed(correct: CompareEvaluations, key: tuple[str, int, str], is_correct: np.ndarray) -> None:
    """Append the evaluation of one more seed, bool [M]."""
    correct[key] = np.vstack([*correct.get(key, ()), is_correct])


# ---------------------------------------------------------------------- fine-tuning


def finetune_arms(
    config: CompareConfig,
    arms: Sequence[PretrainedArm],
    images: CompareImages,
    correct: CompareEvaluations,
    argv: Sequence[str],
) -> Literal["complete", "SIGTERM", "SIGINT"]:
    """Fine-tune all arms and random weights, with every number of labels and every seed.

    Nothing is done if --protocols does not include finetune.

    Args:
        correct: the evaluations, to which those of this function are added.

    Returns:
        ``complete``, or the signal that stopped a run.
    """
    finetunable = [arm for arm in arms if arm.is_finetunable]
    if "finetune" not in config.options.protocols or not finetunable:
        return "complete"
    slugs = {arm.name: arm.slug for arm in finetunable}
    slugs[SCRATCH] = f"{SCRATCH}-{finetunable[0].slug}"
    plan = [(count, seed, name) for count in images.label_counts for seed in config.seeds for name in slugs]
    for index, (count, seed, name) in enumerate(plan, 1):
        LOGGER.info(
            "Fine-tuning %d of %d: %s, %s labelled images, seed %d",
            index,
            len(plan),
            name,
            f"{count:,}",
            seed,
        )
        folder = Path(config.run.out) / "runs" / f"{slugs[name]}-{count}-seed{seed}"
        result = finetune(make_arm_finetune_config(config, finetunable, name, count, seed, folder), argv)
        if result.run.status != "complete":
            return result.run.status
        is_correct = read_correct_predictions(result.run.folder, images.split.test_labels)
        _append_seed(correct, ("finetune", count, name), is_correct)
    return "complete"
