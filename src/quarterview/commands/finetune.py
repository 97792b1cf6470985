"""``quarterview finetune``: end-to-end or partial fine-tuning of an encoder as a classifier.

See He et al. 2021, section 4.3 and appendix A.1. With `scratch` instead of a run the same network is trained
from random weights under the same recipe, as a baseline for pre-training.
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
from quarterview.commands.finetune_start import (
    get_initial_config,
    get_start_info,
    has_start_moved,
    read_resumed_config,
)
from quarterview.data.cache import CachedDataset
from quarterview.data.loader import Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.sources.subset import select_subset
from quarterview.data.statistics import compute_channel_statistics
from quarterview.data.transforms.randaugment import check_randaugment_policy
from quarterview.errors import EXIT_CODES, UserError, invalid, not_supported
from quarterview.evaluation.labelled import open_split
from quarterview.evaluation.predictions import TestAccuracy
from quarterview.evaluation.results import write_result
from quarterview.evaluation.statistics import compute_standard_error
from quarterview.methods.supervised import Supervised
from quarterview.models.classifier import Classifier, freeze_all_but_last_blocks
from quarterview.models.config import ClassifierConfig
from quarterview.models.create import create_classifier
from quarterview.training.console import Console
from quarterview.training.distributed import get_world_size, is_main_process
from quarterview.training.optim import (
    Schedule,
    compute_warmup_steps,
    create_adamw_from_groups,
    param_groups_layer_decay,
)
from quarterview.training.run import (
    OpenRun,
    Run,
    cache_on_device,
    check_batch_size,
    choose_precision,
    enable_determinism,
    open_run,
)
from quarterview.training.sharding import prepare_method
from quarterview.training.trainer import Trainer
from quarterview.weights.config import SCRATCH, parse_num_blocks
from quarterview.weights.loading import load_encoder_into, make_metadata


@dataclass(frozen=True)
class FinetuneResult:
    """The result of fine-tuning."""

    run: Run
    accuracy: float | None
    """Test accuracy of the weights after the last step (with --ema, of their average); None if the run was
    stopped."""
    test_images: int
    """Number of test images."""
    data: Mapping[str, Any]
    """Fingerprints and numbers of the images, for the record."""


def main(config: FinetuneConfig, argv: Sequence[str], options: FinetuneOptions) -> int:
    """Run ``quarterview finetune`` and return the exit code."""
    if options.table:
        print_parameters(config, Console())
        return 0
    if options.slurm is not None:

        def check_ranks(ranks: int) -> None:
            check_batch_size(config.loop, ranks)
            check_data(config)

        data = (*config.images.train, *config.images.test)
        slurm.submit_command(options.slurm, config, data, check_ranks, argv)
        return 0
    if len(config.tuning.blocks) == 1:
        return EXIT_CODES[finetune(config, argv).run.status]
    results = finetune_each_blocks(config, Console(), argv)
    return max(EXIT_CODES[result.run.status] for result in results.values())


def finetune(config: FinetuneConfig | None = None, argv: Sequence[str] = (), **flags: Any) -> FinetuneResult:
    """Fine-tune a classifier, or resume an interrupted run, and evaluate it on the test images.

    Args:
        config: the configuration, with one value of ``--blocks``; by default all flags have their defaults.
        argv: the command line, for the record.
        flags: flags that override `config`:
            ``finetune(run="runs/x", train="labelled/train", test="labelled/test", out="runs/tuned")``.

    Returns:
        The run and its test accuracy.

    Raises:
        UserError: if the configuration, the data or the run's folder is invalid.
        RunError: if the run diverges, too many images are broken, or another rank fails.
    """
    config = (config or FinetuneConfig()).with_flags(**flags)
    check_config(config)
    start = read_resumed_config(config) or get_initial_config(config)
    may_change = {"run"} if has_start_moved(config) else set()
    with open_run(config, (*config.images.train, *config.images.test)) as run:
        images = open_images(config, start)
        run.attach_data(images.train, config.loader.max_bad_samples, argv, may_change)
        if run.is_complete:
            result = run.result()
            if is_main_process() and not (run.folder / "results" / "finetune.json").exists():
                record_result(
                    config, images, result, run, argv
                )  # the run was killed before it wrote the result
            return make_result(result, images)
        if run.resolved and run.resolved["test"] != images.info["test"]:
            raise UserError(
                "--test has other images than at the first start of the run. Give the same images, or "
                "another --out."
            )
        check_batch_size(config.loop, run.world.size)
        enable_determinism(config.compute)
        precision = choose_precision(config.compute, run)

        stream = SampleStream(len(images.train), 0, config.loop.seed)
        cached, reason = (None, "because of RandAugment")
        if config.augment.randaugment is None:
            cached, reason = cache_on_device(config.loader, images.train, run)
        mean, std = get_channel_statistics(config, start, images.train, stream, run)
        classes = {"classes": images.classes, "class_names": images.class_names}
        model = build_classifier(config, replace(start, mean=mean, std=std, **classes), run)
        steps = config.loop.total_steps(len(images.train))
        steps_per_epoch = len(images.train) / config.loop.batch_size
        warmup, warning = compute_warmup_steps(config.optim.warmup_epochs, steps_per_epoch, steps)
        if warning:
            run.log.warning(warning)
        run.log.info(
            format_summary(model, images, f"{'cached on the device' if cached else 'streamed'} ({reason})")
        )

        method = Supervised(model, config.regularization, config.loop.seed)
        eval_method = prepare_method(method, config.compute, precision, run.world, run.log.info)
        decay = (config.optim.weight_decay, config.decay.layer_decay)
        groups = param_groups_layer_decay(method, *decay, len(model.blocks), "model.")
        optimizer = create_adamw_from_groups(groups, (0.9, config.decay.beta2))
        peak = config.optim.peak_lr(config.loop.batch_size)
        schedule = Schedule(peak, warmup, steps, config.decay.min_lr)
        loader = create_loader(config, images, model.config, stream, cached, run)

        resolved = {"steps": steps, "precision": precision, "mean": list(mean), "std": list(std)}
        resolved |= {"cache": "device" if cached else "none", "cache_reason": reason}
        resolved |= {"test": images.info["test"], **get_start_info(config, run)}
        trainer = Trainer(
            config.with_flags(eval_every=config.run.eval_every or steps),
            *(run, method, optimizer, schedule, loader, precision),
            eval_module=eval_method,
            state=run.checkpoint_state(resolved),
            metadata=make_metadata(model.config),
        )
        if run.world.is_main:
            test = (images.test, images.test_labels, config.tuning.crop_pct)
            trainer.evaluators = [TestAccuracy(trainer, eval_method.model, *test)]
        result = run.train(trainer)
        if result.status == "complete" and run.world.is_main:
            record_result(config, images, result, run, argv)
        return make_result(result, images)


def make_result(result: Run, images: "LabeledImages") -> FinetuneResult:
    """Make the result of a run; accuracy is None if the run was stopped."""
    if result.status != "complete":
        return FinetuneResult(result, None, 0, images.info)
    metrics = result.metrics
    return FinetuneResult(result, metrics.get("test_accuracy"), metrics.get("test_images", 0), images.info)


def check_config(config: FinetuneConfig) -> None:
    """Check the configuration before any data is read.

    Raises:
        UserError: if it is invalid.
    """
    config.check_complete()
    if len(config.tuning.blocks) > 1:
        raise UserError(
            f"--blocks {' '.join(config.tuning.blocks)} has several values, which need a run each. Give one."
        )
    if config.augment.randaugment is not None:
        check_randaugment_policy(config.augment.randaugment)
        if config.loader.cache == "device":
            raise not_supported("--cache device", "--randaugment", "Use --cache auto or none.")


def check_data(config: FinetuneConfig) -> Source:
    """Check the configuration and the images, and return the labelled training images.

    Raises:
        UserError: if they are invalid.
    """
    check_config(config)
    return open_images(config, read_resumed_config(config) or get_initial_config(config)).train


def record_result(
    config: FinetuneConfig, images: "LabeledImages", result: Run, run: OpenRun, argv: Sequence[str]
) -> None:
    """Write the result into the run's folder, and print it."""
    accuracy, test_images = result.metrics["test_accuracy"], result.metrics["test_images"]
    error = compute_standard_error(accuracy, test_images)
    write_result(
        run.folder / "results",
        "finetune",
        argv,
        config.to_dict(),
        images.info,
        {"accuracy": accuracy, "standard_error": error, "judged": test_images, "steps": result.step},
    )
    start = "random weights" if config.start.run == SCRATCH else config.start.run
    run.log.info(
        f"Test accuracy: {accuracy:.1%} ± {error:.1%} on {test_images} images, after {result.step} steps "
        f"from {start} with {len(images.train)} labelled images, --blocks {config.tuning.blocks[0]}."
    )


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class LabeledImages:
    """The training and test images of a classifier."""

    train: Source
    """The labelled training images in use."""
    labels: Tensor
    """Training labels, int64 [N]."""
    test: Source
    test_labels: Tensor
    classes: int
    class_names: tuple[str, ...] | None
    info: dict[str, Any]
    """Fingerprints and numbers of the images, for the record."""


def open_images(config: FinetuneConfig, start: ClassifierConfig) -> LabeledImages:
    """Open the labelled images, and choose --labels of the training images.

    Args:
        config: the configuration.
        start: configuration of the classifier; that of a resumed run has its classes.

    Raises:
        UserError: if the images have no labels, too few classes, or train and test have different classes.
    """
    channels = start.in_chans
    if config.augment.randaugment is not None and channels != 3:
        raise UserError(
            f"RandAugment needs 8-bit RGB images, but the network has {channels} channel(s). Give "
            "--randaugment none."
        )
    split = open_split(config.images.train, config.images.test, channels)
    classes, names = split.num_classes, split.class_names
    if read_resumed_config(config) is not None:
        classes, names = start.classes, start.class_names
        split.check_classifier(classes, names)
    chosen = split.choose_labeled(config.start.labels, config.loop.seed)
    train = select_subset(split.train, chosen.tolist())
    described = {
        "train": train.fingerprint(),
        "train_images": len(train),
        "test": split.test.fingerprint(),
        "test_images": len(split.test),
    }
    labels = split.train_labels[chosen]
    return LabeledImages(train, labels, split.test, split.test_labels, classes, names, described)


def get_channel_statistics(
    config: FinetuneConfig, start: ClassifierConfig, source: Source, stream: SampleStream, run: OpenRun
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return channel means and standard deviations: those of pre-training, or from scratch of the images."""
    if run.resolved:
        return tuple(run.resolved["mean"]), tuple(run.resolved["std"])
    if start.mean is not None and start.std is not None:
        return start.mean, start.std
    return compute_channel_statistics(source, stream, config.loader.num_workers, run.bad_samples)


def build_classifier(config: FinetuneConfig, model_config: ClassifierConfig, run: OpenRun) -> Classifier:
    """Build the classifier with initial weights on the run's device, with --blocks trainable."""
    model = create_classifier(model_config, config.loop.seed).to(run.world.device)
    if config.start.run != SCRATCH and run.resumed is None:
        for line in load_encoder_into(model, config.start.run, config.tuning.from_ema):
            run.log.info(line)
    freeze_all_but_last_blocks(model, parse_num_blocks(config.tuning.blocks[0]))
    return model


def create_loader(
    config: FinetuneConfig,
    images: "LabeledImages",
    model: ClassifierConfig,
    stream: SampleStream,
    cached: CachedDataset | None,
    run: OpenRun,
) -> Loader:
    """Create the loader of augmented training images."""
    assert model.mean is not None
    assert model.std is not None
    return Loader(
        images.train,
        stream,
        model.image_size,
        model.mean,
        model.std,
        run.world.device,
        config.loader.num_workers,
        cached,
        run.bad_samples,
        config.augment,
        images.labels,
    )


def format_summary(model: Classifier, images: LabeledImages, storage: str) -> str:
    """Format the numbers of images and parameters in one line."""
    sizes = {p: p.numel() for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    return (
        f"{len(images.train)} labelled images of {images.classes} classes, {storage}; {len(images.test)} "
        f"test images; {trained:,} of {sum(sizes.values()):,} parameters are trained"
    )


# ---------------------------------------------------------------------- several values of --blocks


def finetune_each_blocks(
    config: FinetuneConfig, console: Console, argv: Sequence[str] = ()
) -> dict[str, FinetuneResult]:
    """Fine-tune once for each value of --blocks, each in a folder ``blocks-K``, and draw the curve.

    Complete runs are not trained again, so the same call resumes an interrupted curve.

    Returns:
        The result by value of --blocks. Later values are missing if a run was stopped.

    Raises:
        UserError, RunError: as `finetune`.
    """
    if not config.run.out:
        raise UserError("--out is missing. Give a folder for the runs.")
    if get_world_size() > 1:
        raise not_supported("Several values of --blocks", "torchrun", "Give one value.")
    depth = get_initial_config(config).shape.depth
    for blocks in config.tuning.blocks:
        if depth < parse_num_blocks(blocks) < math.inf:
            raise invalid("--blocks", blocks, f"at most {depth}, the number of blocks, or all")
    folder = Path(config.run.out)
    results_by_blocks: dict[str, FinetuneResult] = {}
    for blocks in config.tuning.blocks:
        console.info(f"Fine-tuning with --blocks {blocks}.")
        one = config.with_flags(blocks=(blocks,), out=str(folder / f"blocks-{blocks}"))
        results_by_blocks[blocks] = finetune(one, argv)
        if results_by_blocks[blocks].run.status != "complete":
            return results_by_blocks
    points = {
        blocks: (result.accuracy, compute_standard_error(result.accuracy, result.test_images))
        for blocks, result in results_by_blocks.items()
        if result.accuracy is not None
    }
    rows = [(blocks, f"{accuracy:.1%}", f"± {error:.1%}") for blocks, (accuracy, error) in points.items()]
    console.table("fine-tuning the last blocks", ["blocks", "accuracy", "standard error"], rows)
    results = {blocks: {"accuracy": a, "standard_error": e} for blocks, (a, e) in points.items()}
    data = results_by_blocks[config.tuning.blocks[-1]].data
    write_result(folder / "results", "partial", argv, config.to_dict(), data, results)
    draw_curve(points, folder / "results" / "partial.png", f"from {config.start.run}")
    console.info(f"See {folder}/results/partial.png")
    return results_by_blocks


def draw_curve(points: dict[str, tuple[float, float]], path: Path, title: str) -> None:
    """Write a PNG of accuracies with standard errors by number of fine-tuned blocks."""
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


# ---------------------------------------------------------------------- parameters


def list_parameters(model: Classifier, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return every parameter's name, peak learning rate and weight decay, and whether it is trained."""
    peak = config.optim.peak_lr(config.loop.batch_size)
    groups = param_groups_layer_decay(
        model, config.optim.weight_decay, config.decay.layer_decay, len(model.blocks)
    )
    by_name = {name: group for group in groups for name in group["names"]}
    return [
        {
            "name": name,
            "trained": name in by_name,
            "lr": peak * by_name[name]["lr_scale"] if name in by_name else 0.0,
            "weight_decay": by_name[name]["weight_decay"] if name in by_name else 0.0,
        }
        for name, _ in model.named_parameters()
    ]


def print_parameters(config: FinetuneConfig, console: Console) -> None:
    """Print `list_parameters` of the classifier, and the drop path rate of each block.

    Raises:
        UserError: if the network is not known.
    """
    for blocks in config.tuning.blocks:
        model = Classifier(get_initial_config(config))
        freeze_all_but_last_blocks(model, parse_num_blocks(blocks))
        rows = [
            (row["name"], f"{row['lr']:.3e}" if row["trained"] else "frozen", f"{row['weight_decay']:g}")
            for row in list_parameters(model, config)
        ]
        title = f"parameters, blocks trained: {blocks}"
        console.table(title, ["name", "peak learning rate", "weight decay"], rows)
    rates = torch.linspace(
        0, config.regularization.drop_path, get_initial_config(config).shape.depth
    ).tolist()
    console.info("Drop path rate by block: " + " ".join(f"{rate:.3g}" for rate in rates))
