"""Tests of benchmarks/scale_plan.py, whose tables docs/scale.md shows."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from quarterview.models.config import MAEConfig
from quarterview.models.flops import count_flops
from quarterview.models.mae import MaskedAutoencoder

ROOT = Path(__file__).parents[1]
TINY = "mae_vit_64x2x2_patch16"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "benchmarks" / "scale_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_plan"] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale_plan"]


def make_tiny_plan(scale, images_per_s=1000.0, **changes):
    """Return a plan in which only the GPUs take time; each trains on so many images per second."""
    operations = count_flops(MAEConfig(model=TINY, image_size=(224, 224))).step
    values = {"model": TINY, "images": 10_000, "epochs": 10, "batch_size": 1000, "ranks": 10}
    values |= {
        "gpu_tflops": images_per_s * operations / 0.5e12,
        "mfu": 0.5,
        "latency_ms": 0.0,
        "cores": 100.0,
    }
    values |= {"node_gbit": 1e9, "inside_gbyte": 1e9, "storage_gbyte": 1e9, "stream_mbyte": 1e9}
    return scale.Plan(**{**values, "disk_gbyte": 1e9, **changes})


def test_hours_and_cost_are_operations_over_rates(scale):
    plan = make_tiny_plan(scale, price_per_hour=3.0)
    seconds = 100_000 / (10 * 1000)
    assert plan.steps == 100
    assert plan.total_flops == 100_000 * count_flops(MAEConfig(model=TINY, image_size=(224, 224))).step
    assert plan.hours == pytest.approx(seconds / 3600, rel=1e-6)
    assert plan.cost == pytest.approx(3 * 10 * seconds / 3600, rel=1e-6)
    assert plan.images_per_s == pytest.approx(1000)
    again = replace(plan, grad_checkpointing=True)
    assert 1.25 < again.hours / plan.hours < 1.34  # almost a forward pass more
    assert again.activation_bytes < plan.activation_bytes
    assert again.total_flops == plan.total_flops  # excludes recomputation


def test_parameters_bytes_and_memory_are_those_of_the_model(scale):
    plan = make_tiny_plan(scale)
    model = MaskedAutoencoder(MAEConfig(model=TINY, image_size=(224, 224)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert plan.num_parameters == trained
    assert plan.checkpoint_bytes == 4 * trained + moments
    assert plan.memory_bytes - plan.activation_bytes == 4 * trained + moments + 2 * plan.gradient_bytes
    assert replace(plan, accum_iter=2).activation_bytes == pytest.approx(plan.activation_bytes / 2, rel=0.02)


def test_the_default_mfu_is_that_of_the_paper(scale):
    """In the MAE paper, ViT-L for 1600 epochs took 31 hours on 128 TPU cores of 61.5 TFLOP/s."""
    assert scale.L16.num_parameters == 329_239_296
    plan = scale.Plan(model="mae_vit_large_patch16", epochs=1600, ranks=128, gpu_tflops=61.5)
    mfu = plan.total_flops / (31 * 3600 * 128 * 61.5e12)
    assert mfu == pytest.approx(plan.mfu, abs=0.02)


def test_the_gradients_are_averaged_by_a_ring_all_reduce(scale):
    plan = make_tiny_plan(scale, node_gbit=8.0, ranks=16, batch_size=1600)
    chunks, sent = [[1] * 16 for _ in range(16)], 0  # chunks[rank][i]: number of ranks summed in part i
    for step in range(15):  # reduce-scatter
        for rank in range(16):
            chunks[(rank + 1) % 16][(rank - step) % 16] += chunks[rank][(rank - step) % 16]
        sent += 1
    assert all(chunks[(i - 1) % 16][i] == 16 for i in range(16))
    sent += 15  # all-gather
    assert plan.sent_bytes == pytest.approx(sent * plan.gradient_bytes / 16)
    assert plan.reduce_s == pytest.approx(plan.sent_bytes / 1e9)
    assert plan.step_s == pytest.approx(plan.compute_s + plan.reduce_s - plan.backward_s)
    alone = replace(plan, ranks=8, batch_size=800)
    assert alone.step_s == alone.compute_s  # inside a node
    assert make_tiny_plan(scale, ranks=1).reduce_s == 0


@pytest.mark.parametrize("kind", ["photographs", "packed jpeg", "packed raw"])
@pytest.mark.parametrize("limit", ["nothing", "cores", "latency", "one read's rate", "the node's link"])
def test_the_simulation_agrees_with_the_closed_form(scale, limit, kind):
    rate, size = scale.STORAGE_FORMATS[kind]
    changes = {
        "nothing": {},
        "cores": {"cores": 1.0},
        "latency": {"cores": 8.0, "latency_ms": 40.0, "images_per_read": 4},
        "one read's rate": {"cores": 8.0, "stream_mbyte": 6.0},
        "the node's link": {"cores": 8.0, "storage_gbyte": 0.5},
    }[limit]
    values = {"images_per_s": 4000.0, "stored_as": kind, "latency_log_std": 0.0, "images_per_read": 16}
    plan = make_tiny_plan(scale, **{**values, **changes})
    bandwidth = {"one read's rate": 6e6, "the node's link": 0.5e9 / (8 * 8)}.get(limit, math.inf)
    seconds = plan.latency_ms / 1e3 + plan.images_per_read * size / bandwidth + plan.images_per_read / rate
    loaded_per_s = plan.workers * plan.images_per_read / seconds
    assert plan.waiting_fraction == pytest.approx(max(0.0, 1 - loaded_per_s / 4000), abs=0.01)
    assert (plan.waiting_fraction > 0.2) == (limit != "nothing")
    assert plan.hours == pytest.approx(plan.steps * 100 / min(4000, loaded_per_s) / 3600, rel=0.02)


def test_latency_causes_waiting_only_with_few_workers_and_small_reads(scale):
    slow = make_tiny_plan(scale, cores=8.0, latency_ms=40.0, images_per_read=4)
    constant = replace(slow, latency_log_std=0.0)
    assert slow.waiting_fraction > constant.waiting_fraction > 0.1  # a lognormal's mean is above its median
    assert scale.simulate_waiting(slow) == scale.simulate_waiting(slow)
    ample = replace(slow, images_per_read=64, cores=64.0)
    assert ample.waiting_fraction < 0.01
    mean = math.exp(slow.latency_log_std**2 / 2) * slow.latency_ms
    expected = replace(slow, latency_log_std=0.0, latency_ms=mean).waiting_fraction
    assert slow.waiting_fraction == pytest.approx(expected, abs=0.03)


def test_the_first_bottleneck(scale):
    for changes, expected in (
        ({"gpu_gib": 1e3}, "GPUs, then "),
        ({"gpu_gib": 0.1}, "GPU memory ("),
        (
            {"cores": 1.0},
            "data workers, mostly decoding (153%)",
        ),  # 1000 images per second are needed, not 652
        ({"cores": 2.0, "latency_ms": 900.0}, "data workers, mostly waiting for the first byte ("),
        ({"storage_gbyte": 1e-2}, "storage link of a node ("),
        ({"node_gbit": 1e-3}, "gradient all-reduce during the backward pass ("),
        ({"disk_gbyte": 1e-6}, "checkpoint disk ("),
    ):
        plan = make_tiny_plan(scale, stored_as="photographs", **changes)
        assert scale.describe_plan(plan)["first bottleneck"].startswith(expected)


@pytest.mark.slow
def test_the_page_shows_what_the_script_prints(scale, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scale_plan.py"])
    scale.main()
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for block in capsys.readouterr().out.strip().split("\n\n"):
        assert block in page


def test_the_manifests_of_the_page_are_valid_and_their_flags_exist():
    from quarterview import cli

    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    documents = [yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml\n")[1:]]
    job = next(d for d in documents if d.get("kind") == "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for it by this name
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    argv = [*container["command"], *container.get("args", [])]
    cli.parse(argv[argv.index("quarterview") + 1 :])
    task = next(d for d in documents if "num_nodes" in d)
    command = task["run"].replace("\\\n", " ").split(" quarterview ")[1].split()
    cli.parse(command)
