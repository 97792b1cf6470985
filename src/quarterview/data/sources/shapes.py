"""A generated data set of simple shapes with labels, which needs no download.

Each image is a pure function of (seed, index), to the last bit: pixels are computed with sums, products,
quotients, square roots and comparisons alone, which IEEE 754 rounds alike in every batch and on every
machine. Sines, convolutions and matrix products are not rounded alike.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.sources.base import DecodedImage, compute_digest
from quarterview.errors import UserError

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "bar", "corner")
"""The names of the shapes, in the order of the labels."""

_CHUNK_SIZE = 1024  # images of 32 pixels that are rendered at once; they fit into the processor's cache
_NUM_WAVES = 6
_MIN_CONTRAST = 0.25  # between the luminance of a shape and of its background, from 0 to 1


class ShapesSource:
    """Ten classes of filled shapes of random position, size, angle and color on smooth color noise.

    Args:
        count: number of images. It does not change the images themselves.
        seed: seed of the whole data set.
        channels: 3 for RGB, 1 for luminance.
        size: height and width in pixels. The scene does not depend on it.

    Raises:
        UserError: if `channels` is neither 1 nor 3, or `count` or `size` is out of range.
    """

    classes: Sequence[str] | None = CLASSES

    def __init__(self, count: int, seed: int, channels: int, size: int = 32) -> None:
        if channels not in (1, 3):
            raise UserError(f"Generated shapes have 1 or 3 channels, not {channels}. Give --in-chans 1 or 3.")
        if count < 1 or not 8 <= size <= 1024:
            raise UserError(
                f"Cannot generate {count} shapes of {size} pixels. Give 1 or more, of 8 to 1024 pixels."
            )
        self.count, self.seed, self.channels, self.size = count, seed, channels, size

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> DecodedImage:
        return DecodedImage(self.images([index])[0])

    def images(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Return many images at once, uint8 [B, channels, size, size], equal to those of `image`.

        This is the method of `BulkSource`.

        Raises:
            IndexError: if an id is out of range.
        """
        indices = torch.as_tensor(ids, dtype=torch.int64)
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.count:
            raise IndexError(f"an index is outside 0..{self.count - 1}")
        rgb = render(indices, self.seed, self.size)
        if self.channels == 3:
            return rgb
        red, green, blue = rgb.to(torch.int32).unbind(1)
        return ((299 * red + 587 * green + 114 * blue + 500) // 1000).to(torch.uint8)[:, None]

    def label(self, index: int) -> int:
        return int(compute_labels(torch.tensor([index]), self.seed))

    def name(self, index: int) -> str:
        return f"shapes seed {self.seed}, image {index}"

    def fingerprint(self) -> str:
        return compute_digest("shapes", self.count, self.seed, self.channels, self.size)


def compute_labels(ids: Tensor, seed: int) -> Tensor:
    """Return indices into `CLASSES`, int64 [B]. Images 10 i to 10 i + 9 contain every class once."""
    return rng.permute(seed, "shapes/label", ids // len(CLASSES), ids % len(CLASSES), len(CLASSES))


def render(ids: Tensor, seed: int, size: int = 32) -> Tensor:
    """Draw images.

    Args:
        ids: int64 [B].
        seed: seed of the data set.
        size: height and width in pixels.

    Returns:
        uint8 [B, 3, size, size], RGB.
    """
    per_chunk = max(1, _CHUNK_SIZE * 32 * 32 // size**2)
    chunks = [_render(chunk, seed, size) for chunk in ids.split(per_chunk) if len(chunk)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _render(ids: Tensor, seed: int, size: int) -> Tensor:
    x = (torch.arange(size, device=ids.device) + 0.5) / size  # the image is the unit square
    y = x[:, None]
    radius, center_x, center_y, cosine, sine = _place_shape(rng.uniform(seed, "shapes/place", 0, ids, 5))
    u = ((x - center_x) * cosine + (y - center_y) * sine) / radius  # [B, S, S]: the shape fits the unit disc
    v = ((y - center_y) * cosine - (x - center_x) * sine) / radius
    distance = torch.empty_like(u)
    classes = compute_labels(ids, seed)
    for label, outline in enumerate(_SIGNED_DISTANCES):
        chosen = classes == label
        distance[chosen] = outline(u[chosen], v[chosen])
    cover = (0.5 - distance * radius * size).clamp(0, 1)[:, None]  # [B, 1, S, S]: the edge is a pixel wide

    noise = rng.uniform(seed, "shapes/ground", 0, ids, 3 + 6 * _NUM_WAVES)
    ground = _render_background(x, y, noise)  # [B, 3, S, S]
    beside = torch.tensor([-0.6, 0.0, 0.6], device=ids.device) * radius
    near = _render_background(center_x + beside, center_y + beside.mT, noise)  # [B, 3, 3, 3]
    local = sum(near.flatten(2).unbind(2), torch.zeros_like(near[:, :, 0, 0])) / 9  # [B, 3]
    paint = _choose_contrasting_color(rng.uniform(seed, "shapes/paint", 0, ids, 4), local)[:, :, None, None]
    return ((ground + cover * (paint - ground)) * 255 + 0.5).floor().to(torch.uint8)


def _place_shape(uniforms: Tensor) -> tuple[Tensor, ...]:
    """Return radius, centre, and cosine and sine of the angle of the shape, each [B, 1, 1]."""
    size, across, down, turn, half = uniforms[:, :, None, None].unbind(1)
    radius = 0.32 + 0.1 * size
    margin = 1 - 2 * radius
    tangent = 2 * turn - 1  # of half the angle: cosine and sine follow without trigonometric functions
    sign = torch.where(half < 0.5, 1.0, -1.0)
    norm = sign / (1 + tangent * tangent)
    return (
        *(radius, radius + margin * across, radius + margin * down),
        *((1 - tangent * tangent) * norm, 2 * tangent * norm),
    )


def _render_background(x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Return the colors [B, 3, …] in [0, 1] at points (x, y): a sum of smooth waves of different colors."""
    base, waves = noise[:, :3], noise[:, 3:].unflatten(1, (_NUM_WAVES, 6))
    color = (0.3 + 0.4 * base)[:, :, None, None]  # [B, 3, 1, 1]
    for index, wave in enumerate(waves.unbind(1)):
        across, down, phase, *tint = wave[:, :, None, None].unbind(1)  # each [B, 1, 1]
        finest = 0.8 + 0.4 * index  # waves per image
        turns = (2 * across - 1) * finest * x + (2 * down - 1) * finest * y + phase
        ramp = (2 * (turns - turns.floor()) - 1).abs()
        height = ramp * ramp * (3 - 2 * ramp) - 0.5  # much like a cosine
        tints = (torch.stack(tint, 1) - 0.5) * (0.6 - 0.06 * index)
        color = color + tints * height[:, None]
    return color.clamp(0, 1)


def _choose_contrasting_color(uniforms: Tensor, local_color: Tensor) -> Tensor:
    """Return colours [B, 3] that differ from the local ones by at least `_MIN_CONTRAST` in luminance."""
    around = _compute_luminance(local_color)
    below, above = (around - _MIN_CONTRAST).clamp(min=0), (1 - _MIN_CONTRAST - around).clamp(min=0)
    level = uniforms[:, 3] * (below + above)
    level = torch.where(level < below, level, level - below + around + _MIN_CONTRAST)[:, None]
    color, own = uniforms[:, :3], _compute_luminance(uniforms[:, :3])[:, None]
    return torch.where(level < own, color * (level / own), color + (1 - color) * ((level - own) / (1 - own)))


def _compute_luminance(rgb: Tensor) -> Tensor:
    red, green, blue = rgb.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _norm(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt()


def _box_distance(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


def _star_distance(u: Tensor, v: Tensor) -> Tensor:
    u = u.abs()
    for normal_u in (0.809017, -0.809017, 0.809017):  # fold the five arms onto the one that points to -v
        reach = 2 * (u * normal_u + v * 0.587785).clamp(min=0)
        u, v = u - reach * normal_u, v - reach * 0.587785
    u = u.abs()
    return 0.891007 * u - 0.453990 * (v + 1.0)


def _heart_distance(u: Tensor, v: Tensor) -> Tensor:
    diamond = (u.abs() + v.abs() - 0.8) * 0.707107
    return torch.minimum(diamond, _norm(u.abs() - 0.4, v + 0.4) - 0.565685)


_SIGNED_DISTANCES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda u, v: _norm(u, v) - 0.9,
    lambda u, v: (_norm(u, v) - 0.72).abs() - 0.24,
    lambda u, v: _box_distance(u, v, 0.72, 0.72),
    lambda u, v: torch.maximum(v, 0.866025 * u.abs() - 0.5 * v) - 0.5,
    _star_distance,
    lambda u, v: torch.minimum(_box_distance(u, v, 0.95, 0.27), _box_distance(u, v, 0.27, 0.95)),
    lambda u, v: torch.maximum(_norm(u, v) - 0.95, 0.8 - _norm(u - 0.5, v)),
    _heart_distance,
    lambda u, v: _box_distance(u, v, 0.97, 0.25),
    lambda u, v: torch.maximum(_box_distance(u, v, 0.72, 0.72), torch.minimum(u + 0.15, 0.15 - v)),
)
"""The signed distance of a point (u, v) from the outline of each class, negative inside.

All outlines fit into the unit disc.
"""
