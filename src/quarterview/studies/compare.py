"""Did pre-training help? Backbones beside random weights and raw pixels, by every protocol, and a verdict.

Each seed draws other labelled images, another random encoder and other batches, and within a seed
every arm gets the same images. `verdict` says what the figures allow to be said.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quarterview import rng
from quarterview.commands.finetune import SCRATCH, FinetuneConfig, finetune, told_right
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError, check_types, unknown
from quarterview.evaluation.features import (
    Backbone,
    Encoder,
    choose_labelled,
    encoder_features,
    extract,
    fresh_twin,
    pixel_features,
)
from quarterview.evaluation.knn import nearest, vote
from quarterview.evaluation.linear import check_classes, choose_strength, fit
from quarterview.evaluation.results import write_result
from quarterview.evaluation.timm_backbone import TimmBackbone, open_timm
from quarterview.models.classifier import Classifier
from quarterview.studies.compare_page import Between, Page, Point, write_page
from quarterview.studies.verdict import Comparison, Estimate, Verdict, contrast, estimate, judge, signed
from quarterview.training.distributed import choose_device
from quarterview.training.logging import Journal
from quarterview.training.run import to_plain
from quarterview.weights.loading import load, read

PROTOCOLS = {"finetune": "fine-tuning", "linear": "linear classifier", "knn": "nearest neighbours"}
"""What each protocol is called, the one that counts most first."""
RANDOM, PIXELS, TIMM = "random encoder", "raw pixels", "timm:"
_LEAST_A_CLASS = 2

Status = Literal["helped", "did not help", "cannot tell", "SIGTERM", "SIGINT"]
Measured = dict[tuple[str, int, str], np.ndarray]
"""By protocol, number of labelled images and arm: bool [S, M], which test images each seed told right."""


@dataclass(frozen=True)
class CompareConfig(FinetuneConfig):
    """What is compared, and the recipe of fine-tuning, which is one for all."""

    arms: tuple[str, ...] = ()
    """Runs, checkpoint folders, .safetensors files or timm:NAME. scratch and random, which stand in
    every comparison, may be named too."""
    counts: tuple[str, ...] = ("1%", "10%", "100%")
    """How many of the training images have labels: shares of them or numbers."""
    seeds: int = 3
    """How many choices of labelled images, random encoders and fine-tuning runs there are of each."""
    protocols: tuple[str, ...] = ("knn", "linear", "finetune")
    """knn, linear, finetune: any of them."""
    k: int = 20
    """Neighbours that vote, each by exp(cosine / 0.07); all where there are fewer images."""
    least_steps: int = 500
    """Fine-tune for at least so many updates: a hundred passes over fifty images are too few of them
    for random weights, and an easy win is no help."""
    scratch_layer_decay: float = 1.0
    """Layer decay of random weights, which have no lower layers worth protecting (table 11)."""
    worthwhile: float = 1.0
    """The smallest gain worth having, in points of accuracy."""

    def __post_init__(self) -> None:
        for name in ("arms", "counts", "protocols"):
            values = getattr(self, name)
            values = (values,) if isinstance(values, str) else tuple(map(str, values))
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        FinetuneConfig.__post_init__(self)
        check_types(self, CompareConfig)
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                raise unknown("protocol", protocol, PROTOCOLS)
        for name, least in (("seeds", 1), ("k", 1), ("least_steps", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}; accepted: {least} or more")
        if not 0 < self.scratch_layer_decay <= 1:
            raise UserError(
                f"scratch layer decay {self.scratch_layer_decay}; accepted: a number above 0, at most 1"
            )
        if not 0 < self.worthwhile < 100:
            raise UserError(f"worthwhile {self.worthwhile}; accepted: points of accuracy above 0")
        for count in self.counts:
            resolve(count, 100)
        if self.resume != "auto":
            raise UserError(f"--resume {self.resume}; accepted: auto, for runs that are complete are kept")
        if self.run or self.model or self.labels is not None or len(self.blocks) > 1:
            raise UserError(
                "run, model, labels and several blocks are finetune's; accepted: arms and --counts, and the "
                "network is that of the first arm"
            )


def resolve(count: str, images: int) -> int:
    """How many labelled images `10%` or `500` means. Raises UserError if it means none."""
    text = count.removesuffix("%")
    try:
        number = float(text) if text != count else int(text)
    except ValueError:
        number = -1.0
    if not number > 0 or (text != count and number > 100):
        raise UserError(f"{count} labelled images; accepted: a share such as 10%, or a number")
    return max(1, round(number * images / 100)) if text != count else int(number)


class Compared(NamedTuple):
    """How a comparison ended."""

    status: Status
    """The verdict on the first arm, or the signal that stopped it."""
    verdicts: tuple[Verdict, ...]
    report: Path | None
    """The page; None if a signal came first."""


def compare(config: CompareConfig, journal: Journal, argv: Sequence[str] = ()) -> Compared:
    """Measure every arm, give the verdict, and write ``results/compare.json`` and ``report.html``.

    The runs of fine-tuning stay in ``runs/``; those that are complete are not trained again.

    Raises:
        UserError: if the request cannot be met: an arm that is no model, images without labels, …
        RunError: if a run of fine-tuning cannot go on.
    """
    if not config.out or not config.train or not config.test or not config.protocols:
        raise UserError("something is missing; accepted: compare A … --train … --test … --out FOLDER")
    arms = open_arms(config)
    images = _open_images(config, arms, journal)
    measured: Measured = {}
    frozen = [protocol for protocol in ("knn", "linear") if protocol in config.protocols]
    if frozen:
        _measure_frozen(config, arms, images, frozen, measured, journal)
    tunable = [arm for arm in arms if arm.tunable]
    if "finetune" in config.protocols and tunable:
        status = _measure_tuned(config, tunable, images, measured, journal, argv)
        if status != "complete":
            return Compared(status, (), None)
    verdicts = tuple(
        judge(arm.name, comparisons(measured, arm.name), config.worthwhile / 100) for arm in arms
    )
    report = _report(config, arms, images, measured, verdicts, journal, argv)
    return Compared(verdicts[0].answer, verdicts, report)


# ---------------------------------------------------------------------- arms and images


class Arm(NamedTuple):
    """A pre-trained backbone that is judged."""

    name: str
    """In tables."""
    given: str
    """As the user named it."""
    model: Backbone
    digest: str
    """Of its weights file, or timm's tag of the weights."""
    tunable: bool


def open_arms(config: CompareConfig) -> list[Arm]:
    """Load every pre-trained arm.

    Raises:
        UserError: if there is none, or one of them cannot be loaded or fine-tuned.
    """
    named = [given for given in config.arms if given not in (SCRATCH, "random")]
    if not named:
        raise UserError(
            "no pre-trained arm; accepted: a run, a checkpoint folder, a .safetensors file or timm:NAME, "
            "beside which scratch, random and raw pixels stand anyway"
        )
    arms: list[Arm] = []
    for given in named:
        if given.startswith(TIMM):
            if set(config.protocols) == {"finetune"}:
                raise UserError(f"{given} is not fine-tuned here; accepted with it: --protocols knn linear")
            model, digest = open_timm(given.removeprefix(TIMM))
            tunable = False
        else:
            model, digest = load(given, config.from_ema), read(given, config.from_ema).digest
            tunable = True
            if isinstance(model, Classifier) and "finetune" in config.protocols:
                raise UserError(
                    f"{given} is a fine-tuned classifier, which is not fine-tuned again; accepted: a "
                    "pre-trained masked autoencoder, or --protocols knn linear"
                )
        arms.append(Arm(given, given, model, digest, tunable))
        if model.config.in_chans != arms[0].model.config.in_chans:
            raise UserError(f"{named[0]} and {given} take other channels; accepted: the same")
    return arms


def random_twin(model: Backbone, seed: int) -> Backbone:
    """The same network with the initial weights that belong to a seed."""
    if not isinstance(model, TimmBackbone):
        return fresh_twin(model, seed)
    with rng.seeded(seed, "init"):
        return open_timm(model.vit.pretrained_cfg["architecture"], pretrained=False)[0]


class _Images(NamedTuple):
    """The labelled images of a comparison."""

    train: Source
    train_labels: Tensor
    test: Source
    test_labels: Tensor
    counts: tuple[int, ...]
    """Numbers of labelled images, rising."""
    notes: tuple[str, ...]
    """What was left out, and why."""

    def chosen(self, count: int, seed: int) -> Tensor:
        """The training images whose labels are used; those that fine-tuning chooses."""
        return choose_labelled(self.train_labels, count, seed)


def _open_images(config: CompareConfig, arms: Sequence[Arm], journal: Journal) -> _Images:
    channels = arms[0].model.config.in_chans
    train, test = open_sources(config.train, channels), open_sources(config.test, channels)
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError("--train and --test have different classes; accepted: the same")
    labels, test_labels = torch.tensor(labels_of(train)), torch.tensor(labels_of(test))
    check_classes(labels)
    counts, notes = set(), []
    if "finetune" in config.protocols:
        notes = [
            f"{arm.name} is judged frozen only: timm's are not fine-tuned" for arm in arms if not arm.tunable
        ]
    least = _LEAST_A_CLASS * len(labels.unique())
    for given in config.counts:
        count = resolve(given, len(labels))
        if least <= count <= len(labels):
            counts.add(count)
        else:
            notes.append(
                f"{given} of {len(labels):,} labelled images were left out: that is {count:,}, and "
                f"{least:,} (two a class) to {len(labels):,} can be compared"
            )
    for note in notes:
        journal.warn(note)
    if not counts:
        raise UserError(f"no --counts left; accepted: {least} to {len(labels)} labelled images")
    return _Images(train, labels, test, test_labels, tuple(sorted(counts)), tuple(notes))


# ---------------------------------------------------------------------- frozen features


def _measure_frozen(
    config: CompareConfig,
    arms: Sequence[Arm],
    images: _Images,
    protocols: Sequence[str],
    measured: Measured,
    journal: Journal,
) -> None:
    """k-NN and linear probes of every arm, the random encoders and raw pixels."""
    device = choose_device(config.device)
    seeds = range(config.seed, config.seed + config.seeds)
    used = sorted({int(i) for count in images.counts for seed in seeds for i in images.chosen(count, seed)})
    journal.say(f"features of {len(used):,} training and {len(images.test):,} test images")
    for name, mine, model, encoder in _encoders(config, arms, seeds):
        train, test, kept, test_kept = _features(name, model, encoder, images, used, device, config.crop_pct)
        truth = images.test_labels[test_kept]
        place = torch.full((len(images.train),), -1)
        place[kept] = torch.arange(len(kept))
        for count in images.counts:
            known: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
            for seed in mine:
                chosen = images.chosen(count, seed)
                chosen = chosen[place[chosen] >= 0]  # what could be read
                key = tuple(chosen.tolist())
                if key not in known:  # with all labels, the seeds of one encoder are alike
                    answers = (train[place[chosen]], images.train_labels[chosen], test, truth)
                    known[key] = {p: _PROBES[p](*answers, config, device) for p in protocols}
                for protocol, right in known[key].items():
                    row = (protocol, count, name)
                    measured[row] = np.vstack([*measured.get(row, ()), right])
        journal.say(f"judged: {name}" + (f", seed {mine[0]}" if name == RANDOM else ""))


def _encoders(
    config: CompareConfig, arms: Sequence[Arm], seeds: Sequence[int]
) -> Iterator[tuple[str, Sequence[int], Backbone, Encoder]]:
    """The name of each frozen encoder, the seeds that it stands for, and its network, one after the other."""
    first = arms[0].model
    for arm in arms:
        yield arm.name, seeds, arm.model, encoder_features(arm.model, config.pool)
    for seed in seeds:
        twin = random_twin(first, seed)
        yield RANDOM, [seed], twin, encoder_features(twin, config.pool)
    yield PIXELS, seeds, first, pixel_features


def _features(
    name: str,
    model: Backbone,
    encoder: Encoder,
    images: _Images,
    used: Sequence[int],
    device: torch.device,
    crop_pct: float | None,
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Features of the training images `used` and of the test images, and which could be read."""
    if isinstance(model, nn.Module):
        model.to(device)
    of = partial(extract, config=model.config, device=device, crop_pct=crop_pct)
    train, kept = of({name: encoder}, images.train, used)
    test, test_kept = of({name: encoder}, images.test, range(len(images.test)))
    if isinstance(model, nn.Module):
        model.cpu()
    return train[name], test[name], kept, test_kept


def _knn(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, config: CompareConfig, device: torch.device
) -> np.ndarray:
    """bool [M]: which test images their weighted neighbours tell right."""
    similarity, index = nearest(train, test, min(config.k, len(train)), device)
    return (vote(similarity, labels[index], "weighted") == truth).numpy()


def _linear(
    train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, config: CompareConfig, _device: torch.device
) -> np.ndarray:
    """bool [M], likewise of a linear classifier; its strength is chosen on a fifth of the training images."""
    check_classes(labels)
    strength = choose_strength(train.numpy(), labels.numpy(), config.seed)
    predicted = fit(train.numpy(), labels.numpy(), strength).predict(test.numpy())
    return np.equal(predicted, truth.numpy())


_PROBES: Mapping[str, Callable[..., np.ndarray]] = {"knn": _knn, "linear": _linear}


# ---------------------------------------------------------------------- fine-tuning


def _measure_tuned(
    config: CompareConfig,
    arms: Sequence[Arm],
    images: _Images,
    measured: Measured,
    journal: Journal,
    argv: Sequence[str],
) -> Literal["complete", "SIGTERM", "SIGINT"]:
    """Fine-tune every arm and random weights, for every count and seed; then see what they tell right."""
    plans = [(arm.name, arm.given, f"{_slug(arm.given)}-{arm.digest[:8]}") for arm in arms]
    total = len(images.counts) * config.seeds * (len(plans) + 1)
    done = 0
    for count in images.counts:
        for seed in range(config.seed, config.seed + config.seeds):
            for name, given, slug in (*plans, (SCRATCH, SCRATCH, f"{SCRATCH}-{plans[0][2]}")):
                done += 1
                journal.say(f"fine-tuning {done} of {total}: {name}, {count:,} labelled images, seed {seed}")
                folder = Path(config.out) / "runs" / f"{slug}-{count}-seed{seed}"
                result = finetune(recipe(config, arms[0], given, count, seed, folder), argv)
                if result.run.status != "complete":
                    return result.run.status
                right = told_right(result.run.folder, images.test_labels)
                row = ("finetune", count, name)
                measured[row] = np.vstack([*measured.get(row, ()), right])
    return "complete"


def _slug(given: str) -> str:
    """A name for a folder from the last words of a path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(given).name)[-40:].strip("-.") or "arm"


def recipe(
    config: CompareConfig, first: Arm, given: str, count: int, seed: int, folder: Path
) -> FinetuneConfig:
    """The fine-tuning of one arm: that of every other but for the start, and layer decay from scratch."""
    values: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(FinetuneConfig)}
    values |= {"run": given, "labels": count, "seed": seed, "out": str(folder)}
    if config.total_steps(count) < config.least_steps and config.steps is None:
        values |= {"steps": config.least_steps, "warmup_epochs": None}  # a warm-up of the same share
    if given == SCRATCH:
        network: Any = first.model.config
        values |= {
            "model": network.model,
            "image_size": config.image_size or network.image_size,
            "in_chans": network.in_chans,
            "cls_tokens": network.cls_tokens,
            "layer_decay": config.scratch_layer_decay,
            "from_ema": False,
        }
    return FinetuneConfig(**values)


# ---------------------------------------------------------------------- what came of it


def comparisons(measured: Measured, arm: str) -> list[Comparison]:
    """An arm against random weights, and for frozen features against raw pixels too."""
    found = []
    for protocol in PROTOCOLS:
        baselines = (SCRATCH,) if protocol == "finetune" else (RANDOM, PIXELS)
        for count in sorted({c for p, c, name in measured if (p, name) == (protocol, arm)}):
            ours = measured[protocol, count, arm]
            contrasts = (contrast(b, ours, measured[protocol, count, b]) for b in baselines)
            found.append(Comparison(protocol, count, tuple(contrasts)))
    return found


def _report(
    config: CompareConfig,
    arms: Sequence[Arm],
    images: _Images,
    measured: Measured,
    verdicts: Sequence[Verdict],
    journal: Journal,
    argv: Sequence[str],
) -> Path:
    """Say it, write ``results/compare.json`` and the page."""
    points = _points(measured)
    rivals = between(measured, [arm.name for arm in arms])
    compared = {arm.name: comparisons(measured, arm.name) for arm in arms}
    _tables(points, compared, rivals, journal)
    settings = to_plain(config)
    data = {
        "train": images.train.fingerprint(),
        "train_images": len(images.train),
        "test": images.test.fingerprint(),
        "test_images": len(images.test),
        "labelled": list(images.counts),
    }
    results = {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "arms": {arm.name: _described(arm) for arm in arms},
        "accuracies": [asdict(point) for point in points],
        "comparisons": {name: [asdict(c) for c in rows] for name, rows in compared.items()},
        "between": [asdict(row) for row in rivals],
        "notes": list(images.notes),
    }
    out = Path(config.out)
    file = write_result(out / "results", "compare", argv, settings, data, results)
    assert file is not None
    report = write_page(
        out / "report.html",
        Page(
            tuple(verdicts),
            {p: name for p, name in PROTOCOLS.items() if any(point.protocol == p for point in points)},
            tuple(points),
            compared,
            tuple(rivals),
            {arm.name: _described(arm) for arm in arms},
            file,
            config.worthwhile / 100,
        ),
    )
    for verdict in verdicts:
        journal.say(verdict.sentence)
    journal.say(f"See {report}; the figures are in {file}")
    return report


def _described(arm: Arm) -> dict[str, Any]:
    network: Any = arm.model.config
    return {
        "given": arm.given,
        "weights": arm.digest,
        "network": getattr(network, "model", arm.given),
        "image_size": list(network.image_size),
    }


def _points(measured: Measured) -> list[Point]:
    """The accuracy of every arm, by every protocol, at every count."""
    order = {protocol: i for i, protocol in enumerate(PROTOCOLS)}
    rows = sorted(measured, key=lambda row: (order[row[0]], row[1]))
    return [Point(p, count, arm, estimate(measured[p, count, arm].astype(float))) for p, count, arm in rows]


def between(measured: Measured, arms: Sequence[str]) -> list[Between]:
    """Every further arm against the first one, by every protocol that both were judged by."""
    first, *others = arms
    return [
        Between(p, count, name, contrast(first, measured[p, count, name], measured[p, count, first]))
        for p, count, name in measured
        if name in others and (p, count, first) in measured
    ]


def _tables(
    points: Sequence[Point],
    compared: Mapping[str, Sequence[Comparison]],
    rivals: Sequence[Between],
    journal: Journal,
) -> None:
    """A table for each protocol: a row for each arm and each difference, a column for each count."""
    for protocol, title in PROTOCOLS.items():
        cells: dict[str, dict[int, str]] = {}
        for point in points:
            if point.protocol == protocol:
                cells.setdefault(point.arm, {})[point.labels] = _accuracy(point.accuracy)
        differences = [
            (arm, c.labels, d)
            for arm, cs in compared.items()
            for c in cs
            if c.protocol == protocol
            for d in c.contrasts
        ]
        differences += [(row.arm, row.labels, row.contrast) for row in rivals if row.protocol == protocol]
        for arm, labels, found in differences:
            cells.setdefault(f"{arm} less {found.baseline}", {})[labels] = _points_of(found.difference)
        counts = sorted({labels for row in cells.values() for labels in row})
        if counts:
            journal.table(
                f"{title}: accuracy and points of difference, with 95% intervals",
                ["labelled images", *(f"{n:,}" for n in counts)],
                [(name, *(row[n] for n in counts)) for name, row in cells.items()],
            )


def _accuracy(found: Estimate) -> str:
    low, high = found.as_share
    return f"{found.mean:.1%} ({low:.1%} to {high:.1%})"


def _points_of(found: Estimate) -> str:
    return f"{signed(found.mean)} ({signed(found.low)} to {signed(found.high)})"
