"""``quarterview bench``: how fast a pre-training would run here, where its time goes, and for how long."""

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

from quarterview.benchmark.rate import median, product_rates, products_of, repeat, timed
from quarterview.commands.config import BenchConfig, PretrainConfig, RecipeOptions
from quarterview.commands.dry_run import ADAM_BYTES, masks_per_image, measure
from quarterview.data.cache import CACHE_BYTES, CachedSet, load_all
from quarterview.data.loader import Batch, Loader
from quarterview.data.sampler import default_holdout
from quarterview.data.shuffle import shard_cache, stream_of
from quarterview.data.sources.open import open_sources
from quarterview.files import replace_text
from quarterview.methods.mae import MaskedAutoencoding
from quarterview.models.create import fresh_model
from quarterview.models.flops import flops
from quarterview.models.vit import recompute_blocks
from quarterview.training.allocator import keep_freed_memory
from quarterview.training.console import Console, duration
from quarterview.training.distributed import World, choose_device
from quarterview.training.optim import adamw
from quarterview.training.record import provenance
from quarterview.training.step import Step
from quarterview.training.trainer import precision_context, usable_precision

_UNCOUNTED = 4  # batches
IMAGENET = 1_281_167
"""Images of ImageNet-1K's training set, for which hours are told where no set is named."""


def main(config: BenchConfig, argv: Sequence[str], _options: RecipeOptions) -> int:
    """``quarterview bench``; returns the exit code."""
    bench(config, Console(), argv)
    return 0


@dataclass(frozen=True)
class Figures:
    """What was found."""

    device: str
    precision: str
    batch: int
    """Images of an update."""
    step_s: float
    """Seconds of an update on images that are at hand: the median."""
    forward_s: float
    backward_s: float
    optimizer_s: float
    """Its parts, timed one by one, each until the device is done; medians."""
    data_s: float | None
    """Seconds to read, decode and augment a batch, if there is --data, with nothing else running."""
    flops_per_image: int
    """Of forward and backward pass, by closed form; of all of an image's masks."""
    products: dict[str, float]
    """The machine's rate of matrix products in this precision, in operations a second."""
    peak_memory: int
    """Bytes: of the device's allocator, or of this process on a CPU."""
    largest_batch: int
    """Images that fit at a time, as far as activations and weights go."""
    hours: float
    """Of the whole schedule."""
    images: int
    """In the set that the hours are for."""

    @property
    def images_per_s(self) -> float:
        """Of updates alone, images at hand."""
        return self.batch / self.step_s

    @property
    def flops_per_s(self) -> float:
        """What the step achieves."""
        return self.flops_per_image * self.images_per_s

    @property
    def utilisation(self) -> float:
        """The share of the best rate of matrix products that the step achieves."""
        return self.flops_per_s / max(self.products.values())


def bench(config: BenchConfig, console: Console, argv: Sequence[str] = ()) -> Figures:
    """Time the updates of a pre-training, and say what a whole one takes.

    Raises:
        UserError: if the request cannot be met.
    """
    keep_freed_memory()
    device = choose_device(config.compute.device)
    precision = usable_precision(config.compute.precision, device)
    pretraining, seconds, loop = config.pretraining(), config.options.seconds, config.loop
    model, masks = pretraining.autoencoder(), masks_per_image(pretraining)
    console.say(f"timing {model.model} on {device} in {precision}, for about {2 * seconds:.0f} s")
    loader = loader_of(pretraining, device)
    batch = _batch(pretraining, device, loader)
    step = _step(pretraining, device, precision)
    whole, parts = _times(step, batch, device, seconds)
    peak = _peak_memory(device)
    rates = product_rates(
        products_of(model, masks * loop.batch_size // loop.accum_iter),
        _dtype(precision),
        device,
    )
    data_s = reading_time(loader, pretraining, seconds) if loader is not None else None
    images = config.options.images or (loader.stream.trained if loader is not None else IMAGENET)
    # Reading goes on beside a GPU's work, but takes the cores away from a CPU's.
    each = whole if data_s is None else max(whole, data_s) if device.type == "cuda" else whole + data_s
    figures = Figures(
        device=_device_name(device),
        precision=precision,
        batch=loop.batch_size,
        step_s=whole,
        forward_s=parts[0],
        backward_s=parts[1],
        optimizer_s=parts[2],
        data_s=data_s,
        flops_per_image=masks * flops(model).step,
        products={"×".join(map(str, product)): rate for product, rate in rates.items()},
        peak_memory=peak,
        largest_batch=_largest_batch(pretraining, precision, device),
        hours=loop.total_steps(images) * each / 3600,
        images=images,
    )
    _show(config, figures, console)
    if config.options.json is not None:
        record = {"figures": _plain(figures), **provenance(argv)}
        replace_text(Path(config.options.json), json.dumps(record, indent=1) + "\n")
    return figures


# ---------------------------------------------------------------------- what is timed


def loader_of(config: PretrainConfig, device: torch.device) -> Loader | None:
    """A loader of a run's images, held on the device if the run would hold them; None without --data."""
    if not config.data.data:
        return None
    source = open_sources(config.data.data, config.model.in_chans, shard_cache(config.data))
    holdout = default_holdout(len(source)) if config.data.holdout is None else config.data.holdout
    stream = stream_of(config.data, source, holdout, config.loop.seed)
    limit = CACHE_BYTES if config.loader.cache == "auto" else sys.maxsize
    cached = "as asked" if config.loader.cache == "none" else load_all(
        source, device, limit, config.loader.threads, _quiet
    )  # fmt: skip
    held = cached if isinstance(cached, CachedSet) else None
    gray = (0.5,) * config.model.in_chans
    size, threads = config.model.image_size, config.loader.threads
    return Loader(source, stream, size, gray, gray, device, threads, held, _quiet)


def _quiet(_report: object) -> None:
    """The run itself will say what is wrong with an image."""


def _batch(config: PretrainConfig, device: torch.device, loader: Loader | None) -> Batch:
    """A batch of the user's images, or of noise: a step takes as long."""
    size = config.loop.batch_size
    if loader is not None:
        return next(loader.batches(iter([range(size)])))
    images = torch.randn(size, config.model.in_chans, *config.model.image_size, device=device)
    ids = torch.arange(size, device=device)
    return Batch(images, ids, torch.zeros_like(ids))


def _step(config: PretrainConfig, device: torch.device, precision: str) -> Step:
    model = fresh_model(config.autoencoder(), config.loop.seed).to(device)
    if config.compute.grad_checkpointing:
        recompute_blocks(model)
    if config.compute.compile:
        model.compile()
    method = MaskedAutoencoding(model, config.loop.seed, masks_per_image(config))
    return Step(
        method,
        adamw(method, config.optim.weight_decay),
        World(device),
        precision_context(precision, device),
        config.loop.accum_iter,
        config.optim.clip_grad,
    )


def _times(
    step: Step, batch: Batch, device: torch.device, seconds: float
) -> tuple[float, tuple[float, float, float]]:
    """The seconds of a whole update, and those of its three parts."""

    def update() -> None:
        step.apply(step.gradients(batch)[0])

    for _ in range(3):  # kernels are chosen, compiled and given memory
        timed(update, device)
    whole = median(repeat(update, device, seconds / 2))
    rounds: list[tuple[float, float, float]] = []
    while sum(map(sum, rounds)) < seconds / 2 or len(rounds) < 3:
        rounds.append(_parts(step, batch, device))
    forward, backward, optimizer = (median(times) for times in zip(*rounds, strict=True))
    return whole, (forward, backward, optimizer)


def _parts(step: Step, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    forward = backward = 0.0
    losses: list[torch.Tensor] = []
    for part in batch.chunks(step.accum_iter):
        forward += timed(lambda part=part: losses.append(step.forward(part).loss), device)
        backward += timed((losses[-1] / step.accum_iter).backward, device)
    return forward, backward, timed(lambda: step.apply(losses[-1].detach()), device)


def reading_time(loader: Loader, config: PretrainConfig, seconds: float) -> float:
    """Seconds a batch, when nothing else is done, once what workers made while they started is used up."""
    size = config.loop.batch_size
    times: list[float] = []
    with closing(loader.batches(range(i * size, (i + 1) * size) for i in count())) as batches:
        for _ in range(_UNCOUNTED):
            timed(lambda: next(batches), loader.device)
        while sum(times) < seconds or len(times) < 2 * _UNCOUNTED:
            times.append(timed(lambda: next(batches), loader.device))
    return sum(times) / len(times)  # not the median: workers deliver in bursts


# ---------------------------------------------------------------------- memory


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _largest_batch(config: PretrainConfig, precision: str, device: torch.device) -> int:
    """Images whose activations fit beside weights, gradients and moments in the whole memory, by tracing."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (trained, frozen, one), (_, _, two) = (
        measure(config.with_flags(batch_size=size, accum_iter=1), precision, device) for size in (1, 2)
    )
    each = two - one  # the rest of what is kept, such as weights in bf16, is there once
    left = 0.9 * memory - trained * ADAM_BYTES - frozen * 4 - (one - each)
    return max(0, int(left / each))


# ---------------------------------------------------------------------- telling


def _show(config: BenchConfig, found: Figures, console: Console) -> None:
    best = max(found.products, key=lambda name: found.products[name])
    rows = [
        ("images/s", f"{found.images_per_s:,.1f} in batches of {found.batch}, images at hand"),
        ("a step", f"{_ms(found.step_s)}: forward {_ms(found.forward_s)}, backward {_ms(found.backward_s)}, "
                   f"optimiser {_ms(found.optimizer_s)}"),
        ("data", _data_line(found)),
        ("operations", f"{found.flops_per_image / 1e9:,.2f} GFLOP an image, forward and backward; "
                       f"{_rate(found.flops_per_s)}"),
        ("the limit", f"{_rate(found.products[best])}, the best of {len(found.products)} matrix products "
                      f"({best}); the step achieves {found.utilisation:.0%} of it"),
        ("memory", f"{found.peak_memory / 2**30:.2f} GiB at the peak; about {found.largest_batch:,} images "
                   "at a time would fit, by the size of what the backward pass keeps"),
        ("the whole run", f"{duration(3600 * found.hours)} for "
                          f"{config.loop.total_steps(found.images):,} steps over {found.images:,} images"),
    ]  # fmt: skip
    console.facts(f"{config.model.model} on {found.device}, {found.precision}", rows)


def _data_line(found: Figures) -> str:
    if found.data_s is None:
        return "not read: give --data"
    return (
        f"{_ms(found.data_s)} a batch, {found.batch / found.data_s:,.1f} images/s, with nothing else running"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _rate(value: float) -> str:
    return f"{value / 1e12:,.2f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.0f} GFLOP/s"


def _plain(found: Figures) -> dict[str, Any]:
    derived = ("images_per_s", "flops_per_s", "utilisation")
    stored = {field.name: getattr(found, field.name) for field in fields(Figures)}
    return {**stored, **{name: getattr(found, name) for name in derived}}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
