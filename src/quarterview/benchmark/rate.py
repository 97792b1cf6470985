"""The machine's own limit: how fast it multiplies matrices."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quarterview.models.config import MAEConfig
from quarterview.models.vit import MLP_RATIO

SQUARES = (1024, 2048, 4096)
"""Sides of the square products that are tried beside the model's own."""


class Product(NamedTuple):
    """A matrix product: [rows, inputs] by [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition for each number that meets another."""
        return 2 * self.rows * self.inputs * self.outputs


def products_of(config: MAEConfig, batch: int) -> list[Product]:
    """The products of the largest layers of a model, for so many images at once, and the squares."""
    shape, kept = config.shape, int(config.patches * (1 - config.mask_ratio))
    encoded = batch * (config.cls_tokens + (config.patches if config.encoder_mask_tokens else kept))
    decoded = batch * (config.cls_tokens + config.patches) if config.decoder_depth else 0
    widths = [(encoded, shape.width), (decoded, config.decoder_width)]
    layers = [
        Product(rows, *ends)
        for rows, width in widths
        for ends in ((width, 3 * width), (width, MLP_RATIO * width), (MLP_RATIO * width, width))
        if rows
    ]
    return layers + [Product(side, side, side) for side in SQUARES]


def product_rates(
    products: Iterable[Product], dtype: torch.dtype, device: torch.device, seconds: float = 0.2
) -> dict[Product, float]:
    """The rate of each product, in floating-point operations a second: the median of repeated runs.

    Args:
        seconds: how long each is repeated, after one run that is not counted.
    """
    return {product: _rate(product, dtype, device, seconds) for product in products}


def _rate(product: Product, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    left = torch.randn(product.rows, product.inputs, device=device).to(dtype)
    right = torch.randn(product.outputs, product.inputs, device=device).to(dtype)
    return product.flops / median(repeat(lambda: F.linear(left, right), device, seconds))


def repeat(work: Callable[[], object], device: torch.device, seconds: float, least: int = 3) -> list[float]:
    """How long `work` takes, again and again for so many seconds, after once uncounted."""
    timed(work, device)
    times: list[float] = []
    while sum(times) < seconds or len(times) < least:
        times.append(timed(work, device))
    return times


def timed(work: Callable[[], object], device: torch.device) -> float:
    """The seconds that `work` takes, until the device is done with it."""
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median(values: Iterable[float]) -> float:
    """The middle one: one slow moment of a busy machine does not count."""
    return statistics.median(values)
