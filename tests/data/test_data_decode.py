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

from quarterview.data.decode import _coarsest, _scaled, croppable_file, decode
from quarterview.data.sources.base import BadSampleError
from quarterview.data.transforms.crop import crop_resize
from quarterview.errors import UserError


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


RGB = random_pixels(7, 5, 3)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_comes_out_as_it_went_in(form):
    picture = decode(saved(Image.fromarray(RGB), form), 3)
    assert picture.pixels.dtype == torch.uint8
    assert np.array_equal(picture.pixels.permute(1, 2, 0), RGB)
    assert picture.notes == ()


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_out_as_pillow_reads_them(form):
    data = saved(Image.fromarray(RGB), form)
    assert np.array_equal(decode(data, 3).pixels.permute(1, 2, 0), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "PPM", "BMP"])
def test_grey_is_repeated(form, channels):
    grey = random_pixels(7, 5)
    pixels = decode(saved(Image.fromarray(grey), form), channels).pixels
    assert pixels.shape == (channels, 7, 5)
    assert all(np.array_equal(plane, grey) for plane in pixels)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_rgb_for_other_channels_is_the_users_error(channels):
    with pytest.raises(UserError, match=f"{channels} channels; accepted: grey .* RGB images for 3"):
        decode(saved(Image.fromarray(RGB), "PNG"), channels)


def test_palette_becomes_rgb():
    image = Image.fromarray(RGB).quantize(4)
    pixels = decode(saved(image, "PNG"), 3).pixels
    assert np.array_equal(pixels.permute(1, 2, 0), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    samples = random_pixels(9, 9, len(mode))
    picture = decode(saved(Image.fromarray(samples, mode=None), "PNG"), 3)
    colour, alpha = samples[..., :-1].astype(float), samples[..., -1:] / 255
    expected = np.broadcast_to(np.rint(colour * alpha + 255 * (1 - alpha)), (9, 9, 3))
    assert np.array_equal(picture.pixels.permute(1, 2, 0), expected)
    assert picture.notes == ("transparency composited on white",)


def test_opaque_alpha_needs_no_note():
    picture = decode(saved(Image.fromarray(RGB).convert("RGBA"), "PNG"), 3)
    assert np.array_equal(picture.pixels.permute(1, 2, 0), RGB)
    assert picture.notes == ()


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    pixels = decode(saved(image, "PNG", transparency=0), 3).pixels
    assert pixels[:, 0].T.tolist() == [[255, 255, 255], [0, 0, 255]]


def test_cmyk_is_converted_and_noted():
    image = Image.fromarray(RGB).convert("CMYK")
    data = saved(image, "TIFF")
    picture = decode(data, 3)
    assert np.array_equal(picture.pixels.permute(1, 2, 0), image.convert("RGB"))
    assert picture.notes == ("CMYK converted to RGB",)
    assert decode(saved(image, "JPEG"), 3).notes == ("CMYK converted to RGB",)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        picture = decode(saved(frames[0], form, save_all=True, append_images=frames[1:], **options), 3)
        assert picture.pixels[:, 0, 0].tolist() == [255, 0, 0]
        assert picture.notes == ("first of several frames",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_exif_orientation_is_applied(orientation, form, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(RGB), form, exif=exif, **options)
    picture = decode(data, 3)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(Image.fromarray(RGB), "PNG", exif=exif))))
    assert np.array_equal(picture.pixels.permute(1, 2, 0), expected)
    assert picture.notes == (() if orientation == 1 else ("rotated by EXIF",))


def test_a_broken_exif_block_does_not_lose_the_picture():
    data = saved(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish")
    assert np.array_equal(decode(data, 3).pixels.permute(1, 2, 0), RGB)


def test_float_tiff():
    values = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    picture = decode(saved(Image.fromarray(values), "TIFF"), 1)
    assert picture.pixels.dtype == torch.float32
    assert np.array_equal(picture.pixels[0], values)
    for wrong in (2.0, -0.5, np.nan, np.inf):
        values[2, 2] = wrong
        with pytest.raises(BadSampleError, match="accepted: 0 to 1"):
            decode(saved(Image.fromarray(values), "TIFF"), 1)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(size):
    start = time.process_time()
    with pytest.raises(BadSampleError, match="more than the 128 megapixels accepted"):
        decode(png_header(*size), 3)
    assert time.process_time() - start < 0.5


def test_unusable_files_have_a_reason_of_one_line(tmp_path):
    whole = saved(Image.fromarray(random_pixels(64, 64, 3)), "JPEG")
    cases = {
        b"": "empty",
        b"hello, this is text": "accepted formats: JPEG, PNG",
        whole[: len(whole) * 2 // 3]: "truncated",
    }
    for data, reason in cases.items():
        with pytest.raises(BadSampleError, match=reason) as caught:
            decode(data, 3)
        assert "\n" not in str(caught.value)


def test_other_formats_of_pillow_are_not_tried():
    with pytest.raises(BadSampleError, match="accepted formats"):
        decode(saved(Image.fromarray(RGB), "ICO"), 3)


def test_pillow_keeps_its_settings():
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BadSampleError):
            decode(png_header(10_000, 10_000), 3)  # allowed, but Pillow would warn; and it is truncated
    assert not caught
    assert before == Image.MAX_IMAGE_PIXELS


def sample_files() -> list[bytes]:
    image = Image.fromarray(random_pixels(16, 16, 3))
    forms = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
    deep = Image.fromarray(random_pixels(16, 16).astype(np.uint16) * 257)
    return [saved(image, form) for form in forms] + [saved(deep, form) for form in ("PNG", "TIFF", "PPM")]


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300) | st.sampled_from([b"P6 4 4 65535 ", b"BM", b"GIF89a", b"II*\0"]))
def test_any_bytes_decode_or_are_a_bad_sample(data):
    refused_or_a_picture(data)


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_damaged_files_decode_or_are_a_bad_sample(draw):
    data = bytearray(draw.draw(st.sampled_from(sample_files())))
    for _ in range(draw.draw(st.integers(0, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    refused_or_a_picture(bytes(data[: draw.draw(st.integers(0, len(data)))]))


def refused_or_a_picture(data: bytes) -> None:
    try:
        pixels = decode(data, 3).pixels
    except BadSampleError:
        return
    assert pixels.shape[0] == 3
    assert pixels.numel() > 0


# ---------------------------------------------------------------------- crops


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(random_pixels(9, 7, 3, seed=seed)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_jpeg_is_that_of_the_upright_picture(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photograph(60, 90).convert(mode), "JPEG", exif=exif, quality=95)
    whole, image = decode(data, 3), croppable_file(data, 3)
    assert image.size == whole.pixels.shape[1:] == ((60, 90) if orientation < 5 else (90, 60))
    for box in [(0, 0, *image.size), (10, 20, 30, 40), (5, 0, 20, 20), (31, 17, 8, 9)]:
        crop = image.crop(box, (20, 20))
        assert crop.notes == whole.notes
        assert crop.pixels.shape == (3, 20, 20)
        assert crop.pixels.dtype == torch.uint8
        off = (crop.pixels.float() - crop_resize(whole.pixels, box, (20, 20)).float()).abs()
        assert off.mean() < (1 if min(box[2:]) < 40 else 3)  # larger boxes are decoded at half the size


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(0, 299), st.integers(0, 299), st.integers(1, 300), st.integers(1, 300)),
)
def test_a_crop_is_never_decoded_coarser_than_it_is_wanted(size, box):
    top, left = min(box[0], size[0] - 1), min(box[1], size[1] - 1)
    box = (top, left, min(box[2], size[0] - top), min(box[3], size[1] - left))
    times = _coarsest(box, (20, 30))
    decoded = [-(-side // times) for side in size]
    top, left, height, width = _scaled(box, size, decoded)
    assert 0 <= top < top + height <= decoded[0]
    assert 0 <= left < left + width <= decoded[1]
    if times > 1:
        assert height >= 20
        assert width >= 30
    else:
        assert (top, left, height, width) == box


def test_a_large_photograph_is_decoded_small():
    data = saved(photograph(640, 960), "JPEG", quality=95)
    box = (0, 0, 640, 960)
    crop = croppable_file(data, 3).crop(box, (64, 96)).pixels
    off = (crop.float() - crop_resize(decode(data, 3).pixels, box, (64, 96)).float()).abs()
    assert off.mean() < 2


@pytest.mark.parametrize("channels", [1, 5])
def test_a_crop_of_a_grey_jpeg_has_any_number_of_channels(channels):
    data = saved(photograph(40, 30).convert("L"), "JPEG")
    crop = croppable_file(data, channels).crop((0, 0, 20, 20), (20, 20)).pixels
    assert torch.equal(crop, decode(data, channels).pixels[:, :20, :20])
    with pytest.raises(UserError, match=f"{channels} channels; accepted: grey"):
        croppable_file(saved(photograph(40, 30), "JPEG"), channels)


def test_what_turns_a_jpeg_or_gives_it_several_frames_is_never_overlooked():
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    profile = b"\xff\xda" * 40_000  # looks like a start of scan, in two segments
    content = b"http://ns.adobe.com/xap/1.0/\x00" + turned
    xmp = b"\xff\xe1" + (2 + len(content)).to_bytes(2, "big") + content
    for options in ({}, {"icc_profile": profile}):
        plain = saved(photograph(30, 40), "JPEG", **options)
        data = plain[:2] + xmp + plain[2:]
        whole, image = decode(data, 3), croppable_file(data, 3)
        assert image.size == whole.pixels.shape[1:] == (40, 30)
        crop = image.crop((0, 0, 40, 30), (40, 30))
        assert torch.equal(crop.pixels, whole.pixels)
        assert crop.notes == whole.notes == ("rotated by EXIF",)
    frames = [photograph(30, 40, seed) for seed in (0, 1)]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    crop = croppable_file(data, 3).crop((0, 0, 30, 40), (30, 40))
    assert crop.notes == decode(data, 3).notes == ("first of several frames",)
    assert torch.equal(crop.pixels, decode(data, 3).pixels)


def test_what_is_no_plain_jpeg_is_cropped_from_the_whole_picture():
    for form, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGB")):
        data = saved(photograph(30, 40).convert(mode), form)
        whole, image = decode(data, 3), croppable_file(data, 3)
        assert image.size == (30, 40)
        crop = image.crop((3, 5, 20, 25), (10, 10))
        assert crop.notes == whole.notes
        assert torch.equal(crop.pixels, crop_resize(whole.pixels, (3, 5, 20, 25), (10, 10)))


def test_what_is_wrong_with_a_file_is_said_alike_when_it_is_cropped():
    whole = saved(photograph(64, 64), "JPEG")
    cases = [
        b"",
        b"hello, this is text",
        whole[: len(whole) // 2],
        whole[:-2],
        whole[:200],
        png_header(9000, 9000),
    ]
    for data in cases:
        said = []
        for make in (lambda d: decode(d, 3), lambda d: croppable_file(d, 3).crop((0, 0, 8, 8), (8, 8))):
            try:
                make(data)
                said.append(None)
            except BadSampleError as error:
                said.append(str(error))
        assert said[0] == said[1]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_are_cropped_or_are_a_bad_sample(draw):
    data = bytearray(draw.draw(st.sampled_from(sample_files()[:2])))
    for _ in range(draw.draw(st.integers(0, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = croppable_file(bytes(data[: draw.draw(st.integers(0, len(data)))]), 3)
        assert image.crop((0, 0, *image.size), (4, 4)).pixels.shape == (3, 4, 4)
    except BadSampleError:
        return
