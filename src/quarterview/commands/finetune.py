"""Fine-tuning: the whole encoder, its last blocks, or half a block (He et al. 2021, 4.3 and A.1).

`scratch` in place of a run trains the same network from random weights under the same recipe, which
is what pre-training must be compared with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from quarterview.data.cache import CachedSet
from quarterview.data.loader import Loader
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.data.sources.subset import subset
from quarterview.data.statistics import channel_statistics
from quarterview.data.transforms.randaugment import AugmentConfig
from quarterview.errors import RunError, UserError, check_types
from quarterview.evaluation.features import (
    check_crop_pct,
    choose_labelled,
    class_scores,
    extract,
)
from quarterview.evaluation.report import standard_error
from quarterview.evaluation.results import write_result
from quarterview.methods.supervised import Supervised, SupervisedConfig
from quarterview.models.classifier import (
    Classifier,
    ClassifierConfig,
    Pool,
    freeze_all_but,
    fresh_classifier,
)
from quarterview.training import checkpoint, run_folder
from quarterview.training.distributed import is_first_rank
from quarterview.training.optim import OptimConfig, Schedule, fused_adamw, layer_decay_groups, warmup_steps
from quarterview.training.run import Run, RunningConfig, Site, carry_out, hold, settle, spread, to_plain
from quarterview.training.trainer import LoopConfig, Trainer
from quarterview.weights.facts import facts_of
from quarterview.weights.loading import (
    load_encoder,
    metadata,
    read,
    read_config,
    read_header,
)

SCRATCH = "scratch"
_PREDICTIONS = "predictions.npz"

Part = TypeVar("Part", AugmentConfig, SupervisedConfig, LoopConfig)


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig, AugmentConfig, OptimConfig, RunningConfig):
    """Everything about a fine-tuning run. The defaults are the paper's for ViT-B (table 9), with the
    random erasing of the official code."""

    run: str = ""
    """A run, checkpoint or .safetensors file of a masked autoencoder; scratch for random weights."""
    train: tuple[str, ...] = ()
    """Required: labelled images to learn from, anything that --data of pretrain takes."""
    test: tuple[str, ...] = ()
    """Required: labelled images to be judged on. Nothing is chosen by them: the last step counts."""
    labels: int | None = None
    """Use only so many labelled training images, equally many a class; by default all."""
    blocks: tuple[str, ...] = ("all",)
    """How many of the last blocks are trained: all, a number, 0.5 for the last block's MLP alone, or 0.
    Several give a run each, and the curve of figure 9."""
    pool: Pool = "mean"
    """What the head reads: the mean of the patch tokens under a new norm, or the cls token (of several the
    mean)."""
    image_size: tuple[int, ...] | None = None
    """Height and width, or one number for both; by default those of pre-training."""
    model: str | None = None
    """The network to train from scratch, such as mae_vit_tiny_patch4."""
    in_chans: int = 3
    """Channels of the images, from scratch; otherwise the run says."""
    cls_tokens: int | None = None
    """How many cls tokens there are, from scratch, 1 if nothing is said; otherwise the run says."""
    from_ema: bool = False
    """Start from the moving average of the run's weights."""
    layer_decay: float = 0.75
    """Each layer's learning rate as a share of that of the layer above it."""
    min_lr: float = 1e-6
    """Where the cosine ends."""
    beta2: float = 0.999
    """AdamW's second coefficient; the scratch recipe's is 0.95."""
    epochs: float = 100
    """Passes over the training images."""
    blr: float = 1e-3
    """Base learning rate: the rate is blr × batch size / 256."""
    warmup_epochs: float | None = 5
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.05
    """Of weight matrices; biases, norms, the cls token and the positions have none."""
    crop_pct: float | None = None
    """Share of the sides of the largest central box that a test image is cut to. By default 0.875 for
    224 × 224 pixels, as the paper does, and 1 for other sizes."""
    eval_every: int | None = None
    """Updates between looks at the test images, for a curve; by default only after the last."""

    def __post_init__(self) -> None:
        size = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if size is not None and len(size) not in (1, 2):
            raise UserError(f"image size {size}; accepted: one side or two (height width)")
        object.__setattr__(self, "image_size", None if size is None else tuple(size) * (3 - len(size)))
        for name in ("train", "test", "blocks"):
            values = getattr(self, name)
            object.__setattr__(self, name, (values,) if isinstance(values, str) else tuple(values))
        for part in (RunningConfig, OptimConfig, AugmentConfig, SupervisedConfig):
            part.__post_init__(self)
        check_types(self, FinetuneConfig)
        if self.labels is not None and self.labels < 2:
            raise UserError(f"{self.labels} labels; accepted: 2 or more")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer decay {self.layer_decay}; accepted: a number above 0, at most 1")
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2 {self.beta2}; accepted: 0 to below 1")
        check_crop_pct(self.crop_pct)
        if self.min_lr < 0:
            raise UserError(f"min_lr {self.min_lr}; accepted: 0 or more")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UserError(
                f"a batch of {self.batch_size} leaves an image without one to mix with; accepted: an even "
                "number, or --mixup 0 --cutmix 0"
            )
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise UserError(f"blocks {' '.join(self.blocks)}; accepted: one or several different numbers")
        for blocks in self.blocks:
            count_blocks(blocks)

    def part(self, kind: type[Part]) -> Part:
        """The fields of one of the configurations that this one is made of."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})


def count_blocks(blocks: str) -> float:
    """A value of ``--blocks`` as a number; infinity for all. Raises UserError if it is none."""
    try:
        count = math.inf if blocks == "all" else float(blocks)
    except ValueError:
        count = -1.0
    if count < 0 or (count not in (0.5, math.inf) and count % 1):
        raise UserError(f"{blocks} blocks; accepted: all, 0, 0.5 or a whole number")
    return count


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


def finetune(config: FinetuneConfig, argv: Sequence[str] = ()) -> Finetuned:
    """Fine-tune a classifier, or go on with a run that was interrupted, and judge it.

    Raises:
        UserError: if the request cannot be met: no labels, another architecture, …
        RunError: if the run cannot go on.
    """
    plan = _plan(config)

    def ending(run: Run) -> str:
        return _record(config, plan, run, argv)

    inputs = (*config.train, *config.test)
    may_change = {"train", "test", *(["run"] if _has_moved(config) else [])}
    run = carry_out(config, inputs, plan.open, plan.build, ending, may_change, argv)
    if run.status != "complete":
        return Finetuned(run, None, 0, plan.described)
    if is_first_rank() and not (run.folder / "results" / "finetune.json").exists():
        ending(run)  # a kill came between the last checkpoint and the result
    judged = run.metrics.get("test_images", 0)
    return Finetuned(run, run.metrics.get("test_accuracy"), judged, plan.described)


def check(config: FinetuneConfig) -> Source:
    """The labelled training images. Raises UserError if fine-tuning could not begin with them."""
    return _plan(config).open()


def _plan(config: FinetuneConfig) -> "_Plan":
    for name, given in (("RUN", config.run), ("--train", config.train), ("--test", config.test)):
        if not given:
            raise UserError(f"{name} is missing; accepted: finetune RUN --train … --test … --out …")
    if len(config.blocks) > 1:
        raise UserError(
            f"blocks {' '.join(config.blocks)} are several runs; accepted: one value, or partial()"
        )
    return _Plan(config)


def _record(config: FinetuneConfig, plan: "_Plan", run: Run, argv: Sequence[str]) -> str:
    """Write the result down, and say it."""
    accuracy, judged = run.metrics["test_accuracy"], run.metrics["test_images"]
    error = standard_error(accuracy, judged)
    write_result(
        run.folder / "results",
        "finetune",
        argv,
        to_plain(config),
        plan.described,
        {"accuracy": accuracy, "standard_error": error, "judged": judged, "steps": run.step},
    )
    start = "random weights" if config.run == SCRATCH else config.run
    return (
        f"done: {accuracy:.1%} ± {error:.1%} of {judged} test images, after {run.step} steps from "
        f"{start} with {plan.trained} labelled images, blocks trained: {config.blocks[0]}"
    )


class _Plan:
    """The images of a fine-tuning run, and how its trainer is built."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.begun = _begun(config)
        self.model_config = self.begun or start_of(config)
        self.fingerprint, self.trained, self.judged = "", 0, 0
        self.test_data: dict[str, Any] = {}
        self.labels = torch.empty(0, dtype=torch.int64)

    @property
    def described(self) -> dict[str, Any]:
        """The images, for a result."""
        return {"train": self.fingerprint, "train_images": self.trained, **self.test_data}

    def open(self) -> Source:
        """The labelled training images that are used."""
        channels = self.model_config.in_chans
        if self.config.randaugment is not None and channels != 3:
            raise UserError(
                f"RandAugment needs 8-bit RGB images, and the network takes {channels} channel(s); accepted: "
                "--randaugment none"
            )
        source = open_sources(self.config.train, channels)
        self.test = open_sources(self.config.test, self.model_config.in_chans)
        if source.classes and self.test.classes and list(source.classes) != list(self.test.classes):
            raise UserError("--train and --test have different classes; accepted: the same")
        labels, test_labels = torch.tensor(labels_of(source)), torch.tensor(labels_of(self.test))
        if labels.min() < 0 or len(labels.unique()) < 2:
            raise UserError(
                f"--train has the labels {labels.unique().tolist()}; accepted: two or more, from 0 upward"
            )
        if self.begun is None:
            names = tuple(source.classes) if source.classes else None
            count = len(names) if names else int(max(labels.max(), test_labels.max())) + 1
            self.model_config = replace(self.model_config, classes=count, class_names=names)
        if not 0 <= test_labels.min() <= test_labels.max() < self.model_config.classes:
            raise UserError(
                f"--test has labels from {int(test_labels.min())} to {int(test_labels.max())}; accepted: "
                f"0 to {self.model_config.classes - 1}"
            )
        chosen = choose_labelled(labels, self.config.labels, self.config.seed)
        self.labels, self.test_labels = labels[chosen], test_labels
        self.trained = len(chosen)
        self.test_data = {"test": self.test.fingerprint(), "test_images": len(self.test)}
        self.judged = len(self.test)
        chosen_source = subset(source, chosen.tolist())
        self.fingerprint = chosen_source.fingerprint()
        return chosen_source

    def build(self, site: Site) -> Trainer:
        """Model, objective, optimiser and loop of a run at its beginning."""
        config, journal = self.config, site.journal
        precision = settle(config, site)
        if (config.mixup or config.cutmix) and config.batch_size % 2:
            raise UserError(
                f"a batch of {config.batch_size} images cannot be mixed in pairs; accepted: an even one"
            )
        if config.randaugment is not None and config.cache == "device":
            raise UserError("--cache device cannot serve RandAugment; accepted: --cache auto or none")
        if site.known and site.known["test"] != self.test_data["test"]:
            raise UserError("--test is another set of images than before; accepted: the same, or a new --out")
        stream = SampleStream(len(site.source), 0, config.seed)
        held = hold(config, site) if config.randaugment is None else (None, "for RandAugment")
        mean, std = self._statistics(site, stream)
        self.model_config = replace(self.model_config, mean=mean, std=std)
        model = self._model(site)
        total = config.total_steps(self.trained)
        warmup, warning = warmup_steps(config.warmup_epochs, self.trained / config.batch_size, total)
        if warning:
            journal.warn(warning)
        journal.say(self._summary(model, *held))
        objective = Supervised(model, config.part(SupervisedConfig), config.seed)
        watched = spread(objective, config, precision, site)
        depth = len(model.blocks)
        groups = layer_decay_groups(objective, config.weight_decay, config.layer_decay, depth, "model.")
        resolved = {
            "steps": total,
            "fingerprint": site.fingerprint,
            "test": self.test_data["test"],
            "start": site.known.get("start") if site.known else _weights_of(config),
            "licence": site.known.get("licence") if site.known else _licence_of(config),
            "cache": "device" if held[0] else "none",
            "cache_reason": held[1],
            "mean": list(mean),
            "std": list(std),
            "precision": precision,
        }
        trainer = Trainer(
            objective,
            fused_adamw(groups, (0.9, config.beta2)),
            Schedule(config.peak_lr(config.batch_size), warmup, total, config.min_lr),
            self._loader(site, stream, held[0]),
            replace(config.part(LoopConfig), precision=precision, eval_every=config.eval_every or total),
            site.world,
            journal,
            site.folder,
            ema=config.ema,
            clip_grad=config.clip_grad,
            state={
                "config": to_plain(config),
                "resolved": resolved,
                "origin": run_folder.origin(config.resume, site.resumed),
            },
            metadata=metadata(self.model_config),
            watched=watched,
        )
        if site.world.is_main:
            trainer.hooks = [Judge(trainer, watched.model, self.test, self.test_labels, config.crop_pct)]
        return trainer

    def _model(self, site: Site) -> Classifier:
        """The classifier at its start, with its frozen part frozen."""
        model = fresh_classifier(self.model_config, self.config.seed).to(site.world.device)
        if self.config.run != SCRATCH and site.resumed is None:
            for line in load_encoder(model, self.config.run, self.config.from_ema):
                site.journal.say(line)
        freeze_all_but(model, count_blocks(self.config.blocks[0]))
        return model

    def _summary(self, model: Classifier, cached: CachedSet | None, reason: str) -> str:
        sizes = {p: p.numel() for p in model.parameters()}
        trained = sum(size for p, size in sizes.items() if p.requires_grad)
        return (
            f"{self.trained} labelled images of {self.model_config.classes} classes, "
            f"{'held on the device' if cached else 'streamed'} ({reason}); {self.judged} test images; "
            f"{trained:,} of {sum(sizes.values()):,} parameters are trained"
        )

    def _loader(self, site: Site, stream: SampleStream, cached: CachedSet | None) -> Loader:
        mean, std = self.model_config.mean, self.model_config.std
        assert mean is not None
        assert std is not None
        return Loader(
            site.source,
            stream,
            self.model_config.image_size,
            mean,
            std,
            site.world.device,
            self.config.threads,
            cached,
            site.ledger,
            self.config.part(AugmentConfig),
            self.labels,
        )

    def _statistics(self, site: Site, stream: SampleStream) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The channel means and deviations: the run's, or of the training images from scratch."""
        if site.known:
            return tuple(site.known["mean"]), tuple(site.known["std"])
        mean, std = self.model_config.mean, self.model_config.std
        if mean is not None and std is not None:
            return mean, std
        return channel_statistics(site.source, stream, self.config.threads, site.ledger)


def _begun(config: FinetuneConfig) -> ClassifierConfig | None:
    """What a run in the folder is training already, for which its start is no longer asked."""
    newest = checkpoint.newest(Path(config.out) / "checkpoints") if config.out else None
    header = read_header(newest / "model.safetensors") if newest else None
    return header if isinstance(header, ClassifierConfig) else None


def _has_moved(config: FinetuneConfig) -> bool:
    """Whether a run in the folder began with these very weights, which were elsewhere then."""
    newest = checkpoint.newest(Path(config.out) / "checkpoints") if config.out else None
    if newest is None or config.run == SCRATCH:
        return False
    state = checkpoint.read_state(newest)
    return state["config"]["run"] != config.run and state["resolved"]["start"] == _weights_of(config)


def _weights_of(config: FinetuneConfig) -> str | None:
    """Sixteen hex digits of the weights that a run starts from; None from scratch."""
    return None if config.run == SCRATCH else read(config.run, config.from_ema).digest


def _licence_of(config: FinetuneConfig) -> str:
    """Of the weights that a run starts from, as far as it is known: what is made of them goes by it."""
    return "" if config.run == SCRATCH else facts_of(config.run, config.from_ema).licence


def start_of(config: FinetuneConfig) -> ClassifierConfig:
    """The classifier to be, as far as its start tells; how many classes the images will."""
    if config.run == SCRATCH:
        if config.model is None or config.image_size is None:
            raise UserError(
                "scratch says nothing of the network; accepted: --model mae_vit_tiny_patch4 --image-size 32"
            )
        network = (config.model, config.image_size, config.in_chans)
        return ClassifierConfig(
            *network, cls_tokens=1 if config.cls_tokens is None else config.cls_tokens, pool=config.pool
        )
    theirs = read_config(config.run, config.from_ema)
    if config.model not in (None, theirs.model):
        raise UserError(f"--model {config.model}, but {config.run} is {theirs.model}; accepted: neither")
    if config.cls_tokens not in (None, theirs.cls_tokens):
        raise UserError(
            f"--cls-tokens {config.cls_tokens}, but {config.run} has {theirs.cls_tokens}; accepted: neither"
        )
    size = config.image_size or theirs.image_size
    network = (theirs.model, size, theirs.in_chans, theirs.mean, theirs.std, theirs.cls_tokens)
    return ClassifierConfig(*network, pool=config.pool)


class Told(NamedTuple):
    """What a classifier said of the test images."""

    images: np.ndarray
    """int64 [M], the places of those that could be read, in order."""
    classes: np.ndarray
    """int64 [M], what it took each of them for."""


def read_told(run: Path) -> Told | None:
    """What the last judging of a fine-tuning run said; None if it wrote nothing."""
    file = run / "results" / _PREDICTIONS
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as stored:
        return Told(stored["images"], stored["classes"])


def told_right(run: Path, labels: Tensor) -> np.ndarray:
    """Which of the readable test images a complete run tells right: bool [M].

    Args:
        labels: int64, of all test images.

    Raises:
        RunError: if what it said of them is missing.
    """
    told = read_told(run)
    if told is None:
        raise RunError(f"{run / 'results' / _PREDICTIONS} is missing; remove {run} to train it again")
    return np.equal(told.classes, labels[torch.from_numpy(told.images)].numpy())


def _write_told(run: Path, told: Told) -> None:
    """Keep it, whole or not at all."""
    folder = run / "results"
    folder.mkdir(exist_ok=True)
    partial = folder / f".{_PREDICTIONS}.partial.npz"
    np.savez(partial, images=told.images, classes=told.classes)
    partial.replace(folder / _PREDICTIONS)


class Judge:
    """The accuracy on labelled images, as columns for the metrics; what was said of each is kept.

    With a moving average of the weights `test_accuracy` is the average's, and that of the weights
    themselves stands beside it.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: Classifier,
        source: Source,
        labels: Tensor,
        crop_pct: float | None = None,
    ) -> None:
        self.trainer, self.model, self.source, self.labels = trainer, model, source, labels
        self.crop_pct = crop_pct

    def __call__(self, step: int) -> dict[str, float]:
        trainer = self.trainer
        judged = {"test_accuracy": class_scores(self.model, trainer.watched_ema or None)}
        if trainer.ema:
            judged["test_accuracy_last"] = class_scores(self.model)
        scores, seen = extract(
            judged,
            self.source,
            range(len(self.source)),
            self.model.config,
            trainer.world.device,
            crop_pct=self.crop_pct,
            precision=trainer.config.precision,
        )
        if len(seen) < len(self.source):
            trainer.journal.warn(f"{len(self.source) - len(seen)} test image(s) could not be read")
        truth = self.labels[seen]
        _write_told(
            trainer.folder, Told(np.array(seen, np.int64), scores["test_accuracy"].argmax(dim=1).numpy())
        )
        right = {name: float((s.argmax(dim=1) == truth).double().mean()) for name, s in scores.items()}
        return {**right, "test_images": len(seen)}
