import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from quarterview.data.decode import _choose_scale, _scale_box, decode, open_croppable_file
from quarterview.data.sources.base import BadSampleError
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


RGB = random_pixels(7, 5, 3)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_decoded_without_loss(file_format):
    decoded = decode(encode(Image.fromarray(RGB), file_format), 3)
    assert decoded.pixels.dtype == torch.uint8
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), RGB)
    assert decoded.notes == ()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_equal_pillow(file_format):
    data = encode(Image.fromarray(RGB), file_format)
    assert np.array_equal(decode(data, 3).pixels.permute(1, 2, 0), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("file_format", ["PNG", "GIF", "TIFF", "PPM", "BMP"])
def test_gray_is_repeated_to_all_channels(file_format, channels):
    gray = random_pixels(7, 5)
    pixels = decode(encode(Image.fromarray(gray), file_format), channels).pixels
    assert pixels.shape == (channels, 7, 5)
    assert all(np.array_equal(plane, gray) for plane in pixels)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_rgb_to_another_number_of_channels_is_a_user_error(channels):
    with pytest.raises(UserError, match=f"to {channels} channels. Give --in-chans 3, gray images"):
        decode(encode(Image.fromarray(RGB), "PNG"), channels)


def test_palette_is_converted_to_rgb():
    image = Image.fromarray(RGB).quantize(4)
    pixels = decode(encode(image, "PNG"), 3).pixels
    assert np.array_equal(pixels.permute(1, 2, 0), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    samples = random_pixels(9, 9, len(mode))
    decoded = decode(encode(Image.fromarray(samples, mode=None), "PNG"), 3)
    color, alpha = samples[..., :-1].astype(float), samples[..., -1:] / 255
    expected = np.broadcast_to(np.rint(color * alpha + 255 * (1 - alpha)), (9, 9, 3))
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), expected)
    assert decoded.notes == ("transparency composited on white",)


def test_opaque_alpha_gives_no_note():
    decoded = decode(encode(Image.fromarray(RGB).convert("RGBA"), "PNG"), 3)
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), RGB)
    assert decoded.notes == ()


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = decode(encode(image, "PNG", transparency=0), 3).pixels
    assert pixels[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 255]]


def test_cmyk_is_converted_and_noted():
    image = Image.fromarray(RGB).convert("CMYK")
    data = encode(image, "TIFF")
    decoded = decode(data, 3)
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), image.convert("RGB"))
    assert decoded.notes == ("CMYK converted to RGB",)
    assert decode(encode(image, "JPEG"), 3).notes == ("CMYK converted to RGB",)


def test_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "lime", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        decoded = decode(
            encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options), 3
        )
        assert decoded.pixels[:, 0, 0].tolist() == [255, 0, 0]
        assert decoded.notes == ("first of several frames",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_exif_orientation_is_applied(orientation, file_format, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(RGB), file_format, exif=exif, **options)
    decoded = decode(data, 3)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(Image.fromarray(RGB), "PNG", exif=exif))))
    assert np.array_equal(decoded.pixels.permute(1, 2, 0), expected)
    assert decoded.notes == (() if orientation == 1 else ("rotated by EXIF",))


def test_image_with_a_broken_exif_block_is_decoded():
    data = encode(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish")
    assert np.array_equal(decode(data, 3).pixels.permute(1, 2, 0), RGB)


def test_float_tiff():
    values = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    decoded = decode(encode(Image.fromarray(values), "TIFF"), 1)
    assert decoded.pixels.dtype == torch.float32
    assert np.array_equal(decoded.pixels[0], values)
    for wrong in (2.0, -0.5, np.nan, np.inf):
        values[2, 2] = wrong
        with pytest.raises(BadSampleError, match="expected 0 to 1"):
            decode(encode(Image.fromarray(values), "TIFF"), 1)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_by_their_header(size):
    start = time.process_time()
    with pytest.raises(BadSampleError, match="more than 128 megapixels"):
        decode(png_header(*size), 3)
    assert time.process_time() - start < 0.5


def test_unusable_files_give_a_reason_of_one_line(tmp_path):
    whole = encode(Image.fromarray(random_pixels(64, 64, 3)), "JPEG")
    cases = {
        b"": "empty",
        b"hello, this is text": "one of the formats JPEG, PNG",
        whole[: len(whole) * 2 // 3]: "truncated",
    }
    for data, reason in cases.items():
        with pytest.raises(BadSampleError, match=reason) as caught:
            decode(data, 3)
        assert "\n" not in str(caught.value)


def test_other_formats_of_pillow_are_refused():
    with pytest.raises(BadSampleError, match="one of the formats"):
        decode(encode(Image.fromarray(RGB), "ICO"), 3)


def test_global_settings_of_pillow_are_unchanged():
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BadSampleError):
            decode(png_header(10_000, 10_000), 3)  # allowed, but Pillow would warn; and it is truncated
    assert not caught
    assert before == Image.MAX_IMAGE_PIXELS


def sample_files() -> list[bytes]:
    image = Image.fromarray(random_pixels(16, 16, 3))
    file_formats = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
    deep = Image.fromarray(random_pixels(16, 16).astype(np.uint16) * 257)
    return [encode(image, file_format) for file_format in file_formats] + [
        encode(deep, file_format) for file_format in ("PNG", "TIFF", "PPM")
    ]


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300) | st.sampled_from([b"P6 4 4 65535 ", b"BM", b"GIF89a", b"II*\0"]))
def test_any_bytes_decode_or_are_a_bad_sample(data):
    assert_decodes_or_is_refused(data)


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_damaged_files_decode_or_are_a_bad_sample(draw):
    data = bytearray(draw.draw(st.sampled_from(sample_files())))
    for _ in range(draw.draw(st.integers(0, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    assert_decodes_or_is_refused(bytes(data[: draw.draw(st.integers(0, len(data)))]))


def assert_decodes_or_is_refused(data: bytes) -> None:
    try:
        pixels = decode(data, 3).pixels
    except BadSampleError:
        return
    assert pixels.shape[0] == 3
    assert pixels.numel() > 0


# ---------------------------------------------------------------------- crops


def make_photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(random_pixels(9, 7, 3, seed=seed)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_crop_equals_a_crop_of_the_upright_image(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(make_photograph(60, 90).convert(mode), "JPEG", exif=exif, quality=95)
    whole, image = decode(data, 3), open_croppable_file(data, 3)
    assert image.size == whole.pixels.shape[1:] == ((60, 90) if orientation < 5 else (90, 60))
    for box in [(0, 0, *image.size), (10, 20, 30, 40), (5, 0, 20, 20), (31, 17, 8, 9)]:
        crop = image.crop(box, (20, 20))
        assert crop.notes == whole.notes
        assert crop.pixels.shape == (3, 20, 20)
        assert crop.pixels.dtype == torch.uint8
        difference = (crop.pixels.float() - crop_resize(whole.pixels, box, (20, 20)).float()).abs()
        # Larger boxes are decoded at half the size.
        assert difference.mean() < (1 if min(box[2:]) < 40 else 3)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(0, 299), st.integers(0, 299), st.integers(1, 300), st.integers(1, 300)),
)
def test_crop_is_never_decoded_smaller_than_requested(size, box):
    top, left = min(box[0], size[0] - 1), min(box[1], size[1] - 1)
    box = (top, left, min(box[2], size[0] - top), min(box[3], size[1] - left))
    times = _choose_scale(box, (20, 30))
    decoded = [-(-side // times) for side in size]
    top, left, height, width = _scale_box(box, size, decoded)
    assert 0 <= top < top + height <= decoded[0]
    assert 0 <= left < left + width <= decoded[1]
    if times > 1:
        assert height >= 20
        assert width >= 30
    else:
        assert (top, left, height, width) == box


def test_reduced_decoding_is_close_to_full_decoding():
    data = encode(make_photograph(640, 960), "JPEG", quality=95)
    box = (0, 0, 640, 960)
    crop = open_croppable_file(data, 3).crop(box, (64, 96)).pixels
    difference = (crop.float() - crop_resize(decode(data, 3).pixels, box, (64, 96)).float()).abs()
    assert difference.mean() < 2


@pytest.mark.parametrize("channels", [1, 5])
def test_gray_jpeg_crop_has_any_number_of_channels(channels):
    data = encode(make_photograph(40, 30).convert("L"), "JPEG")
    crop = open_croppable_file(data, channels).crop((0, 0, 20, 20), (20, 20)).pixels
    assert torch.equal(crop, decode(data, channels).pixels[:, :20, :20])
    with pytest.raises(UserError, match=f"to {channels} channels. Give --in-chans 3"):
        open_croppable_file(encode(make_photograph(40, 30), "JPEG"), channels)


def test_jpeg_orientation_and_frames_are_always_detected():
    rotated = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    profile = b"\xff\xda" * 40_000  # looks like a start of scan, in two segments
    content = b"http://ns.adobe.com/xap/1.0/\x00" + rotated
    xmp = b"\xff\xe1" + (2 + len(content)).to_bytes(2, "big") + content
    for options in ({}, {"icc_profile": profile}):
        plain = encode(make_photograph(30, 40), "JPEG", **options)
        data = plain[:2] + xmp + plain[2:]
        whole, image = decode(data, 3), open_croppable_file(data, 3)
        assert image.size == whole.pixels.shape[1:] == (40, 30)
        crop = image.crop((0, 0, 40, 30), (40, 30))
        assert torch.equal(crop.pixels, whole.pixels)
        assert crop.notes == whole.notes == ("rotated by EXIF",)
    frames = [make_photograph(30, 40, seed) for seed in (0, 1)]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    crop = open_croppable_file(data, 3).crop((0, 0, 30, 40), (30, 40))
    assert crop.notes == decode(data, 3).notes == ("first of several frames",)
    assert torch.equal(crop.pixels, decode(data, 3).pixels)


def test_other_files_are_cropped_from_the_whole_image():
    for file_format, mode in (
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("JPEG", "CMYK"),
        ("GIF", "P"),
        ("WEBP", "RGB"),
    ):
        data = encode(make_photograph(30, 40).convert(mode), file_format)
        whole, image = decode(data, 3), open_croppable_file(data, 3)
        assert image.size == (30, 40)
        crop = image.crop((3, 5, 20, 25), (10, 10))
        assert crop.notes == whole.notes
        assert torch.equal(crop.pixels, crop_resize(whole.pixels, (3, 5, 20, 25), (10, 10)))


def test_crop_and_decode_raise_the_same_errors():
    whole = encode(make_photograph(64, 64), "JPEG")
    cases = [
        b"",
        b"hello, this is text",
        whole[: len(whole) // 2],
        whole[:-2],
        whole[:200],
        png_header(9000, 9000),
    ]
    for data in cases:
        messages = []
        for read in (lambda d: decode(d, 3), lambda d: open_croppable_file(d, 3).crop((0, 0, 8, 8), (8, 8))):
            try:
                read(data)
                messages.append(None)
            except BadSampleError as error:
                messages.append(str(error))
        assert messages[0] == messages[1]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_crop_or_are_a_bad_sample(draw):
    data = bytearray(draw.draw(st.sampled_from(sample_files()[:2])))
    for _ in range(draw.draw(st.integers(0, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = open_croppable_file(bytes(data[: draw.draw(st.integers(0, len(data)))]), 3)
        assert image.crop((0, 0, *image.size), (4, 4)).pixels.shape == (3, 4, 4)
    except BadSampleError:
        return
