"""Judge one arm under one seed: which of the test images does it tell right, by each measure."""

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
from quarterview.errors import UserError
from quarterview.evaluation.config import COMMON
from quarterview.evaluation.corruptions import library, one_of, predictions
from quarterview.evaluation.evaluators import Evaluator
from quarterview.evaluation.features import (
    BackboneConfig,
    Encoder,
    encoder_features,
    extract,
    partly_visible,
)
from quarterview.evaluation.knn import Knn
from quarterview.evaluation.labelled import LabelledSplit
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.predictions import correct_predictions
from quarterview.models.classifier import Classifier
from quarterview.models.config import MAEConfig
from quarterview.models.create import fresh_model
from quarterview.models.mae import MaskedAutoencoder
from quarterview.studies.config import TUNED, StudyConfig, parts_of
from quarterview.studies.plain_features import PLAIN
from quarterview.studies.plan import network_flags
from quarterview.studies.study import Start
from quarterview.training.distributed import choose_device
from quarterview.weights.config import SCRATCH, count_blocks
from quarterview.weights.loading import load, load_classifier

NEIGHBOURS = 20
TUNE_STEPS = 500
"""Updates of fine-tuning, if nothing is said and there is time."""
SEVERITY = 3
"""Of the corruptions: the middle one."""


class StoppedError(Exception):
    """A signal stopped a run."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


def frozen(
    encoders: Mapping[str, Encoder],
    shape: BackboneConfig,
    measures: Sequence[str],
    images: LabelledSplit,
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
    chosen = images.choose(min(config.labels, len(images.train)), seed)
    train, kept = extract(encoders, images.train, chosen.tolist(), shape, device)
    test, seen = extract(encoders, images.test, range(len(images.test)), shape, device)
    labels, truth = images.train_labels[kept], images.test_labels[seen]
    evaluators: dict[str, Evaluator] = {
        "knn": Knn(NEIGHBOURS, device=device),
        "linear": LogisticRegression(seed),
    }
    found: dict[str, np.ndarray] = {}
    for measure in measures:
        kind, _, visible = parts_of(measure)
        predicted = evaluators[kind].predict(train[visible], labels, test[visible])
        found[measure] = (predicted == truth).numpy()
    return found


def tuned(
    run: str,
    pretraining: PretrainConfig,
    measure: str,
    images: LabelledSplit,
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
    flags = {
        "run": run,
        "train": config.train,
        "test": config.test,
        "labels": min(config.labels, len(images.train)),
        "out": str(out),
        "seed": seed,
        "steps": config.tune_steps or TUNE_STEPS,
        "blocks": (measure.partition(":")[2] or "all",),
        "workers": config.workers,
        "device": config.device,
        "precision": pretraining.compute.precision,
    }
    if run == SCRATCH:
        flags |= {**network_flags(pretraining), "layer_decay": 1.0}
    result = finetune(recipes.read_finetune("small").with_flags(**flags))
    if result.run.status != "complete":
        raise StoppedError(result.run.status)
    return correct_predictions(out, images.test_labels)


def corrupted(model: Classifier, images: LabelledSplit, precision: Literal["bf16", "fp32"]) -> np.ndarray:
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
    images: LabelledSplit,
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
        found["corrupted"] = corrupted(model, images, pretraining.compute.precision)
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
        source = open_sources(pretraining.data.data, pretraining.model.in_chans)
        return model.config, {"": PLAIN[start](source, pretraining.model.image_size, seed)}
    model.to(choose_device(config.device))
    kind = "cls" if pretraining.method.compares and run is not None else "mean"
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
    half = (0.5,) * pretraining.model.in_chans
    network = network_flags(pretraining)
    config = MAEConfig(**network, mean=half, std=half, decoder_depth=0, encoder_mask_tokens=True)
    return fresh_model(config, seed).eval()


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
    depth = pretraining.model.shape.depth
    if "corrupted" in measures:
        library()  # before hours of training
        if pretraining.model.in_chans != 3:
            raise UserError(
                f"The measure corrupted needs images of 3 channels, not {pretraining.model.in_chans}. Leave "
                "it out."
            )
    for measure in measures:
        kind, blocks, visible = parts_of(measure)
        if start in PLAIN and (kind in TUNED or visible):
            raise UserError(f"The measure {measure} needs a network, not {start}. Give linear or knn.")
        if blocks and depth < count_blocks(blocks) < math.inf:
            raise UserError(
                f"The measure {measure} needs more blocks than the encoder's {depth}. Give at most {depth}."
            )
