"""Evaluation of one arm with one seed: which test images are classified correctly, by each measure."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from quarterview import recipes
from quarterview.commands.config import PretrainConfig
from quarterview.commands.finetune import finetune
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError, not_supported
from quarterview.evaluation.config import COMMON_CORRUPTIONS
from quarterview.evaluation.corruptions import choose_one, load_library, predict_corrupted
from quarterview.evaluation.evaluators import FeatureEvaluator
from quarterview.evaluation.features import (
    BackboneConfig,
    Encoder,
    extract_features,
    make_encoder,
    make_masked_encoder,
)
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import LabeledSplit
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.predictions import read_correct_predictions
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.create import create_mae
from quarterview.models.mae import MaskedAutoencoder
from quarterview.studies.config import FINETUNED_MEASURES, StudyConfig, parse_measure
from quarterview.studies.plain_features import NETWORK_FREE_ENCODERS
from quarterview.studies.plan import get_encoder_flags
from quarterview.studies.study import ArmStart
from quarterview.training.distributed import choose_device
from quarterview.weights.config import SCRATCH, parse_num_blocks
from quarterview.weights.loading import load, load_classifier

NUM_NEIGHBORS = 20
"""Nearest neighbours that vote in the measures ``knn`` and ``knn@P``."""
DEFAULT_TUNE_STEPS = 500
"""Fine-tuning steps without --tune-steps, if the budget allows."""
CORRUPTION_SEVERITY = 3
"""Severity of the corruptions in the measure ``corrupted``, the middle of 1 to 5."""


class StoppedError(Exception):
    """A run was stopped by a signal.

    Args:
        signal: name of the signal, ``SIGTERM`` or ``SIGINT``.
    """

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def evaluate_frozen(
    encoders: Mapping[str, Encoder],
    backbone: BackboneConfig,
    measures: Sequence[str],
    images: LabeledSplit,
    config: StudyConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """Classify frozen features by a linear probe or nearest neighbours.

    Args:
        encoders: feature extractors by the percentage of visible patches as text; empty text for all patches.
        backbone: image size and normalization of the encoders.
        measures: ``linear``, ``knn``, ``linear@P`` and ``knn@P``.

    Returns:
        By measure, bool [M]: is each readable test image classified correctly?
    """
    device = choose_device(config.device)
    chosen = images.choose_labeled(min(config.labels, len(images.train)), seed)
    train, train_ids = extract_features(encoders, images.train, chosen.tolist(), backbone, device)
    test, test_ids = extract_features(encoders, images.test, range(len(images.test)), backbone, device)
    train_labels, test_labels = images.train_labels[train_ids], images.test_labels[test_ids]
    evaluators: dict[str, FeatureEvaluator] = {
        "knn": Knn(NUM_NEIGHBORS, device=device),
        "linear": LogisticRegression(seed),
    }
    correct: dict[str, np.ndarray] = {}
    for measure in measures:
        kind, _, visible = parse_measure(measure)
        predicted = evaluators[kind].predict(train[visible], train_labels, test[visible])
        correct[measure] = (predicted == test_labels).numpy()
    return correct


def evaluate_finetuned(
    run: str,
    pretraining: PretrainConfig,
    measure: str,
    images: LabeledSplit,
    config: StudyConfig,
    seed: int,
    out: Path,
) -> np.ndarray:
    """Fine-tune with the recipe ``small`` and classify the test images.

    Args:
        run: the pre-training to start from, or ``scratch``.
        measure: ``finetune``, or ``finetune:K`` for the last K blocks.

    Returns:
        bool [M]: is each readable test image classified correctly?

    Raises:
        StoppedError: if a signal stopped the fine-tuning.
    """
    flags = {
        "run": run,
        "train": config.train,
        "test": config.test,
        "labels": min(config.labels, len(images.train)),
        "out": str(out),
        "seed": seed,
        "steps": config.tune_steps or DEFAULT_TUNE_STEPS,
        "blocks": (measure.partition(":")[2] or "all",),
        "workers": config.workers,
        "device": config.device,
        "precision": pretraining.compute.precision,
    }
    if run == SCRATCH:
        flags |= {**get_encoder_flags(pretraining), "layer_decay": 1.0}
    result = finetune(recipes.read_finetune_recipe("small").with_flags(**flags))
    if result.run.status != "complete":
        raise StoppedError(result.run.status)
    return read_correct_predictions(out, images.test_labels)


def evaluate_corrupted(
    model: Classifier, images: LabeledSplit, precision: Literal["bf16", "fp32"]
) -> np.ndarray:
    """Classify corrupted test images, each with one of the 15 corruptions of ImageNet-C.

    The corruption and its random draws depend only on the index of the image, so that they are the same for
    all arms and seeds.

    Args:
        model: a classifier on the device of the evaluation.

    Returns:
        bool [M]: is each readable test image classified correctly?
    """
    policy = partial(choose_one, COMMON_CORRUPTIONS, CORRUPTION_SEVERITY, 0)
    correct = [
        predicted[:, 0] == images.test_labels[image_ids]
        for image_ids, predicted in predict_corrupted(model, images.test, policy, precision=precision)
    ]
    return torch.cat(correct).numpy()


def evaluate_arm(
    run: str | None,
    start: ArmStart,
    pretraining: PretrainConfig,
    measures: Sequence[str],
    images: LabeledSplit,
    config: StudyConfig,
    seed: int,
    folder: Path,
) -> dict[str, np.ndarray]:
    """Evaluate one arm with one seed by all measures that are not stored yet, and store each result.

    Args:
        run: the folder of the pre-training; None for an arm without one.
        start: the initial weights, or the features without a network, of such an arm.
        folder: contains ``judged.npz`` with the stored results, and the fine-tuning runs.

    Returns:
        By measure, bool [M]: is each readable test image classified correctly? Includes all stored measures.

    Raises:
        StoppedError: if a signal stopped a fine-tuning.
    """
    correct = read_evaluations(folder)
    missing = [measure for measure in measures if measure not in correct]
    frozen = [measure for measure in missing if parse_measure(measure)[0] not in FINETUNED_MEASURES]
    if frozen:
        backbone, encoders = _make_encoders(run, start, pretraining, frozen, config, seed)
        correct |= evaluate_frozen(encoders, backbone, frozen, images, config, seed)
        write_evaluations(folder, correct)
    weights = run or SCRATCH
    for measure in missing:
        if measure.startswith("finetune"):
            out = folder / measure.replace(":", "-")
            correct[measure] = evaluate_finetuned(weights, pretraining, measure, images, config, seed, out)
            write_evaluations(folder, correct)
    if "corrupted" in missing:
        out = folder / "finetune"
        if not (out / "results" / "finetune.json").is_file():  # the measures do not include finetune
            evaluate_finetuned(weights, pretraining, "finetune", images, config, seed, out)
        model = load_classifier(out).to(choose_device(config.device))
        correct["corrupted"] = evaluate_corrupted(model, images, pretraining.compute.precision)
        write_evaluations(folder, correct)
    return correct


def _make_encoders(
    run: str | None,
    start: ArmStart,
    pretraining: PretrainConfig,
    measures: Sequence[str],
    config: StudyConfig,
    seed: int,
) -> tuple[BackboneConfig, dict[str, Encoder]]:
    """Create the feature extractors of an arm, by the percentage of visible patches that measures name.

    Features are the mean of the patch tokens, or the cls token of contrastive methods, which train only it.
    """
    percentages = sorted({parse_measure(measure)[2] for measure in measures})
    model = _load_or_init_model(run, pretraining, seed)
    if start in NETWORK_FREE_ENCODERS:
        source = open_sources(pretraining.data.data, pretraining.model.in_chans)
        return model.config, {"": NETWORK_FREE_ENCODERS[start](source, pretraining.model.image_size, seed)}
    model.to(choose_device(config.device))
    pool = "cls" if pretraining.method.uses_two_views and run is not None else "mean"
    encoders = {
        percent: make_masked_encoder(model, int(percent) / 100, seed)
        if percent
        else make_encoder(model, pool)
        for percent in percentages
    }
    return model.config, encoders


def _load_or_init_model(run: str | None, pretraining: PretrainConfig, seed: int) -> MaskedAutoencoder:
    """Load the model of a run, or create an encoder with the initial weights of a seed and no decoder."""
    if run is not None:
        model = load(run)
        assert isinstance(model, MaskedAutoencoder)
        return model
    half = (0.5,) * pretraining.model.in_chans
    encoder = get_encoder_flags(pretraining)
    config = MAEConfig(**encoder, mean=half, std=half, decoder_depth=0, encoder_mask_tokens=True)
    return create_mae(config, seed).eval()


def read_evaluations(folder: Path) -> dict[str, np.ndarray]:
    """Read the stored results of an arm with one seed, bool [M] by measure; empty if there are none."""
    file = folder / "judged.npz"
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_evaluations(folder: Path, correct: Mapping[str, np.ndarray]) -> None:
    """Write the results of an arm with one seed atomically into ``judged.npz``."""
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / ".judged.partial.npz"
    arrays = {measure: np.asarray(values, bool) for measure, values in correct.items()}
    np.savez(partial_file, **arrays)  # type: ignore[arg-type]
    partial_file.replace(folder / "judged.npz")


def check_measures(start: ArmStart, measures: Sequence[str], pretraining: PretrainConfig) -> None:
    """Check that an arm can be evaluated by all of these measures.

    Raises:
        UserError: if a measure needs a network, an RGB image, a package or a number of blocks that the arm
            or the installation does not have.
    """
    depth = pretraining.model.shape.depth
    if "corrupted" in measures:
        load_library()  # raises now, not after hours of training, if the package is missing
        if pretraining.model.in_chans != 3:
            raise not_supported(
                "The measure corrupted", f"--in-chans {pretraining.model.in_chans}", "Leave the measure out."
            )
    for measure in measures:
        kind, blocks, visible = parse_measure(measure)
        if start in NETWORK_FREE_ENCODERS and (kind in FINETUNED_MEASURES or visible):
            raise not_supported(
                f"The measure {measure}", f"an arm of {start}, which has no network", "Give linear or knn."
            )
        if blocks and depth < parse_num_blocks(blocks) < math.inf:
            raise UserError(
                f"The measure {measure} needs {blocks} blocks, but the encoder has {depth}. Give at most "
                f"finetune:{depth}."
            )
