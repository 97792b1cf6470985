"""The paper's linear probe (He et al. 2021, appendix A.1, table 10), with what the official code adds.

The encoder is frozen and sees a new crop of every image in every epoch. Its cls token, after the
final norm, goes through a BatchNorm without scale and shift into a linear layer, which LARS trains
for 90 epochs. The last epoch is what is reported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

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
from quarterview.errors import RunError, UserError, check_types
from quarterview.evaluation.features import (
    Encoder,
    Probe,
    ProbeConfig,
    ProbeData,
    decoding_threads,
    extract,
    open_probe,
    record_probe,
)
from quarterview.evaluation.lars import Lars
from quarterview.evaluation.linear import check_classes
from quarterview.evaluation.report import show_accuracies, standard_error
from quarterview.training.logging import Journal, Meter
from quarterview.training.optim import Schedule, warmup_steps
from quarterview.training.trainer import precision_context, usable_precision

CROP_SCALE = (0.08, 1.0)
HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6
_AT_ONCE = 256
"""Images that the encoder sees at a time."""


@dataclass(frozen=True)
class PaperConfig:
    """How the head is trained. The defaults are the paper's."""

    epochs: int = 90
    """Passes over the labelled images."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up from 0."""
    batch_size: int = 16384
    """Images per update; the whole set where it has fewer."""
    blr: float = 0.1
    """Base learning rate: the rate is blr × batch size / 256."""

    def __post_init__(self) -> None:
        check_types(self, PaperConfig)
        if self.epochs < 1:
            raise UserError(f"{self.epochs} epochs; accepted: 1 or more")
        if self.warmup_epochs < 0:
            raise UserError(f"warm-up of {self.warmup_epochs} epochs; accepted: 0 or more")
        if self.batch_size < 2:
            raise UserError(f"a batch of {self.batch_size} cannot be normalised; accepted: 2 or more")
        if self.blr <= 0:
            raise UserError(f"blr {self.blr}; accepted: a number above 0")


def linear_paper(
    config: ProbeConfig, paper: PaperConfig, journal: Journal, argv: Sequence[str] = ()
) -> dict[str, float]:
    """Train a linear classifier on each frozen encoder by the paper's protocol.

    Shows a table and records the result.

    Args:
        argv: the command line, for the record.

    Returns:
        The test accuracy of each encoder after the last epoch, by its name.

    Raises:
        UserError: if there are fewer than two classes.
    """
    probe = open_probe(config, default="cls")
    check_classes(probe.train_labels[probe.chosen])
    pictures = Pictures(probe.train, probe.chosen.tolist(), probe.device)
    labels = probe.train_labels[pictures.ids]
    check_classes(labels)
    heads = train_heads(probe, pictures, labels, paper, journal)
    everything = range(len(probe.test))
    test, kept = extract(
        probe.encoders, probe.test, everything, probe.backbone, probe.device, crop_pct=config.crop_pct
    )
    unreadable = len(probe.chosen) - len(labels) + len(probe.test) - len(kept)
    data = ProbeData({}, labels, test, probe.test_labels[kept], probe.classes, unreadable)

    accuracies = {name: judge(head, test[name], data.test_labels) for name, head in heads.items()}
    show_accuracies(
        f"linear classifier, the paper's protocol, {paper.epochs} epochs, {probe.kind} features",
        accuracies,
        data,
        journal,
    )
    shown = {
        name: {"accuracy": accuracy, "standard_error": standard_error(accuracy, len(data.test_labels))}
        for name, accuracy in accuracies.items()
    }
    record_probe(
        "linear-paper",
        config,
        argv,
        {**asdict(paper), "features": probe.kind, "batch_size_used": min(paper.batch_size, len(labels))},
        {**probe.described, "unreadable": unreadable},
        {"classes": probe.classes, "accuracies": shown},
    )
    return accuracies


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
    probe: Probe, pictures: Pictures, labels: Tensor, paper: PaperConfig, journal: Journal
) -> dict[str, nn.Sequential]:
    """A head for each encoder, all trained on the same crops.

    Returns:
        The heads after the last epoch, in evaluation mode.
    """
    seed, size = probe.config.seed, probe.backbone.image_size
    stream = SampleStream(len(pictures), 0, seed)
    schedule, batch = plan(paper, len(pictures), journal)
    classes, labels = int(labels.max()) + 1, labels.to(probe.device)
    heads: dict[str, nn.Sequential] = {}
    optimizers: dict[str, Lars] = {}
    meter = Meter()
    journal.start_progress(schedule.total_steps, 0)
    try:
        for step in range(schedule.total_steps):
            epochs, rows = stream.at(torch.arange(step * batch, (step + 1) * batch))
            seen = crop_features(probe.encoders, pictures, epochs, rows, size, seed)
            losses = []
            for name, features in seen.items():
                if name not in heads:
                    heads[name] = make_head(features.shape[1], classes, seed).to(probe.device)
                    optimizers[name] = Lars(heads[name].parameters())
                loss = F.cross_entropy(heads[name](features), labels[rows.to(probe.device)])
                loss.backward()
                optimizers[name].step(schedule.lr(step))
                losses.append(float(loss.detach()))
            _show_step(journal, meter, step + 1, batch, losses[-1], schedule.lr(step))
    finally:
        journal.close()
    return {name: head.eval() for name, head in heads.items()}


def _show_step(journal: Journal, meter: Meter, step: int, batch: int, loss: float, lr: float) -> None:
    meter.images += batch
    rate, waited = meter.read()
    journal.advance(step)
    journal.row({"step": step, "loss": loss, "lr": lr, "images_per_s": rate, "data_wait": waited})


def plan(paper: PaperConfig, images: int, journal: Journal) -> tuple[Schedule, int]:
    """The learning rate of every update, and the images in each."""
    batch = min(paper.batch_size, images)
    if batch < paper.batch_size:
        journal.warn(
            f"a batch of {paper.batch_size} images does not fit {images} labelled ones; it shrinks to all of "
            f"them, and the learning rate with it to {paper.blr * batch / 256:g}"
        )
    steps = math.ceil(paper.epochs * images / batch)
    warmup, note = warmup_steps(paper.warmup_epochs, images / batch, steps)
    if note is not None:
        journal.warn(note)
    return Schedule(paper.blr * batch / 256, warmup, steps), batch


@torch.no_grad()
def judge(head: nn.Sequential, features: Tensor, labels: Tensor) -> float:
    """The share of the features float [M, D] that a head gives the right label int64 [M]."""
    device = next(head.parameters()).device
    predicted = [head(some.to(device)).argmax(dim=1).cpu() for some in features.split(4096)]
    return float((torch.cat(predicted) == labels).double().mean())
