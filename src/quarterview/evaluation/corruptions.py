"""Pictures as bad cameras, weather and files make them: the corruptions of ImageNet-C.

The corruptions are those of Hendrycks and Dietterich 2019, as the library imagecorruptions-imaug has them.
What it draws is a function of (seed, image, corruption, severity).
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
from quarterview.data.loader import central, ignore_signals
from quarterview.data.reading import read
from quarterview.data.sources.base import Source
from quarterview.data.transforms.crop import to_float
from quarterview.data.workers import watched
from quarterview.errors import UserError
from quarterview.evaluation.features import class_scores, crop_share
from quarterview.models.classifier import Classifier
from quarterview.training.trainer import precision_context, usable_precision

LEAST_SIDE = 32
"""The smallest side of an image that the library takes, in pixels."""
_PACKAGE = "imagecorruptions-imaug"
_SEEDED = ("glass_blur", "impulse_noise")  # they draw from a generator of their own, and take its seed
_MOST_BYTES = 32 << 20  # of pictures that a worker hands over at a time
_MOST_IMAGES = 64


class Corruption(NamedTuple):
    """What is done to a picture."""

    name: str
    severity: int
    """1 to 5."""


@cache
def library() -> tuple[Callable[..., Any], str]:
    """The function that corrupts, and the library's name and version.

    Raises:
        UserError: if the extra ``quarterview[robustness]`` is not installed.
    """
    try:
        named = f"{_PACKAGE} {version(_PACKAGE)}"
        from imagecorruptions import corrupt
    except ImportError as error:
        advice = "pip install 'quarterview[robustness]'"
        if "libGL" in str(error):
            advice = "the system's libGL, or opencv-python-headless in the place of opencv-python"
        raise UserError(f"corruptions need {_PACKAGE}, and there is: {error}; accepted: {advice}") from None
    return corrupt, named


def corrupt(pixels: Tensor, what: Corruption, image: int, seed: int) -> Tensor:
    """One picture, corrupted. Whatever else is drawn, before or in between, it is the same.

    One with a side below 32 pixels is enlarged by a whole factor, corrupted, and averaged back.

    Args:
        pixels: uint8 [3, H, W].
        image: its number in the set.

    Returns:
        uint8 [3, H, W].

    Raises:
        UserError: if it is no such picture, or the library is not there.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise UserError(
            f"a picture of {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)} cannot be "
            "corrupted; accepted: 8-bit RGB"
        )
    apply, _ = library()
    factor = -(-LEAST_SIDE // min(pixels.shape[1:]))  # 1 where it is large enough
    large = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else pixels
    given = large.permute(1, 2, 0).contiguous().numpy()  # [H, W, 3]
    with rng.seeded(seed, f"corrupt {what.name}", image, what.severity), np.errstate(invalid="raise"):
        own = {"seed": int(np.random.randint(2**31))} if what.name in _SEEDED else {}
        try:
            made = apply(given, severity=what.severity, corruption_name=what.name, **own)
        except FloatingPointError:
            if what.name != "spatter":
                raise
            made = given  # not a drop fell, and the library divides by how many
    changed = torch.from_numpy(np.array(made)).permute(2, 0, 1)
    if factor == 1:
        return changed.contiguous()
    return torch.nn.functional.avg_pool2d(changed.float(), factor).round().to(torch.uint8)


# ---------------------------------------------------------------------- over many images

Asked = Callable[[int], Sequence[Corruption | None]]
"""What is to be done to each image: equally many things for all of them; None is nothing."""


def all_of(conditions: Sequence[Corruption | None], _image: int) -> Sequence[Corruption | None]:
    """The same for every image: an `Asked`, once its first argument is bound."""
    return conditions


def one_of(names: Sequence[str], severity: int, seed: int, image: int) -> tuple[Corruption]:
    """One of the names for each image, drawn by its number: an `Asked`, all but the image bound."""
    number = float(rng.uniform(seed, "which corruption", 0, torch.tensor([image]), 1))
    return (Corruption(names[int(number * len(names))], severity),)


class _Pictures(Dataset):
    """Each image as it is asked for: its number and uint8 [K, 3, H, W], or None, or why all must end."""

    def __init__(self, source: Source, cut: Callable[[Tensor], Tensor], asked: Asked, seed: int) -> None:
        self.source, self.cut, self.asked, self.seed = source, cut, asked, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | UserError | None:
        try:
            picture, _ = read(self.source, index)
            if picture is None:
                return None
            pixels = self.cut(picture.pixels)
            made = [
                pixels if what is None else corrupt(pixels, what, index, self.seed)
                for what in self.asked(index)
            ]
        except UserError as error:  # handed over, for torch would wrap it in a traceback
            return UserError(f"{self.source.name(index)}: {error}")
        return index, torch.stack(made)


def _together(some: list[tuple[int, Tensor] | UserError | None]) -> tuple[list[int], Tensor] | UserError:
    """The readable ones of some images: their numbers and uint8 [B, K, 3, H, W]."""
    kept = []
    for each in some:
        if isinstance(each, UserError):
            return each
        if each is not None:
            kept.append(each)
    return [image for image, _ in kept], torch.stack([p for _, p in kept]) if kept else torch.empty(0)


def _begin_worker(worker: int) -> None:
    import cv2

    ignore_signals(worker)
    cv2.setNumThreads(0)  # there is a worker for each core, and threads of a forked library may hang


@torch.inference_mode()
def predictions(
    model: Classifier,
    source: Source,
    asked: Asked,
    seed: int = 0,
    crop_pct: float | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
    workers: int = 0,
    batch_size: int = 256,
) -> Iterator[tuple[list[int], Tensor]]:
    """What a classifier takes corrupted central crops for, which are corrupted at the size that it sees.

    Args:
        model: on its device.
        crop_pct: as `central_batches`.
        workers: processes that decode and corrupt.
        batch_size: pictures that the model sees at a time.

    Yields:
        Some images that could be read, in order, and int64 [B, K] on the CPU, the class under each of what
        was asked for.

    Raises:
        UserError: if the images are no 8-bit RGB.
        RunError: if a worker dies.
    """
    if model.config.in_chans != 3:
        raise UserError(f"a classifier of {model.config.in_chans} channel(s); accepted: of 3, for RGB images")
    library()  # before workers would miss it
    size = model.config.image_size
    cut = partial(central, image_size=size, crop_pct=crop_share(crop_pct, size))
    bytes_each = 3 * size[0] * size[1] * len(asked(0))
    loader = DataLoader(
        _Pictures(source, cut, asked, seed),
        batch_size=max(1, min(_MOST_IMAGES, _MOST_BYTES // bytes_each)),
        num_workers=workers,
        collate_fn=_together,
        worker_init_fn=_begin_worker if workers else None,
    )
    device = next(model.parameters()).device
    context = precision_context(usable_precision(precision, device), device)
    score = class_scores(model)
    with watched(iter(loader)) as batches:
        for made in batches:
            if isinstance(made, UserError):
                raise made
            images, pictures = made
            if not images:
                continue
            told = []
            for some in pictures.flatten(0, 1).split(batch_size):
                with context():
                    told.append(score(to_float(some.to(device))).argmax(dim=1).cpu())
            yield images, torch.cat(told).view(len(images), -1)
