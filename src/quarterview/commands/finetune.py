"""``quarterview finetune``: a classifier from a pre-trained encoder, whole or in part.

He et al. 2021, section 4.3 and appendix A.1.

`scratch` in place of a run trains the same network from random weights under the same recipe, which
is what pre-training must be compared with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from quarterview.commands import slurm
from quarterview.commands.config import FinetuneConfig, FinetuneOptions
from quarterview.data.cache import CachedSet
from quarterview.data.loader import Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.sources.subset import subset
from quarterview.data.statistics import channel_statistics
from quarterview.data.transforms.randaugment import check_policy
from quarterview.errors import EXIT_CODES, UserError
from quarterview.evaluation.labelled import open_split
from quarterview.evaluation.predictions import TestAccuracy
from quarterview.evaluation.results import write_result
from quarterview.evaluation.statistics import standard_error
from quarterview.methods.supervised import Supervised
from quarterview.models.classifier import Classifier, freeze_all_but
from quarterview.models.config import ClassifierConfig
from quarterview.models.create import fresh_classifier
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.training.distributed import is_first_rank, ranks
from quarterview.training.optim import Schedule, fused_adamw, layer_decay_groups, warmup_steps
from quarterview.training.run import (
    OpenRun,
    Run,
    check_shares,
    choose_precision,
    hold_on_device,
    make_deterministic,
    open_run,
)
from quarterview.training.sharding import distribute
from quarterview.training.trainer import Trainer
from quarterview.weights.config import SCRATCH, count_blocks
from quarterview.weights.facts import facts_of
from quarterview.weights.loading import load_encoder, metadata, read, read_config, read_header


@dataclass(frozen=True)
class Finetuned:
    """What came of fine-tuning."""

    run: Run
    accuracy: float | None
    """On the test images, of the weights after the last step (with --ema, of their average); None if
    the run was stopped."""
    test_images: int
    data: Mapping[str, Any]
    """The images, for a result."""


def main(config: FinetuneConfig, argv: Sequence[str], options: FinetuneOptions) -> int:
    """``quarterview finetune``; returns the exit code."""
    if options.table:
        show_parameters(config, Console())
        return 0
    if options.slurm is not None:

        def check_ranks(ranks: int) -> None:
            check_shares(config.loop, ranks)
            check(config)

        inputs = (*config.images.train, *config.images.test)
        slurm.submit_command(options.slurm, config, inputs, check_ranks, argv)
        return 0
    if len(config.tuning.blocks) == 1:
        return EXIT_CODES[finetune(config, argv).run.status]
    found = finetune_each(config, Console(), argv)
    return max(EXIT_CODES[result.run.status] for result in found.values())


def finetune(config: FinetuneConfig | None = None, argv: Sequence[str] = (), **flags: Any) -> Finetuned:
    """Fine-tune a classifier, or go on with a run that was interrupted, and judge it.

    Args:
        config: what to do, with one value of ``--blocks``; by default everything is a default.
        argv: the command line, for the record.
        flags: in what to depart from `config`, by the names of the flags:
            ``finetune(run="runs/x", train="labelled/train", test="labelled/test", out="runs/tuned")``.

    Raises:
        UserError: if the request cannot be met: no labels, another architecture, …
        RunError: if the run cannot go on.
    """
    config = (config or FinetuneConfig()).with_flags(**flags)
    check_request(config)
    start = begun(config) or start_of(config)
    may_change = {"run"} if _has_moved(config) else set()
    with open_run(config, (*config.images.train, *config.images.test)) as run:
        images = open_images(config, start)
        run.attach(images.train, config.loader.max_bad_samples, argv, may_change)
        if run.is_complete:
            result = run.result()
            if is_first_rank() and not (run.folder / "results" / "finetune.json").exists():
                record(config, images, result, run, argv)  # a kill came between checkpoint and result
            return finetuned(result, images)
        if run.known and run.known["test"] != images.described["test"]:
            raise UserError("--test is another set of images than before; accepted: the same, or a new --out")
        check_shares(config.loop, run.world.size)
        make_deterministic(config.compute)
        precision = choose_precision(config.compute, run)

        stream = SampleStream(len(images.train), 0, config.loop.seed)
        cached, reason = (None, "for RandAugment")
        if config.augment.randaugment is None:
            cached, reason = hold_on_device(config.loader, images.train, run)
        mean, std = statistics_of(config, start, images.train, stream, run)
        classes = {"classes": images.classes, "class_names": images.class_names}
        model = build_classifier(config, replace(start, mean=mean, std=std, **classes), run)
        steps = config.loop.total_steps(len(images.train))
        steps_per_epoch = len(images.train) / config.loop.batch_size
        warmup, warning = warmup_steps(config.optim.warmup_epochs, steps_per_epoch, steps)
        if warning:
            run.log.warn(warning)
        run.log.say(summary(model, images, f"{'held on the device' if cached else 'streamed'} ({reason})"))

        method = Supervised(model, config.regularization, config.loop.seed)
        watched = distribute(method, config.compute, precision, run.world, run.log.say)
        decay = (config.optim.weight_decay, config.decay.layer_decay)
        groups = layer_decay_groups(method, *decay, len(model.blocks), "model.")
        optimizer = fused_adamw(groups, (0.9, config.decay.beta2))
        peak = config.optim.peak_lr(config.loop.batch_size)
        schedule = Schedule(peak, warmup, steps, config.decay.min_lr)
        loader = make_loader(config, images, model.config, stream, cached, run)

        resolved = {"steps": steps, "precision": precision, "mean": list(mean), "std": list(std)}
        resolved |= {"cache": "device" if cached else "none", "cache_reason": reason}
        resolved |= {"test": images.described["test"], **start_facts(config, run)}
        trainer = Trainer(
            config.with_flags(eval_every=config.run.eval_every or steps),
            *(run, method, optimizer, schedule, loader, precision),
            watched=watched,
            state=run.state(resolved),
            metadata=metadata(model.config),
        )
        if run.world.is_main:
            judged = (images.test, images.test_labels, config.tuning.crop_pct)
            trainer.evaluators = [TestAccuracy(trainer, watched.model, *judged)]
        result = run.train(trainer)
        if result.status == "complete" and run.world.is_main:
            record(config, images, result, run, argv)
        return finetuned(result, images)


def finetuned(result: Run, images: "LabelledImages") -> Finetuned:
    """What a run of fine-tuning came to."""
    if result.status != "complete":
        return Finetuned(result, None, 0, images.described)
    metrics = result.metrics
    return Finetuned(result, metrics.get("test_accuracy"), metrics.get("test_images", 0), images.described)


def check_request(config: FinetuneConfig) -> None:
    """Raises UserError if fine-tuning could not begin by a configuration, before any data is read."""
    config.check_complete()
    if len(config.tuning.blocks) > 1:
        raise UserError(f"--blocks {' '.join(config.tuning.blocks)} are several runs. Give one value.")
    if config.augment.randaugment is not None:
        check_policy(config.augment.randaugment)
        if config.loader.cache == "device":
            raise UserError("--cache device cannot serve RandAugment; accepted: --cache auto or none")


def check(config: FinetuneConfig) -> Source:
    """The labelled training images. Raises UserError if fine-tuning could not begin with them."""
    check_request(config)
    return open_images(config, begun(config) or start_of(config)).train


def record(
    config: FinetuneConfig, images: "LabelledImages", result: Run, run: OpenRun, argv: Sequence[str]
) -> None:
    """Write the result down, and say it."""
    accuracy, judged = result.metrics["test_accuracy"], result.metrics["test_images"]
    error = standard_error(accuracy, judged)
    write_result(
        run.folder / "results",
        "finetune",
        argv,
        config.to_plain(),
        images.described,
        {"accuracy": accuracy, "standard_error": error, "judged": judged, "steps": result.step},
    )
    start = "random weights" if config.start.run == SCRATCH else config.start.run
    run.log.say(
        f"done: {accuracy:.1%} ± {error:.1%} of {judged} test images, after {result.step} steps from "
        f"{start} with {len(images.train)} labelled images, blocks trained: {config.tuning.blocks[0]}"
    )


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class LabelledImages:
    """The images that a classifier is trained and judged on."""

    train: Source
    """The labelled training images that are used."""
    labels: Tensor
    """int64 [N], of those."""
    test: Source
    test_labels: Tensor
    classes: int
    class_names: tuple[str, ...] | None
    described: dict[str, Any]
    """Fingerprints and numbers, for a result."""


def open_images(config: FinetuneConfig, start: ClassifierConfig) -> LabelledImages:
    """Open the labelled images, and choose those that are used.

    Args:
        start: the classifier to be; that of a run that is resumed has its classes.

    Raises:
        UserError: if their labels cannot be learned, or train and test have different classes.
    """
    channels = start.in_chans
    if config.augment.randaugment is not None and channels != 3:
        raise UserError(
            f"RandAugment needs 8-bit RGB images, and the network takes {channels} channel(s); accepted: "
            "--randaugment none"
        )
    split = open_split(config.images.train, config.images.test, channels)
    classes, names = split.num_classes, split.class_names
    if begun(config) is not None:
        classes, names = start.classes, start.class_names
        split.check_classifier(classes, names)
    chosen = split.choose(config.start.labels, config.loop.seed)
    train = subset(split.train, chosen.tolist())
    described = {
        "train": train.fingerprint(),
        "train_images": len(train),
        "test": split.test.fingerprint(),
        "test_images": len(split.test),
    }
    labels = split.train_labels[chosen]
    return LabelledImages(train, labels, split.test, split.test_labels, classes, names, described)


def statistics_of(
    config: FinetuneConfig, start: ClassifierConfig, source: Source, stream: SampleStream, run: OpenRun
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The channel means and deviations: the run's, or of the training images from scratch."""
    if run.known:
        return tuple(run.known["mean"]), tuple(run.known["std"])
    if start.mean is not None and start.std is not None:
        return start.mean, start.std
    return channel_statistics(source, stream, config.loader.threads, run.bad_samples)


def build_classifier(config: FinetuneConfig, model_config: ClassifierConfig, run: OpenRun) -> Classifier:
    """The classifier at its start, on the run's device, with its frozen part frozen."""
    model = fresh_classifier(model_config, config.loop.seed).to(run.world.device)
    if config.start.run != SCRATCH and run.resumed is None:
        for line in load_encoder(model, config.start.run, config.tuning.from_ema):
            run.log.say(line)
    freeze_all_but(model, count_blocks(config.tuning.blocks[0]))
    return model


def make_loader(
    config: FinetuneConfig,
    images: "LabelledImages",
    model: ClassifierConfig,
    stream: SampleStream,
    cached: CachedSet | None,
    run: OpenRun,
) -> Loader:
    """Batches of the labelled images, augmented."""
    assert model.mean is not None
    assert model.std is not None
    return Loader(
        images.train,
        stream,
        model.image_size,
        model.mean,
        model.std,
        run.world.device,
        config.loader.threads,
        cached,
        run.bad_samples,
        config.augment,
        images.labels,
    )


def summary(model: Classifier, images: LabelledImages, held: str) -> str:
    """What will be trained on what, in a line."""
    sizes = {p: p.numel() for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    return (
        f"{len(images.train)} labelled images of {images.classes} classes, {held}; {len(images.test)} test "
        f"images; {trained:,} of {sum(sizes.values()):,} parameters are trained"
    )


# ---------------------------------------------------------------------- where it starts


def begun(config: FinetuneConfig) -> ClassifierConfig | None:
    """What a run in the folder is training already, for which its start is no longer asked."""
    newest = _newest(config)
    header = read_header(newest / "model.safetensors") if newest else None
    return header if isinstance(header, ClassifierConfig) else None


def _newest(config: FinetuneConfig) -> Path | None:
    return checkpoint.newest(Path(config.run.out) / "checkpoints") if config.run.out else None


def _has_moved(config: FinetuneConfig) -> bool:
    """Whether a run in the folder began with these very weights, which were elsewhere then."""
    newest = _newest(config)
    if newest is None or config.start.run == SCRATCH:
        return False
    state = checkpoint.read_state(newest)
    before = FinetuneConfig.flat(state["config"])["run"]
    return before != config.start.run and state["resolved"]["start"] == digest_of_start(config)


def start_facts(config: FinetuneConfig, run: OpenRun) -> dict[str, Any]:
    """The weights that a run started from, as its first start found them: their digest and licence."""
    if run.known:
        return {name: run.known.get(name) for name in ("start", "licence")}
    return {"start": digest_of_start(config), "licence": _licence_of(config)}


def digest_of_start(config: FinetuneConfig) -> str | None:
    """Sixteen hex digits of the weights that a run starts from; None from scratch."""
    start = config.start.run
    return None if start == SCRATCH else read(start, config.tuning.from_ema).digest


def _licence_of(config: FinetuneConfig) -> str:
    """Of the weights that a run starts from, as far as it is known: what is made of them goes by it."""
    start = config.start.run
    return "" if start == SCRATCH else facts_of(start, config.tuning.from_ema).licence


def start_of(config: FinetuneConfig) -> ClassifierConfig:
    """The classifier to be, as far as its start tells; how many classes the images will.

    Raises:
        UserError: if the start says nothing of the network, or something else than the flags.
    """
    given, tuning = config.start, config.tuning
    if given.run == SCRATCH:
        if given.model is None or tuning.image_size is None:
            raise UserError(
                "scratch says nothing of the network. Give, say, --model mae_vit_tiny_patch4 --image-size 32."
            )
        cls_tokens = 1 if tuning.cls_tokens is None else tuning.cls_tokens
        network = (given.model, tuning.image_size, tuning.in_chans)
        return ClassifierConfig(*network, cls_tokens=cls_tokens, pool=tuning.pool)
    theirs = read_config(given.run, tuning.from_ema)
    if given.model not in (None, theirs.model):
        raise UserError(
            f"--model {given.model} was given, but {given.run} is {theirs.model}. Remove --model."
        )
    if tuning.cls_tokens not in (None, theirs.cls_tokens):
        raise UserError(
            f"--cls-tokens {tuning.cls_tokens} was given, but {given.run} has {theirs.cls_tokens}. Remove "
            "--cls-tokens."
        )
    size = tuning.image_size or theirs.image_size
    network = (theirs.model, size, theirs.in_chans, theirs.mean, theirs.std, theirs.cls_tokens)
    return ClassifierConfig(*network, pool=tuning.pool)


# ---------------------------------------------------------------------- several values of --blocks


def finetune_each(config: FinetuneConfig, console: Console, argv: Sequence[str] = ()) -> dict[str, Finetuned]:
    """Fine-tune once for each value of `blocks`, each in its folder ``blocks-K``, and draw the curve.

    What is complete is not trained again, so an interrupted curve goes on where it was.

    Returns:
        What came of each, by the value; it ends early if a run is stopped.

    Raises:
        UserError, RunError: as `finetune`.
    """
    if not config.run.out:
        raise UserError("The runs have no folder. Give --out FOLDER.")
    if ranks() > 1:
        raise UserError("several values of --blocks are several runs; accepted under torchrun: one")
    depth = start_of(config).shape.depth
    for blocks in config.tuning.blocks:
        if depth < count_blocks(blocks) < math.inf:
            raise UserError(f"{blocks} blocks of {depth}; accepted: at most {depth}, or all")
    folder = Path(config.run.out)
    found: dict[str, Finetuned] = {}
    for blocks in config.tuning.blocks:
        console.say(f"blocks trained: {blocks}")
        one = config.with_flags(blocks=(blocks,), out=str(folder / f"blocks-{blocks}"))
        found[blocks] = finetune(one, argv)
        if found[blocks].run.status != "complete":
            return found
    points = {
        blocks: (result.accuracy, standard_error(result.accuracy, result.test_images))
        for blocks, result in found.items()
        if result.accuracy is not None
    }
    rows = [(blocks, f"{accuracy:.1%}", f"± {error:.1%}") for blocks, (accuracy, error) in points.items()]
    console.table("fine-tuning the last blocks", ["blocks", "accuracy", "standard error"], rows)
    results = {blocks: {"accuracy": a, "standard_error": e} for blocks, (a, e) in points.items()}
    data = found[config.tuning.blocks[-1]].data
    write_result(folder / "results", "partial", argv, config.to_plain(), data, results)
    draw(points, folder / "results" / "partial.png", f"from {config.start.run}")
    console.say(f"See {folder}/results/partial.png")
    return found


def draw(points: dict[str, tuple[float, float]], path: Path, title: str) -> None:
    """Write a PNG of accuracies and their errors over the blocks that were trained."""
    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.subplots()
    accuracies, errors = ([100 * x for x in column] for column in zip(*points.values(), strict=True))
    axes.errorbar(range(len(points)), accuracies, errors, marker="o", linewidth=1, markersize=4, capsize=3)
    axes.set_xticks(range(len(points)), list(points))
    axes.set_xlabel("blocks fine-tuned")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---------------------------------------------------------------------- rates of parameters


def parameter_table(model: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Every parameter's name, highest learning rate, weight decay, and whether it is trained."""
    peak = config.optim.peak_lr(config.loop.batch_size)
    groups = layer_decay_groups(model, config.optim.weight_decay, config.decay.layer_decay, len(model.blocks))
    found = {name: group for group in groups for name in group["names"]}
    return [
        {
            "name": name,
            "trained": name in found,
            "lr": peak * found[name]["lr_scale"] if name in found else 0.0,
            "weight_decay": found[name]["weight_decay"] if name in found else 0.0,
        }
        for name, _ in model.named_parameters()
    ]


def show_parameters(config: FinetuneConfig, console: Console) -> None:
    """Show the `parameter_table` of what would be trained, and the drop path of each block.

    Raises:
        UserError: if the start says nothing of the network.
    """
    for blocks in config.tuning.blocks:
        model = Classifier(start_of(config))
        freeze_all_but(model, count_blocks(blocks))
        rows = [
            (row["name"], f"{row['lr']:.3e}" if row["trained"] else "frozen", f"{row['weight_decay']:g}")
            for row in parameter_table(model, config)
        ]
        title = f"parameters, blocks trained: {blocks}"
        console.table(title, ["name", "peak learning rate", "weight decay"], rows)
    rates = torch.linspace(0, config.regularization.drop_path, start_of(config).shape.depth).tolist()
    console.say("drop path by block: " + " ".join(f"{rate:.3g}" for rate in rates))
