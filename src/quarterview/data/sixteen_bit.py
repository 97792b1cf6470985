"""Images with sixteen bits a sample, read by Pillow without losing any.

Pillow has no mode for colours of sixteen bits: it silently keeps the first byte of each sample. But it
knows both byte orders, so reading a file twice, the second time as if its bytes were the other way round,
gives first the high bytes and then the low ones. Grey has a mode of its own and needs one reading.
"""

import io
import re
import sys
from typing import Any

import numpy as np
from PIL import Image

from quarterview.data.sources.base import BadSampleError

_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def found_in(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded image holds integers of more than eight bits."""
    if image.format == "TIFF":
        bits = _tiff_tag(image, _BITS_PER_SAMPLE, (1,))
        return image.mode != "F" and max(bits) > 8
    if image.format == "PPM":
        return image.mode == "I" or (image.mode == "RGB" and _portable_maximum(image) > 255)
    return ";16" in _raw_mode(image)


def samples(image: Image.Image, data: bytes) -> np.ndarray:
    """Every sample divided by the greatest it could be.

    Args:
        image: opened from `data`, with `found_in` true of it.
        data: the whole file.

    Returns:
        float32 [H, W, C] in [0, 1]: grey, grey and alpha, RGB, or RGBA.

    Raises:
        BadSampleError: if the samples are signed, have more than sixteen bits, or lie in a way that
            Pillow cannot be made to read in full.
    """
    if image.format == "PPM":
        return _portable(image, data)
    if image.mode == "I" and image.format == "TIFF":
        raise BadSampleError("integers that are signed or of 32 bits; accepted: unsigned, up to 16 bits")
    raw_mode = _raw_mode(image) or _raw_mode(_reopened(data))  # a loaded PNG has forgotten it
    if image.mode.startswith("I"):
        values = np.array(image)[..., None].astype(np.float32)  # [H, W, 1]
        values /= 4095 if raw_mode == "I;12" else 65535
        if image.format == "TIFF" and _tiff_tag(image, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
            values = 1.0 - values
    else:
        values = _both_bytes(data, raw_mode).astype(np.float32) / 65535
    if raw_mode.startswith("CMYK"):
        return (1.0 - values[..., :3]) * (1.0 - values[..., 3:])
    return _with_transparent_colour(values, image.info.get("transparency"))


def _both_bytes(data: bytes, raw_mode: str) -> np.ndarray:
    if raw_mode == "LA;16B":  # four bytes a pixel, as RGBA has with eight bits
        pairs = _reading(data, "RGBA")
        return pairs[..., 0::2] * 256 + pairs[..., 1::2]
    layout = re.fullmatch(r"(RGB|RGBA|RGBX|CMYK);16([BLN])", raw_mode)
    if layout is None:
        raise BadSampleError("16-bit colours in planes or premultiplied; accepted: RGB or RGBA pixels")
    colours, order = layout.groups()
    return _reading(data, raw_mode) * 256 + _reading(data, f"{colours};16{_OTHER_ORDER[order]}")


def _reading(data: bytes, raw_mode: str) -> np.ndarray:
    """uint16 [H, W, C]: the file as Pillow decodes it if its bytes are taken to lie as `raw_mode` says."""
    image = _reopened(data)
    image.tile = [
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
        for tile in image.tile
    ]
    return np.array(image).astype(np.uint16)


def _reopened(data: bytes) -> Any:
    return Image.open(io.BytesIO(data), formats=("PNG", "TIFF"))


def _with_transparent_colour(values: np.ndarray, colour: Any) -> np.ndarray:
    """With an alpha channel where a PNG names one colour as transparent."""
    if not isinstance(colour, int | tuple):
        return values
    alpha = (np.rint(values * 65535) != np.asarray(colour)).any(-1, keepdims=True)
    return np.concatenate((values, alpha.astype(np.float32)), -1)


def _portable(image: Image.Image, data: bytes) -> np.ndarray:
    """The binary PGM and PPM, whose samples lie behind the header as they are."""
    tile = _first_tile(image)
    if tile.codec_name == "ppm_plain":
        raise BadSampleError("16-bit PGM or PPM written as text; accepted: the binary form")
    width, height = image.size
    shape = (height, width, len(image.getbands()))
    values = np.frombuffer(data, ">u2", count=int(np.prod(shape)), offset=tile.offset).reshape(shape)
    maximum = _portable_maximum(image)
    if (values > maximum).any():
        raise BadSampleError(f"a sample above {maximum}, the maximum that the file gives")
    return values.astype(np.float32) / maximum


def _portable_maximum(image: Image.Image) -> int:
    arguments = _first_tile(image).args
    if isinstance(arguments, tuple):
        return arguments[1]
    return 65535 if ";16" in arguments else 255


def _first_tile(image: Image.Image) -> Any:
    tiles = getattr(image, "tile", None)
    if not tiles:
        raise BadSampleError("the file holds no pixels")
    return tiles[0]


def _raw_mode(image: Image.Image) -> str:
    """How the samples lie in the file, in Pillow's words; empty for formats that do not say."""
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0]) if arguments else ""


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    tags: Any = getattr(image, "tag_v2", {})
    return tags.get(tag, default)
