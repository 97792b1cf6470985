"""How many training crops of 224 pixels does one core make, from files and from packed stores?

Random resized crop (scale 0.2 to 1) and flip of photographs to uint8 tensors [3, 224, 224], one thread,
taking turns in one process:

- pillow: Pillow and torchvision's RandomResizedCrop, as its documentation shows it;
- torchvision: torchvision.io.decode_jpeg and transforms v2 on tensors;
- files, packed jpeg, packed raw: this package's loader, from the folder and from stores packed of it,
  with everything that its workers do: order, reading, draws, decoding, cropping, making a batch;
- raw, first epoch: the same by a process that has not read the images before, and so compares checksums.

    uv run python benchmarks/input_speed.py --photos photos --out docs/results/input_speed.json
"""

import io
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from quarterview.data.config import View
from quarterview.data.loader import _collate, _StreamedSamples
from quarterview.data.pack import pack
from quarterview.data.pack_config import PackConfig
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.training.record import provenance

SIZE, SCALE = 224, (0.2, 1.0)


def by_pillow(paths: list[Path]) -> Callable[[], None]:
    """The documented pipeline on Pillow's images."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )

    def once() -> None:
        torch.stack([transform(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) for path in paths])

    return once


def by_torchvision(paths: list[Path]) -> Callable[[], None]:
    """The same on tensors."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )

    def decoded(path: Path) -> torch.Tensor:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return decode_jpeg(data, ImageReadMode.RGB)

    def once() -> None:
        torch.stack([transform(decoded(path)) for path in paths])

    return once


def by_us(data: str, first: bool = False) -> Callable[[], None]:
    """The loader's own path, without the process around it; another epoch each time, or always the first."""
    source = open_source(data, 3)
    stream = SampleStream(len(source), 0, 0)
    samples = _StreamedSamples(source, stream, (SIZE, SIZE), None, (0.5,) * 3, (View(),))
    seen = 0

    def once() -> None:
        nonlocal seen
        samples.source = pickle.loads(pickle.dumps(source)) if first else source
        collated = _collate(samples.__getitems__(range(seen, seen + len(source))))
        assert not isinstance(collated, Exception)
        seen += len(source)

    return once


def main(photos: Path, rounds: int = 9, out: Path | None = None) -> None:
    """Measure.

    Args:
        photos: a folder of JPEG files.
        rounds: how often the contestants take turns, each with every photograph; medians are reported.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    paths = sorted(photos.glob("*.jpg"))
    if len(paths) != len(open_source(str(photos), 3)):
        raise SystemExit(f"{photos} holds other pictures than *.jpg; accepted: a flat folder of JPEG files")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for encoding in ("jpeg", "raw"):
            pack(PackConfig((str(photos),), f"{folder}/{encoding}", encoding=encoding, workers=0))
            files = Path(folder, encoding).iterdir()
            sizes[encoding] = sum(file.stat().st_size for file in files) / len(paths)
        contestants = {
            "pillow": by_pillow(paths),
            "torchvision": by_torchvision(paths),
            "files": by_us(str(photos)),
            "packed jpeg": by_us(f"{folder}/jpeg"),
            "packed raw": by_us(f"{folder}/raw"),
            "raw, first epoch": by_us(f"{folder}/raw", first=True),
        }
        rates = take_turns(contestants, len(paths), rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:16} {rate:6.0f} images/s   {rate / medians['pillow']:.2f} times pillow")
    for encoding, size in sizes.items():
        print(f"packed {encoding}: {size / 1024:.0f} KiB an image")
    if out is not None:
        record = {
            **provenance(sys.argv),
            "decoders": {name: version(name) for name in ("torchvision", "pillow", "simplejpeg", "numpy")},
            "photos": len(paths),
            "images_per_s": rates,
            "medians": medians,
            "bytes_per_image": sizes,
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def take_turns(contestants: dict[str, Callable[[], Any]], images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each, round by round, after one round to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, once in contestants.items():
            began = time.perf_counter()
            once()
            if turn:
                rates[name].append(images / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    tyro.cli(main)
