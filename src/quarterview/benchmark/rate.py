"""Measurement of the matrix-product rate of a device, an upper limit of the speed of a training step."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quarterview.models.config import MAEConfig
from quarterview.models.vit import MLP_RATIO

SQUARE_SIZES = (1024, 2048, 4096)
"""Sizes of the square matrix products that are measured in addition to those of the model."""


class MatrixProduct(NamedTuple):
    """Shape of a matrix product: [rows, in_features] times [in_features, out_features]."""

    rows: int
    in_features: int
    out_features: int

    @property
    def flops(self) -> int:
        """Floating-point operations; a multiplication and an addition count as two."""
        return 2 * self.rows * self.in_features * self.out_features


def list_matrix_products(config: MAEConfig, batch_size: int) -> list[MatrixProduct]:
    """List the matrix products of the attention and MLP layers of a model, and the square ones.

    Args:
        batch_size: images per forward pass.
    """
    shape, num_visible = config.shape, int(config.num_patches * (1 - config.mask_ratio))
    num_encoded = config.num_patches if config.encoder_mask_tokens else num_visible
    encoder_tokens = batch_size * (config.cls_tokens + num_encoded)
    decoder_tokens = batch_size * (config.cls_tokens + config.num_patches) if config.decoder_depth else 0
    layers = [
        MatrixProduct(rows, *features)
        for rows, width in ((encoder_tokens, shape.width), (decoder_tokens, config.decoder_width))
        for features in ((width, 3 * width), (width, MLP_RATIO * width), (MLP_RATIO * width, width))
        if rows
    ]
    return layers + [MatrixProduct(side, side, side) for side in SQUARE_SIZES]


def measure_flops_per_s(
    products: Iterable[MatrixProduct], dtype: torch.dtype, device: torch.device, seconds: float = 0.2
) -> dict[MatrixProduct, float]:
    """Measure the rate of each product in floating-point operations per second, as a median.

    Args:
        seconds: minimum duration of the repetitions of each product, after one untimed call.
    """
    return {product: _measure_one(product, dtype, device, seconds) for product in products}


def _measure_one(product: MatrixProduct, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    left = torch.randn(product.rows, product.in_features, device=device).to(dtype)
    right = torch.randn(product.out_features, product.in_features, device=device).to(dtype)
    return product.flops / median(time_repeatedly(lambda: F.linear(left, right), device, seconds))


def time_repeatedly(
    function: Callable[[], object], device: torch.device, seconds: float, min_repeats: int = 3
) -> list[float]:
    """Return the durations in seconds of repeated calls of a function, after one untimed call.

    Args:
        seconds: minimum total duration.
        min_repeats: minimum number of calls.
    """
    time_once(function, device)
    times: list[float] = []
    while sum(times) < seconds or len(times) < min_repeats:
        times.append(time_once(function, device))
    return times


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Return the duration of a function call in seconds, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median(values: Iterable[float]) -> float:
    """Return the median, which a few slow calls on a busy machine hardly change."""
    return statistics.median(values)
