"""Judge one arm under one seed: which of the test images does it tell right, by each measure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview import recipes
from quarterview.data.open import open_sources
from quarterview.data.source import Source, labels_of
from quarterview.errors import UserError
from quarterview.evaluate.features import Backbone, choose_labelled, class_scores, encoder_features, extract
from quarterview.evaluate.finetune import SCRATCH, count_blocks, finetune
from quarterview.evaluate.knn import nearest, vote
from quarterview.evaluate.linear import check_classes, choose_strength, fit
from quarterview.exchange.weights import load, load_classifier
from quarterview.objectives.choice import COMPARING
from quarterview.pretraining import PretrainConfig
from quarterview.studies.plan import StudyConfig
from quarterview.train.distributed import choose_device

NEIGHBOURS = 20


class Images(NamedTuple):
    """The labelled images that all arms are judged on."""

    train: Source
    train_labels: Tensor
    test: Source
    test_labels: Tensor


class StoppedError(Exception):
    """A signal stopped a run."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def open_images(config: StudyConfig, channels: int) -> Images:
    """Open the labelled images.

    Raises:
        UserError: if they have no labels, or train and test have other classes.
    """
    train, test = open_sources(config.train, channels), open_sources(config.test, channels)
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError("--train and --test have different classes; accepted: the same")
    images = Images(train, torch.tensor(labels_of(train)), test, torch.tensor(labels_of(test)))
    check_classes(images.train_labels)
    return images


def frozen(
    model: Backbone, objective: str, measures: Sequence[str], images: Images, config: StudyConfig, seed: int
) -> dict[str, np.ndarray]:
    """bool [M] by measure, of features that are left as they are.

    They are the mean of the patch tokens, and the cls token of methods that train that one alone.
    """
    wanted = [measure for measure in measures if measure in ("linear", "knn")]
    if not wanted:
        return {}
    device = choose_device(config.device)
    count = min(config.labels, len(images.train))
    chosen = choose_labelled(images.train_labels, count, seed)
    encoders = {"": encoder_features(model.to(device), "cls" if objective in COMPARING else "mean")}  # type: ignore[attr-defined]
    features, kept = extract(encoders, images.train, chosen.tolist(), model.config, device)
    test, seen = extract(encoders, images.test, range(len(images.test)), model.config, device)
    labels, truth = images.train_labels[kept], images.test_labels[seen]
    found: dict[str, np.ndarray] = {}
    if "linear" in wanted:
        strength = choose_strength(features[""].numpy(), labels.numpy(), seed)
        predicted = fit(features[""].numpy(), labels.numpy(), strength).predict(test[""].numpy())
        found["linear"] = np.equal(predicted, truth.numpy())
    if "knn" in wanted:
        similarity, index = nearest(features[""], test[""], min(NEIGHBOURS, len(labels)), device)
        found["knn"] = (vote(similarity, labels[index], "weighted") == truth).numpy()
    return found


def tuned(
    run: str,
    pretraining: PretrainConfig,
    measure: str,
    images: Images,
    config: StudyConfig,
    seed: int,
    out: Path,
) -> np.ndarray:
    """bool [M], after fine-tuning under the recipe `small`.

    Args:
        run: what is fine-tuned, or ``scratch``.
        measure: ``finetune``, or ``finetune:K`` for the last K blocks.

    Raises:
        StoppedError: if a signal came.
    """
    recipe = recipes.read_finetune("small")
    values: dict[str, Any] = {
        **{"run": run, "train": config.train, "test": config.test, "out": str(out), "seed": seed},
        **{"labels": min(config.labels, len(images.train)), "steps": config.tune_steps},
        **{"blocks": (measure.partition(":")[2] or "all",), "workers": config.workers},
        **{"device": config.device, "precision": pretraining.precision},
    }
    if run == SCRATCH:
        network = {name: getattr(pretraining, name) for name in ("model", "image_size", "in_chans")}
        values |= {**network, "layer_decay": 1.0}
    result = finetune(replace(recipe, **values))
    if result.run.status != "complete":
        raise StoppedError(result.run.status)
    device = choose_device(config.device)
    model = load_classifier(out).to(device)
    scores, seen = extract(
        {"": class_scores(model)},
        images.test,
        range(len(images.test)),
        model.config,
        device,
        precision=pretraining.precision,
    )
    return (scores[""].argmax(dim=1) == images.test_labels[seen]).numpy()


def judge(
    run: str,
    pretraining: PretrainConfig,
    measures: Sequence[str],
    images: Images,
    config: StudyConfig,
    seed: int,
    folder: Path,
) -> dict[str, np.ndarray]:
    """Every measure of one arm under one seed; those that are in the folder are not taken again.

    Args:
        run: a run's folder, or ``scratch`` for the initial weights that belong to the seed.
        folder: where ``judged.npz`` and the runs of fine-tuning are kept.
    """
    found = read_judged(folder)
    missing = [measure for measure in measures if measure not in found]
    if any(measure in ("linear", "knn") for measure in missing):
        found |= frozen(_model(run, pretraining, seed), pretraining.objective, missing, images, config, seed)
        write_judged(folder, found)
    for measure in missing:
        if measure.startswith("finetune"):
            out = folder / measure.replace(":", "-")
            found[measure] = tuned(run, pretraining, measure, images, config, seed, out)
            write_judged(folder, found)
    return found


def _model(run: str, pretraining: PretrainConfig, seed: int) -> Any:
    if run != SCRATCH:
        return load(run)
    from quarterview.model.config import ViTConfig
    from quarterview.model.encoder import fresh_encoder

    half = (0.5,) * pretraining.in_chans  # mean and deviation
    network = (pretraining.model, pretraining.image_size, pretraining.in_chans)
    return fresh_encoder(ViTConfig(*network, half, half), seed).eval()


def read_judged(folder: Path) -> dict[str, np.ndarray]:
    """What was measured already, by measure."""
    file = folder / "judged.npz"
    if not file.is_file():
        return {}
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_judged(folder: Path, found: Mapping[str, np.ndarray]) -> None:
    """Keep what was measured, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".judged.partial.npz"
    np.savez(partial, **{name: np.asarray(right, bool) for name, right in found.items()})  # type: ignore[arg-type]
    partial.replace(folder / "judged.npz")


def depth_is_enough(measures: Sequence[str], depth: int) -> None:
    """Raises UserError if more blocks are to be tuned than there are."""
    for measure in measures:
        blocks = measure.partition(":")[2]
        if blocks and count_blocks(blocks) not in (float("inf"),) and count_blocks(blocks) > depth:
            raise UserError(f"{measure} of an encoder of {depth} blocks; accepted: at most {depth}")
