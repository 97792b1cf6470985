"""From the bytes of an image file to a `Picture`, whatever the bytes are.

Files come from anywhere: truncated, hostile, sixteen bits deep, rotated, transparent, animated. All of
them end as pixels or as a BadSampleError with a reason a person can read, and nothing that was done to
the pixels goes unsaid. Pillow's global settings are neither read nor changed here.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from quarterview.data import sixteen_bit
from quarterview.data.sources.base import BadSampleError, Croppable, Picture, Whole
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""What is decoded; Pillow's other readers are never tried on a file."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
"""What files of those formats are called, in lower case."""

MAX_PIXELS = 128_000_000
"""Larger images are refused by their header, before anything is allocated for them."""

_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_MOST_SCANS = 500
"""Of a JPEG file: each takes time for all pixels, and a few bytes. Ten are usual where it is progressive."""
_START_OF_SCAN, _APPLICATION_MARKERS = 0xDA, (0xE1, 0xE2)
_ORIENTATION = 0x0112
_ROTATED = "rotated by EXIF"
_UPRIGHT = {
    **{2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1)},
    **{6: (False, 3), 7: (True, 3), 8: (False, 1)},
}
"""For each EXIF orientation but the usual 1: whether to mirror, then how many quarter turns to the left."""


def decode(data: bytes, channels: int) -> Picture:
    """Decode one image file.

    Turned upright by its EXIF orientation, composited on white where transparent, reduced to its first
    frame, converted to RGB or grey; the picture's notes say which of these happened. Grey is repeated to
    `channels`. Sixteen bits become float32 in [0, 1] without loss; floating point must lie there already.

    Args:
        data: the whole file.
        channels: how many channels the picture shall have.

    Returns:
        A picture [channels, H, W].

    Raises:
        BadSampleError: if this is no readable image of an accepted format, or has more than
            `MAX_PIXELS` pixels.
        UserError: if the image is sound, but its colours cannot become `channels` channels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of sizes we check ourselves
            return _decode(data, channels)
    except (BadSampleError, UserError):
        raise
    except Exception as error:  # Pillow raises nearly everything, SyntaxError and struct.error included
        raise BadSampleError(_reason(error)) from error


def croppable_file(data: bytes, channels: int) -> Croppable:
    """One image file, of which a crop is wanted.

    JPEG files are decoded when they are cropped, at half, a quarter or an eighth of their size if the crop
    has pixels enough there. Whatever is unusual about a file goes the way of `decode`.

    Args, Raises: as of `decode`.
    """
    return _plain_jpeg(data, channels) or Whole(decode(data, channels))


def _plain_jpeg(data: bytes, channels: int) -> "_JpegFile | None":
    """A JPEG file of an accepted size that can be `channels` channels; None if anything speaks against it."""
    if not data.startswith(_JPEG) or _scans(data) > _MOST_SCANS:
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
        height, width = int(height), int(width)
        orientation = 1 if _is_bare_jpeg(data) else _jpeg_orientation(data)
    except Exception:  # `decode` says what is wrong
        return None
    colour = {"Gray": "GRAY", "YCbCr": "RGB"}.get(colours)
    if colour is None or (colour == "RGB" and channels != 3) or height * width > MAX_PIXELS:
        return None
    return _JpegFile(data, height, width, colour, orientation, channels)


def _scans(data: bytes) -> int:
    """How many scans a JPEG file has, or a few more."""
    return data.count(_SCAN, max((place for place, _ in _segments(data)), default=0))


def _is_bare_jpeg(data: bytes) -> bool:
    """Whether there is surely nothing in a JPEG file that turns it, and no second frame: a quick look."""
    for place, marker in _segments(data):
        if marker == _START_OF_SCAN:
            return True
        if marker in _APPLICATION_MARKERS and data[place + 4 : place + 8] in (b"Exif", b"http", b"MPF\0"):
            return False
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each segment of a JPEG file begins, and its marker, as far as the first scan."""
    place, marker = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF and marker != _START_OF_SCAN:
        marker = data[place + 1]
        yield place, marker
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _jpeg_orientation(data: bytes) -> int:
    """By Pillow's reading. Raises ValueError if the file has several frames, of which `decode` speaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.format != "JPEG":
            raise ValueError(image.format)
        return _orientation(image)


class _JpegFile(NamedTuple):
    """A JPEG file of eight bits, grey or RGB, whose header looks well."""

    data: bytes
    stored_height: int
    stored_width: int
    colour: str
    orientation: int
    channels: int

    @property
    def size(self) -> tuple[int, int]:
        turned = _UPRIGHT.get(self.orientation, (False, 0))[1] % 2
        sides = self.stored_height, self.stored_width
        return sides[::-1] if turned else sides

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> Picture:
        times = _coarsest(box, image_size)
        height, width = -(-self.stored_height // times), -(-self.stored_width // times)
        try:  # to [H, W, 1 or 3]
            samples = decode_jpeg(self.data, self.colour, min_height=height, min_width=width)
        except ValueError:  # of anything odd: `decode` says what, or takes it
            return Whole(decode(self.data, self.channels)).crop(box, image_size)
        notes = ()
        if self.orientation in _UPRIGHT:
            samples, notes = _upright(samples, self.orientation), (_ROTATED,)
        pixels = torch.from_numpy(samples).permute(2, 0, 1)
        cropped = crop_resize(pixels, _scaled(box, self.size, pixels.shape[1:]), image_size)
        return Picture(cropped.expand(self.channels, -1, -1), notes)


def _coarsest(box: Sequence[int], image_size: Sequence[int]) -> int:
    """How many times smaller an image may be decoded: 1, 2, 4 or 8."""
    _, _, height, width = box
    enough = (by for by in (8, 4, 2) if height // by >= image_size[0] and width // by >= image_size[1])
    return next(enough, 1)


def _scaled(box: Sequence[int], size: Sequence[int], decoded: Sequence[int]) -> tuple[int, int, int, int]:
    """The box on the image as it was decoded, to its nearest pixel."""
    (top, height), (left, width) = (
        (start * now // full, max(1, (start + length) * now // full - start * now // full))
        for start, length, full, now in zip(box[:2], box[2:], size, decoded, strict=True)
    )
    return top, left, height, width


def from_pillow(image: Image.Image, channels: int) -> Picture:
    """A picture [channels, H, W], uint8, of an image that Pillow has already decoded to eight bits.

    Raises:
        UserError: if its colours cannot become `channels` channels.
    """
    notes: list[str] = []
    samples = _on_white(_eight_bit(image), notes)
    return Picture(_fit(samples, channels), tuple(notes))


def _decode(data: bytes, channels: int) -> Picture:
    image = _open(data)
    notes: list[str] = []
    if getattr(image, "is_animated", False):
        notes.append("first of several frames")
    if image.mode in ("CMYK", "YCbCr", "LAB"):
        notes.append(f"{image.mode} converted to RGB")
    wide = sixteen_bit.found_in(image)
    orientation = _orientation(image)
    if wide:
        samples = sixteen_bit.samples(image, data)  # [H, W, 1 to 4]
        notes.append("16 bits scaled to [0, 1]")
    elif image.mode == "F":
        samples = _unit_floats(np.array(image))[..., None]
    else:
        samples = _eight_bit(image)
    samples = _on_white(samples, notes)  # [H, W, 1 or 3]
    if orientation in _UPRIGHT:
        notes.append(_ROTATED)
        if image.format != "TIFF":  # there Pillow has done it while loading
            samples = _upright(samples, orientation)
    return Picture(_fit(samples, channels), tuple(notes))


def _open(data: bytes) -> Image.Image:
    """The image with its header read and checked, not yet decoded."""
    if not data:
        raise BadSampleError("the file is empty")
    if data.startswith(_JPEG) and _scans(data) > _MOST_SCANS:
        raise BadSampleError(f"more than the {_MOST_SCANS} scans accepted of a JPEG file")
    limit = f"more than the {MAX_PIXELS // 1_000_000} megapixels accepted"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSampleError(f"not a readable image; accepted formats: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadSampleError(limit) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"{width} × {height} pixels, {limit}")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return 1


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    mirror, turns = _UPRIGHT[orientation]
    return np.ascontiguousarray(np.rot90(samples[:, ::-1] if mirror else samples, turns))


def _eight_bit(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C]: grey, grey and alpha, RGB, or RGBA."""
    image.load()
    grey = image.mode in ("1", "L", "LA", "La") or _has_grey_palette(image)
    mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
    samples = np.array(image if image.mode == mode else image.convert(mode))
    return samples if samples.ndim == 3 else samples[..., None]


def _has_grey_palette(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") if image.mode == "P" else None
    return palette is not None and palette[0::3] == palette[1::3] == palette[2::3]


def _unit_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())  # not a number if any value is not
    if not (low >= 0.0 and high <= 1.0):
        raise BadSampleError(f"floating-point values from {low:g} to {high:g}; accepted: 0 to 1")
    return values.astype(np.float32)


def _on_white(samples: np.ndarray, notes: list[str]) -> np.ndarray:
    """Without the last of an even number of channels, the alpha."""
    if samples.shape[2] % 2:
        return samples
    colour, alpha = samples[..., :-1], samples[..., -1:]
    opaque = 255 if samples.dtype == np.uint8 else 1.0
    if (alpha == opaque).all():
        return colour
    notes.append("transparency composited on white")
    if samples.dtype != np.uint8:
        return colour * alpha + (1.0 - alpha)
    weighted = colour * alpha.astype(np.uint16) + 255 * (255 - alpha.astype(np.uint16))  # fits: 255² at most
    return ((weighted + 127) // 255).astype(np.uint8)


def _fit(samples: np.ndarray, channels: int) -> torch.Tensor:
    given = samples.shape[2]
    if given not in (1, channels):
        raise UserError(
            f"an RGB image cannot become {channels} channels; accepted: grey images for any number of "
            "channels, RGB images for 3; for anything else give arrays (.npy or .npz)"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(samples)).permute(2, 0, 1)  # [1 or 3, H, W]
    return pixels.expand(channels, -1, -1).contiguous()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"cannot be decoded: {lines[0] if lines else type(error).__name__}"
