"""Tests of `quarterview bench`."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from quarterview.benchmark.rate import (
    MatrixProduct,
    list_matrix_products,
    measure_flops_per_s,
    time_once,
    time_repeatedly,
)
from quarterview.commands.bench import bench
from quarterview.commands.config import BenchConfig
from quarterview.errors import UserError
from quarterview.models.flops import count_flops
from quarterview.training.console import Console

CPU = torch.device("cpu")
TINY = {
    "model": "mae_vit_64x2x4_patch4",
    "image_size": (32,),
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "batch_size": 8,
    "seconds": 0.2,
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 1_281_167),
        ({"data": ("shapes:200",), "epochs": 3}, 198),
        ({"data": ("shapes:64",), "workers": 2, "cache": "none"}, 64),
        ({"accum_iter": 2, "precision": "fp32", "images": 80}, 80),
        ({"masks_per_image": 2, "grad_checkpointing": True, "images": 80}, 80),
    ],
    ids=str,
)
def test_results_are_consistent(tmp_path, changes, images, capsys):
    config = BenchConfig.from_flags(**{**TINY, **changes}, json=str(tmp_path / "bench.json"))
    found = bench(config, Console(), ["quarterview", "bench"])
    assert found.images_per_s == pytest.approx(8 / found.step_s)
    assert (
        found.flops_per_image
        == config.method.masks_per_image * count_flops(config.pretraining().autoencoder()).step
    )
    assert found.flops_per_s == pytest.approx(found.flops_per_image * 8 / found.step_s)
    assert found.utilisation == pytest.approx(found.flops_per_s / max(found.products.values()))
    assert 0 < found.utilisation < 1
    assert 0 < found.forward_s + found.backward_s + found.optimizer_s < 5 * found.step_s
    assert found.images == images
    each = found.step_s + (found.data_s or 0)
    steps = math.ceil(config.loop.epochs * found.images / 8)
    assert found.hours == pytest.approx(steps * each / 3600)
    assert (found.data_s is None) == (not config.data.data)
    assert found.largest_batch > 1000
    written = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert written["figures"]["images_per_s"] == found.images_per_s
    assert torch.__version__.startswith(written["versions"]["torch"])
    said = capsys.readouterr().out
    assert f"{found.images_per_s:,.1f} with batch size 8" in said
    assert f"reaches {found.utilisation:.0%} of it" in " ".join(said.split())


@pytest.mark.parametrize("changes", [{"seconds": 0}, {"images": 0}, {"device": "abacus"}], ids=str)
def test_invalid_values_are_refused(changes):
    with pytest.raises(UserError):
        bench(BenchConfig.from_flags(**{**TINY, **changes}), Console())


def test_rate_of_a_matrix_product_equals_timing_by_hand():
    """The rate equals operations per second of the same product, timed by hand, within noise."""
    product = MatrixProduct(512, 512, 512)
    rate = measure_flops_per_s([product], torch.float32, CPU)[product]
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    by_hand = min(time_once(lambda: F.linear(left, right), CPU) for _ in range(50))
    assert product.flops == 2 * 512**3
    assert 0.05 < rate * by_hand / product.flops < 1.5


def test_matrix_products_are_those_of_the_layers():
    config = BenchConfig.from_flags(**TINY)
    products = list_matrix_products(config.pretraining().autoencoder(), batch_size=8)
    assert MatrixProduct(8 * 17, 64, 192) in products
    assert MatrixProduct(8 * 65, 128, 32) in products
    assert MatrixProduct(4096, 4096, 4096) in products


def test_repeat_runs_for_the_given_time():
    calls: list[int] = []
    times = time_repeatedly(lambda: calls.append(1), CPU, seconds=0.0, min_repeats=4)
    assert len(times) == 4
    assert len(calls) == 5  # once uncounted
