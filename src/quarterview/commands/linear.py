"""``quarterview linear``: how much of the classes a linear classifier finds in frozen features."""

from collections.abc import Mapping, Sequence

from quarterview.commands.config import LinearConfig
from quarterview.commands.probe_results import record, show_accuracies, unreadable
from quarterview.commands.required import require
from quarterview.evaluation.features import extract
from quarterview.evaluation.labelled import check_classes
from quarterview.evaluation.linear import HELD_OUT, STRENGTHS, LogisticRegression
from quarterview.evaluation.linear_paper import Pictures, head_predict, plan, train_heads
from quarterview.evaluation.probe import open_probe
from quarterview.evaluation.statistics import figures
from quarterview.training.console import Console, Progress
from quarterview.training.logging import Meter, describe


def main(config: LinearConfig, argv: Sequence[str]) -> int:
    """Carry out the command, and return its exit code."""
    linear(config, Console(), argv)
    return 0


def linear(config: LinearConfig, console: Console, argv: Sequence[str] = ()) -> dict[str, float]:
    """Train a linear classifier on the features of each encoder, show a table and record the result.

    Args:
        argv: the command line, for the record.

    Returns:
        The test accuracy of each encoder, by its name.

    Raises:
        UserError: if the images cannot be compared.
    """
    require(config, "run")
    protocol = _paper if config.classifier.protocol == "paper" else _fast
    return protocol(config, console, argv)


def _fast(config: LinearConfig, console: Console, argv: Sequence[str]) -> dict[str, float]:
    """Features once, then a logistic regression."""
    probe = open_probe(config.images, config.probe)
    features = probe.features()
    labelled, tested = next((len(f.train_labels), len(f.test_labels)) for f in features.values())
    evaluate = LogisticRegression(config.probe.seed)
    found = {name: dict(evaluate(each)) for name, each in features.items()}
    accuracies = {name: row["accuracy"] for name, row in found.items()}

    title = f"linear classifier, {probe.kind} features"
    show_accuracies(title, accuracies, probe, labelled, tested, console)
    settings = {"strengths": STRENGTHS, "held_out": HELD_OUT}
    record("linear", config, probe, settings, unreadable(probe, labelled, tested), found, argv)
    return accuracies


def _paper(config: LinearConfig, console: Console, argv: Sequence[str]) -> dict[str, float]:
    """The paper's protocol: new crops in every epoch, and the accuracy after the last one."""
    probe = open_probe(config.images, config.probe, default="cls")
    images, paper = probe.images, config.classifier
    check_classes(images.train_labels[probe.chosen])
    pictures = Pictures(images.train, probe.chosen.tolist(), probe.device)
    labels = images.train_labels[pictures.ids]
    check_classes(labels)
    schedule, batch_size = plan(paper, len(pictures))
    meter = Meter()

    def log(row: Mapping[str, float]) -> None:
        meter.images += batch_size
        rate, waited = meter.read()
        step = int(row["step"])
        shown = {**row, "images_per_s": rate, "data_wait": waited}
        progress.show(step, describe(shown, progress.remaining(step)))

    with Progress(console, schedule.total_steps) as progress:
        heads = train_heads(probe, pictures, labels, schedule, batch_size, log)
    test, kept = extract(
        probe.encoders,
        images.test,
        range(len(images.test)),
        probe.backbone,
        probe.device,
        crop_pct=probe.crop_pct,
    )
    truth = images.test_labels[kept]
    found = {name: dict(figures(head_predict(head, test[name]) == truth)) for name, head in heads.items()}
    accuracies = {name: row["accuracy"] for name, row in found.items()}

    title = f"linear classifier, the paper's protocol, {paper.epochs} epochs, {probe.kind} features"
    show_accuracies(title, accuracies, probe, len(labels), len(truth), console)
    settings = {
        **{name: getattr(paper, name) for name in ("epochs", "warmup_epochs", "batch_size", "blr")},
        "batch_size_used": batch_size,
    }
    missing = unreadable(probe, len(labels), len(truth))
    record("linear-paper", config, probe, settings, missing, found, argv)
    return accuracies
