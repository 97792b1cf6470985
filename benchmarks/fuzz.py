"""Fuzz the readers of untrusted files with atheris (libFuzzer), guided by the coverage of the Python code.

Each fuzz target receives mutations of valid files. It may accept them or raise an error of this package.
Anything else is a finding: another exception, a crash of the process, an input that takes longer than
`MAX_SECONDS_PER_INPUT`, or more memory than `MAX_MEMORY_MIB`. Findings are written into a folder, each with
its traceback.

    uv run python benchmarks/fuzz.py images --seconds 600 --seed 0 --findings findings
    uv run python benchmarks/fuzz.py images --reproduce findings/images-crash-0123
"""

import argparse
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tyro

MAX_SECONDS_PER_INPUT = 20
MAX_SECONDS_PER_PROCESS = 200
"""Another process continues after this time, because the fuzzer's own memory grows with its corpus."""
MAX_MEMORY_MIB = 1536
"""Limit for the whole process. torch alone takes about 400 MiB."""
MAX_PIXELS = 4_000_000
"""The largest image that the decoders accept here. With the 128 megapixels of normal use, inputs that are
refused late would take most of the time, and large allocations could not be told from allowed ones."""
INSTRUMENTED_PACKAGES = ["quarterview", "PIL", "yaml"]


@dataclass(frozen=True)
class FuzzTarget:
    """A reader of untrusted bytes, with valid inputs from which the fuzzer starts."""

    run: Callable[[bytes, Path], None]
    """Reads the bytes, with a folder for temporary files, and raises only unexpected errors."""
    corpus: Callable[[], Iterator[bytes]]
    """Yields valid inputs."""
    tokens: Callable[[], list[str]]
    """Returns strings that are typical of the inputs, for libFuzzer's dictionary."""


# ---------------------------------------------------------------------- images


def fuzz_images(data: bytes, _folder: Path) -> None:
    """Decode an image, and a crop of it."""
    from quarterview.data import decode

    decode.MAX_PIXELS = MAX_PIXELS
    data = _repair_png_checksums(data) if len(data) % 2 else data
    for read in (lambda: decode.decode(data, 3), lambda: _crop(decode.open_croppable_file(data, 3))):
        try:
            pixels = read().pixels
        except get_allowed_errors():
            continue
        assert pixels.ndim == 3, pixels.shape
        assert pixels.shape[0] == 3, pixels.shape
        low, high = float(pixels.min()), float(pixels.max())
        assert -1 < low <= high < (2 if pixels.is_floating_point() else 256), (low, high)  # crops overshoot


def _crop(image):  # a Croppable, not annotated: the package must not be imported before it is instrumented
    height, width = image.size
    return image.crop((height // 3, width // 3, max(1, height // 2), max(1, width // 2)), (8, 8))


def _repair_png_checksums(data: bytes) -> bytes:
    """Return a PNG file with valid checksums, because decoders stop at the first chunk with a wrong one."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    repaired, offset = [data[:8]], 8
    while offset + 12 <= len(data):
        body_end = offset + 8 + int.from_bytes(data[offset : offset + 4], "big")
        chunk = data[offset + 4 : body_end]
        repaired += [data[offset : offset + 4], chunk, struct.pack(">I", zlib.crc32(chunk))]
        offset = body_end + 4
    return b"".join(repaired)


def create_image_corpus() -> Iterator[bytes]:
    """Yield a file of every format, bit depth and color mode that is supported."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    color = Image.fromarray(noise[..., :3])
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = [
        *((color, file_format, {}) for file_format in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")),
        *(
            (color, "TIFF", {"compression": compression})
            for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        *((deep, file_format, {}) for file_format in ("PNG", "TIFF", "PPM")),
        *((Image.fromarray(noise), file_format, {}) for file_format in ("PNG", "WEBP", "TIFF")),
        (color, "JPEG", {"progressive": True, "exif": exif}),
        (color.convert("L"), "JPEG", {}),
        (color.convert("CMYK"), "JPEG", {}),
        (color.convert("1"), "TIFF", {"compression": "group4"}),
        (color.quantize(8), "PNG", {"transparency": 0}),
        (color, "GIF", {"save_all": True, "append_images": [color.rotate(90)]}),
        (color, "PNG", {"save_all": True, "append_images": [color.rotate(90)]}),
        (color, "WEBP", {"lossless": True, "exif": exif}),
        (Image.fromarray(noise[..., 0].astype(np.float32) / 255), "TIFF", {}),
    ]
    for image, file_format, options in variants:
        file = io.BytesIO()
        image.save(file, file_format, **options)
        yield file.getvalue()
    wide = noise[..., :3].astype(">u2") * 257
    yield b"P6 20 24 65535\n" + wide.tobytes()
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 20, 24, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    )
    yield b"\x89PNG\r\n\x1a\n" + body


# ---------------------------------------------------------------------- checkpoints and weights

WEIGHT_FILES = (
    *("state.json", "model.safetensors", "weights.pth", "data.pkl", "config.json", "weights.index.json"),
    "SHA256SUMS",
)
"""The file that an input replaces among valid ones. The first byte of the input is its index here."""


def fuzz_weights(data: bytes, folder: Path) -> None:
    """Read a checkpoint, or weights from other libraries."""
    from quarterview.training import checkpoint
    from quarterview.weights import loading as weights

    file_name, data = WEIGHT_FILES[data[0] % len(WEIGHT_FILES)] if data else WEIGHT_FILES[0], data[1:]
    try:
        if file_name in get_checkpoint_files():
            step = folder / "run" / "checkpoints" / "step-00000001"
            _write_files(step, {**get_checkpoint_files(), file_name: data})
            if file_name == "SHA256SUMS":
                checkpoint.verify(step)
            loaded = checkpoint.load(step)
            assert isinstance(loaded.state, dict), "the state is not a dictionary"
            weights.build_model(weights.read_weights(folder / "run"))
        elif file_name == "weights.pth":
            _write_files(folder, {file_name: data})
            weights.read_weights(folder / file_name)
        elif file_name == "data.pkl":
            _write_files(folder, {"weights.pth": _zip_pickle(data)})
            weights.read_weights(folder / "weights.pth")
        else:
            name = "model.safetensors.index.json" if "index" in file_name else file_name
            valid = {"config.json": b'{"a": 1}', "model-1.safetensors": get_timm_weights()}
            _write_files(
                folder / name,
                {
                    **valid,
                    **({} if "index" in file_name else {"model.safetensors": get_timm_weights()}),
                    name: data,
                },
            )
            weights.read_weights(folder / name)
    except get_allowed_errors():
        return


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _zip_pickle(pickled: bytes) -> bytes:
    """Return a file as `torch.save` writes it, with the given pickle and one storage of 4096 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", bytes(4096))
        archive.writestr("x/version", "3\n")
    return file.getvalue()


@cache
def get_checkpoint_files() -> dict[str, bytes]:
    """Return the files of a checkpoint of a very small model."""
    from quarterview.models.create import create_model
    from quarterview.training import checkpoint
    from quarterview.weights.loading import make_metadata

    model = create_model(
        model="mae_vit_4x1x1_patch4", image_size=8, decoder_width=4, decoder_depth=1, decoder_heads=1
    )
    state = {
        "step": 1,
        "samples": 8,
        "skips": 0,
        "skips_in_a_row": 0,
        "sums": {},
        "config": {},
        "resolved": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"model": model.state_dict()}
        path = checkpoint.save(Path(folder), 1, tensors, state, make_metadata(model.config))
        return {file.name: file.read_bytes() for file in path.iterdir()}


@cache
def get_timm_weights() -> bytes:
    """Return the encoder's weights of that checkpoint, which have timm's names."""
    from safetensors.torch import load, save

    tensors = load(get_checkpoint_files()["model.safetensors"])
    return save({name: tensor for name, tensor in tensors.items() if "decoder" not in name})


def create_weights_corpus() -> Iterator[bytes]:
    """Yield an input for every entry of `WEIGHT_FILES`."""
    import torch
    from safetensors.torch import load

    tensors = load(get_timm_weights())
    for name, data in get_checkpoint_files().items():
        yield bytes([WEIGHT_FILES.index(name)]) + data
    yield bytes([1]) + get_timm_weights()
    for new in (True, False):
        file = io.BytesIO()
        content = {"model": tensors, "args": argparse.Namespace(input_size=8), "epoch": 3}
        torch.save(content, file, _use_new_zipfile_serialization=new)
        yield bytes([2]) + file.getvalue()
        if new:
            with zipfile.ZipFile(file) as archive:
                yield bytes([3]) + archive.read("archive/data.pkl")
    timm = {"architecture": "vit_tiny", "num_classes": 0, "global_pool": "token"}
    cfg = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "input_size": [3, 8, 8],
        "label_names": ["a"],
        "license": "mit",
    }
    model_args = {"img_size": [8, 8], "num_heads": 1}
    for config in (
        {**timm, "pretrained_cfg": cfg, "model_args": model_args},
        {"num_attention_heads": 1, "image_size": 8, "layer_norm_eps": 1e-6, "id2label": {"0": "a"}},
        {"norm_pix_loss": True, "mask_ratio": 0.75, "decoder_num_attention_heads": 1},
    ):
        yield bytes([4]) + json.dumps(config).encode()
    yield bytes([5]) + json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()


# ---------------------------------------------------------------------- tar shards


def fuzz_tar(data: bytes, _folder: Path) -> None:
    """Index a tar shard. Check that all indexed images are within the file, and each is indexed once."""
    from quarterview.data.sources.tar_headers import BLOCK
    from quarterview.data.sources.tar_index import scan_shard

    is_repaired, data = data[:1] < b"\x80", data[1:]
    data = _repair_tar_checksums(data) if is_repaired else data
    total_read = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal total_read
        assert offset >= 0, offset
        assert length <= 4 << 20, f"{length} bytes in one read"
        part = data[offset : offset + length]
        total_read += BLOCK + len(part)
        return part

    index = scan_shard(read, len(data))
    ends = index.samples["block"].astype("i8") * BLOCK + index.samples["bytes"]
    assert (ends <= len(data)).all(), "an image ends after the end of the file"
    assert len(set(index.samples["block"].tolist())) == len(index.samples) == len(index.labels)
    assert (index.labels >= -1).all()
    assert len(index.named) == len(index.name_ends)
    assert [*index.name_ends[-1:].tolist()] in ([], [len(index.names)])
    assert total_read <= 20 * (len(data) + BLOCK), f"{total_read} bytes read from a file of {len(data)}"


def _repair_tar_checksums(data: bytes) -> bytes:
    """Return a tar file with valid checksums in all blocks that look like headers."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for index, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            blank = block[:148] + b" " * 8 + block[156:]
            blocks[index] = block[:148] + b"%06o\0 " % sum(blank) + block[156:]
    return b"".join(blocks)


def create_tar_corpus() -> Iterator[bytes]:
    """Yield a shard of each tar format, with all types of members."""
    import tarfile

    members = [("a.jpg", b"x" * 700), ("a.cls", b"3"), ("a.json", b"{}"), ("b.seg.png", b"y" * 20)]
    members += [
        ("d/c.webp", b"z" * 600),
        ("n" * 120 + "/é.jpg", b"w" * 9),
        ("../e.jpg", b"v"),
        ("f.pyd", b"u"),
    ]
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format, pax_headers={"comment": "c"}) as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if tar_format == tarfile.PAX_FORMAT:
                    member.pax_headers = {"size": str(len(content)), "path": name}
                archive.addfile(member, io.BytesIO(content))
            for member_type in (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.DIRTYPE,
                tarfile.CHRTYPE,
            ):
                member = tarfile.TarInfo(f"k{member_type.decode()}.jpg")
                member.type, member.linkname = member_type, "a.jpg"
                archive.addfile(member)
        yield b"\0" + file.getvalue()[:-8192]


def get_tar_tokens() -> list[str]:
    """Return strings that occur in headers and extended headers."""
    return ["11 size=1\n", "30 GNU.sparse.realsize=9", " path=", "77777777777", "ustar  ", ".jpg", ".cls"]


# ---------------------------------------------------------------------- configurations


def fuzz_configuration(data: bytes, folder: Path) -> None:
    """Read a recipe, and check its configuration."""
    import yaml

    from quarterview import recipes

    path = folder / "recipe.yaml"
    path.write_bytes(data[1:])
    try:
        config = (recipes.read_pretrain_recipe if data[:1] < b"\x80" else recipes.read_finetune_recipe)(
            str(path)
        )
        config.loop.total_steps(1_000_000)
    except get_allowed_errors():
        return
    yaml.safe_dump(config.to_dict())  # as `config.yaml` is written


def create_configuration_corpus() -> Iterator[bytes]:
    """Yield every recipe twice: with the flags that differ from the defaults, and with all flags, nested."""
    import yaml

    from quarterview import recipes

    for first_byte, table, read in (
        (b"\0", recipes.RECIPES, recipes.read_pretrain_recipe),
        (b"\xff", recipes.FINETUNE_RECIPES, recipes.read_finetune_recipe),
    ):
        for name, recipe in table.items():
            yield first_byte + yaml.safe_dump(recipes.get_changed_flags(recipe())).encode()
            yield first_byte + yaml.safe_dump(read(name).to_dict()).encode()
    yield b"\0a: &a [x, x]\nb: &b [*a, *a]\ndata: [*b, *b]\n"
    yield b"\0seed: 0x1F\nlr: 1_0.5e+3\ndata: !!python/tuple [a]\nout: 2001-12-14t21:59:43.10-05:00\n"


def get_configuration_tokens() -> list[str]:
    """Return the names of all fields, and tags and special values of YAML."""
    from quarterview.commands.config import FinetuneConfig, PretrainConfig
    from quarterview.config import get_field_specs

    names = set()
    for composed in (PretrainConfig(), FinetuneConfig()):
        methods = [config for choice in composed.choices().values() for config in choice.values()]
        parts = [type(part) for part in composed.parts().values()]
        names |= {name for config in (*parts, *methods) for name in get_field_specs(config)} | set(
            composed.parts()
        )
    return [
        *sorted(names),
        "!!python/object/apply:",
        "!!binary",
        "!!timestamp",
        "!!set",
        "<<: ",
        ".inf",
        ".nan",
        "1e400",
    ]


# ---------------------------------------------------------------------- running the fuzzer

TARGETS = {
    "images": FuzzTarget(fuzz_images, create_image_corpus, list),
    "tar": FuzzTarget(fuzz_tar, create_tar_corpus, get_tar_tokens),
    "weights": FuzzTarget(fuzz_weights, create_weights_corpus, list),
    "configuration": FuzzTarget(fuzz_configuration, create_configuration_corpus, get_configuration_tokens),
}
"""All fuzz targets by name."""


def get_allowed_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions by which an input may be refused."""
    from quarterview.data.sources.base import BadSampleError
    from quarterview.errors import RunError, UserError

    return BadSampleError, UserError, RunError


def run_libfuzzer(
    target: FuzzTarget, name: str, work_folder: Path, findings: Path, options: list[str]
) -> None:
    """Run libFuzzer on one target in this process. libFuzzer exits the process at the end."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED_PACKAGES):
        corpus, tokens = list(target.corpus()), target.tokens()
        for data in corpus:  # runs every late import now, so that all modules are instrumented
            target.run(data, work_folder / "files")
    for data in corpus:
        (work_folder / "corpus" / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    escaped = ("".join(f"\\x{byte:02x}" for byte in token.encode()) for token in tokens)
    (work_folder / "dictionary").write_text("".join(f'"{token}"\n' for token in escaped))

    def run_input(data: bytes) -> None:
        try:
            target.run(data, work_folder / "files")
        except Exception as error:  # every exception that was not allowed is a finding
            _save_finding(findings, name, data, error)

    dictionary = [f"-dict={work_folder / 'dictionary'}"] if tokens else []
    atheris.Setup([sys.argv[0], *dictionary, *options, str(work_folder / "corpus")], run_input)
    atheris.Fuzz()


def _save_finding(findings: Path, name: str, data: bytes, error: Exception) -> None:
    """Write a finding, only the first one for each line of code that raises."""
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if "quarterview" in frame.filename] or frames
    location = f"{type(error).__name__} {own_frames[-1].filename} {own_frames[-1].lineno}"
    path = findings / f"{name}-{type(error).__name__}-{hashlib.sha256(location.encode()).hexdigest()[:8]}"
    if path.exists():
        path.touch()
    else:
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error, limit=-12))
        path.with_name(path.name + ".txt").write_text(text[:20_000], "utf-8", errors="replace")


def fuzz_in_processes(name: str, seconds: int, runs: int, seed: int, findings: Path) -> dict[str, object]:
    """Fuzz a target in child processes, one after the other.

    Returns:
        The number of executions, seconds, executions per second, and the names of the findings.
    """
    findings.mkdir(parents=True, exist_ok=True)
    start_time, start, executions, num_processes, peak = time.time(), time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory(dir=_get_ram_folder()) as folder:
        for part in ("corpus", "files"):
            (Path(folder) / part).mkdir()
        while (left := seconds - (time.monotonic() - start)) > 1 and (not runs or executions < runs):
            options = {
                "max_total_time": int(min(left, MAX_SECONDS_PER_PROCESS)),
                "runs": runs - executions if runs else -1,
                "seed": seed + num_processes + 1,
                "timeout": MAX_SECONDS_PER_INPUT,
                "rss_limit_mb": MAX_MEMORY_MIB,
                "max_len": 20_000,
                "len_control": 0,
                "print_final_stats": 1,
                "artifact_prefix": f"{findings}/{name}-",
            }
            command = [sys.executable, __file__, name, "--findings", str(findings), "--child", folder]
            command += [f"-{option}={value}" for option, value in options.items()]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            counted = re.search(r"stat::number_of_executed_units: (\d+)", result.stderr)
            if counted is None:
                raise RuntimeError(f"libFuzzer failed:\n{result.stderr[-3000:]}")
            executions += int(counted[1])
            num_processes += 1
            peak = max([peak, *map(int, re.findall(r"stat::peak_rss_mb: +(\d+)", result.stderr))])
            if result.returncode:
                (findings / f"{name}-process-{num_processes}.txt").write_text(
                    result.stderr[-20_000:], "utf-8"
                )
    elapsed = time.monotonic() - start
    new = {path.name for path in findings.iterdir() if path.stat().st_mtime >= start_time}
    new_findings = sorted(name for name in new if not name.endswith(".txt") and "-slow-unit-" not in name)
    return {
        "target": name,
        "seed": seed,
        "seconds": round(elapsed),
        "executions": executions,
        "per_second": round(executions / elapsed, 1),
        "peak_mib": peak,
        "processes": num_processes,
        "findings": new_findings,
    }


def _get_ram_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(
    target: tyro.conf.Positional[str],
    seconds: int = 600,
    runs: int = 0,
    seed: int = 0,
    findings: Path = Path("findings"),
    reproduce: Path | None = None,
) -> int:
    """Fuzz a target, or run it on one input.

    Args:
        target: images, tar, weights or configuration.
        seconds: time limit.
        runs: stop after this number of inputs; 0 for no limit.
        seed: seed of the mutations.
        findings: folder for the findings.
        reproduce: file of a finding. Only this input is read, and the exception is shown.
    """
    if target not in TARGETS:
        sys.exit(f"Unknown target {target!r}. Give one of: {', '.join(TARGETS)}.")
    if reproduce is not None:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[target].run(reproduce.read_bytes(), Path(folder))
        print("The input was accepted, or refused with an error of this package.")
        return 0
    result = fuzz_in_processes(target, seconds, runs, seed, findings)
    print(json.dumps(result, indent=1))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        _, name, _, findings, _, work_folder, *options = sys.argv
        run_libfuzzer(TARGETS[name], name, Path(work_folder), Path(findings), options)
    sys.exit(tyro.cli(main))
