"""``quarterview robustness``: evaluate a classifier on corrupted images and on other test sets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from quarterview.commands.config import RobustnessCommandConfig
from quarterview.commands.required import require_flags
from quarterview.data.sources.base import Source
from quarterview.data.sources.open import open_sources
from quarterview.errors import UserError
from quarterview.evaluation import results
from quarterview.evaluation.class_map import ClassMap, map_labels, read_class_map
from quarterview.evaluation.config import COMMON_CORRUPTIONS, RobustnessConfig
from quarterview.evaluation.corruptions import load_library
from quarterview.evaluation.labelled import check_classes, describe_images
from quarterview.evaluation.robustness import CorruptionResult, SetAccuracy, evaluate_corrupted, evaluate_set
from quarterview.evaluation.statistics import compute_standard_error
from quarterview.models.classifier import Classifier
from quarterview.training.console import Console, Progress
from quarterview.training.distributed import choose_device
from quarterview.weights.loading import load_classifier


def main(config: RobustnessCommandConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    require_flags(config, "run")
    evaluate_robustness(config.robustness, Console(), argv)
    return 0


@dataclass(frozen=True)
class RobustnessResult:
    """Accuracies of a classifier on corrupted images and on other test sets."""

    corrupted: CorruptionResult | None
    """Accuracies on the corrupted images of --test; None without --test."""
    sets: Mapping[str, SetAccuracy]
    """Accuracies on the sets of --sets, by name."""


def evaluate_robustness(
    config: RobustnessConfig, console: Console, argv: Sequence[str] = ()
) -> RobustnessResult:
    """Evaluate a classifier on corrupted images and on other test sets, print tables and record the results.

    Args:
        config: the classifier, the images and the corruptions.
        console: prints the tables.
        argv: the command line, for the record.

    Raises:
        UserError: if no images are given, the weights are not a classifier's, the images have other classes
            or are not 8-bit RGB, or the extra ``quarterview[robustness]`` is not installed.
    """
    if not (config.test or config.sets):
        raise UserError("No images are given. Give --test IMAGES, --sets NAME=IMAGES, or both.")
    model = load_classifier(config.run, config.ema).to(choose_device(config.device))
    classes = read_class_map(config.class_map) if config.class_map else {}
    if config.test:
        load_library()  # fails early if it is not installed
    test = open_sources(config.test, model.config.in_chans) if config.test else None
    specs = {name: (images,) for name, images in config.named_sets.items()}
    sources = {name: open_sources(spec, model.config.in_chans) for name, spec in specs.items()}
    truths = {
        name: map_labels(source, model.config, classes, f"the set {name}") for name, source in sources.items()
    }
    for name, truth in truths.items():
        check_classes(truth, f"the set {name}")

    corrupted = None
    if test is not None:
        corrupted = _evaluate_corrupted(model, test, classes, config, console)
        _print_corrupted(corrupted, config, console)
        _record_corrupted(config, corrupted, describe_images(config.test, test), classes, argv)
    sets = dict[str, SetAccuracy]()
    for name, source in sources.items():
        sets[name] = evaluate_set(model, source, truths[name], config)
        info = describe_images(specs[name], source)
        _record(config, f"set-{name}", classes, info, {}, asdict(sets[name]), argv)
    if sets:
        _print_sets(sets, console)
    return RobustnessResult(corrupted, sets)


def _evaluate_corrupted(
    model: Classifier, test: Source, classes: ClassMap, config: RobustnessConfig, console: Console
) -> CorruptionResult:
    """Evaluate on clean images and on every corruption at every severity, with a progress bar."""
    truth = map_labels(test, model.config, classes, "--test")
    count = len(config.corruption_names) * len(set(config.severities))
    console.info(f"{len(test)} test images, {count} corruptions of each.")
    with Progress(console, len(test), unit="image") as progress:
        return evaluate_corrupted(model, test, truth, config, progress.advance)


# ---------------------------------------------------------------------- tables and records


def _print_corrupted(result: CorruptionResult, config: RobustnessConfig, console: Console) -> None:
    _warn_unreadable(result.unreadable, "test", console)
    columns = ["corruption", *(str(s) for s in result.severities), "mean"]
    rows: list[tuple[str, ...]] = [("none", *("" for _ in result.severities), f"{result.clean:.1%}")]
    errors = result.corruption_errors if config.alexnet else {}
    for name, by_severity in result.accuracies.items():
        accuracies = (*by_severity.values(), fmean(by_severity.values()))
        rows.append((name.replace("_", " "), *(f"{accuracy:.1%}" for accuracy in accuracies)))
    if config.alexnet:
        columns.append("CE")
        shown = [f"{errors[name]:.1%}" if name in errors else "" for name in result.accuracies]
        rows = [(*row, last) for row, last in zip(rows, ["", *shown], strict=True)]
    title = (
        f"accuracy on corrupted images, by severity; {result.images} test images, {result.classes} classes"
    )
    console.table(title, columns, rows)
    if result.mean_error is not None:
        count = len([name for name in result.accuracies if name in COMMON_CORRUPTIONS])
        console.info(
            f"Mean error over {count} of the 15 common corruptions: {result.mean_error:.1%}. Clean error: "
            f"{1 - result.clean:.1%} ± {compute_standard_error(result.clean, result.images):.1%}."
        )
    if config.alexnet:
        console.info(
            f"mCE {100 * result.mce:.1f}: the mean ratio of errors to AlexNet's on ImageNet-C (column CE), "
            "which are for ImageNet's 1000 classes and validation images."
        )


def _print_sets(sets: Mapping[str, SetAccuracy], console: Console) -> None:
    rows = []
    for name, result in sets.items():
        _warn_unreadable(result.unreadable, name, console)
        accuracy = (f"{result.accuracy:.1%}", f"± {result.standard_error:.1%}")
        rows.append((name, str(result.images), str(result.classes), f"{1 / result.classes:.1%}", *accuracy))
    columns = ["set", "images", "classes", "chance", "accuracy", "standard error"]
    console.table("other test sets, among the classes of each", columns, rows)


def _warn_unreadable(count: int, set_name: str, console: Console) -> None:
    if count:
        console.warning(f"{count} image(s) of {set_name} could not be read and were skipped.")


def _record_corrupted(
    config: RobustnessConfig,
    result: CorruptionResult,
    data: Mapping[str, Any],
    classes: ClassMap,
    argv: Sequence[str],
) -> None:
    names = ("corruptions", "severities", "seed", "alexnet")
    settings = {"library": load_library()[1], **{name: getattr(config, name) for name in names}}
    values: dict[str, Any] = {
        **asdict(result),
        "standard_error": compute_standard_error(result.clean, result.images),
        "mean_error": result.mean_error,
    }
    if config.alexnet:
        values |= {"corruption_errors": result.corruption_errors, "mce": result.mce}
    _record(config, "corrupted", classes, data, settings, values, argv)


def _record(
    config: RobustnessConfig,
    name: str,
    classes: ClassMap,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    argv: Sequence[str],
) -> None:
    """Write a result into the run's results folder; nothing for weights outside of a run."""
    names = ("ema", "crop_pct", "batch_size", "precision", "device")
    results.record_result(
        config.run,
        config.ema,
        f"{name}-ema" if config.ema else name,
        argv,
        {**{key: getattr(config, key) for key in names}, "class_map": dict(classes), **settings},
        data,
        result,
    )
