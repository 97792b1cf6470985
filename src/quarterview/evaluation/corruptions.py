"""Image corruptions of ImageNet-C (Hendrycks and Dietterich 2019): noise, blur, weather and digital
artefacts.

The library imagecorruptions-imaug implements them. Its random draws are a function of (seed, image,
corruption, severity).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from quarterview import rng
from quarterview.data.loader import ignore_signals, resized_center_crop
from quarterview.data.reading import read_sample
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.data.workers import watch_workers
from quarterview.errors import UserError, missing_package
from quarterview.evaluation.features import make_logits_fn, resolve_crop_pct
from quarterview.models.classifier import Classifier
from quarterview.training.trainer import get_autocast_context, get_supported_precision

MIN_SIDE = 32
"""Smallest side in pixels of an image that the library accepts."""
_PACKAGE = "imagecorruptions-imaug"
_SEEDED_CORRUPTIONS = (
    "glass_blur",
    "impulse_noise",
)  # they create their own generator, from an argument `seed`
_MAX_BATCH_BYTES = 32 << 20  # of the images in one batch of a worker
_MAX_BATCH_IMAGES = 64


class Corruption(NamedTuple):
    """A type of corruption and its severity."""

    name: str
    severity: int
    """1 to 5."""


@cache
def load_library() -> tuple[Callable[..., Any], str]:
    """Import the corruption library. Return its function `corrupt`, and its name and version.

    Raises:
        UserError: if the extra ``quarterview[robustness]`` or the system's libGL is not installed.
    """
    try:
        name_and_version = f"{_PACKAGE} {version(_PACKAGE)}"
        from imagecorruptions import corrupt
    except ImportError as error:
        if "libGL" in str(error):
            raise UserError(
                f"{_PACKAGE} cannot be imported: {error}. Install the system's libGL, or replace "
                "opencv-python by opencv-python-headless."
            ) from None
        raise missing_package(_PACKAGE, "Corrupting images", "robustness") from error
    return corrupt, name_and_version


def corrupt(pixels: Tensor, corruption: Corruption, image_index: int, seed: int) -> Tensor:
    """Return a corrupted copy of an image.

    The result depends on the arguments alone, not on earlier random draws. An image with a side below 32
    pixels is enlarged by an integer factor, corrupted, and averaged down again.

    Args:
        pixels: uint8 [3, H, W].
        image_index: index of the image in its set, which selects the random draws.

    Returns:
        uint8 [3, H, W].

    Raises:
        UserError: if the image is not 8-bit RGB, or the library is not installed.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise UserError(
            f"Cannot corrupt an image of type {str(pixels.dtype).removeprefix('torch.')} and shape "
            f"{list(pixels.shape)}. Give 8-bit RGB images."
        )
    apply, _ = load_library()
    factor = -(-MIN_SIDE // min(pixels.shape[1:]))  # 1 if the image is large enough
    large = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else pixels
    array = large.permute(1, 2, 0).contiguous().numpy()  # [H, W, 3]
    with (
        rng.seeded(seed, f"corrupt {corruption.name}", image_index, corruption.severity),
        np.errstate(invalid="raise"),
    ):
        seeding = {"seed": int(np.random.randint(2**31))} if corruption.name in _SEEDED_CORRUPTIONS else {}
        try:
            corrupted = apply(array, severity=corruption.severity, corruption_name=corruption.name, **seeding)
        except FloatingPointError:
            if corruption.name != "spatter":
                raise
            corrupted = array  # no drop was drawn, and the library divides by the number of drops
    result = torch.from_numpy(np.array(corrupted)).permute(2, 0, 1)
    if factor == 1:
        return result.contiguous()
    return torch.nn.functional.avg_pool2d(result.float(), factor).round().to(torch.uint8)


# ---------------------------------------------------------------------- over many images

CorruptionPolicy = Callable[[int], Sequence[Corruption | None]]
"""Image index -> the corruptions to apply to that image, one at a time; None stands for the clean image.
Every image has the same number of them."""


def choose_all(conditions: Sequence[Corruption | None], _image_index: int) -> Sequence[Corruption | None]:
    """Return the same conditions for every image: a `CorruptionPolicy` once `conditions` is bound."""
    return conditions


def choose_one(names: Sequence[str], severity: int, seed: int, image_index: int) -> tuple[Corruption]:
    """Draw one corruption per image, keyed by its index: a `CorruptionPolicy` once the other arguments are
    bound."""
    position = float(rng.uniform(seed, "which corruption", 0, torch.tensor([image_index]), 1))
    return (Corruption(names[int(position * len(names))], severity),)


class _CorruptedDataset(Dataset):
    """Corrupted central crops of each image.

    An item is (index, uint8 [K, 3, H, W]), None for an unreadable image, or the UserError that ends the
    evaluation.
    """

    def __init__(
        self, source: Source, crop: Callable[[Tensor], Tensor], policy: CorruptionPolicy, seed: int
    ) -> None:
        self.source, self.crop, self.policy, self.seed = source, crop, policy, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | UserError | None:
        try:
            image, _ = read_sample(self.source, index)
            if image is None:
                return None
            pixels = self.crop(image.pixels)
            conditions = [
                pixels if corruption is None else corrupt(pixels, corruption, index, self.seed)
                for corruption in self.policy(index)
            ]
        except UserError as error:  # returned, because torch would add a worker's traceback to the message
            return UserError(f"{self.source.name(index)}: {error}")
        return index, torch.stack(conditions)


def _collate(samples: list[tuple[int, Tensor] | UserError | None]) -> tuple[list[int], Tensor] | UserError:
    """Stack readable samples: indices and uint8 [B, K, 3, H, W]. Return the first UserError if there is
    one."""
    readable = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        if sample is not None:
            readable.append(sample)
    return [i for i, _ in readable], torch.stack([p for _, p in readable]) if readable else torch.empty(0)


def _init_worker(worker: int) -> None:
    import cv2

    ignore_signals(worker)
    cv2.setNumThreads(0)  # there is one worker per core, and OpenCV's threads may hang in a forked process


@torch.inference_mode()
def predict_corrupted(
    model: Classifier,
    source: Source,
    policy: CorruptionPolicy,
    seed: int = 0,
    crop_pct: float | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    num_workers: int = 0,
    batch_size: int = 256,
) -> Iterator[tuple[list[int], Tensor]]:
    """Classify corrupted central crops. They are corrupted at the input size of the classifier.

    Args:
        model: the classifier, on its device.
        policy: the K corruptions of each image.
        seed: seed of the random draws of the corruptions.
        crop_pct: see `iterate_central_crops`.
        workers: processes that decode and corrupt images; 0 for this process.
        batch_size: images per forward pass of the model.

    Yields:
        Indices of B readable images, in order, and int64 [B, K] on the CPU, the class predicted under each
        corruption.

    Raises:
        UserError: if the images are not 8-bit RGB.
        RunError: if a worker dies.
    """
    if model.config.in_chans != 3:
        raise UserError(
            f"Corruptions are not supported for a classifier of {model.config.in_chans} channel(s). Give a "
            "classifier of 3 channels, for RGB images."
        )
    load_library()  # fails here rather than in the workers
    size = model.config.image_size
    crop = partial(resized_center_crop, image_size=size, crop_pct=resolve_crop_pct(crop_pct, size))
    bytes_each = 3 * size[0] * size[1] * len(policy(0))
    loader = DataLoader(
        _CorruptedDataset(source, crop, policy, seed),
        batch_size=max(1, min(_MAX_BATCH_IMAGES, _MAX_BATCH_BYTES // bytes_each)),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_init_worker if num_workers else None,
    )
    device = next(model.parameters()).device
    context = get_autocast_context(get_supported_precision(precision, device), device)
    compute_logits = make_logits_fn(model)
    with watch_workers(iter(loader)) as batches:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            indices, pixels = batch  # [B], [B, K, 3, H, W]
            if not indices:
                continue
            predicted = []
            for chunk in pixels.flatten(0, 1).split(batch_size):
                with context():
                    predicted.append(compute_logits(to_float(chunk.to(device))).argmax(dim=1).cpu())
            yield indices, torch.cat(predicted).view(len(indices), -1)
