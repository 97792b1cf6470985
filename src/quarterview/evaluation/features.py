"""Features of labelled images: what every probe of a frozen encoder starts from."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quarterview import rng
from quarterview.data.loader import central, stack
from quarterview.data.reading import Report, read_many
from quarterview.data.sources.base import Source, labels_of
from quarterview.data.sources.open import open_sources
from quarterview.data.transforms.crop import normalise, to_float
from quarterview.errors import UserError, check_types
from quarterview.evaluation.results import results_folder, write_result
from quarterview.models import masking
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.training.distributed import choose_device
from quarterview.training.trainer import precision_context, usable_precision
from quarterview.weights.loading import load, read

FeatureKind = Literal["mean", "cls"]
PAPER_SIZE, PAPER_CROP_PCT = (224, 224), 224 / 256
PIXEL_SIDE = 32
"""Larger images are shrunk to this side before their pixels serve as features."""

Encoder = Callable[[Tensor], Tensor]
"""float [B, C, H, W] in [0, 1], on the device -> float [B, D]."""


class BackboneConfig(Protocol):
    """What there is to know of a backbone's images."""

    @property
    def image_size(self) -> tuple[int, ...]: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...] | None: ...
    @property
    def std(self) -> tuple[float, ...] | None: ...
    @property
    def cls_tokens(self) -> int: ...


class Backbone(Protocol):
    """A vision transformer of ours, in evaluation mode, whatever it was trained for."""

    @property
    def config(self) -> BackboneConfig: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    def encode(self, images: Tensor) -> Tensor:
        """float [B, C, H, W], normalised -> float [B, K + L, D]: K cls tokens, then the patches by row."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)


@dataclass(frozen=True)
class ProbeConfig:
    """Which model is judged, and on what."""

    run: str
    """A run, a checkpoint folder or a .safetensors file."""
    train: tuple[str, ...]
    """Labelled images to learn from: anything that --data of pretrain takes."""
    test: tuple[str, ...]
    """Labelled images to be judged on."""
    features: FeatureKind | None = None
    """The mean of the patch tokens after the final norm, or the cls token (of several the mean). By
    default the mean, and for the paper's linear probe the cls token."""
    labels: int | None = None
    """Use only so many labelled training images, equally many a class; by default all."""
    baselines: bool = True
    """Judge raw pixels and an encoder with random weights beside the model."""
    ema: bool = False
    """Judge the moving average of the weights, of a run with --ema."""
    crop_pct: float | None = None
    """Share of the sides of the largest central box that an image is cut to. By default 0.875 for
    224 × 224 pixels, as the paper does, and 1 for other sizes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute the features."""
    compile: bool = False
    """Compile the encoders, which takes a minute and pays off over many images."""
    seed: int = 0
    """Of the choice of labelled images, of the random encoder, and of a probe's own draws."""

    def __post_init__(self) -> None:
        check_types(self, ProbeConfig)
        if self.labels is not None and self.labels < 1:
            raise UserError(f"{self.labels} labels; accepted: 1 or more")
        check_crop_pct(self.crop_pct)


def check_crop_pct(crop_pct: float | None) -> None:
    """Raises UserError if it is no share."""
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct}; accepted: a share above 0, at most 1")


class Probe(NamedTuple):
    """What a probe works with: the encoders and the labelled images."""

    config: ProbeConfig
    kind: FeatureKind
    backbone: BackboneConfig
    device: torch.device
    encoders: Mapping[str, Encoder]
    """By the name that they have in tables."""
    train: Source
    train_labels: Tensor
    """int64, of every training image, chosen or not."""
    chosen: Tensor
    """int64, the training images whose labels may be used."""
    test: Source
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """How many classes the training images have."""
        return len(self.train_labels.unique())

    @property
    def described(self) -> dict[str, Any]:
        """The images, for a result."""
        return {
            "train": {
                "specs": list(self.config.train),
                "fingerprint": self.train.fingerprint(),
                "images": len(self.train),
                "labelled": len(self.chosen),
            },
            "test": {
                "specs": list(self.config.test),
                "fingerprint": self.test.fingerprint(),
                "images": len(self.test),
            },
        }


class ProbeData(NamedTuple):
    """The features of each encoder, by its name, and the labels."""

    train: Mapping[str, Tensor]
    train_labels: Tensor
    test: Mapping[str, Tensor]
    test_labels: Tensor
    classes: int
    unreadable: int
    """Images that were left out because they could not be read."""
    described: Mapping[str, Any] = MappingProxyType({})
    """The images, for a result."""


def open_probe(config: ProbeConfig, default: FeatureKind = "mean") -> Probe:
    """Open the model and the images of a probe.

    Args:
        default: the features where the configuration leaves them open.

    Raises:
        UserError: if the images have no labels, or train and test have other classes.
    """
    device = choose_device(config.device)
    model = load(config.run, config.ema).to(device)
    train, test = (open_sources(spec, model.config.in_chans) for spec in (config.train, config.test))
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError(f"{config.train} and {config.test} have different classes; accepted: the same")
    train_labels, test_labels = torch.tensor(labels_of(train)), torch.tensor(labels_of(test))
    chosen = choose_labelled(train_labels, config.labels, config.seed)
    kind = config.features or default
    encoders = make_encoders(model, config, kind)
    return Probe(config, kind, model.config, device, encoders, train, train_labels, chosen, test, test_labels)


def probe_data(config: ProbeConfig) -> ProbeData:
    """Compute everything that a probe of features compares.

    Raises:
        UserError: if the images have no labels, or train and test have other classes.
    """
    probe = open_probe(config)
    encoders, backbone, device = probe.encoders, probe.backbone, probe.device
    of = partial(extract, config=backbone, device=device, crop_pct=config.crop_pct)
    train_features, train_kept = of(encoders, probe.train, probe.chosen.tolist())
    test_features, test_kept = of(encoders, probe.test, range(len(probe.test)))
    return ProbeData(
        train_features,
        probe.train_labels[train_kept],
        test_features,
        probe.test_labels[test_kept],
        probe.classes,
        len(probe.chosen) - len(train_kept) + len(probe.test) - len(test_kept),
        probe.described,
    )


def choose_labelled(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """The ids of `count` images, equally many of each class as far as there are; all if None."""
    if count is None:
        return torch.arange(len(labels))
    if count > len(labels):
        raise UserError(
            f"{count} labels were asked for, and there are {len(labels)}; accepted: at most those"
        )
    order = rng.permute(seed, "labels", 0, torch.arange(len(labels)), len(labels))
    place = torch.empty(len(labels), dtype=torch.int64)  # of each image among those of its class
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)][:count].sort().values


# ---------------------------------------------------------------------- encoders


def make_encoders(
    model: Backbone, config: ProbeConfig, kind: FeatureKind | None = None
) -> dict[str, Encoder]:
    """The encoders to compare, by the name they have in tables."""
    kind = kind or config.features or "mean"
    models = {"this model": model}
    if config.baselines:
        models = {"random encoder": fresh_twin(model, config.seed), **models}
    if config.compile:
        for each in models.values():
            compile_blocks(each)
    encoders = {name: encoder_features(each, kind) for name, each in models.items()}
    return {"raw pixels": pixel_features, **encoders} if config.baselines else encoders


def fresh_twin(model: AnyBackbone, seed: int) -> AnyBackbone:
    """A model of the same architecture, with the initial weights that belong to a seed."""
    kind: Any = type(model)
    with rng.seeded(seed, "init"):
        twin = kind(model.config)
    return twin.to(next(model.parameters()).device).eval()


def compile_blocks(model: Backbone, count: int | None = None) -> None:
    """Compile the first `count` blocks of a model, by default all, when they are first used."""
    for block in model.blocks[:count]:
        block.compile()


def encoder_features(model: Backbone, kind: FeatureKind) -> Encoder:
    """What a model makes of whole images."""

    cls = model.config.cls_tokens

    def encode(images: Tensor) -> Tensor:
        tokens = tokens_after(model, as_trained(model, images))  # [B, K + L, D]
        if kind == "cls":
            return tokens[:, :cls].mean(dim=1)
        mean = tokens[:, cls:].mean(dim=1)
        return model.fc_norm(mean) if isinstance(model, Classifier) else mean

    return encode


def partly_visible(model: MaskedAutoencoder, share: float, seed: int) -> Encoder:
    """The mean of the patch tokens, of images of which a share of the patches is seen, chosen at random.

    What each image shows depends on its place among those that have been given, and on the seed.
    """
    given, kept = 0, max(1, int(model.config.patches * share))

    def encode(images: Tensor) -> Tensor:
        nonlocal given
        places = torch.arange(given, given + len(images), device=images.device)
        given += len(images)
        noise = rng.uniform(seed, "visible", 0, places, model.config.patches)
        mask = masking.mask_from_noise(noise, kept)
        return model.encode(as_trained(model, images), mask)[:, model.config.cls_tokens :].mean(dim=1)

    return encode


def class_scores(model: Classifier, weights: Mapping[str, Tensor] | None = None) -> Encoder:
    """What a classifier says of whole images: float [B, classes].

    Args:
        weights: to use in place of its own, by name.
    """

    def score(images: Tensor) -> Tensor:
        images = as_trained(model, images)
        return model(images) if weights is None else functional_call(model, dict(weights), (images,))

    return score


def as_trained(model: Backbone, images: Tensor) -> Tensor:
    """Images in [0, 1], normalised by the means and deviations that a model was trained with."""
    mean = model.config.mean or (0.0,) * model.config.in_chans
    std = model.config.std or (1.0,) * model.config.in_chans
    return normalise(images, mean, std)


class _Reached(Exception):  # noqa: N818
    """Carries the tokens out of a forward pass that need not go further: no error."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def tokens_after(model: Backbone, images: Tensor, block: int | None = None) -> Tensor:
    """The tokens of whole images after the first `block` blocks.

    Args:
        images: float [B, C, H, W], normalised.
        block: 1 to the model's depth, before the final norm; None means after it.

    Returns:
        float [B, K + L, D], the K cls tokens first.
    """
    if block is None:
        return model.encode(images)

    def stop(_module: nn.Module, _inputs: object, tokens: Tensor) -> None:
        raise _Reached(tokens)

    handle = model.blocks[block - 1].register_forward_hook(stop)
    try:
        model.encode(images)
    except _Reached as reached:
        return reached.tokens
    finally:
        handle.remove()
    raise AssertionError("unreachable: encode applies every block")


def pixel_features(images: Tensor) -> Tensor:
    """The pixels themselves, of images shrunk to at most 32 on the longer side."""
    return shrunk(images).flatten(1)


def shrunk(images: Tensor) -> Tensor:
    """Images [B, C, H, W] shrunk to at most 32 on the longer side."""
    shrink = max(images.shape[2:]) / PIXEL_SIDE
    if shrink <= 1:
        return images
    size = [max(1, round(side / shrink)) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


# ---------------------------------------------------------------------- over many images


@torch.inference_mode()
def extract(
    encoders: Mapping[str, Encoder],
    source: Source,
    ids: Sequence[int],
    config: BackboneConfig,
    device: torch.device,
    batch_size: int = 256,
    crop_pct: float | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> tuple[dict[str, Tensor], list[int]]:
    """Features of the images `ids` by each encoder, in one pass over the images.

    Args:
        crop_pct: as `central_batches`.
        precision: of the encoders; fp32 where the device has no bf16.

    Returns:
        float32 [N, D] on the CPU for each encoder, and the ids that could be read, in order.
    """
    found: dict[str, Tensor] = {}
    kept: list[int] = []
    context = precision_context(usable_precision(precision, device), device)
    for some, pixels in central_batches(source, ids, config.image_size, batch_size, crop_pct=crop_pct):
        images = to_float(pixels.to(device))
        for name, encoder in encoders.items():
            with context():
                rows = encoder(images).float().cpu()
            if name not in found:  # all of it at once: parts put together at the end would take twice that
                found[name] = torch.empty(len(ids), rows.shape[1])
            found[name][len(kept) : len(kept) + len(some)] = rows
        kept += some
    if not kept:
        raise UserError("none of the images could be read")
    return {name: rows[: len(kept)] for name, rows in found.items()}, kept


def central_batches(
    source: Source,
    ids: Sequence[int],
    image_size: Sequence[int],
    batch_size: int,
    broken: Callable[[Report], None] | None = None,
    crop_pct: float | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Central crops of the readable images: their ids and [B, C, *image_size].

    Args:
        broken: told of each image that cannot be read.
        crop_pct: share of the sides of the largest central box; by default 0.875 for 224 × 224
            pixels, as the official evaluation of the paper, and 1 for other sizes.
    """
    crop_pct = crop_share(crop_pct, image_size)
    some: list[tuple[int, Tensor]] = []
    for sample, picture, reports in read_many(source, ids, decoding_threads()):
        if picture is not None:
            some.append((sample, central(picture.pixels, image_size, crop_pct)))
        elif broken is not None:
            broken(reports[0])
        if len(some) == batch_size:
            yield [i for i, _ in some], stack([pixels for _, pixels in some])
            some = []
    if some:
        yield [i for i, _ in some], stack([pixels for _, pixels in some])


def crop_share(crop_pct: float | None, image_size: Sequence[int]) -> float:
    """The share that was asked for, or the default of `central_batches`."""
    if crop_pct is not None:
        return crop_pct
    return PAPER_CROP_PCT if tuple(image_size) == PAPER_SIZE else 1.0


def decoding_threads() -> int:
    """How many images are decoded at a time."""
    return min(8, os.cpu_count() or 1)


# ---------------------------------------------------------------------- records


def record_probe(
    protocol: str,
    config: ProbeConfig,
    argv: Sequence[str],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Path | None:
    """Write a probe's result into its run's results folder; nothing for a weights file outside a run.

    Args:
        protocol: the file's name, to which features, ema and the number of labels are added where given.
        settings: those of the protocol, beside those of `config`.
    """
    folder, weights = results_folder(config.run), read(config.run, config.ema)
    if folder is None or weights.file is None:
        return None
    given = {
        field.name: getattr(config, field.name)
        for field in fields(ProbeConfig)
        if field.name not in ("run", "train", "test")
    }
    file = weights.file.resolve().relative_to(folder.parent)
    described = {"weights": str(file), "weights_digest": weights.digest}
    details = (protocol, config.features, "ema" if config.ema else None, config.labels)
    name = "-".join(str(part) for part in details if part is not None)
    return write_result(folder, name, argv, {**described, **given, **settings}, data, results)
