"""Does anything that comes from outside crash the program, hang it or fill the memory?

Each door, where bytes of others come in, is given mutations of sound files, guided by the coverage of
Python code (atheris, libFuzzer). It may take them, or refuse them with an error of ours. All else is a
finding: another exception, the death of the process, an input that takes longer than `SECONDS_AN_INPUT`,
or memory beyond `MEBIBYTES`. Findings are kept in a folder, each with its traceback.

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
from pathlib import Path

import tyro

SECONDS_AN_INPUT = 20
SECONDS_A_PROCESS = 200
"""Then another goes on: the fuzzer's own memory grows with what it has seen."""
MEBIBYTES = 1536
"""Of the whole process, in which torch alone takes about 400."""
PIXELS = 4_000_000
"""What the decoders accept here: with the 128 megapixels of real runs, inputs that are refused only late
would take most of the time, and an allocation of any size could hide among those that are allowed."""
INSTRUMENTED = ["quarterview", "PIL", "yaml"]


@dataclass(frozen=True)
class Door:
    """A place where bytes of others come in."""

    enter: Callable[[bytes, Path], None]
    """Give it bytes, with a folder to put files in. Raises whatever the program does."""
    corpus: Callable[[], Iterator[bytes]]
    """Sound inputs to begin with."""
    words: Callable[[], list[str]]
    """What inputs are made of, where that is text."""


# ---------------------------------------------------------------------- images


def enter_images(data: bytes, _folder: Path) -> None:
    """The decoders: the whole picture, and a crop of it."""
    from quarterview.data import decode

    decode.MAX_PIXELS = PIXELS
    data = _sealed(data) if len(data) % 2 else data
    for make in (lambda: decode.decode(data, 3), lambda: _crop(decode.croppable_file(data, 3))):
        try:
            pixels = make().pixels
        except ALLOWED():
            continue
        assert pixels.ndim == 3, pixels.shape
        assert pixels.shape[0] == 3, pixels.shape
        low, high = float(pixels.min()), float(pixels.max())
        assert -1 < low <= high < (2 if pixels.is_floating_point() else 256), (low, high)  # crops overshoot


def _crop(image):  # a Croppable: nothing of ours is imported before it is instrumented
    height, width = image.size
    return image.crop((height // 3, width // 3, max(1, height // 2), max(1, width // 2)), (8, 8))


def _sealed(data: bytes) -> bytes:
    """A PNG file with the checksums that its chunks should have, behind which nothing would be read else."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    sealed, place = [data[:8]], 8
    while place + 12 <= len(data):
        body_end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        chunk = data[place + 4 : body_end]
        sealed += [data[place : place + 4], chunk, struct.pack(">I", zlib.crc32(chunk))]
        place = body_end + 4
    return b"".join(sealed)


def image_corpus() -> Iterator[bytes]:
    """A file of every format, depth and kind of colour that is read."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    colour = Image.fromarray(noise[..., :3])
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        *((colour, form, {}) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")),
        *(
            (colour, "TIFF", {"compression": kind})
            for kind in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        *((deep, form, {}) for form in ("PNG", "TIFF", "PPM")),
        *((Image.fromarray(noise), form, {}) for form in ("PNG", "WEBP", "TIFF")),
        (colour, "JPEG", {"progressive": True, "exif": exif}),
        (colour.convert("L"), "JPEG", {}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour.quantize(8), "PNG", {"transparency": 0}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "PNG", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "WEBP", {"lossless": True, "exif": exif}),
        (Image.fromarray(noise[..., 0].astype(np.float32) / 255), "TIFF", {}),
    ]
    for image, form, options in kinds:
        file = io.BytesIO()
        image.save(file, form, **options)
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

KINDS = (
    *("state.json", "model.safetensors", "weights.pth", "data.pkl", "config.json", "weights.index.json"),
    "SHA256SUMS",
)
"""What the first byte of an input makes of the rest: one file among sound ones."""


def enter_weights(data: bytes, folder: Path) -> None:
    """The reader of checkpoints, and that of weights from elsewhere."""
    from quarterview.training import checkpoint
    from quarterview.weights import loading as weights

    kind, data = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    try:
        if kind in SOUND():
            step = folder / "run" / "checkpoints" / "step-00000001"
            _put(step, {**SOUND(), kind: data})
            if kind == "SHA256SUMS":
                checkpoint.check(step)
            loaded = checkpoint.load(step)
            assert isinstance(loaded.state, dict), "a state that is no table"
            weights.open_model(weights.read(folder / "run"))
        elif kind == "weights.pth":
            _put(folder, {kind: data})
            weights.read(folder / kind)
        elif kind == "data.pkl":
            _put(folder, {"weights.pth": _zipped(data)})
            weights.read(folder / "weights.pth")
        else:
            name = "model.safetensors.index.json" if "index" in kind else kind
            sound = {"config.json": b'{"a": 1}', "model-1.safetensors": FOREIGN()}
            _put(
                folder / name,
                {**sound, **({} if "index" in kind else {"model.safetensors": FOREIGN()}), name: data},
            )
            weights.read(folder / name)
    except ALLOWED():
        return


def _put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _zipped(pickled: bytes) -> bytes:
    """What `torch.save` writes, with another pickle in it and one storage of 4096 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", bytes(4096))
        archive.writestr("x/version", "3\n")
    return file.getvalue()


_made: dict[str, dict[str, bytes] | bytes] = {}


def SOUND() -> dict[str, bytes]:  # noqa: N802
    """The files of a checkpoint of a very small model."""
    if "sound" not in _made:
        from quarterview.models.create import create_model
        from quarterview.training import checkpoint
        from quarterview.weights.loading import metadata

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
            path = checkpoint.save(Path(folder), 1, tensors, state, metadata(model.config))
            _made["sound"] = {file.name: file.read_bytes() for file in path.iterdir()}
    return _made["sound"]


def FOREIGN() -> bytes:  # noqa: N802
    """The same weights as of timm."""
    if "foreign" not in _made:
        from safetensors.torch import load, save

        _made["foreign"] = save(
            {k: v for k, v in load(SOUND()["model.safetensors"]).items() if "decoder" not in k}
        )
    return _made["foreign"]


def weights_corpus() -> Iterator[bytes]:
    """An input of every kind."""
    import torch
    from safetensors.torch import load

    tensors = load(FOREIGN())
    for name, data in SOUND().items():
        yield bytes([KINDS.index(name)]) + data
    yield bytes([1]) + FOREIGN()
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


def enter_tar(data: bytes, _folder: Path) -> None:
    """The index of a tar shard: whatever it says lies in the file, each image once."""
    from quarterview.data.sources.tar_headers import BLOCK
    from quarterview.data.sources.tar_index import scan

    sealed, data = data[:1] < b"\x80", data[1:]
    data = _sealed_tar(data) if sealed else data
    asked = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal asked
        assert offset >= 0, offset
        assert length <= 4 << 20, f"{length} bytes at once"
        part = data[offset : offset + length]
        asked += BLOCK + len(part)
        return part

    found = scan(read, len(data))
    ends = found.samples["block"].astype("i8") * BLOCK + found.samples["bytes"]
    assert (ends <= len(data)).all(), "an image behind the end"
    assert len(set(found.samples["block"].tolist())) == len(found.samples) == len(found.labels)
    assert (found.labels >= -1).all()
    assert len(found.named) == len(found.name_ends)
    assert [*found.name_ends[-1:].tolist()] in ([], [len(found.names)])
    assert asked <= 20 * (len(data) + BLOCK), f"{asked} bytes read of {len(data)}"


def _sealed_tar(data: bytes) -> bytes:
    """With the checksum that each block should have that says it is a header."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    for place, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == 512:
            blank = block[:148] + b" " * 8 + block[156:]
            blocks[place] = block[:148] + b"%06o\0 " % sum(blank) + block[156:]
    return b"".join(blocks)


def tar_corpus() -> Iterator[bytes]:
    """Shards of each dialect, with all that may be in one."""
    import tarfile

    members = [("a.jpg", b"x" * 700), ("a.cls", b"3"), ("a.json", b"{}"), ("b.seg.png", b"y" * 20)]
    members += [
        ("d/c.webp", b"z" * 600),
        ("n" * 120 + "/é.jpg", b"w" * 9),
        ("../e.jpg", b"v"),
        ("f.pyd", b"u"),
    ]
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=dialect, pax_headers={"comment": "c"}) as archive:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                if dialect == tarfile.PAX_FORMAT:
                    member.pax_headers = {"size": str(len(content)), "path": name}
                archive.addfile(member, io.BytesIO(content))
            for kind in (
                tarfile.SYMTYPE,
                tarfile.LNKTYPE,
                tarfile.FIFOTYPE,
                tarfile.DIRTYPE,
                tarfile.CHRTYPE,
            ):
                member = tarfile.TarInfo(f"k{kind.decode()}.jpg")
                member.type, member.linkname = kind, "a.jpg"
                archive.addfile(member)
        yield b"\0" + file.getvalue()[:-8192]


def tar_words() -> list[str]:
    """What sizes and extended headers are made of."""
    return ["11 size=1\n", "30 GNU.sparse.realsize=9", " path=", "77777777777", "ustar  ", ".jpg", ".cls"]


# ---------------------------------------------------------------------- configurations


def enter_configuration(data: bytes, folder: Path) -> None:
    """The reader of recipes, and the checks of the configurations."""
    import yaml

    from quarterview import recipes

    path = folder / "recipe.yaml"
    path.write_bytes(data[1:])
    try:
        config = (recipes.read if data[:1] < b"\x80" else recipes.read_finetune)(str(path))
        config.loop.total_steps(1_000_000)
    except ALLOWED():
        return
    yaml.safe_dump(config.to_plain())  # as `config.yaml` is written


def configuration_corpus() -> Iterator[bytes]:
    """Every recipe, with the few flags that differ from the defaults, and with all, nested."""
    import yaml

    from quarterview import recipes

    for first, table, read in (
        (b"\0", recipes.RECIPES, recipes.read),
        (b"\xff", recipes.FINETUNE_RECIPES, recipes.read_finetune),
    ):
        for name, recipe in table.items():
            yield first + yaml.safe_dump(recipes.differences(recipe())).encode()
            yield first + yaml.safe_dump(read(name).to_plain()).encode()
    yield b"\0a: &a [x, x]\nb: &b [*a, *a]\ndata: [*b, *b]\n"
    yield b"\0seed: 0x1F\nlr: 1_0.5e+3\ndata: !!python/tuple [a]\nout: 2001-12-14t21:59:43.10-05:00\n"


def configuration_words() -> list[str]:
    """The names of all fields, and what YAML has signs for."""
    from quarterview.commands.config import FinetuneConfig, PretrainConfig
    from quarterview.config import field_specs

    names = set()
    for composed in (PretrainConfig(), FinetuneConfig()):
        methods = [kind for kinds in composed.choices().values() for kind in kinds.values()]
        parts = [type(part) for part in composed.parts().values()]
        names |= {name for kind in (*parts, *methods) for name in field_specs(kind)} | set(composed.parts())
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


# ---------------------------------------------------------------------- the doors

DOORS = {
    "images": Door(enter_images, image_corpus, list),
    "tar": Door(enter_tar, tar_corpus, tar_words),
    "weights": Door(enter_weights, weights_corpus, list),
    "configuration": Door(enter_configuration, configuration_corpus, configuration_words),
}
"""A door more is a row more."""


def ALLOWED() -> tuple[type[Exception], ...]:  # noqa: N802
    """How an input may be refused."""
    from quarterview.data.sources.base import BadSampleError
    from quarterview.errors import RunError, UserError

    return BadSampleError, UserError, RunError


def fuzz(door: Door, name: str, work: Path, findings: Path, options: list[str]) -> None:
    """Give a door inputs until libFuzzer has enough: the work of one process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        corpus, words = list(door.corpus()), door.words()
        for data in corpus:  # so that all that is imported late is here, and instrumented
            door.enter(data, work / "files")
    for data in corpus:
        (work / "corpus" / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    escaped = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in words)
    (work / "words").write_text("".join(f'"{word}"\n' for word in escaped))

    def once(data: bytes) -> None:
        try:
            door.enter(data, work / "files")
        except Exception as error:  # whatever it is, it is a finding, and the search goes on
            _keep(findings, name, data, error)

    dictionary = [f"-dict={work / 'words'}"] if words else []
    atheris.Setup([sys.argv[0], *dictionary, *options, str(work / "corpus")], once)
    atheris.Fuzz()


def _keep(findings: Path, name: str, data: bytes, error: Exception) -> None:
    """Once for every place that raises."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "quarterview" in frame.filename] or frames
    place = f"{type(error).__name__} {ours[-1].filename} {ours[-1].lineno}"
    path = findings / f"{name}-{type(error).__name__}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    if path.exists():
        path.touch()
    else:
        path.write_bytes(data)
        text = "".join(traceback.format_exception(error, limit=-12))
        path.with_name(path.name + ".txt").write_text(text[:20_000], "utf-8", errors="replace")


def search(name: str, seconds: int, runs: int, seed: int, findings: Path) -> dict[str, object]:
    """Fuzz a door in processes of their own, one after the other.

    Returns:
        Executions, seconds, executions a second, and the names of the findings.
    """
    findings.mkdir(parents=True, exist_ok=True)
    since, began, executions, attempt, peak = time.time(), time.monotonic(), 0, 0, 0
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        for part in ("corpus", "files"):
            (Path(folder) / part).mkdir()
        while (left := seconds - (time.monotonic() - began)) > 1 and (not runs or executions < runs):
            options = {
                "max_total_time": int(min(left, SECONDS_A_PROCESS)),
                "runs": runs - executions if runs else -1,
                "seed": seed + attempt + 1,
                "timeout": SECONDS_AN_INPUT,
                "rss_limit_mb": MEBIBYTES,
                "max_len": 20_000,
                "len_control": 0,
                "print_final_stats": 1,
                "artifact_prefix": f"{findings}/{name}-",
            }
            command = [sys.executable, __file__, name, "--findings", str(findings), "--child", folder]
            command += [f"-{option}={value}" for option, value in options.items()]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            counted = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
            if counted is None:
                raise RuntimeError(f"the fuzzer could not work:\n{done.stderr[-3000:]}")
            executions += int(counted[1])
            attempt += 1
            peak = max([peak, *map(int, re.findall(r"stat::peak_rss_mb: +(\d+)", done.stderr))])
            if done.returncode:
                (findings / f"{name}-process-{attempt}.txt").write_text(done.stderr[-20_000:], "utf-8")
    took = time.monotonic() - began
    new = {path.name for path in findings.iterdir() if path.stat().st_mtime >= since}
    found = sorted(name for name in new if not name.endswith(".txt") and "-slow-unit-" not in name)
    return {
        "door": name,
        "seed": seed,
        "seconds": round(took),
        "executions": executions,
        "per_second": round(executions / took, 1),
        "peak_mib": peak,
        "processes": attempt,
        "findings": found,
    }


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(
    door: tyro.conf.Positional[str],
    seconds: int = 600,
    runs: int = 0,
    seed: int = 0,
    findings: Path = Path("findings"),
    reproduce: Path | None = None,
) -> int:
    """Fuzz a door, or give it one input.

    Args:
        door: images, tar, weights or configuration.
        seconds: how long.
        runs: stop after so many inputs; 0 for no such limit.
        seed: of the mutations.
        findings: the folder for what is found.
        reproduce: a finding, to see what comes of it.
    """
    if door not in DOORS:
        sys.exit(f"no door {door!r}; accepted: {', '.join(DOORS)}")
    if reproduce is not None:
        with tempfile.TemporaryDirectory() as folder:
            DOORS[door].enter(reproduce.read_bytes(), Path(folder))
        print("taken, or refused with an error of ours")
        return 0
    result = search(door, seconds, runs, seed, findings)
    print(json.dumps(result, indent=1))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    if "--child" in sys.argv:
        _, name, _, findings, _, work, *options = sys.argv
        fuzz(DOORS[name], name, Path(work), Path(findings), options)
    sys.exit(tyro.cli(main))
