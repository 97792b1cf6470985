"""The linear probe of the MAE paper (He et al. 2021, appendix A.1, table 10), as in the official code.

The encoder is frozen and sees a new random crop of every image in every epoch. Its cls token after the final
norm goes through a BatchNorm without scale and shift into a linear layer, which LARS trains for 90 epochs.
The reported accuracy is that of the last epoch.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quarterview import rng
from quarterview.data.cache import MAX_CACHE_BYTES, CachedDataset, load_cached_dataset
from quarterview.data.loader import stack_images
from quarterview.data.reading import read_samples
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.base import Source
from quarterview.data.sources.subset import select_subset
from quarterview.data.transforms.crop import crop_resize, crop_resize_batch, draw_random_crops, to_float
from quarterview.errors import RunError, UserError
from quarterview.evaluation.config import LinearClassifierConfig
from quarterview.evaluation.features import Encoder, get_num_decoding_threads
from quarterview.evaluation.probe import Probe
from quarterview.training.optim import Schedule, compute_warmup_steps
from quarterview.training.trainer import get_autocast_context, get_supported_precision

_LOG = logging.getLogger("quarterview")

CROP_SCALE = (0.08, 1.0)
HEAD_STD = 0.01
BATCH_NORM_EPS = 1e-6
_ENCODER_BATCH_SIZE = 256
"""Images per forward pass of the encoders."""


# ---------------------------------------------------------------------- training images


class TrainingImages:
    """Images for random crops, cached on the device if they fit, and decoded for every crop otherwise.

    `ids`, int64 [N], are the ids of the readable images, and `sizes`, int64 [N, 2], their heights and widths.

    Args:
        source: source of the images.
        ids: indices of the images in the source.
        device: device of the cache and of the crops.
        max_cache_bytes: maximum size of the cached pixels in bytes.

    Raises:
        UserError: if none of the images can be read.
    """

    def __init__(
        self, source: Source, ids: Sequence[int], device: torch.device, max_cache_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self.source, self.device = source, device
        chosen = select_subset(source, ids)
        cached = load_cached_dataset(
            chosen, device, max_cache_bytes, get_num_decoding_threads(), lambda _: None
        )
        if isinstance(cached, CachedDataset):
            indices = torch.tensor([i for i in range(len(chosen)) if i not in cached.broken_ids])
            self.images = cached.images[indices.to(device)] if cached.broken_ids else cached.images
            self.ids = torch.tensor(ids)[indices]
            self.sizes = torch.tensor(self.images.shape[2:]).expand(len(indices), 2)
            return
        self.images = None
        readable = [
            (sample, image.pixels.shape[1:])
            for sample, image, _ in read_samples(source, ids, get_num_decoding_threads())
            if image is not None
        ]
        if not readable:
            raise UserError(f"None of the {len(ids)} images can be read. Give images in a supported format.")
        self.ids = torch.tensor([sample for sample, _ in readable])
        self.sizes = torch.tensor([size for _, size in readable])

    def __len__(self) -> int:
        return len(self.ids)

    def crop(self, indices: Tensor, boxes: Tensor, flips: Tensor, image_size: Sequence[int]) -> Tensor:
        """Crop, resize and flip the images at `indices`.

        Args:
            indices: int64 [B], in range(N).
            boxes: int64 [B, 4], top, left, height and width.
            flips: bool [B].

        Returns:
            float32 [B, C, *image_size] in [0, 1], on the device.

        Raises:
            RunError: if an image that was readable before cannot be read any more.
        """
        if self.images is not None:
            indices, boxes, flips = (x.to(self.device) for x in (indices, boxes, flips))
            return crop_resize_batch(self.images[indices], boxes, flips, image_size) / 255
        crops = []
        read = read_samples(self.source, self.ids[indices].tolist(), get_num_decoding_threads())
        for (sample, image, _), box, flip in zip(read, boxes.tolist(), flips.tolist(), strict=True):
            if image is None:
                raise RunError(
                    f"{self.source.name(sample)} was readable before and cannot be read any more. Check the "
                    "file, and repeat the command."
                )
            crops.append(crop_resize(image.pixels, box, image_size, flip))
        return to_float(stack_images(crops).to(self.device))


@torch.no_grad()
def encode_random_crops(
    encoders: Mapping[str, Encoder],
    images: TrainingImages,
    epochs: Tensor,
    indices: Tensor,
    image_size: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """Encode a random crop of each image with each encoder: encoder name -> float32 [B, D] on the device.

    The crop is a function of the seed, the epoch and the image alone.

    Args:
        epochs: int64 [B].
        indices: int64 [B], indices of the images in `images`.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in encoders}
    context = get_autocast_context(get_supported_precision("bf16", images.device), images.device)
    for batch_epochs, batch in zip(
        epochs.split(_ENCODER_BATCH_SIZE), indices.split(_ENCODER_BATCH_SIZE), strict=True
    ):
        boxes, flips = draw_random_crops(
            seed,
            batch_epochs,
            images.ids[batch],
            images.sizes[batch],
            CROP_SCALE,
            single_draw=True,
            purpose="probe crop",
        )
        crops = images.crop(batch, boxes, flips, image_size)
        for name, encoder in encoders.items():
            with context():
                parts[name].append(encoder(crops).float())
    return {name: torch.cat(features) for name, features in parts.items()}


# ---------------------------------------------------------------------- heads


def make_head(in_features: int, num_classes: int, seed: int) -> nn.Sequential:
    """Create a head: BatchNorm without scale and shift, then a linear layer with weights of std 0.01."""
    head = nn.Sequential(
        nn.BatchNorm1d(in_features, eps=BATCH_NORM_EPS, affine=False),
        linear := nn.Linear(in_features, num_classes),
    )
    with rng.seeded(seed, "probe head"):
        nn.init.normal_(linear.weight, std=HEAD_STD)
    nn.init.zeros_(linear.bias)
    return head


def make_lars(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Create the optimizer of the paper's linear probe: LARS (You et al. 2017) without weight decay.

    As in the official code, the gradient of a matrix is scaled by ``0.001 * |w| / |gradient|``, that of a
    vector is not scaled, and the momentum is 0.9.
    """
    from timm.optim.lars import Lars  # timm is imported only where it is used: it takes a second

    parameters = list(parameters)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "always_adapt": False}]
    return Lars(groups, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


def train_heads(
    probe: Probe,
    images: TrainingImages,
    labels: Tensor,
    schedule: Schedule,
    batch_size: int,
    log: Callable[[Mapping[str, float]], None] | None = None,
) -> dict[str, nn.Sequential]:
    """Train a head for each encoder, all on the same crops.

    Args:
        images: the N labelled images.
        labels: int64 [N], the labels of the images.
        schedule, batch_size: result of `make_schedule`.
        log: called after each update with the step, the loss of the last encoder's head and the learning
            rate.

    Returns:
        The heads after the last epoch, in evaluation mode.
    """
    stream = SampleStream(len(images), 0, probe.seed)
    num_classes, labels = int(labels.max()) + 1, labels.to(probe.device)
    heads: dict[str, nn.Sequential] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for step in range(schedule.total_steps):
        epochs, indices = stream.get_samples(torch.arange(step * batch_size, (step + 1) * batch_size))
        encoded = encode_random_crops(
            probe.encoders, images, epochs, indices, probe.backbone_config.image_size, probe.seed
        )
        last_loss, lr = math.nan, schedule.lr(step)
        for name, features in encoded.items():
            if name not in heads:
                heads[name] = make_head(features.shape[1], num_classes, probe.seed).to(probe.device)
                optimizers[name] = make_lars(heads[name].parameters())
            loss = F.cross_entropy(heads[name](features), labels[indices.to(probe.device)])
            for group in optimizers[name].param_groups:
                group["lr"] = lr
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            last_loss = float(loss.detach())
        if log is not None:
            log({"step": step + 1, "loss": last_loss, "lr": lr})
    return {name: head.eval() for name, head in heads.items()}


def make_schedule(config: LinearClassifierConfig, num_images: int) -> tuple[Schedule, int]:
    """Return the learning rate schedule and the number of images per update."""
    batch_size = min(config.batch_size, num_images)
    if batch_size < config.batch_size:
        _LOG.warning(
            "--batch-size %d is more than the %d labelled images. All of them are used in each update, and "
            "the learning rate is scaled to %g.",
            config.batch_size,
            num_images,
            config.blr * batch_size / 256,
        )
    steps = math.ceil(config.epochs * num_images / batch_size)
    warmup, note = compute_warmup_steps(config.warmup_epochs, num_images / batch_size, steps)
    if note is not None:
        _LOG.warning("%s", note)
    return Schedule(config.blr * batch_size / 256, warmup, steps), batch_size


@torch.no_grad()
def predict_with_head(head: nn.Sequential, features: Tensor) -> Tensor:
    """Return the class that a head predicts for each feature: float [M, D] -> int64 [M] on the CPU."""
    device = next(head.parameters()).device
    return torch.cat([head(chunk.to(device)).argmax(dim=1).cpu() for chunk in features.split(4096)])
