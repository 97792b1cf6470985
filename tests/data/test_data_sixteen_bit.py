import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from quarterview.data.decode import decode
from quarterview.data.sources.base import BadSampleError

SCALED_NOTE = "16 bits scaled to [0, 1]"
PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
ADAM7 = [
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
]


def random_samples(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (23, 17, channels), dtype=np.uint16)


def to_integers(pixels: torch.Tensor) -> np.ndarray:
    assert pixels.dtype == torch.float32
    return (pixels.permute(1, 2, 0).double() * 65535).round().numpy()


def make_png(samples: np.ndarray, transparent: bytes = b"", interlaced: bool = False) -> bytes:
    """Encode a 16-bit PNG: rows filtered by all five filters in turn, or Adam7-interlaced and unfiltered."""
    height, width, channels = samples.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    if interlaced:
        rows = b"".join(
            b"\0" + row.astype(">u2").tobytes() for y, x, dy, dx in ADAM7 for row in samples[y::dy, x::dx]
        )
    else:
        rows = filter_rows(samples.astype(">u2").reshape(height, -1).view(np.uint8).astype(int), 2 * channels)
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOR_TYPES[channels], 0, 0, int(interlaced))
    extra = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def filter_rows(rows: np.ndarray, pixel: int) -> bytes:
    result, above = [], np.zeros_like(rows[0])
    for y, row in enumerate(rows):
        left, corner = (np.concatenate((np.zeros(pixel, int), line[:-pixel])) for line in (row, above))
        estimate = left + above - corner
        a, b, c = abs(estimate - left), abs(estimate - above), abs(estimate - corner)
        paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, above, corner))
        prediction = [0 * row, left, above, (left + above) // 2, paeth][y % 5]
        result.append(bytes([y % 5]) + ((row - prediction) % 256).astype(np.uint8).tobytes())
        above = row
    return b"".join(result)


def make_tiff(
    samples: np.ndarray,
    order: str,
    photometric: int,
    *,
    compressed: bool = False,
    planar: int = 1,
    signed: bool = False,
) -> bytes:
    height, width, channels = samples.shape
    pixels = samples.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if compressed else pixels
    pixels += b"\0" * (len(pixels) % 2)
    short, long = (3, "H"), (4, "I")
    tags = [
        *((256, long, [width]), (257, long, [height]), (258, short, [16] * channels)),
        *((259, short, [8 if compressed else 1]), (262, short, [photometric]), (273, long, [8])),
        *(
            (277, short, [channels]),
            (278, long, [height]),
            (279, long, [len(pixels)]),
            (284, short, [planar]),
        ),
        *([(338, short, [2])] if channels == 4 and photometric == 2 else []),
        *([(339, short, [2])] if signed else []),
    ]
    start = 8 + len(pixels)
    overflow_start, overflow, entries = start + 2 + 12 * len(tags) + 4, b"", b""
    for tag, (kind, letter), values in tags:
        value = struct.pack(order + letter * len(values), *values)
        if len(value) > 4:
            value, overflow = struct.pack(f"{order}I", overflow_start + len(overflow)), overflow + value
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    magic = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return magic + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + overflow


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_gray_is_decoded_without_loss(file_format):
    samples = random_samples(1)
    file = io.BytesIO()
    Image.fromarray(samples[..., 0]).save(file, file_format)
    image = decode(file.getvalue(), 1)
    assert np.array_equal(to_integers(image.pixels), samples)
    assert image.notes == (SCALED_NOTE,)


@pytest.mark.parametrize("interlaced", [False, True])
def test_rgb_png_is_decoded_without_loss(interlaced):
    samples = random_samples(3)
    image = decode(make_png(samples, interlaced=interlaced), 3)
    assert np.array_equal(to_integers(image.pixels), samples)
    assert image.notes == (SCALED_NOTE,)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_alpha_is_composited_on_white(channels, interlaced):
    samples = random_samples(channels)
    image = decode(make_png(samples, interlaced=interlaced), channels - 1)
    unit = samples / 65535
    expected = unit[..., :-1] * unit[..., -1:] + 1 - unit[..., -1:]
    assert np.allclose(image.pixels.permute(1, 2, 0), expected, atol=1e-6)
    assert image.notes == (SCALED_NOTE, "transparency composited on white")


def test_opaque_alpha_is_dropped_without_loss():
    samples = random_samples(4)
    samples[..., 3] = 65535
    assert np.array_equal(to_integers(decode(make_png(samples), 3).pixels), samples[..., :3])


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_color_of_a_png_becomes_white(channels):
    samples = random_samples(channels)
    image = decode(make_png(samples, transparent=struct.pack(f">{channels}H", *samples[4, 5])), channels)
    samples[4, 5] = 65535
    assert np.array_equal(to_integers(image.pixels), samples)
    assert image.notes[-1] == "transparency composited on white"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_is_decoded_without_loss(order, compressed, channels):
    samples = random_samples(channels)
    if channels == 4:
        samples[..., 3] = 65535
    image = decode(
        make_tiff(samples, order, 1 if channels == 1 else 2, compressed=compressed), min(channels, 3)
    )
    assert np.array_equal(to_integers(image.pixels), samples[..., :3])


def test_white_is_zero_tiff_is_inverted():
    samples = random_samples(1)
    assert np.array_equal(
        to_integers(decode(make_tiff(samples, "<", 0), 1).pixels), 65535 - samples.astype(int)
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_cmyk_tiff(order):
    samples = random_samples(4)
    unit = samples / 65535
    image = decode(make_tiff(samples, order, 5), 3)
    assert np.allclose(image.pixels.permute(1, 2, 0), (1 - unit[..., :3]) * (1 - unit[..., 3:]), atol=1e-6)
    assert image.notes == ("CMYK converted to RGB", SCALED_NOTE)


@pytest.mark.parametrize(("magic", "channels"), [("P5", 1), ("P6", 3)])
@pytest.mark.parametrize("maximum", [4095, 65535])
def test_portable_maps_are_divided_by_their_maximum(magic, channels, maximum):
    samples = np.minimum(random_samples(channels), maximum)
    data = f"{magic}\n# a comment\n17 23\n{maximum}\n".encode() + samples.astype(">u2").tobytes()
    image = decode(data, channels)
    assert torch.equal(image.pixels.permute(1, 2, 0), torch.from_numpy(samples.astype(np.float32) / maximum))
    with pytest.raises(BadSampleError):
        decode(data[:-1], channels)


@pytest.mark.parametrize(
    "data",
    [
        make_tiff(random_samples(3), "<", 2, planar=2),
        make_tiff(random_samples(1), "<", 1, signed=True),
        b"P3\n1 1\n65535\n1 2 3\n",
        b"P5\n1 1\n4095\n\xff\xff",
    ],
    ids=["planes", "signed", "text", "above its maximum"],
)
def test_layouts_that_would_lose_bits_are_refused(data):
    with pytest.raises(BadSampleError):
        decode(data, 3)
