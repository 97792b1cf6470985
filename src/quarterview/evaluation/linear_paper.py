"""The paper's linear probe (He et al. 2021, appendix A.1, table 10), with what the official code adds.

The encoder is frozen and sees a new crop of every image in every epoch. Its cls token, after the
final norm, goes through a BatchNorm without scale and shift into a linear layer, which LARS trains
for 90 epochs. The last epoch is what is reported.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.cache import CACHE_BYTES, CachedSet, load_all
from quarterview.data.loader import stack
from quarterview.data.reading import read_many
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.sources.subset import subset
from quarterview.data.transforms.crop import crop_resize, crop_resize_batch, random_crops, to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation.config import LinearClassifierConfig
from quarterview.evaluation.features import Encoder, decoding_threads
from quarterview.evaluation.lars import Lars
from quarterview.evaluation.probe import Probe
from quarterview.training.optim import Schedule, warmup_steps
from quarterview.training.trainer import precision_context, usable_precision

_LOG = logging.getLogger("quarterview")

CROP_SCALE = (0.08, 1.0)
HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6
_AT_ONCE = 256
"""Images that the encoder sees at a time."""


# ---------------------------------------------------------------------- the images


class Pictures:
    """Labelled images to cut from: held on the device where they fit, else decoded whenever seen.

    `ids` int64 [N] are those that can be read, and `sizes` int64 [N, 2] their heights and widths.

    Args:
        source, ids: the images.
        limit: so many bytes of pixels are held at most.
    """

    def __init__(
        self, source: Source, ids: Sequence[int], device: torch.device, limit: int = CACHE_BYTES
    ) -> None:
        self.source, self.device = source, device
        chosen = subset(source, ids)
        held = load_all(chosen, device, limit, decoding_threads(), lambda _: None)
        if isinstance(held, CachedSet):
            rows = torch.tensor([i for i in range(len(chosen)) if i not in held.broken])
            self.images = held.images[rows.to(device)] if held.broken else held.images
            self.ids = torch.tensor(ids)[rows]
            self.sizes = torch.tensor(self.images.shape[2:]).expand(len(rows), 2)
            return
        self.images = None
        found = [
            (sample, picture.pixels.shape[1:])
            for sample, picture, _ in read_many(source, ids, decoding_threads())
            if picture is not None
        ]
        if not found:
            raise UserError("none of the images could be read")
        self.ids = torch.tensor([sample for sample, _ in found])
        self.sizes = torch.tensor([size for _, size in found])

    def __len__(self) -> int:
        return len(self.ids)

    def crops(self, rows: Tensor, boxes: Tensor, flips: Tensor, image_size: Sequence[int]) -> Tensor:
        """Crop, resize and flip the images at `rows`.

        Args:
            rows: int64 [B], in range(N).
            boxes: int64 [B, 4] of top, left, height, width.
            flips: bool [B].

        Returns:
            float32 [B, C, *image_size] in [0, 1], on the device.

        Raises:
            RunError: if an image that could be read before cannot be read any more.
        """
        if self.images is not None:
            rows, boxes, flips = (x.to(self.device) for x in (rows, boxes, flips))
            return crop_resize_batch(self.images[rows], boxes, flips, image_size) / 255
        crops = []
        read = read_many(self.source, self.ids[rows].tolist(), decoding_threads())
        for (sample, picture, _), box, flip in zip(read, boxes.tolist(), flips.tolist(), strict=True):
            if picture is None:
                raise RunError(f"{self.source.name(sample)} could be read before and cannot any more")
            crops.append(crop_resize(picture.pixels, box, image_size, flip))
        return to_float(stack(crops).to(self.device))


@torch.no_grad()
def crop_features(
    encoders: Mapping[str, Encoder],
    pictures: Pictures,
    epochs: Tensor,
    rows: Tensor,
    image_size: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """What each encoder makes of a random crop of each image: float32 [B, D], on the device.

    The crop is a function of the seed, the epoch and the image, and of nothing else.

    Args:
        epochs, rows: int64 [B].
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    context = precision_context(usable_precision("bf16", pictures.device), pictures.device)
    for some_epochs, some in zip(epochs.split(_AT_ONCE), rows.split(_AT_ONCE), strict=True):
        boxes, flips = random_crops(
            seed,
            some_epochs,
            pictures.ids[some],
            pictures.sizes[some],
            CROP_SCALE,
            single_draw=True,
            purpose="probe crop",
        )
        images = pictures.crops(some, boxes, flips, image_size)
        for name, encoder in encoders.items():
            with context():
                parts[name].append(encoder(images).float())
    return {name: torch.cat(features) for name, features in parts.items()}


# ---------------------------------------------------------------------- the heads


def make_head(width: int, classes: int, seed: int) -> nn.Sequential:
    """BatchNorm without scale and shift, and a linear layer: normal weights of deviation 0.01, no bias."""
    head = nn.Sequential(
        nn.BatchNorm1d(width, eps=BATCH_NORM_EPS, affine=False), linear := nn.Linear(width, classes)
    )
    with rng.seeded(seed, "probe head"):
        nn.init.normal_(linear.weight, std=HEAD_STD)
    nn.init.zeros_(linear.bias)
    return head


def train_heads(
    probe: Probe,
    pictures: Pictures,
    labels: Tensor,
    schedule: Schedule,
    batch_size: int,
    log: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, nn.Sequential]:
    """A head for each encoder, all trained on the same crops.

    Args:
        pictures: the N labelled images.
        labels: int64 [N], theirs.
        schedule, batch_size: as `plan` gives them.
        log: given the step, the loss of the last encoder's head and the learning rate after each update.

    Returns:
        The heads after the last epoch, in evaluation mode.
    """
    stream = SampleStream(len(pictures), 0, probe.seed)
    classes, labels = int(labels.max()) + 1, labels.to(probe.device)
    heads: dict[str, nn.Sequential] = {}
    optimizers: dict[str, Lars] = {}
    for step in range(schedule.total_steps):
        epochs, rows = stream.at(torch.arange(step * batch_size, (step + 1) * batch_size))
        seen = crop_features(probe.encoders, pictures, epochs, rows, probe.backbone.image_size, probe.seed)
        loss, lr = math.nan, schedule.lr(step)
        for name, features in seen.items():
            if name not in heads:
                heads[name] = make_head(features.shape[1], classes, probe.seed).to(probe.device)
                optimizers[name] = Lars(heads[name].parameters())
            error = F.cross_entropy(heads[name](features), labels[rows.to(probe.device)])
            error.backward()
            optimizers[name].step(lr)
            loss = float(error.detach())
        if log is not None:
            log({"step": step + 1, "loss": loss, "lr": lr})
    return {name: head.eval() for name, head in heads.items()}


def plan(config: LinearClassifierConfig, images: int) -> tuple[Schedule, int]:
    """The learning rate of every update, and the number of images in each."""
    batch_size = min(config.batch_size, images)
    if batch_size < config.batch_size:
        _LOG.warning(
            "--batch-size %d is more than the %d labelled images: it shrinks to all of them, and the "
            "learning rate with it to %g.",
            config.batch_size,
            images,
            config.blr * batch_size / 256,
        )
    steps = math.ceil(config.epochs * images / batch_size)
    warmup, note = warmup_steps(config.warmup_epochs, images / batch_size, steps)
    if note is not None:
        _LOG.warning("%s", note)
    return Schedule(config.blr * batch_size / 256, warmup, steps), batch_size


@torch.no_grad()
def head_predict(head: nn.Sequential, features: Tensor) -> Tensor:
    """The class that a head gives to each feature: float [M, D] -> int64 [M], on the CPU."""
    device = next(head.parameters()).device
    return torch.cat([head(some.to(device)).argmax(dim=1).cpu() for some in features.split(4096)])
