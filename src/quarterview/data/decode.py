"""Decode the bytes of an image file.

Files may be truncated, hostile, of 16 bits, rotated, transparent or animated. Each gives pixels, or a
BadSampleError with a readable reason. Every conversion is noted. Pillow's global settings are neither used
nor changed.
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
from quarterview.data.sources.base import BadSampleError, Croppable, DecodedImage, WholeImage
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""The formats that are decoded. Pillow's other readers are never used."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
"""The file name suffixes of these formats, in lower case."""

MAX_PIXELS = 128_000_000
"""The largest number of pixels. Larger images are refused after reading the header, before allocation."""

_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_MAX_SCANS = 500
"""The largest number of scans of a JPEG file. A scan takes a few bytes and the time to process all pixels;
progressive files have about ten."""
_START_OF_SCAN, _APPLICATION_MARKERS = 0xDA, (0xE1, 0xE2)
_ORIENTATION_TAG = 0x0112
_ROTATED_NOTE = "rotated by EXIF"
_EXIF_TRANSFORMS = {
    **{2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1)},
    **{6: (False, 3), 7: (True, 3), 8: (False, 1)},
}
"""The transform for each EXIF orientation except 1: mirror or not, then the quarter turns to the left."""


def decode(data: bytes, channels: int) -> DecodedImage:
    """Decode one image file.

    The EXIF orientation is applied, transparency is composited on white, the first of several frames is
    taken, and other colour modes are converted to RGB or gray; the notes say which of these were done. Gray
    is repeated to `channels`. 16-bit values become float32 in [0, 1] without loss; floating-point values
    must be in [0, 1].

    Args:
        data: the whole file.
        channels: number of channels of the result.

    Returns:
        An image [channels, H, W].

    Raises:
        BadSampleError: if this is not a readable image of a supported format, or has more than
            `MAX_PIXELS` pixels.
        UserError: if the image cannot be converted to `channels` channels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of unusual metadata, and of sizes that are checked here.
            warnings.simplefilter("ignore")
            return _decode(data, channels)
    except (BadSampleError, UserError):
        raise
    except Exception as error:  # Pillow raises errors of many types, SyntaxError and struct.error included
        raise BadSampleError(_format_reason(error)) from error


def open_croppable_file(data: bytes, channels: int) -> Croppable:
    """Open an image file for cropping. Arguments and errors are those of `decode`.

    A JPEG file is decoded when it is cropped, at half, a quarter or an eighth of its size if the crop still
    has enough pixels. Unusual files are decoded at once by `decode`.
    """
    return _open_plain_jpeg(data, channels) or WholeImage(decode(data, channels))


def _open_plain_jpeg(data: bytes, channels: int) -> "_JpegFile | None":
    """Open a JPEG file that is neither too large nor unusual; return None for any other file."""
    if not data.startswith(_JPEG) or _count_scans(data) > _MAX_SCANS:
        return None
    try:
        height, width, color_space, _ = decode_jpeg_header(data)
        height, width = int(height), int(width)
        orientation = 1 if _has_no_metadata(data) else _read_jpeg_orientation(data)
    except Exception:  # `decode` reports what is wrong
        return None
    color_mode = {"Gray": "GRAY", "YCbCr": "RGB"}.get(color_space)
    if color_mode is None or (color_mode == "RGB" and channels != 3) or height * width > MAX_PIXELS:
        return None
    return _JpegFile(data, height, width, color_mode, orientation, channels)


def _count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG file, or slightly more."""
    return data.count(_SCAN, max((offset for offset, _ in _iterate_segments(data)), default=0))


def _has_no_metadata(data: bytes) -> bool:
    """Return True if a JPEG file certainly has no orientation and no second frame. Fast."""
    for offset, marker in _iterate_segments(data):
        if marker == _START_OF_SCAN:
            return True
        if marker in _APPLICATION_MARKERS and data[offset + 4 : offset + 8] in (b"Exif", b"http", b"MPF\0"):
            return False
    return False


def _iterate_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the offset and the marker of each segment of a JPEG file up to the first scan."""
    offset, marker = 2, None
    while offset + 4 <= len(data) and data[offset] == 0xFF and marker != _START_OF_SCAN:
        marker = data[offset + 1]
        yield offset, marker
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")


def _read_jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation that Pillow reads. Raises ValueError if the file has several frames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _open(data)
        if image.format != "JPEG":
            raise ValueError(image.format)
        return _read_orientation(image)


class _JpegFile(NamedTuple):
    """A JPEG file of eight bits, gray or RGB, with a valid header."""

    data: bytes
    stored_height: int
    stored_width: int
    color_mode: str
    orientation: int
    channels: int

    @property
    def size(self) -> tuple[int, int]:
        turned = _EXIF_TRANSFORMS.get(self.orientation, (False, 0))[1] % 2
        sides = self.stored_height, self.stored_width
        return sides[::-1] if turned else sides

    def crop(self, box: Sequence[int], image_size: Sequence[int]) -> DecodedImage:
        scale = _choose_scale(box, image_size)
        height, width = -(-self.stored_height // scale), -(-self.stored_width // scale)
        try:  # to [H, W, 1 or 3]
            samples = decode_jpeg(self.data, self.color_mode, min_height=height, min_width=width)
        except ValueError:  # the file is unusual: `decode` reads it, or reports what is wrong
            return WholeImage(decode(self.data, self.channels)).crop(box, image_size)
        notes = ()
        if self.orientation in _EXIF_TRANSFORMS:
            samples, notes = _apply_orientation(samples, self.orientation), (_ROTATED_NOTE,)
        pixels = torch.from_numpy(samples).permute(2, 0, 1)
        cropped = crop_resize(pixels, _scale_box(box, self.size, pixels.shape[1:]), image_size)
        return DecodedImage(cropped.expand(self.channels, -1, -1), notes)


def _choose_scale(box: Sequence[int], image_size: Sequence[int]) -> int:
    """Return by how much the image may be reduced when it is decoded: 1, 2, 4 or 8 times."""
    _, _, height, width = box
    enough = (by for by in (8, 4, 2) if height // by >= image_size[0] and width // by >= image_size[1])
    return next(enough, 1)


def _scale_box(
    box: Sequence[int], size: Sequence[int], decoded_size: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return the box in pixels of the decoded image, which may be smaller than the stored one."""
    (top, height), (left, width) = (
        (start * now // full, max(1, (start + length) * now // full - start * now // full))
        for start, length, full, now in zip(box[:2], box[2:], size, decoded_size, strict=True)
    )
    return top, left, height, width


def convert_pillow_image(image: Image.Image, channels: int) -> DecodedImage:
    """Convert an image that Pillow has already decoded to eight bits: uint8 [channels, H, W].

    Raises:
        UserError: if the image cannot be converted to `channels` channels.
    """
    notes: list[str] = []
    samples = _composite_on_white(_to_eight_bit(image), notes)
    return DecodedImage(_to_channels(samples, channels), tuple(notes))


def _decode(data: bytes, channels: int) -> DecodedImage:
    image = _open(data)
    notes: list[str] = []
    if getattr(image, "is_animated", False):
        notes.append("first of several frames")
    if image.mode in ("CMYK", "YCbCr", "LAB"):
        notes.append(f"{image.mode} converted to RGB")
    is_sixteen_bit = sixteen_bit.is_sixteen_bit(image)
    orientation = _read_orientation(image)
    if is_sixteen_bit:
        samples = sixteen_bit.read_samples(image, data)  # [H, W, 1 to 4]
        notes.append("16 bits scaled to [0, 1]")
    elif image.mode == "F":
        samples = _check_unit_range(np.array(image))[..., None]
    else:
        samples = _to_eight_bit(image)
    samples = _composite_on_white(samples, notes)  # [H, W, 1 or 3]
    if orientation in _EXIF_TRANSFORMS:
        notes.append(_ROTATED_NOTE)
        if image.format != "TIFF":  # Pillow has already applied it to a TIFF
            samples = _apply_orientation(samples, orientation)
    return DecodedImage(_to_channels(samples, channels), tuple(notes))


def _open(data: bytes) -> Image.Image:
    """Read and check the header of an image, without decoding the pixels."""
    if not data:
        raise BadSampleError("the file is empty")
    if data.startswith(_JPEG) and _count_scans(data) > _MAX_SCANS:
        raise BadSampleError(f"the JPEG file has more than {_MAX_SCANS} scans")
    limit = f"more than {MAX_PIXELS // 1_000_000} megapixels"
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSampleError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadSampleError(limit) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadSampleError(f"{width} × {height} pixels, {limit}")
    return image


def _read_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # an image with a broken EXIF block can still be used
        return 1


def _apply_orientation(samples: np.ndarray, orientation: int) -> np.ndarray:
    mirror, turns = _EXIF_TRANSFORMS[orientation]
    return np.ascontiguousarray(np.rot90(samples[:, ::-1] if mirror else samples, turns))


def _to_eight_bit(image: Image.Image) -> np.ndarray:
    """Return uint8 [H, W, C]: gray, gray and alpha, RGB, or RGBA."""
    image.load()
    is_gray = image.mode in ("1", "L", "LA", "La") or _has_gray_palette(image)
    mode = ("L" if is_gray else "RGB") + ("A" if image.has_transparency_data else "")
    samples = np.array(image if image.mode == mode else image.convert(mode))
    return samples if samples.ndim == 3 else samples[..., None]


def _has_gray_palette(image: Image.Image) -> bool:
    palette = image.getpalette("RGB") if image.mode == "P" else None
    return palette is not None and palette[0::3] == palette[1::3] == palette[2::3]


def _check_unit_range(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())  # NaN if any value is NaN
    if not (low >= 0.0 and high <= 1.0):
        raise BadSampleError(f"floating-point values from {low:g} to {high:g}, expected 0 to 1")
    return values.astype(np.float32)


def _composite_on_white(samples: np.ndarray, notes: list[str]) -> np.ndarray:
    """Composite on white and drop the alpha channel, which is the last of two or four channels."""
    if samples.shape[2] % 2:
        return samples
    color, alpha = samples[..., :-1], samples[..., -1:]
    opaque = 255 if samples.dtype == np.uint8 else 1.0
    if (alpha == opaque).all():
        return color
    notes.append("transparency composited on white")
    if samples.dtype != np.uint8:
        return color * alpha + (1.0 - alpha)
    wide = alpha.astype(np.uint16)
    weighted = color * wide + 255 * (255 - wide)  # at most 255², which fits into 16 bits
    return ((weighted + 127) // 255).astype(np.uint8)


def _to_channels(samples: np.ndarray, channels: int) -> torch.Tensor:
    num_channels = samples.shape[2]
    if num_channels not in (1, channels):
        raise UserError(
            f"An RGB image cannot be converted to {channels} channels. Give --in-chans 3, gray images, or "
            "arrays (.npy or .npz) with that number of channels."
        )
    pixels = torch.from_numpy(np.ascontiguousarray(samples)).permute(2, 0, 1)  # [1 or 3, H, W]
    return pixels.expand(channels, -1, -1).contiguous()


def _format_reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"cannot be decoded: {lines[0] if lines else type(error).__name__}"
