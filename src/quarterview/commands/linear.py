"""``quarterview linear``: evaluate frozen features by a linear classifier."""

from collections.abc import Mapping, Sequence

from quarterview.commands.config import LinearConfig
from quarterview.commands.probe_results import count_unreadable, print_accuracies, record_probe
from quarterview.commands.required import require_flags
from quarterview.evaluation.features import extract_features
from quarterview.evaluation.labelled import check_classes
from quarterview.evaluation.linear import C_VALUES, HELD_OUT_FRACTION, LogisticRegression
from quarterview.evaluation.linear_paper import TrainingImages, make_schedule, predict_with_head, train_heads
from quarterview.evaluation.probe import open_probe
from quarterview.evaluation.statistics import compute_accuracy_metrics
from quarterview.training.console import Console, Progress
from quarterview.training.logging import ThroughputMeter, format_metrics


def main(config: LinearConfig, argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    evaluate_linear(config, Console(), argv)
    return 0


def evaluate_linear(config: LinearConfig, console: Console, argv: Sequence[str] = ()) -> dict[str, float]:
    """Train a linear classifier on the features of each encoder, print a table and record the result.

    Args:
        config: images, encoder and protocol.
        console: prints the table.
        argv: the command line, for the record.

    Returns:
        The test accuracy of each encoder by name.

    Raises:
        UserError: if the images cannot be used.
    """
    require_flags(config, "run")
    protocol = _run_paper if config.classifier.protocol == "paper" else _run_fast
    return protocol(config, console, argv)


def _run_fast(config: LinearConfig, console: Console, argv: Sequence[str]) -> dict[str, float]:
    """Extract features once, then fit a logistic regression."""
    probe = open_probe(config.images, config.probe)
    features = probe.extract_features()
    num_train, num_test = next((len(f.train_labels), len(f.test_labels)) for f in features.values())
    evaluate = LogisticRegression(config.probe.seed)
    results = {name: dict(evaluate(each)) for name, each in features.items()}
    accuracies = {name: row["accuracy"] for name, row in results.items()}

    title = f"linear classifier, {probe.pool} features"
    print_accuracies(title, accuracies, probe, num_train, num_test, console)
    settings = {"strengths": C_VALUES, "held_out": HELD_OUT_FRACTION}
    record_probe(
        "linear", config, probe, settings, count_unreadable(probe, num_train, num_test), results, argv
    )
    return accuracies


def _run_paper(config: LinearConfig, console: Console, argv: Sequence[str]) -> dict[str, float]:
    """Train by the paper's protocol, with new crops in every epoch, and evaluate after the last one."""
    probe = open_probe(config.images, config.probe, default_pool="cls")
    images, paper = probe.split, config.classifier
    check_classes(images.train_labels[probe.labeled_ids])
    train_images = TrainingImages(images.train, probe.labeled_ids.tolist(), probe.device)
    labels = images.train_labels[train_images.ids]
    check_classes(labels)
    schedule, batch_size = make_schedule(paper, len(train_images))
    meter = ThroughputMeter()

    def log(row: Mapping[str, float]) -> None:
        meter.num_images += batch_size
        rate, waiting = meter.read_and_reset()
        step = int(row["step"])
        shown = {**row, "images_per_s": rate, "data_wait": waiting}
        progress.update(step, format_metrics(shown, progress.remaining(step)))

    with Progress(console, schedule.total_steps) as progress:
        heads = train_heads(probe, train_images, labels, schedule, batch_size, log)
    test_features, kept = extract_features(
        probe.encoders,
        images.test,
        range(len(images.test)),
        probe.backbone_config,
        probe.device,
        crop_pct=probe.crop_pct,
    )
    truth = images.test_labels[kept]
    results = {
        name: dict(compute_accuracy_metrics(predict_with_head(head, test_features[name]) == truth))
        for name, head in heads.items()
    }
    accuracies = {name: row["accuracy"] for name, row in results.items()}

    title = f"linear classifier, the paper's protocol, {paper.epochs} epochs, {probe.pool} features"
    print_accuracies(title, accuracies, probe, len(labels), len(truth), console)
    settings = {
        **{name: getattr(paper, name) for name in ("epochs", "warmup_epochs", "batch_size", "blr")},
        "batch_size_used": batch_size,
    }
    num_unreadable = count_unreadable(probe, len(labels), len(truth))
    record_probe("linear-paper", config, probe, settings, num_unreadable, results, argv)
    return accuracies
