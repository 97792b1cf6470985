"""Tests that broken images leak no memory, and that enormous ones are refused at once."""

import io
import multiprocessing
import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quarterview.data.decode import decode, open_croppable_file
from quarterview.data.sources.base import BadSampleError
from quarterview.errors import UserError

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quarterview.commands.pretrain", "torch.utils.tensorboard"])


def in_a_fresh_process(work, *arguments) -> float:
    """Return the result of `work` in a new process that imported everything."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=answer, args=(writer, work, *arguments))
    process.start()
    writer.close()
    try:
        return reader.recv()  # EOFError if it died
    finally:
        process.join(60)


def answer(writer, work, *arguments) -> None:
    writer.send(work(*arguments))


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def reserved_at_most() -> float:
    """Return the peak virtual memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) / 2**10


# ---------------------------------------------------------------------- by the thousand


def sound_files() -> list[bytes]:
    """Valid files of every decoder: JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, with 8 and 16 bits."""
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    colour, deep = Image.fromarray(noise), Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds = [(colour, form, {}) for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM")]
    kinds += [(deep, form, {}) for form in ("PNG", "TIFF", "PPM")]
    kinds += [(colour, "TIFF", {"compression": "tiff_lzw"}), (colour, "JPEG", {"progressive": True})]
    files = []
    for image, form, options in kinds:
        file = io.BytesIO()
        image.save(file, form, **options)
        files.append(file.getvalue())
    return files


def malformed(files: list[bytes], dice: random.Random) -> bytes:
    """Return one of the files truncated, with bits flipped, or both."""
    data = bytearray(dice.choice(files))
    for _ in range(dice.choice((0, 1, 20))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data[: dice.randrange(len(data))] if dice.random() < 0.6 else data)


def growth(count: int) -> float:
    """Return the growth of memory in MiB by decoding malformed files, after the first few hundred."""
    files, dice = sound_files(), random.Random(0)
    before = 0.0
    for number in range(-300, count):
        if number == 0:
            before = resident()
        data = malformed(files, dice)
        try:
            if number % 2:
                decode(data, 3)
            else:
                open_croppable_file(data, 3).crop((20, 20, 80, 90), (16, 16))
        except (BadSampleError, UserError):
            pass
    return resident() - before


def test_hundreds_of_malformed_images_leak_no_memory():
    assert in_a_fresh_process(growth, 400) < 20


@pytest.mark.slow
def test_five_thousand_malformed_images_leak_less_than_50_mb():
    assert in_a_fresh_process(growth, 5000) < 50


# ---------------------------------------------------------------------- enormous by its header

SIDE = 30_000


def png(depth: int) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, 2, 0, 0, 0)),
        (b"IDAT", b"x"),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(form: str, mode: str = "RGB") -> bytearray:
    file = io.BytesIO()
    Image.new(mode, (64, 48)).save(file, form)
    return bytearray(file.getvalue())


def enormous() -> dict[str, bytes]:
    """Small files of every format whose headers claim 30,000 × 30,000 pixels."""
    sides = struct.pack(">HH", SIDE, SIDE)
    jpeg = bytes(saved("JPEG")).replace(struct.pack(">HH", 48, 64), sides)
    grey = bytes(saved("JPEG", "L")).replace(struct.pack(">HH", 48, 64), sides)
    gif, bmp = saved("GIF"), saved("BMP")
    gif[6:10] = struct.pack("<HH", SIDE, SIDE)
    bmp[18:26] = struct.pack("<II", SIDE, SIDE)
    tags = [(256, 4, SIDE), (257, 4, SIDE), (258, 3, 16), (259, 3, 5), (262, 3, 1), (273, 4, 8), (279, 4, 9)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(20)
    canvas = b"VP8X" + struct.pack("<II", 10, 0) + (SIDE - 1).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 4 + len(canvas) + 20) + b"WEBP" + canvas + b"VP8L" + bytes(16)
    return {
        **{"JPEG": jpeg, "grey JPEG": grey, "PNG": png(8), "16-bit PNG": png(16), "GIF": bytes(gif)},
        **{"BMP": bytes(bmp), "16-bit TIFF": tiff, "WebP": webp, "PPM": b"P6 30000 30000 255\n" + bytes(99)},
        **{"16-bit PPM": b"P6 30000 30000 65535\n" + bytes(99)},
    }


def refused(data: bytes) -> tuple[list[str], float, float]:
    """Return the error for a file, and the CPU seconds and MiB of virtual memory until it is raised."""
    decode(bytes(saved("PNG")), 3)  # Pillow makes itself ready
    reserved, began, said = reserved_at_most(), time.process_time(), []
    for make in (decode, open_croppable_file):
        try:
            make(data, 3)
            said.append("taken")
        except BadSampleError as error:
            said.append(str(error))
    return said, time.process_time() - began, reserved_at_most() - reserved


@pytest.mark.parametrize("kind", enormous())
def test_an_image_header_of_enormous_size_is_refused_without_allocation(kind):
    said, seconds, mebibytes = in_a_fresh_process(refused, enormous()[kind])
    expected = "more than 128 megapixels"
    assert all(expected in reason for reason in said), said
    assert seconds < 1
    assert mebibytes < 64


def scans(count: int) -> bytes:
    """A progressive JPEG file with its last scan repeated, each of which takes time for all pixels."""
    file = io.BytesIO()
    Image.new("L", (512, 512), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * count + data[-2:]


def test_a_jpeg_file_with_too_many_scans_is_refused():
    assert decode(scans(100), 1).pixels.shape == (1, 512, 512)
    for make in (decode, open_croppable_file):
        with pytest.raises(BadSampleError, match="scans"):
            make(scans(2000), 1)
