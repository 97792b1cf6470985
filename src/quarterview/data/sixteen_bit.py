"""Decode images with 16 bits per channel value by Pillow without loss.

Pillow has no mode for 16-bit colours: it silently keeps the high byte of each value. But it supports both
byte orders. So a file is read twice, the second time with the bytes swapped, which gives the high bytes and
then the low bytes. 16-bit gray images have a mode of their own and are read once.
"""

import io
import re
import sys
from typing import Any

import numpy as np
from PIL import Image

from quarterview.data.sources.base import BadSampleError

_SWAPPED_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def is_sixteen_bit(image: Image.Image) -> bool:
    """Return True if an image, opened but not yet loaded, has integers of more than eight bits."""
    if image.format == "TIFF":
        bits = _get_tiff_tag(image, _BITS_PER_SAMPLE, (1,))
        return image.mode != "F" and max(bits) > 8
    if image.format == "PPM":
        return image.mode == "I" or (image.mode == "RGB" and _get_portable_max(image) > 255)
    return ";16" in _get_raw_mode(image)


def read_samples(image: Image.Image, data: bytes) -> np.ndarray:
    """Read all values, divided by the largest possible value.

    Args:
        image: image opened from `data`, for which `is_sixteen_bit` is true.
        data: the whole file.

    Returns:
        float32 [H, W, C] in [0, 1]: gray, gray and alpha, RGB, or RGBA.

    Raises:
        BadSampleError: if the values are signed, have more than 16 bits, or have a layout that Pillow
            cannot read completely.
    """
    if image.format == "PPM":
        return _read_portable(image, data)
    if image.mode == "I" and image.format == "TIFF":
        raise BadSampleError("integers that are signed or of 32 bits, expected unsigned with up to 16 bits")
    # Pillow forgets the raw mode of a PNG when it loads it.
    raw_mode = _get_raw_mode(image) or _get_raw_mode(_reopen(data))
    if image.mode.startswith("I"):
        values = np.array(image)[..., None].astype(np.float32)  # [H, W, 1]
        values /= 4095 if raw_mode == "I;12" else 65535
        if image.format == "TIFF" and _get_tiff_tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
            values = 1.0 - values
    else:
        values = _read_both_bytes(data, raw_mode).astype(np.float32) / 65535
    if raw_mode.startswith("CMYK"):
        return (1.0 - values[..., :3]) * (1.0 - values[..., 3:])
    return _add_alpha(values, image.info.get("transparency"))


def _read_both_bytes(data: bytes, raw_mode: str) -> np.ndarray:
    if raw_mode == "LA;16B":  # four bytes per pixel, as in 8-bit RGBA
        pairs = _read_high_bytes(data, "RGBA")
        return pairs[..., 0::2] * 256 + pairs[..., 1::2]
    layout = re.fullmatch(r"(RGB|RGBA|RGBX|CMYK);16([BLN])", raw_mode)
    if layout is None:
        raise BadSampleError("16-bit color planes or premultiplied alpha, expected RGB or RGBA pixels")
    mode, order = layout.groups()
    high = _read_high_bytes(data, raw_mode)
    low = _read_high_bytes(data, f"{mode};16{_SWAPPED_ORDER[order]}")
    return high * 256 + low


def _read_high_bytes(data: bytes, raw_mode: str) -> np.ndarray:
    """Decode the file with a given raw mode of Pillow: uint16 [H, W, C], the high byte of each value."""
    image = _reopen(data)
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
        for tile in image.tile
    ]
    return np.array(image).astype(np.uint16)


def _reopen(data: bytes) -> Any:
    return Image.open(io.BytesIO(data), formats=("PNG", "TIFF"))


def _add_alpha(values: np.ndarray, transparent_color: Any) -> np.ndarray:
    """Add an alpha channel if a PNG declares one colour as transparent."""
    if not isinstance(transparent_color, int | tuple):
        return values
    alpha = (np.rint(values * 65535) != np.asarray(transparent_color)).any(-1, keepdims=True)
    return np.concatenate((values, alpha.astype(np.float32)), -1)


def _read_portable(image: Image.Image, data: bytes) -> np.ndarray:
    """Read a binary PGM or PPM file, whose values follow the header uncompressed."""
    tile = _get_first_tile(image)
    if tile.codec_name == "ppm_plain":
        raise BadSampleError("16-bit PGM or PPM in text form, expected the binary form")
    width, height = image.size
    shape = (height, width, len(image.getbands()))
    values = np.frombuffer(data, ">u2", count=int(np.prod(shape)), offset=tile.offset).reshape(shape)
    max_value = _get_portable_max(image)
    if (values > max_value).any():
        raise BadSampleError(f"a value above {max_value}, the maximum that the file declares")
    return values.astype(np.float32) / max_value


def _get_portable_max(image: Image.Image) -> int:
    arguments = _get_first_tile(image).args
    if isinstance(arguments, tuple):
        return arguments[1]
    return 65535 if ";16" in arguments else 255


def _get_first_tile(image: Image.Image) -> Any:
    tiles = getattr(image, "tile", None)
    if not tiles:
        raise BadSampleError("the file has no pixels")
    return tiles[0]


def _get_raw_mode(image: Image.Image) -> str:
    """Return Pillow's raw mode, the layout of the values in the file; empty for formats without one."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _get_tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    tags: Any = getattr(image, "tag_v2", {})
    return tags.get(tag, default)
