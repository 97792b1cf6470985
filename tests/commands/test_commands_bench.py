"""What `quarterview bench` prints follows from what it measures."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from quarterview.benchmark.rate import Product, product_rates, products_of, repeat, timed
from quarterview.commands.bench import bench
from quarterview.commands.config import BenchConfig
from quarterview.errors import UserError
from quarterview.models.flops import flops
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
def test_the_figures_belong_together(tmp_path, changes, images, capsys):
    config = BenchConfig.from_flags(**{**TINY, **changes}, json=str(tmp_path / "bench.json"))
    found = bench(config, Console(), ["quarterview", "bench"])
    assert found.images_per_s == pytest.approx(8 / found.step_s)
    assert (
        found.flops_per_image
        == config.method.masks_per_image * flops(config.pretraining().autoencoder()).step
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
    assert f"{found.images_per_s:,.1f} in batches of 8" in said
    assert f"achieves {found.utilisation:.0%} of it" in " ".join(said.split())


@pytest.mark.parametrize("changes", [{"seconds": 0}, {"images": 0}, {"device": "abacus"}], ids=str)
def test_nonsense_is_refused(changes):
    with pytest.raises(UserError):
        bench(BenchConfig.from_flags(**{**TINY, **changes}), Console())


def test_a_product_is_timed_as_it_runs():
    """A rate is operations over seconds: of the same product, by hand, within noise."""
    product = Product(512, 512, 512)
    rate = product_rates([product], torch.float32, CPU)[product]
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    by_hand = min(timed(lambda: F.linear(left, right), CPU) for _ in range(50))
    assert product.flops == 2 * 512**3
    assert 0.05 < rate * by_hand / product.flops < 1.5


def test_the_products_are_those_of_the_layers():
    config = BenchConfig.from_flags(**TINY)
    products = products_of(config.pretraining().autoencoder(), batch=8)
    assert Product(8 * 17, 64, 192) in products
    assert Product(8 * 65, 128, 32) in products
    assert Product(4096, 4096, 4096) in products


def test_work_is_repeated_for_as_long_as_asked():
    calls: list[int] = []
    times = repeat(lambda: calls.append(1), CPU, seconds=0.0, least=4)
    assert len(times) == 4
    assert len(calls) == 5  # once uncounted
