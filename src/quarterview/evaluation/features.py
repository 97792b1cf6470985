"""Feature extraction: encoders, and the features of many images."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from quarterview import rng
from quarterview.data.loader import resized_center_crop, stack_images
from quarterview.data.reading import SampleReport, read_samples
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import normalize, to_float
from quarterview.errors import UserError
from quarterview.evaluation.config import FeaturePool
from quarterview.models import masking
from quarterview.models.classifier import Classifier
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.vit import VisionTransformer
from quarterview.training.trainer import get_autocast_context, get_supported_precision

PAPER_SIZE, PAPER_CROP_PCT = (224, 224), 224 / 256
MAX_PIXEL_SIDE = 32
"""Maximum longer side in pixels of the images whose pixels serve as features; larger images are shrunk."""

Encoder = Callable[[Tensor], Tensor]
"""Images, float [B, C, H, W] in [0, 1] on the device -> features, float [B, D]."""


class BackboneConfig(Protocol):
    """The input and token configuration of a backbone."""

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
    """A vision transformer in evaluation mode, of any training method."""

    @property
    def config(self) -> BackboneConfig: ...
    @property
    def blocks(self) -> nn.ModuleList: ...
    def encode(self, images: Tensor) -> Tensor:
        """Encode images: float [B, C, H, W], normalised -> tokens, float [B, K + L, D], the K cls tokens
        first, then the patches row by row."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)


class Features(NamedTuple):
    """Training and test features of one encoder, with labels."""

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
    model: Backbone, pool: FeaturePool, baselines: bool = True, compile: bool = False, seed: int = 0
) -> dict[str, Encoder]:
    """Return the encoders to compare: name in tables -> encoder.

    Args:
        pool: the kind of features, see `make_encoder`.
        baselines: add raw pixels and an encoder with random weights.
        compile: compile the encoders.
        seed: seed of the random weights.
    """
    models = {"this model": model}
    if baselines:
        models = {"random encoder": create_untrained_copy(model, seed), **models}
    if compile:
        for backbone in models.values():
            compile_blocks(backbone)
    encoders = {name: make_encoder(backbone, pool) for name, backbone in models.items()}
    return {"raw pixels": compute_pixel_features, **encoders} if baselines else encoders


def create_untrained_copy(model: AnyBackbone, seed: int) -> AnyBackbone:
    """Return a model of the same architecture in evaluation mode, with the initial weights of a seed."""
    model_class: Any = type(model)
    with rng.seeded(seed, "init"):
        copy = model_class(model.config)
    return copy.to(next(model.parameters()).device).eval()


def compile_blocks(model: Backbone, num_blocks: int | None = None) -> None:
    """Compile the first `num_blocks` blocks of a model, by default all, at their first call."""
    for block in model.blocks[:num_blocks]:
        block.compile()


def make_encoder(model: Backbone, pool: FeaturePool) -> Encoder:
    """Return an encoder that gives the pooled tokens of unmasked images.

    Args:
        pool: ``mean`` of the patch tokens after the final norm (in a classifier, with its `fc_norm` after the
            mean), or ``cls`` token; of several cls tokens the mean.
    """

    cls = model.config.cls_tokens

    def encode(images: Tensor) -> Tensor:
        tokens = model.encode(normalize_for_model(model, images))  # [B, K + L, D]
        if pool == "cls":
            return tokens[:, :cls].mean(dim=1)
        mean = tokens[:, cls:].mean(dim=1)
        return model.fc_norm(mean) if isinstance(model, Classifier) else mean

    return encode


def make_masked_encoder(model: MaskedAutoencoder, visible_ratio: float, seed: int) -> Encoder:
    """Return an encoder that sees a random part of the patches of each image and averages their tokens.

    The random mask of an image depends on the seed and on how many images were encoded before it.

    Args:
        visible_ratio: ratio of visible patches, above 0 to 1.
    """
    num_encoded, kept = 0, max(1, int(model.config.num_patches * visible_ratio))

    def encode(images: Tensor) -> Tensor:
        nonlocal num_encoded
        indices = torch.arange(num_encoded, num_encoded + len(images), device=images.device)
        num_encoded += len(images)
        noise = rng.uniform(seed, "visible", 0, indices, model.config.num_patches)
        mask = masking.mask_from_noise(noise, kept)
        return model.encode(normalize_for_model(model, images), mask)[:, model.config.cls_tokens :].mean(
            dim=1
        )

    return encode


def make_logits_fn(model: Classifier, weights: Mapping[str, Tensor] | None = None) -> Encoder:
    """Return a function that computes the logits of unmasked images: float [B, num_classes].

    Args:
        weights: name -> tensor, to use in place of the classifier's own weights.
    """

    def compute_logits(images: Tensor) -> Tensor:
        images = normalize_for_model(model, images)
        return model(images) if weights is None else functional_call(model, dict(weights), (images,))

    return compute_logits


def normalize_for_model(model: Backbone, images: Tensor) -> Tensor:
    """Normalise images in [0, 1] with the channel means and standard deviations that a model was trained
    with."""
    mean = model.config.mean or (0.0,) * model.config.in_chans
    std = model.config.std or (1.0,) * model.config.in_chans
    return normalize(images, mean, std)


def get_intermediate_tokens(model: VisionTransformer, images: Tensor, block: int | None = None) -> Tensor:
    """Return the tokens of unmasked images after the first `block` blocks. Later blocks are not run.

    Args:
        images: float [B, C, H, W], normalised.
        block: from 1 to the depth of the model, before the final norm; None for the tokens after the final
            norm.

    Returns:
        float [B, K + L, D], the K cls tokens first.
    """
    if block is None:
        return model.encode(images)
    tokens, _ = model.forward_blocks(model.embed(model.patchify(images)), num_blocks=block)
    return tokens


def compute_pixel_features(images: Tensor) -> Tensor:
    """Return the pixels of images that are shrunk to at most 32 pixels a side: float [B, D]."""
    return shrink_images(images).flatten(1)


def shrink_images(images: Tensor) -> Tensor:
    """Shrink images [B, C, H, W] so that the longer side has at most 32 pixels."""
    factor = max(images.shape[2:]) / MAX_PIXEL_SIDE
    if factor <= 1:
        return images
    size = [max(1, round(side / factor)) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


# ---------------------------------------------------------------------- features of many images


@torch.inference_mode()
def extract_features(
    encoders: Mapping[str, Encoder],
    source: Source,
    ids: Sequence[int],
    config: BackboneConfig,
    device: torch.device,
    batch_size: int = 256,
    crop_pct: float | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> tuple[dict[str, Tensor], list[int]]:
    """Extract features of images with each encoder, in one pass over the images.

    Args:
        encoders: name -> encoder.
        ids: indices of the images in the source.
        config: image size of the backbone.
        batch_size: images per forward pass.
        crop_pct: see `iterate_central_crops`.
        precision: precision of the encoders; fp32 on devices without bf16.

    Returns:
        Features, float32 [N, D] on the CPU, by the name of the encoder, and the N readable ids, in order.

    Raises:
        UserError: if none of the images can be read.
    """
    features: dict[str, Tensor] = {}
    read_ids: list[int] = []
    context = get_autocast_context(get_supported_precision(precision, device), device)
    for batch_ids, pixels in iterate_central_crops(
        source, ids, config.image_size, batch_size, crop_pct=crop_pct
    ):
        images = to_float(pixels.to(device))
        for name, encoder in encoders.items():
            with context():
                batch_features = encoder(images).float().cpu()
            if name not in features:  # allocated once: concatenating batches would need twice the memory
                features[name] = torch.empty(len(ids), batch_features.shape[1])
            features[name][len(read_ids) : len(read_ids) + len(batch_ids)] = batch_features
        read_ids += batch_ids
    if not read_ids:
        raise UserError(f"None of the {len(ids)} images can be read. Give images in a supported format.")
    return {name: rows[: len(read_ids)] for name, rows in features.items()}, read_ids


def iterate_central_crops(
    source: Source,
    ids: Sequence[int],
    image_size: Sequence[int],
    batch_size: int,
    on_unreadable: Callable[[SampleReport], None] | None = None,
    crop_pct: float | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield central crops of the readable images in batches: their ids and pixels, [B, C, *image_size].

    Args:
        ids: indices of the images in the source.
        on_unreadable: called with the report of each image that cannot be read.
        crop_pct: fraction of the sides of the largest central box; by default 0.875 for 224 × 224 pixels, as
            in the official evaluation of the paper, and 1 for other sizes.
    """
    crop_pct = resolve_crop_pct(crop_pct, image_size)
    batch: list[tuple[int, Tensor]] = []
    for sample, image, reports in read_samples(source, ids, get_num_decoding_threads()):
        if image is not None:
            batch.append((sample, resized_center_crop(image.pixels, image_size, crop_pct)))
        elif on_unreadable is not None:
            on_unreadable(reports[0])
        if len(batch) == batch_size:
            yield [i for i, _ in batch], stack_images([pixels for _, pixels in batch])
            batch = []
    if batch:
        yield [i for i, _ in batch], stack_images([pixels for _, pixels in batch])


def resolve_crop_pct(crop_pct: float | None, image_size: Sequence[int]) -> float:
    """Return `crop_pct`, or the default of `iterate_central_crops` for this image size if it is None."""
    if crop_pct is not None:
        return crop_pct
    return PAPER_CROP_PCT if tuple(image_size) == PAPER_SIZE else 1.0


def get_num_decoding_threads() -> int:
    """Return the number of threads that decode images."""
    return min(8, os.cpu_count() or 1)
