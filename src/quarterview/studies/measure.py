"""Judge one arm under one seed: which of the test images does it tell right, by each measure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quarterview import recipes
from quarterview.commands.finetune import SCRATCH, count_blocks, finetune, told_right
from quarterview.commands.pretrain import PretrainConfig
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.evaluation.corruptions import COMMON, library, one_of, predictions
from quarterview.evaluation.features import (
    BackboneConfig,
    Encoder,
    choose_labelled,
    encoder_features,
    extract,
    partly_visible,
)
from quarterview.evaluation.knn import nearest, vote
from quarterview.evaluation.linear import check_classes, choose_strength, fit
from quarterview.methods.registry import COMPARING
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.studies.plain_features import PLAIN
from quarterview.studies.plan import StudyConfig
from quarterview.studies.study import TUNED, Start, parts_of
from quarterview.training.distributed import choose_device
from quarterview.weights.loading import load, load_classifier

NEIGHBOURS = 20
TUNE_STEPS = 500
"""Updates of fine-tuning, if nothing is said and there is time."""
SEVERITY = 3
"""Of the corruptions: the middle one."""


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


def open_images(train_images: Sequence[str], test_images: Sequence[str], channels: int) -> Images:
    """Open the labelled images.

    Raises:
        UserError: if they have no labels, or train and test have other classes.
    """
    train, test = open_sources(train_images, channels), open_sources(test_images, channels)
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError("--train and --test have different classes; accepted: the same")
    images = Images(train, torch.tensor(labels_of(train)), test, torch.tensor(labels_of(test)))
    check_classes(images.train_labels)
    return images


def frozen(
    encoders: Mapping[str, Encoder],
    shape: BackboneConfig,
    measures: Sequence[str],
    images: Images,
    config: StudyConfig,
    seed: int,
) -> dict[str, np.ndarray]:
    """bool [M] by measure, of features that are left as they are.

    Args:
        encoders: by the percentage of the patches that they see, as measures name it.
        shape: of their images.
        measures: ``linear``, ``knn``, ``linear@P`` and ``knn@P``.
    """
    device = choose_device(config.device)
    chosen = choose_labelled(images.train_labels, min(config.labels, len(images.train)), seed)
    train, kept = extract(encoders, images.train, chosen.tolist(), shape, device)
    test, seen = extract(encoders, images.test, range(len(images.test)), shape, device)
    labels, truth = images.train_labels[kept], images.test_labels[seen]
    found: dict[str, np.ndarray] = {}
    for measure in measures:
        kind, _, visible = parts_of(measure)
        features, others = train[visible], test[visible]
        if kind == "linear":
            strength = choose_strength(features.numpy(), labels.numpy(), seed)
            predicted = fit(features.numpy(), labels.numpy(), strength).predict(others.numpy())
            found[measure] = np.equal(predicted, truth.numpy())
        else:
            similarity, index = nearest(features, others, min(NEIGHBOURS, len(labels)), device)
            found[measure] = (vote(similarity, labels[index], "weighted") == truth).numpy()
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
        **{"labels": min(config.labels, len(images.train)), "steps": config.tune_steps or TUNE_STEPS},
        **{"blocks": (measure.partition(":")[2] or "all",), "workers": config.workers},
        **{"device": config.device, "precision": pretraining.precision},
    }
    if run == SCRATCH:
        names = ("model", "image_size", "in_chans", "cls_tokens")
        network = {name: getattr(pretraining, name) for name in names}
        values |= {**network, "layer_decay": 1.0}
    result = finetune(replace(recipe, **values))
    if result.run.status != "complete":
        raise StoppedError(result.run.status)
    return told_right(out, images.test_labels)


def corrupted(model: Classifier, images: Images, precision: Literal["bf16", "fp32"]) -> np.ndarray:
    """bool [M], on test images each of which has one of the 15 corruptions of ImageNet-C.

    Which one, and what it draws, depends on the image's number alone: it is the same for all arms and seeds.

    Args:
        model: on its device.
    """
    asked = partial(one_of, COMMON, SEVERITY, 0)
    found = [
        told[:, 0] == images.test_labels[seen]
        for seen, told in predictions(model, images.test, asked, precision=precision)
    ]
    return torch.cat(found).numpy()


def judge(
    run: str | None,
    start: Start,
    pretraining: PretrainConfig,
    measures: Sequence[str],
    images: Images,
    config: StudyConfig,
    seed: int,
    folder: Path,
) -> dict[str, np.ndarray]:
    """Every measure of one arm under one seed; those that are in the folder are not taken again.

    Args:
        run: the folder of a pre-training; None for what needs none.
        folder: where ``judged.npz`` and the runs of fine-tuning are kept.
    """
    found = read_judged(folder)
    missing = [measure for measure in measures if measure not in found]
    still = [measure for measure in missing if parts_of(measure)[0] not in TUNED]
    if still:
        shape, encoders = _encoders(run, start, pretraining, still, config, seed)
        found |= frozen(encoders, shape, still, images, config, seed)
        write_judged(folder, found)
    for measure in missing:
        if measure.startswith("finetune"):
            out = folder / measure.replace(":", "-")
            found[measure] = tuned(run or SCRATCH, pretraining, measure, images, config, seed, out)
            write_judged(folder, found)
    if "corrupted" in missing:
        out = folder / "finetune"
        if not (out / "results" / "finetune.json").is_file():  # whose accuracy nobody asked for
            tuned(run or SCRATCH, pretraining, "finetune", images, config, seed, out)
        model = load_classifier(out).to(choose_device(config.device))
        found["corrupted"] = corrupted(model, images, pretraining.precision)
        write_judged(folder, found)
    return found


def _encoders(
    run: str | None,
    start: Start,
    pretraining: PretrainConfig,
    measures: Sequence[str],
    config: StudyConfig,
    seed: int,
) -> tuple[BackboneConfig, dict[str, Encoder]]:
    """What makes the features of an arm, by the percentage of the patches that it sees.

    Features are the mean of the patch tokens, and the cls token of methods that train that one alone.
    """
    shares = sorted({parts_of(measure)[2] for measure in measures})
    model = _model(run, pretraining, seed)
    if start in PLAIN:
        source = open_sources(pretraining.data, pretraining.in_chans)
        return model.config, {"": PLAIN[start](source, pretraining.image_size, seed)}
    model.to(choose_device(config.device))
    kind = "cls" if pretraining.objective in COMPARING and run is not None else "mean"
    encoders = {
        share: partly_visible(model, int(share) / 100, seed) if share else encoder_features(model, kind)
        for share in shares
    }
    return model.config, encoders


def _model(run: str | None, pretraining: PretrainConfig, seed: int) -> MaskedAutoencoder:
    """The encoder of a run, or with the initial weights that belong to a seed, in a masked autoencoder."""
    if run is not None:
        model = load(run)
        assert isinstance(model, MaskedAutoencoder)
        return model
    half = (0.5,) * pretraining.in_chans  # mean and deviation
    network = (pretraining.model, pretraining.image_size, pretraining.in_chans, half, half)
    network = (*network, pretraining.cls_tokens)
    return fresh_model(MAEConfig(*network, decoder_depth=0, encoder_mask_tokens=True), seed).eval()


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


def check_measures(start: Start, measures: Sequence[str], pretraining: PretrainConfig) -> None:
    """Raises UserError if an arm cannot be judged so: it has no network, or fewer blocks than that."""
    depth = pretraining.shape.depth
    if "corrupted" in measures:
        library()  # before hours of training
        if pretraining.in_chans != 3:
            raise UserError(f"corrupted images of {pretraining.in_chans} channels; accepted: 3")
    for measure in measures:
        kind, blocks, visible = parts_of(measure)
        if start in PLAIN and (kind in TUNED or visible):
            raise UserError(f"{measure} of {start}, which is no network; accepted: linear, knn")
        if blocks and depth < count_blocks(blocks) < math.inf:
            raise UserError(f"{measure} of an encoder of {depth} blocks; accepted: at most {depth}")
