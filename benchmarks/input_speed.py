"""Measure how many training crops of 224 pixels per second one core reads from files and packed stores.

Each pipeline applies random resized crop (scale 0.2 to 1) and horizontal flip to photographs, and returns
uint8 tensors [3, 224, 224]. All pipelines run in one thread of one process, in turns:

- pillow: Pillow and torchvision's RandomResizedCrop, as in the documentation of torchvision;
- torchvision: torchvision.io.decode_jpeg and transforms v2 on tensors;
- files, packed jpeg, packed raw: this package's loader, from the folder and from packed stores of it, with
  all the work of a loader worker: order, reading, random draws, decoding, cropping, collating;
- raw, first epoch: packed raw in a process that has not read the images before, and verifies checksums.

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
from quarterview.data.loader import _collate, _StreamDataset
from quarterview.data.pack import pack
from quarterview.data.pack_config import PackConfig
from quarterview.data.sampler import SampleStream
from quarterview.data.sources.open import open_source
from quarterview.training.record import collect_provenance

SIZE, SCALE = 224, (0.2, 1.0)


def create_pillow_pipeline(paths: list[Path]) -> Callable[[], None]:
    """Create the pipeline of torchvision's documentation, on Pillow images."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )

    def read_all() -> None:
        torch.stack([transform(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")) for path in paths])

    return read_all


def create_torchvision_pipeline(paths: list[Path]) -> Callable[[], None]:
    """Create the pipeline of torchvision's transforms v2, on tensors."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )

    def decode(path: Path) -> torch.Tensor:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return decode_jpeg(data, ImageReadMode.RGB)

    def read_all() -> None:
        torch.stack([transform(decode(path)) for path in paths])

    return read_all


def create_loader_pipeline(data: str, is_first_epoch: bool = False) -> Callable[[], None]:
    """Create the pipeline of a loader worker, without its process.

    Each call reads the next epoch, or the first one in a new process if `is_first_epoch`.
    """
    source = open_source(data, 3)
    stream = SampleStream(len(source), 0, 0)
    samples = _StreamDataset(source, stream, (SIZE, SIZE), None, (0.5,) * 3, (View(),))
    num_read = 0

    def read_all() -> None:
        nonlocal num_read
        samples.source = pickle.loads(pickle.dumps(source)) if is_first_epoch else source
        collated = _collate(samples.__getitems__(range(num_read, num_read + len(source))))
        assert not isinstance(collated, Exception)
        num_read += len(source)

    return read_all


def main(photos: Path, rounds: int = 9, out: Path | None = None) -> None:
    """Measure all pipelines, and print the median rates.

    Args:
        photos: a folder of JPEG files.
        rounds: number of measurements per pipeline, in turns, each with every photograph.
        out: JSON file to write.
    """
    torch.set_num_threads(1)
    paths = sorted(photos.glob("*.jpg"))
    if len(paths) != len(open_source(str(photos), 3)):
        raise SystemExit(f"{photos} contains images that are not *.jpg. Give a flat folder of JPEG files.")
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for encoding in ("jpeg", "raw"):
            pack(PackConfig((str(photos),), f"{folder}/{encoding}", encoding=encoding, workers=0))
            files = Path(folder, encoding).iterdir()
            sizes[encoding] = sum(file.stat().st_size for file in files) / len(paths)
        pipelines = {
            "pillow": create_pillow_pipeline(paths),
            "torchvision": create_torchvision_pipeline(paths),
            "files": create_loader_pipeline(str(photos)),
            "packed jpeg": create_loader_pipeline(f"{folder}/jpeg"),
            "packed raw": create_loader_pipeline(f"{folder}/raw"),
            "raw, first epoch": create_loader_pipeline(f"{folder}/raw", is_first_epoch=True),
        }
        rates = measure_rates(pipelines, len(paths), rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:16} {rate:6.0f} images/s   {rate / medians['pillow']:.2f} times pillow")
    for encoding, size in sizes.items():
        print(f"packed {encoding}: {size / 1024:.0f} KiB per image")
    if out is not None:
        record = {
            **collect_provenance(sys.argv),
            "decoders": {name: version(name) for name in ("torchvision", "pillow", "simplejpeg", "numpy")},
            "photos": len(paths),
            "images_per_s": rates,
            "medians": medians,
            "bytes_per_image": sizes,
        }
        out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def measure_rates(
    pipelines: dict[str, Callable[[], Any]], num_images: int, rounds: int
) -> dict[str, list[float]]:
    """Return the images per second of each pipeline in each round, after one warm-up round."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        for name, read_all in pipelines.items():
            start = time.perf_counter()
            read_all()
            if turn:
                rates[name].append(num_images / (time.perf_counter() - start))
    return rates


if __name__ == "__main__":
    tyro.cli(main)
