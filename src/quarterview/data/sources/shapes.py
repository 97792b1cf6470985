"""A seeded set of simple shapes: labelled pictures without a download.

Each image is a pure function of (seed, index), to the last bit: per pixel nothing is computed but sums,
products, quotients, roots and comparisons, which IEEE 754 rounds in the same way in every batch, on every
machine. Sines, convolutions and matrix products would not keep that promise.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quarterview import rng
from quarterview.data.sources.base import Picture, digest
from quarterview.errors import UserError

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "bar", "corner")
"""What is drawn, in the order of the labels."""

_CHUNK = 1024  # images of 32 pixels at once: what stays in the cache
_WAVES = 6
_CONTRAST = 0.25  # between a shape's luminance and its background's, of 1


class ShapesSource:
    """Ten classes of filled shapes of random place, size, angle and colour on blurred colour noise.

    Args:
        count: how many images; another count changes none of those that remain.
        seed: another seed, another set.
        channels: 3 for RGB, 1 for its luminance.
        size: height and width in pixels; the same scenes at any size.

    Raises:
        UserError: if `channels` is neither 1 nor 3, or `count` or `size` cannot be.
    """

    classes: Sequence[str] | None = CLASSES

    def __init__(self, count: int, seed: int, channels: int, size: int = 32) -> None:
        if channels not in (1, 3):
            raise UserError(f"shapes cannot have {channels} channels; accepted: 1 (grey), 3 (RGB)")
        if count < 1 or not 8 <= size <= 1024:
            raise UserError(f"{count} shapes of {size} pixels; accepted: at least 1, of 8 to 1024 pixels")
        self.count, self.seed, self.channels, self.size = count, seed, channels, size

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Picture:
        return Picture(self.images([index])[0])

    def images(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Many images at once: uint8 [B, channels, size, size].

        A source that can make many at once may offer this; nothing else differs from `image`.

        Raises:
            IndexError: if an id is outside the set.
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
        return int(labels(torch.tensor([index]), self.seed))

    def name(self, index: int) -> str:
        return f"shapes seed {self.seed}, image {index}"

    def fingerprint(self) -> str:
        return digest("shapes", self.count, self.seed, self.channels, self.size)


def labels(ids: Tensor, seed: int) -> Tensor:
    """int64 [B], indices into `CLASSES`: each ten in a row, from a multiple of ten, hold all ten."""
    return rng.permute(seed, "shapes/label", ids // len(CLASSES), ids % len(CLASSES), len(CLASSES))


def render(ids: Tensor, seed: int, size: int = 32) -> Tensor:
    """Draw images.

    Args:
        ids: int64 [B].
        seed: of the set.
        size: height and width in pixels.

    Returns:
        uint8 [B, 3, size, size], RGB.
    """
    per_chunk = max(1, _CHUNK * 32 * 32 // size**2)
    chunks = [_render(chunk, seed, size) for chunk in ids.split(per_chunk) if len(chunk)]
    return torch.cat(chunks) if chunks else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _render(ids: Tensor, seed: int, size: int) -> Tensor:
    x = (torch.arange(size, device=ids.device) + 0.5) / size  # the picture is the unit square
    y = x[:, None]
    radius, centre_x, centre_y, cosine, sine = _placed(rng.uniform(seed, "shapes/place", 0, ids, 5))
    u = ((x - centre_x) * cosine + (y - centre_y) * sine) / radius  # [B, S, S]: the shape fits the unit disc
    v = ((y - centre_y) * cosine - (x - centre_x) * sine) / radius
    distance = torch.empty_like(u)
    classes = labels(ids, seed)
    for label, outline in enumerate(_OUTLINES):
        chosen = classes == label
        distance[chosen] = outline(u[chosen], v[chosen])
    cover = (0.5 - distance * radius * size).clamp(0, 1)[:, None]  # [B, 1, S, S]: the edge is a pixel wide

    noise = rng.uniform(seed, "shapes/ground", 0, ids, 3 + 6 * _WAVES)
    ground = _ground(x, y, noise)  # [B, 3, S, S]
    beside = torch.tensor([-0.6, 0.0, 0.6], device=ids.device) * radius
    near = _ground(centre_x + beside, centre_y + beside.mT, noise)  # [B, 3, 3, 3]
    local = sum(near.flatten(2).unbind(2), torch.zeros_like(near[:, :, 0, 0])) / 9  # [B, 3]
    paint = _contrasting(rng.uniform(seed, "shapes/paint", 0, ids, 4), local)[:, :, None, None]
    return ((ground + cover * (paint - ground)) * 255 + 0.5).floor().to(torch.uint8)


def _placed(draw: Tensor) -> tuple[Tensor, ...]:
    """Radius, centre, and the cosine and sine of an angle anywhere on the circle: each [B, 1, 1]."""
    size, across, down, turn, half = draw[:, :, None, None].unbind(1)
    radius = 0.32 + 0.1 * size
    room = 1 - 2 * radius
    tangent = 2 * turn - 1  # of half the angle, which gives both without trigonometry
    sign = torch.where(half < 0.5, 1.0, -1.0)
    norm = sign / (1 + tangent * tangent)
    return (
        *(radius, radius + room * across, radius + room * down),
        *((1 - tangent * tangent) * norm, 2 * tangent * norm),
    )


def _ground(x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Colours [B, 3, …] in [0, 1] at the points (x, y): smooth waves, each of its own colour."""
    base, waves = noise[:, :3], noise[:, 3:].unflatten(1, (_WAVES, 6))
    colour = (0.3 + 0.4 * base)[:, :, None, None]  # [B, 3, 1, 1]
    for number, wave in enumerate(waves.unbind(1)):
        across, down, phase, *tint = wave[:, :, None, None].unbind(1)  # each [B, 1, 1]
        finest = 0.8 + 0.4 * number  # waves to the picture
        turns = (2 * across - 1) * finest * x + (2 * down - 1) * finest * y + phase
        ramp = (2 * (turns - turns.floor()) - 1).abs()
        height = ramp * ramp * (3 - 2 * ramp) - 0.5  # much like a cosine
        tints = (torch.stack(tint, 1) - 0.5) * (0.6 - 0.06 * number)
        colour = colour + tints * height[:, None]
    return colour.clamp(0, 1)


def _contrasting(draw: Tensor, local: Tensor) -> Tensor:
    """Colours [B, 3] that differ from the local ones by at least `_CONTRAST` in luminance."""
    around = _luminance(local)
    below, above = (around - _CONTRAST).clamp(min=0), (1 - _CONTRAST - around).clamp(min=0)
    level = draw[:, 3] * (below + above)
    level = torch.where(level < below, level, level - below + around + _CONTRAST)[:, None]
    colour, own = draw[:, :3], _luminance(draw[:, :3])[:, None]
    return torch.where(
        level < own, colour * (level / own), colour + (1 - colour) * ((level - own) / (1 - own))
    )


def _luminance(rgb: Tensor) -> Tensor:
    red, green, blue = rgb.unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _length(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt()


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(u.abs() - width, v.abs() - height)


def _star(u: Tensor, v: Tensor) -> Tensor:
    u = u.abs()
    for normal_u in (0.809017, -0.809017, 0.809017):  # fold the five arms onto the one that points to -v
        reach = 2 * (u * normal_u + v * 0.587785).clamp(min=0)
        u, v = u - reach * normal_u, v - reach * 0.587785
    u = u.abs()
    return 0.891007 * u - 0.453990 * (v + 1.0)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    diamond = (u.abs() + v.abs() - 0.8) * 0.707107
    return torch.minimum(diamond, _length(u.abs() - 0.4, v + 0.4) - 0.565685)


_OUTLINES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda u, v: _length(u, v) - 0.9,
    lambda u, v: (_length(u, v) - 0.72).abs() - 0.24,
    lambda u, v: _box(u, v, 0.72, 0.72),
    lambda u, v: torch.maximum(v, 0.866025 * u.abs() - 0.5 * v) - 0.5,
    _star,
    lambda u, v: torch.minimum(_box(u, v, 0.95, 0.27), _box(u, v, 0.27, 0.95)),
    lambda u, v: torch.maximum(_length(u, v) - 0.95, 0.8 - _length(u - 0.5, v)),
    _heart,
    lambda u, v: _box(u, v, 0.97, 0.25),
    lambda u, v: torch.maximum(_box(u, v, 0.72, 0.72), torch.minimum(u + 0.15, 0.15 - v)),
)
"""For each class, how far outside the outline a point lies, negative inside; all fit the unit disc."""
