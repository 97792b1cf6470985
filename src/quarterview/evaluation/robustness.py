"""How well a classifier does on corrupted pictures and on other sets (He et al. 2021, table 13)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch

from quarterview.data.loader import LoadConfig
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError, check_types, unknown
from quarterview.evaluation.class_map import ClassMap, classes_of, read_class_map
from quarterview.evaluation.corruptions import (
    COMMON,
    EXTRA,
    SEVERITIES,
    Corruption,
    all_of,
    library,
    predictions,
)
from quarterview.evaluation.features import check_crop_pct, class_scores, extract
from quarterview.evaluation.report import standard_error
from quarterview.evaluation.results import results_folder, write_result
from quarterview.models.classifier import Classifier
from quarterview.training.distributed import choose_device
from quarterview.training.logging import Journal
from quarterview.weights.loading import load_classifier, read

ALEXNET: Mapping[str, float] = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    **{"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    **{"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840},
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean errors on ImageNet-C, by which the mCE divides (Hendrycks and Dietterich 2019)."""
GROUPS: Mapping[str, tuple[str, ...]] = {"common": COMMON, "extra": EXTRA, "all": (*COMMON, *EXTRA)}
"""Words for several corruptions."""
_NAME = re.compile(r"[\w.-]+")

Accuracies = Mapping[str, Mapping[int, float]]
"""By corruption and severity."""


@dataclass(frozen=True)
class RobustnessConfig:
    """Which classifier is judged, and on what."""

    run: str
    """A run of fine-tuning, a checkpoint folder, or other weights of a classifier."""
    test: tuple[str, ...] = ()
    """Labelled images to corrupt: anything that --data of pretrain takes."""
    sets: tuple[str, ...] = ()
    """Other labelled images, each with a name: sketch=FOLDER. Only classes that a set has are guessed."""
    class_map: str | None = None
    """A file that says which of the classifier's classes a class of --test or --sets is, where the names
    differ: .json or .yaml with `name: class`, or .csv with `name,class`."""
    corruptions: tuple[str, ...] = ("common",)
    """Names of corruptions, or common (the 15 of ImageNet-C), extra (its other 4), all."""
    severities: tuple[int, ...] = SEVERITIES
    """From 1 to 5."""
    alexnet: bool = False
    """Also give the mCE, of errors as shares of AlexNet's on ImageNet-C: it is for ImageNet's classes."""
    ema: bool = False
    """Judge the moving average of the weights, of a run with --ema."""
    crop_pct: float | None = None
    """Share of the sides of the largest central box that an image is cut to. By default 0.875 for
    224 × 224 pixels, as the paper does, and 1 for other sizes."""
    batch_size: int = 256
    """Pictures that the classifier sees at a time."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the classifier; fp32 where the device has no bf16."""
    workers: int | None = None
    """Processes that decode and corrupt; by default one on each core, up to 8."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Of what the corruptions draw."""

    def __post_init__(self) -> None:
        for name in ("test", "sets", "corruptions", "severities"):
            values = getattr(self, name)
            object.__setattr__(self, name, (values,) if isinstance(values, str | int) else tuple(values))
        check_types(self, RobustnessConfig)
        check_crop_pct(self.crop_pct)
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}; accepted: 1 or more")
        LoadConfig(workers=self.workers)  # which checks it
        if not (self.test or self.sets):
            raise UserError("no images are named; accepted: --test IMAGES, --sets NAME=IMAGES, or both")
        names = [*GROUPS["all"], *GROUPS]
        for name in self.corruptions:
            if name not in names:
                raise unknown("corruption", name, names)
        if not self.corruptions or not self.severities:
            raise UserError("no corruption or no severity; accepted: one or more of each")
        for severity in self.severities:
            if severity not in SEVERITIES:
                raise UserError(f"severity {severity}; accepted: 1 to 5")
        whole = self.test and {*COMMON} <= {*self.names} and {*SEVERITIES} <= {*self.severities}
        if self.alexnet and not whole:
            raise UserError(
                "--alexnet without --test, all 15 common corruptions and all five severities, which make an "
                "mCE; accepted: --test, and neither --corruptions nor --severities"
            )
        _named(self.sets)

    @property
    def names(self) -> tuple[str, ...]:
        """The corruptions, each once, in the library's order."""
        asked = {name for given in self.corruptions for name in GROUPS.get(given, (given,))}
        return tuple(name for name in GROUPS["all"] if name in asked)


def _named(sets: Sequence[str]) -> dict[str, str]:
    """The images of each set by its name."""
    found: dict[str, str] = {}
    for given in sets:
        name, _, images = given.partition("=")
        if not images or not _NAME.fullmatch(name):
            raise UserError(f"a set {given!r}; accepted: NAME=IMAGES, such as sketch=data/sketch")
        if name in found:
            raise UserError(f"two sets are called {name}; accepted: different names")
        found[name] = images
    return found


@dataclass(frozen=True)
class Corrupted:
    """How a classifier does on a set that is corrupted."""

    images: int
    """That could be read."""
    unreadable: int
    classes: int
    """That the set has."""
    clean: float
    """Accuracy without corruption."""
    accuracies: Accuracies
    severities: tuple[int, ...]

    @property
    def mean_error(self) -> float | None:
        """Over the severities, and those of the 15 common corruptions that were judged; None for none."""
        errors = [1 - fmean(by.values()) for name, by in self.accuracies.items() if name in COMMON]
        return fmean(errors) if errors else None

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Each common corruption's error as a share of AlexNet's, over all severities."""
        return {n: (1 - fmean(by.values())) / ALEXNET[n] for n, by in self.accuracies.items() if n in ALEXNET}

    @property
    def mce(self) -> float:
        """The mean corruption error of Hendrycks and Dietterich 2019, as a share: 1 is AlexNet."""
        return fmean(self.corruption_errors.values())


@dataclass(frozen=True)
class SetAccuracy:
    """How a classifier does on another set."""

    images: int
    """That could be read."""
    unreadable: int
    classes: int
    """That the set has, and between which the classifier chose."""
    accuracy: float
    standard_error: float


@dataclass(frozen=True)
class Robustness:
    """What came of it."""

    corrupted: Corrupted | None
    """None without --test."""
    sets: Mapping[str, SetAccuracy]
    """By name."""


def robustness(config: RobustnessConfig, journal: Journal, argv: Sequence[str] = ()) -> Robustness:
    """Judge a classifier on corrupted images and on other sets, show tables and record the result.

    Args:
        argv: the command line, for the record.

    Raises:
        UserError: if the weights are no classifier, a class is none of its, images are no 8-bit RGB, or
            the extra ``quarterview[robustness]`` is not installed.
    """
    model = load_classifier(config.run, config.ema).to(choose_device(config.device))
    classes = read_class_map(config.class_map) if config.class_map else {}
    specs = {name: (images,) for name, images in _named(config.sets).items()}
    if config.test:
        library()  # before anything takes long
    test = open_sources(config.test, model.config.in_chans) if config.test else None
    sources = {name: open_sources(spec, model.config.in_chans) for name, spec in specs.items()}
    truths = {
        name: classes_of(source, model.config, classes, f"the set {name}") for name, source in sources.items()
    }
    for name, truth in truths.items():
        if len(truth.unique()) < 2:
            raise UserError(f"the set {name} has one class alone; accepted: two or more")
    corrupted = None
    if test is not None:
        corrupted = _corrupted(model, test, classes, config, journal)
        _show_corrupted(corrupted, config, journal)
        _record_corrupted(config, corrupted, _described(config.test, test), classes, argv)
    sets = dict[str, SetAccuracy]()
    for name, source in sources.items():
        sets[name] = set_accuracy(model, source, truths[name], config)
        described = _described(specs[name], source)
        _record(config, f"set-{name}", classes, described, {}, asdict(sets[name]), argv)
    if sets:
        _show_sets(sets, journal)
    return Robustness(corrupted, sets)


def _corrupted(
    model: Classifier, test: Source, classes: ClassMap, config: RobustnessConfig, journal: Journal
) -> Corrupted:
    """Judge on every corruption at every severity, and on none."""
    truth = classes_of(test, model.config, classes, "--test")
    severities = tuple(sorted(set(config.severities)))
    conditions = [Corruption(name, severity) for name in config.names for severity in severities]
    journal.say(f"{len(test)} test images, {len(conditions)} corruptions of each")
    right = torch.zeros(1 + len(conditions), dtype=torch.int64)
    seen = 0
    journal.start_progress(len(test), 0)
    try:
        for images, told in predictions(
            model,
            test,
            partial(all_of, (None, *conditions)),
            config.seed,
            config.crop_pct,
            config.precision,
            LoadConfig(workers=config.workers).threads,
            config.batch_size,
        ):
            right += (told == truth[images][:, None]).sum(dim=0)
            seen += len(images)
            journal.advance(images[-1] + 1)
    finally:
        journal.close()
    if not seen:
        raise UserError("none of the test images could be read")
    clean, *shares = (right.double() / seen).tolist()
    accuracies: dict[str, dict[int, float]] = {}
    for what, share in zip(conditions, shares, strict=True):
        accuracies.setdefault(what.name, {})[what.severity] = share
    return Corrupted(seen, len(test) - seen, len(truth.unique()), clean, accuracies, severities)


def set_accuracy(
    model: Classifier, source: Source, truth: torch.Tensor, config: RobustnessConfig
) -> SetAccuracy:
    """The accuracy on a set, of a classifier that chooses between the classes that the set has.

    So are ImageNet-A and ImageNet-R judged, which have 200 of ImageNet's classes.

    Args:
        model: on its device.
        truth: int64 [N], of `classes_of`, two classes or more.
    """
    present = truth.unique()
    device = next(model.parameters()).device
    scores, seen = extract(
        {"": class_scores(model)},
        source,
        range(len(source)),
        model.config,
        device,
        config.batch_size,
        config.crop_pct,
        config.precision,
    )
    told = present[scores[""][:, present].argmax(dim=1)]
    accuracy = float((told == truth[seen]).double().mean())
    error = standard_error(accuracy, len(seen))
    return SetAccuracy(len(seen), len(source) - len(seen), len(present), accuracy, error)


# ---------------------------------------------------------------------- tables and records


def _show_corrupted(found: Corrupted, config: RobustnessConfig, journal: Journal) -> None:
    _note_unreadable(found.unreadable, "test", journal)
    columns = ["corruption", *(str(s) for s in found.severities), "mean"]
    rows: list[tuple[str, ...]] = [("none", *("" for _ in found.severities), f"{found.clean:.1%}")]
    errors = found.corruption_errors if config.alexnet else {}
    for name, by_severity in found.accuracies.items():
        shares = (*by_severity.values(), fmean(by_severity.values()))
        rows.append((name.replace("_", " "), *(f"{share:.1%}" for share in shares)))
    if config.alexnet:
        columns.append("CE")
        shown = [f"{errors[name]:.1%}" if name in errors else "" for name in found.accuracies]
        rows = [(*row, last) for row, last in zip(rows, ["", *shown], strict=True)]
    title = f"accuracy on corrupted images, by severity; {found.images} test images, {found.classes} classes"
    journal.table(title, columns, rows)
    if found.mean_error is not None:
        count = len([name for name in found.accuracies if name in COMMON])
        journal.say(
            f"mean error over {count} of the 15 common corruptions: {found.mean_error:.1%}; clean error "
            f"{1 - found.clean:.1%} ± {standard_error(found.clean, found.images):.1%}"
        )
    if config.alexnet:
        journal.say(
            f"mCE {100 * found.mce:.1f}: the mean of errors as shares of AlexNet's on ImageNet-C (the column "
            "CE), which are for ImageNet's 1000 classes on its validation images"
        )


def _show_sets(sets: Mapping[str, SetAccuracy], journal: Journal) -> None:
    rows = []
    for name, found in sets.items():
        _note_unreadable(found.unreadable, name, journal)
        accuracy = (f"{found.accuracy:.1%}", f"± {found.standard_error:.1%}")
        rows.append((name, str(found.images), str(found.classes), f"{1 / found.classes:.1%}", *accuracy))
    columns = ["set", "images", "classes", "chance", "accuracy", "standard error"]
    journal.table("other sets, between the classes that each has", columns, rows)


def _note_unreadable(count: int, where: str, journal: Journal) -> None:
    if count:
        journal.warn(f"{count} image(s) of {where} could not be read and were left out")


def _described(specs: Sequence[str], source: Source) -> dict[str, Any]:
    return {"specs": list(specs), "fingerprint": source.fingerprint(), "images": len(source)}


def _record_corrupted(
    config: RobustnessConfig,
    found: Corrupted,
    data: Mapping[str, Any],
    classes: ClassMap,
    argv: Sequence[str],
) -> None:
    names = ("corruptions", "severities", "seed", "alexnet")
    settings = {"library": library()[1], **{name: getattr(config, name) for name in names}}
    results: dict[str, Any] = {
        **asdict(found),
        "standard_error": standard_error(found.clean, found.images),
        "mean_error": found.mean_error,
    }
    if config.alexnet:
        results |= {"corruption_errors": found.corruption_errors, "mce": found.mce}
    _record(config, "corrupted", classes, data, settings, results, argv)


def _record(
    config: RobustnessConfig,
    what: str,
    classes: ClassMap,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    argv: Sequence[str],
) -> None:
    """Write a result into the run's results folder; nothing for weights outside a run."""
    folder, weights = results_folder(config.run), read(config.run, config.ema)
    if folder is None or weights.file is None:
        return
    settings = {
        "weights": str(weights.file.resolve().relative_to(folder.parent)),
        "weights_digest": weights.digest,
        **{name: getattr(config, name) for name in ("ema", "crop_pct", "batch_size", "precision", "device")},
        "class_map": dict(classes),
        **settings,
    }
    write_result(folder, f"{what}-ema" if config.ema else what, argv, settings, data, results)
