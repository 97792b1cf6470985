"""``quarterview robustness``: how a classifier does on corrupted images and on other sets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from quarterview.commands.config import RobustnessCommandConfig
from quarterview.commands.required import require
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.evaluation import results
from quarterview.evaluation.class_map import ClassMap, classes_of, read_class_map
from quarterview.evaluation.config import COMMON, RobustnessConfig
from quarterview.evaluation.corruptions import library
from quarterview.evaluation.labelled import check_classes, describe_images
from quarterview.evaluation.robustness import Corrupted, SetAccuracy, corrupted_accuracy, set_accuracy
from quarterview.evaluation.statistics import standard_error
from quarterview.models.classifier import Classifier
from quarterview.training.console import Console, Progress
from quarterview.training.distributed import choose_device
from quarterview.weights.loading import load_classifier


def main(config: RobustnessCommandConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    require(config, "run")
    robustness(config.robustness, Console(), argv)
    return 0


@dataclass(frozen=True)
class Robustness:
    """How a classifier does on corrupted images and on other sets."""

    corrupted: Corrupted | None
    """None without --test."""
    sets: Mapping[str, SetAccuracy]
    """By name."""


def robustness(config: RobustnessConfig, console: Console, argv: Sequence[str] = ()) -> Robustness:
    """Judge a classifier on corrupted images and on other sets, show tables and record the results.

    Args:
        argv: the command line, for the record.

    Raises:
        UserError: if no images are given, the weights are no classifier, a class is none of its, images are
            no 8-bit RGB, or the extra ``quarterview[robustness]`` is not installed.
    """
    if not (config.test or config.sets):
        raise UserError("no images are given. Give --test IMAGES, --sets NAME=IMAGES, or both.")
    model = load_classifier(config.run, config.ema).to(choose_device(config.device))
    classes = read_class_map(config.class_map) if config.class_map else {}
    if config.test:
        library()  # before anything takes long
    test = open_sources(config.test, model.config.in_chans) if config.test else None
    specs = {name: (images,) for name, images in config.named_sets.items()}
    sources = {name: open_sources(spec, model.config.in_chans) for name, spec in specs.items()}
    truths = {
        name: classes_of(source, model.config, classes, f"the set {name}") for name, source in sources.items()
    }
    for name, truth in truths.items():
        check_classes(truth, f"the set {name}")

    corrupted = None
    if test is not None:
        corrupted = _corrupted(model, test, classes, config, console)
        _show_corrupted(corrupted, config, console)
        _record_corrupted(config, corrupted, describe_images(config.test, test), classes, argv)
    sets = dict[str, SetAccuracy]()
    for name, source in sources.items():
        sets[name] = set_accuracy(model, source, truths[name], config)
        described = describe_images(specs[name], source)
        _record(config, f"set-{name}", classes, described, {}, asdict(sets[name]), argv)
    if sets:
        _show_sets(sets, console)
    return Robustness(corrupted, sets)


def _corrupted(
    model: Classifier, test: Source, classes: ClassMap, config: RobustnessConfig, console: Console
) -> Corrupted:
    """Judge on every corruption at every severity, and on none, under a bar."""
    truth = classes_of(test, model.config, classes, "--test")
    count = len(config.names) * len(set(config.severities))
    console.say(f"{len(test)} test images, {count} corruptions of each")
    with Progress(console, len(test), unit="image") as progress:
        return corrupted_accuracy(model, test, truth, config, progress.advance)


# ---------------------------------------------------------------------- tables and records


def _show_corrupted(found: Corrupted, config: RobustnessConfig, console: Console) -> None:
    _note_unreadable(found.unreadable, "test", console)
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
    console.table(title, columns, rows)
    if found.mean_error is not None:
        count = len([name for name in found.accuracies if name in COMMON])
        console.say(
            f"mean error over {count} of the 15 common corruptions: {found.mean_error:.1%}; clean error "
            f"{1 - found.clean:.1%} ± {standard_error(found.clean, found.images):.1%}"
        )
    if config.alexnet:
        console.say(
            f"mCE {100 * found.mce:.1f}: the mean of errors as shares of AlexNet's on ImageNet-C (the column "
            "CE), which are for ImageNet's 1000 classes on its validation images"
        )


def _show_sets(sets: Mapping[str, SetAccuracy], console: Console) -> None:
    rows = []
    for name, found in sets.items():
        _note_unreadable(found.unreadable, name, console)
        accuracy = (f"{found.accuracy:.1%}", f"± {found.standard_error:.1%}")
        rows.append((name, str(found.images), str(found.classes), f"{1 / found.classes:.1%}", *accuracy))
    columns = ["set", "images", "classes", "chance", "accuracy", "standard error"]
    console.table("other sets, between the classes that each has", columns, rows)


def _note_unreadable(count: int, where: str, console: Console) -> None:
    if count:
        console.warn(f"{count} image(s) of {where} could not be read and were left out")


def _record_corrupted(
    config: RobustnessConfig,
    found: Corrupted,
    data: Mapping[str, Any],
    classes: ClassMap,
    argv: Sequence[str],
) -> None:
    names = ("corruptions", "severities", "seed", "alexnet")
    settings = {"library": library()[1], **{name: getattr(config, name) for name in names}}
    judged: dict[str, Any] = {
        **asdict(found),
        "standard_error": standard_error(found.clean, found.images),
        "mean_error": found.mean_error,
    }
    if config.alexnet:
        judged |= {"corruption_errors": found.corruption_errors, "mce": found.mce}
    _record(config, "corrupted", classes, data, settings, judged, argv)


def _record(
    config: RobustnessConfig,
    what: str,
    classes: ClassMap,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    found: Mapping[str, Any],
    argv: Sequence[str],
) -> None:
    """Write a result into the run's results folder; nothing for weights outside a run."""
    names = ("ema", "crop_pct", "batch_size", "precision", "device")
    results.record(
        config.run,
        config.ema,
        f"{what}-ema" if config.ema else what,
        argv,
        {**{name: getattr(config, name) for name in names}, "class_map": dict(classes), **settings},
        data,
        found,
    )
