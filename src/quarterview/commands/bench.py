"""``quarterview bench``: measure the speed of pre-training, and estimate the time of a run."""

import json
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch

from quarterview.benchmark.rate import (
    list_matrix_products,
    measure_flops_per_s,
    median,
    time_once,
    time_repeatedly,
)
from quarterview.commands.config import BenchConfig, PretrainConfig, RecipeOptions
from quarterview.commands.dry_run import ADAMW_BYTES_PER_PARAMETER, estimate_memory, get_masks_per_image
from quarterview.data.cache import MAX_CACHE_BYTES, CachedDataset, load_cached_dataset
from quarterview.data.loader import Batch, Loader
from quarterview.data.sampler import compute_default_holdout
from quarterview.data.shuffle import create_shard_cache, create_stream
from quarterview.data.sources.open import open_sources
from quarterview.files import write_text_atomic
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.create import create_mae
from quarterview.models.flops import count_flops
from quarterview.models.vit import enable_grad_checkpointing
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.console import Console, format_duration
from quarterview.training.distributed import World, choose_device
from quarterview.training.optim import create_adamw
from quarterview.training.record import collect_provenance
from quarterview.training.step import TrainStep
from quarterview.training.trainer import get_autocast_context, get_supported_precision

_WARMUP_BATCHES = 4  # batches
IMAGENET_SIZE = 1_281_167
"""Number of training images of ImageNet-1K, for the estimated hours if no --data is given."""


def main(config: BenchConfig, argv: Sequence[str], _options: RecipeOptions) -> int:
    """Run ``quarterview bench`` and return the exit code."""
    bench(config, Console(), argv)
    return 0


@dataclass(frozen=True)
class BenchResult:
    """The result of a benchmark. The field names are the keys of the JSON file."""

    device: str
    precision: str
    batch: int
    """Batch size."""
    step_s: float
    """Median seconds of an update with images already on the device."""
    forward_s: float
    backward_s: float
    optimizer_s: float
    """Median seconds of the three parts of an update, each timed with a synchronization of the device."""
    data_s: float | None
    """Seconds to read, decode and augment a batch with nothing else running; None without --data."""
    flops_per_image: int
    """Operations of forward and backward pass for an image with all its masks, by closed form."""
    products: dict[str, float]
    """Operations per second of matrix products on this machine in this precision, by their shape."""
    peak_memory: int
    """Bytes of the CUDA allocator, or of this process on a CPU."""
    largest_batch: int
    """Estimated maximum number of images that fit into memory at a time."""
    hours: float
    """Estimated hours of a whole run."""
    images: int
    """Number of training images for the estimated hours."""

    @property
    def images_per_s(self) -> float:
        """Images per second of updates, without reading images."""
        return self.batch / self.step_s

    @property
    def flops_per_s(self) -> float:
        """Operations per second of an update."""
        return self.flops_per_image * self.images_per_s

    @property
    def utilisation(self) -> float:
        """Ratio of the update's operations per second to those of the fastest matrix product."""
        return self.flops_per_s / max(self.products.values())


def bench(config: BenchConfig, console: Console, argv: Sequence[str] = ()) -> BenchResult:
    """Time the updates of pre-training, print the result, and write it to --json.

    Args:
        config: the configuration.
        console: prints the result.
        argv: the command line, for the record.

    Raises:
        UserError: if the device is not available or the images cannot be read.
    """
    keep_freed_memory()
    device = choose_device(config.compute.device)
    precision = get_supported_precision(config.compute.precision, device)
    pretraining, seconds, loop = config.pretraining(), config.options.seconds, config.loop
    model, masks = pretraining.autoencoder(), get_masks_per_image(pretraining)
    console.info(f"Timing {model.model} on {device} in {precision} for about {2 * seconds:.0f} s.")
    loader = create_loader(pretraining, device)
    batch = _create_batch(pretraining, device, loader)
    step = _create_step(pretraining, device, precision)
    whole, parts = _time_update(step, batch, device, seconds)
    peak = _get_peak_memory(device)
    rates = measure_flops_per_s(
        list_matrix_products(model, masks * loop.batch_size // loop.accum_iter),
        _get_dtype(precision),
        device,
    )
    data_s = time_reading(loader, pretraining, seconds) if loader is not None else None
    images = config.options.images or (loader.stream.num_train if loader is not None else IMAGENET_SIZE)
    # Reading images overlaps with a GPU's computation, but competes with a CPU's.
    total_s = whole if data_s is None else max(whole, data_s) if device.type == "cuda" else whole + data_s
    result = BenchResult(
        device=_get_device_name(device),
        precision=precision,
        batch=loop.batch_size,
        step_s=whole,
        forward_s=parts[0],
        backward_s=parts[1],
        optimizer_s=parts[2],
        data_s=data_s,
        flops_per_image=masks * count_flops(model).step,
        products={"×".join(map(str, product)): rate for product, rate in rates.items()},
        peak_memory=peak,
        largest_batch=_estimate_max_batch_size(pretraining, precision, device),
        hours=loop.total_steps(images) * total_s / 3600,
        images=images,
    )
    _print_result(config, result, console)
    if config.options.json is not None:
        record = {"figures": _to_dict(result), **collect_provenance(argv)}
        write_text_atomic(Path(config.options.json), json.dumps(record, indent=1) + "\n")
    return result


# ---------------------------------------------------------------------- timing


def create_loader(config: PretrainConfig, device: torch.device) -> Loader | None:
    """Create the loader of a run, with images cached on the device if the run would do so; None without
    --data."""
    if not config.data.data:
        return None
    source = open_sources(config.data.data, config.model.in_chans, create_shard_cache(config.data))
    holdout = compute_default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    stream = create_stream(config.data, source, holdout, config.loop.seed)
    limit = MAX_CACHE_BYTES if config.loader.cache == "auto" else sys.maxsize
    cached = "--cache none" if config.loader.cache == "none" else load_cached_dataset(
        source, device, limit, config.loader.num_workers, _ignore_report
    )  # fmt: skip
    cached_set = cached if isinstance(cached, CachedDataset) else None
    gray = (0.5,) * config.model.in_chans
    size, threads = config.model.image_size, config.loader.num_workers
    return Loader(source, stream, size, gray, gray, device, threads, cached_set, _ignore_report)


def _ignore_report(_report: object) -> None:
    """Ignore a broken image, which the run itself will report."""


def _create_batch(config: PretrainConfig, device: torch.device, loader: Loader | None) -> Batch:
    """Return a batch of the user's images, or of noise, which takes the same time."""
    size = config.loop.batch_size
    if loader is not None:
        return next(loader.iter_batches(iter([range(size)])))
    images = torch.randn(size, config.model.in_chans, *config.model.image_size, device=device)
    ids = torch.arange(size, device=device)
    return Batch(images, ids, torch.zeros_like(ids))


def _create_step(config: PretrainConfig, device: torch.device, precision: str) -> TrainStep:
    model = create_mae(config.autoencoder(), config.loop.seed).to(device)
    if config.compute.grad_checkpointing:
        enable_grad_checkpointing(model)
    if config.compute.compile:
        model.compile()
    method = MaskedAutoencoding(model, config.loop.seed, get_masks_per_image(config))
    return TrainStep(
        method,
        create_adamw(method, config.optim.weight_decay),
        World(device),
        get_autocast_context(precision, device),
        config.loop.accum_iter,
        config.optim.clip_grad,
    )


def _time_update(
    step: TrainStep, batch: Batch, device: torch.device, seconds: float
) -> tuple[float, tuple[float, float, float]]:
    """Return the median seconds of an update, and of its forward, backward and optimizer parts."""

    def update() -> None:
        step.update_weights(step.accumulate_gradients(batch)[0])

    for _ in range(3):  # warm-up: kernels are selected and compiled, and memory is allocated
        time_once(update, device)
    whole = median(time_repeatedly(update, device, seconds / 2))
    rounds: list[tuple[float, float, float]] = []
    while sum(map(sum, rounds)) < seconds / 2 or len(rounds) < 3:
        rounds.append(_time_parts(step, batch, device))
    forward, backward, optimizer = (median(times) for times in zip(*rounds, strict=True))
    return whole, (forward, backward, optimizer)


def _time_parts(step: TrainStep, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    forward = backward = 0.0
    losses: list[torch.Tensor] = []
    for part in batch.chunk(step.accum_iter):
        forward += time_once(lambda part=part: losses.append(step.forward(part).loss), device)
        backward += time_once((losses[-1] / step.accum_iter).backward, device)
    return forward, backward, time_once(lambda: step.update_weights(losses[-1].detach()), device)


def time_reading(loader: Loader, config: PretrainConfig, seconds: float) -> float:
    """Return the seconds to read a batch with nothing else running, after the batches that workers
    prefetched."""
    size = config.loop.batch_size
    times: list[float] = []
    with closing(loader.iter_batches(range(i * size, (i + 1) * size) for i in count())) as batches:
        for _ in range(_WARMUP_BATCHES):
            time_once(lambda: next(batches), loader.device)
        while sum(times) < seconds or len(times) < 2 * _WARMUP_BATCHES:
            times.append(time_once(lambda: next(batches), loader.device))
    return sum(times) / len(times)  # not the median, because workers deliver in bursts


# ---------------------------------------------------------------------- memory


def _get_peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _estimate_max_batch_size(config: PretrainConfig, precision: str, device: torch.device) -> int:
    """Estimate the number of images that fit into memory with weights, gradients and optimizer state."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (trained, frozen, one), (_, _, two) = (
        estimate_memory(config.with_flags(batch_size=size, accum_iter=1), precision) for size in (1, 2)
    )
    per_image = two - one  # other saved tensors, such as weights in bf16, do not depend on the batch
    available = 0.9 * memory - trained * ADAMW_BYTES_PER_PARAMETER - frozen * 4 - (one - per_image)
    return max(0, int(available / per_image))


# ---------------------------------------------------------------------- output


def _print_result(config: BenchConfig, result: BenchResult, console: Console) -> None:
    fastest = max(result.products, key=lambda name: result.products[name])
    rows = [
        ("images/s", f"{result.images_per_s:,.1f} with batch size {result.batch}, without reading images"),
        ("step", f"{_format_ms(result.step_s)}: forward {_format_ms(result.forward_s)}, "
                 f"backward {_format_ms(result.backward_s)}, optimizer {_format_ms(result.optimizer_s)}"),
        ("data", _format_data_time(result)),
        ("operations", f"{result.flops_per_image / 1e9:,.2f} GFLOP per image, forward and backward; "
                       f"{_format_rate(result.flops_per_s)}"),
        ("matrix products", f"{_format_rate(result.products[fastest])}, fastest of {len(result.products)} "
                      f"({fastest}); the step reaches {result.utilisation:.0%} of it"),
        ("memory", f"{result.peak_memory / 2**30:.2f} GiB at the peak; about {result.largest_batch:,} images "
                   "at a time would fit, estimated from the saved activations"),
        ("whole run", f"{format_duration(3600 * result.hours)} for "
                          f"{config.loop.total_steps(result.images):,} steps over {result.images:,} images"),
    ]  # fmt: skip
    console.key_values(f"{config.model.model} on {result.device}, {result.precision}", rows)


def _format_data_time(result: BenchResult) -> str:
    if result.data_s is None:
        return "not measured; give --data"
    return (
        f"{_format_ms(result.data_s)} per batch, {result.batch / result.data_s:,.1f} images/s, with nothing "
        "else running"
    )


def _format_ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _format_rate(value: float) -> str:
    return f"{value / 1e12:,.2f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.0f} GFLOP/s"


def _to_dict(result: BenchResult) -> dict[str, Any]:
    derived = ("images_per_s", "flops_per_s", "utilisation")
    stored = {field.name: getattr(result, field.name) for field in fields(BenchResult)}
    return {**stored, **{name: getattr(result, name) for name in derived}}


def _get_device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _get_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
