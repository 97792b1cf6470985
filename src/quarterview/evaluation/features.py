"""Features of images: encoders, and what they make of many images."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quarterview import rng
from quarterview.data.loader import central, stack
from quarterview.data.reading import Report, read_many
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import normalise, to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import FeatureKind
from quarterview.models import masking
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import VisionTransformer
from quarterview.training.trainer import precision_context, usable_precision

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


class Features(NamedTuple):
    """The features of one encoder, and the labels of the images that they are of."""

    train: Tensor
    """float32 [N, D]."""
    train_labels: Tensor
    """int64 [N]."""
    test: Tensor
    """float32 [M, D]."""
    test_labels: Tensor
    """int64 [M]."""


# ---------------------------------------------------------------------- encoders


def make_encoders(
    model: Backbone, kind: FeatureKind, baselines: bool = True, compile: bool = False, seed: int = 0
) -> dict[str, Encoder]:
    """The encoders to compare, by the name they have in tables.

    Args:
        baselines: raw pixels and an encoder with random weights, too.
        compile: compile the encoders.
        seed: of the random weights.
    """
    models = {"this model": model}
    if baselines:
        models = {"random encoder": fresh_twin(model, seed), **models}
    if compile:
        for each in models.values():
            compile_blocks(each)
    encoders = {name: encoder_features(each, kind) for name, each in models.items()}
    return {"raw pixels": pixel_features, **encoders} if baselines else encoders


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
        tokens = model.encode(as_trained(model, images))  # [B, K + L, D]
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


def tokens_after(model: VisionTransformer, images: Tensor, block: int | None = None) -> Tensor:
    """The tokens of whole images after the first `block` blocks; later blocks are not run.

    Args:
        images: float [B, C, H, W], normalised.
        block: 1 to the model's depth, before the final norm; None means after it.

    Returns:
        float [B, K + L, D], the K cls tokens first.
    """
    if block is None:
        return model.encode(images)
    tokens, _ = model.forward_blocks(model.embed(model.patchify(images)), stop=block)
    return tokens


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
