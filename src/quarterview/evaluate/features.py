"""Features of labelled images: what every probe of a frozen encoder starts from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview import draws
from quarterview.data.augment import normalise, to_float
from quarterview.data.fetch import read_many
from quarterview.data.loader import central, stack
from quarterview.data.open import open_sources
from quarterview.data.source import Source, labels_of
from quarterview.errors import UserError, check_types
from quarterview.exchange.weights import load
from quarterview.model.config import MAEConfig
from quarterview.model.mae import MaskedAutoencoder, fresh_model
from quarterview.train.distributed import choose_device
from quarterview.train.loop import precision_context, usable_precision

FeatureKind = Literal["mean", "cls"]
_THREADS = 4
PIXEL_SIDE = 32
"""Larger images are shrunk to this side before their pixels serve as features."""

Encoder = Callable[[Tensor], Tensor]
"""float [B, C, H, W] in [0, 1], on the device -> float [B, D]."""


@dataclass(frozen=True)
class ProbeConfig:
    """Which model is judged, and on what."""

    run: str
    """A run, a checkpoint folder or a .safetensors file."""
    train: tuple[str, ...]
    """Labelled images to learn from: anything that --data of pretrain takes."""
    test: tuple[str, ...]
    """Labelled images to be judged on."""
    features: FeatureKind = "mean"
    """The mean of the patch tokens after the final norm, or the cls token."""
    labels: int | None = None
    """Use only so many labelled training images, equally many a class; by default all."""
    baselines: bool = True
    """Judge raw pixels and an encoder with random weights beside the model."""
    ema: bool = False
    """Judge the moving average of the weights, of a run with --ema."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute the features."""
    seed: int = 0
    """Of the choice of labelled images and of the random encoder."""

    def __post_init__(self) -> None:
        check_types(self, ProbeConfig)
        if self.labels is not None and self.labels < 1:
            raise UserError(f"{self.labels} labels; accepted: 1 or more")


class ProbeData(NamedTuple):
    """The features of each encoder, by its name, and the labels."""

    train: Mapping[str, Tensor]
    train_labels: Tensor
    test: Mapping[str, Tensor]
    test_labels: Tensor
    classes: int
    unreadable: int
    """Images that were left out because they could not be read."""


def probe_data(config: ProbeConfig) -> ProbeData:
    """Compute everything that a probe compares.

    Raises:
        UserError: if the images have no labels, or train and test have other classes.
    """
    device = choose_device(config.device)
    model = load(config.run, ema=config.ema).to(device)
    train, test = (open_sources(spec, model.config.in_chans) for spec in (config.train, config.test))
    if train.classes and test.classes and list(train.classes) != list(test.classes):
        raise UserError(f"{config.train} and {config.test} have different classes; accepted: the same")
    train_labels, test_labels = torch.tensor(labels_of(train)), torch.tensor(labels_of(test))
    chosen = choose_labelled(train_labels, config.labels, config.seed)
    encoders = make_encoders(model, config)
    train_features, train_kept = extract(encoders, train, chosen.tolist(), model.config, device)
    test_features, test_kept = extract(encoders, test, range(len(test)), model.config, device)
    classes = len(set(train_labels.tolist()))
    unreadable = len(chosen) - len(train_kept) + len(test) - len(test_kept)
    return ProbeData(
        train_features, train_labels[train_kept], test_features, test_labels[test_kept], classes, unreadable
    )


def choose_labelled(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """The ids of `count` images, equally many of each class as far as there are; all if None."""
    if count is None:
        return torch.arange(len(labels))
    if count > len(labels):
        raise UserError(
            f"{count} labels were asked for, and there are {len(labels)}; accepted: at most those"
        )
    order = draws.permute(seed, "labels", 0, torch.arange(len(labels)), len(labels))
    place = torch.empty(len(labels), dtype=torch.int64)  # of each image among those of its class
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = torch.arange(len(mine))
    return order[place[order].argsort(stable=True)][:count].sort().values


def make_encoders(model: MaskedAutoencoder, config: ProbeConfig) -> dict[str, Encoder]:
    """The encoders to compare, by the name they have in tables."""
    ours = encoder_features(model, config.features)
    if not config.baselines:
        return {"this model": ours}
    device = next(model.parameters()).device
    random = fresh_model(model.config, config.seed).to(device).eval()
    return {
        "raw pixels": pixel_features,
        "random encoder": encoder_features(random, config.features),
        "this model": ours,
    }


def encoder_features(model: MaskedAutoencoder, kind: FeatureKind) -> Encoder:
    """What a model makes of whole images."""
    mean = model.config.mean or (0.0,) * model.config.in_chans
    std = model.config.std or (1.0,) * model.config.in_chans

    def encode(images: Tensor) -> Tensor:
        tokens = model.encode(normalise(images, mean, std))  # [B, 1 + L, D]
        return tokens[:, 0] if kind == "cls" else tokens[:, 1:].mean(dim=1)

    return encode


def pixel_features(images: Tensor) -> Tensor:
    """The pixels themselves, of images shrunk to at most 32 on the longer side."""
    shrink = max(images.shape[2:]) / PIXEL_SIDE
    if shrink > 1:
        size = [max(1, round(side / shrink)) for side in images.shape[2:]]
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.flatten(1)


@torch.inference_mode()
def extract(
    encoders: Mapping[str, Encoder],
    source: Source,
    ids: Sequence[int],
    config: MAEConfig,
    device: torch.device,
    batch_size: int = 256,
) -> tuple[dict[str, Tensor], list[int]]:
    """Features of the images `ids` by each encoder, in one pass over the images.

    Returns:
        float32 [N, D] on the CPU for each encoder, and the ids that could be read, in order.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    kept: list[int] = []
    context = precision_context(usable_precision("bf16", device), device)
    for some, pixels in _batches(source, ids, config.image_size, batch_size):
        kept += some
        images = to_float(pixels.to(device))
        for name, encoder in encoders.items():
            with context():
                found[name].append(encoder(images).float().cpu())
    if not kept:
        raise UserError("none of the images could be read")
    return {name: torch.cat(parts) for name, parts in found.items()}, kept


def _batches(
    source: Source, ids: Sequence[int], image_size: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Central crops of the readable images: their ids and [B, C, *image_size]."""

    some: list[tuple[int, Tensor]] = []
    for sample, picture, _ in read_many(source, ids, _THREADS):
        if picture is not None:
            some.append((sample, central(picture.pixels, image_size)))
        if len(some) == batch_size:
            yield [i for i, _ in some], stack([pixels for _, pixels in some])
            some = []
    if some:
        yield [i for i, _ in some], stack([pixels for _, pixels in some])
