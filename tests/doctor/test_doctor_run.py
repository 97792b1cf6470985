"""The doctor: findings on constructed measurements, on tiny runs, and on runs with known problems (slow)."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from quarterview.commands.config import PretrainConfig
from quarterview.commands.doctor import main
from quarterview.commands.pretrain import pretrain
from quarterview.doctor.collapse import FeatureStatistics
from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examine import read_run_record
from quarterview.doctor.examined import MODEL, RunMeasurements, compute_mean_difference, compute_reference_lr
from quarterview.doctor.findings import diagnose
from quarterview.doctor.history import summarize_history
from quarterview.doctor.inpainters import INPAINTERS
from quarterview.doctor.run import diagnose_run
from quarterview.errors import RunError, UserError
from quarterview.evaluation.pictures import ImageStatistics
from quarterview.models.config import MAEConfig
from quarterview.training.config import LoopConfig, OptimConfig


def row(step, loss=0.5, **others):
    return {
        "step": step,
        "epoch": step / 100,
        "loss": loss,
        "skipped": 0,
        "grad_norm": 1.0,
        "data_wait": 0.1,
    } | others


def rows(losses, **others):
    return [row(10 * (i + 1), loss, **others) for i, loss in enumerate(losses)]


def levels(model, **others):
    """Return losses of 100 images for each inpainter and the model, with small differences between images."""
    means = {"zero": 1.0, "mean of visible": 0.9, "nearest patch": 0.8, "interpolation": 0.6} | others
    noise = torch.linspace(-0.05, 0.05, 100)
    return {name: mean + noise for name, mean in means.items()} | {MODEL: model + noise.flip(0)}


HEALTHY = RunMeasurements(
    model=MAEConfig("mae_vit_64x3x4_patch4", image_size=(32, 32), norm_pix_loss=False),
    optim=OptimConfig(lr=3e-3),
    loop=LoopConfig(batch_size=64, steps=1000),
    num_steps=1000,
    warmup_steps=50,
    history=summarize_history(rows(np.linspace(1.0, 0.5, 100)), 50),
    num_images=1000,
    num_broken=0,
    is_held_out=True,
    losses=levels(0.5),
    train_losses=0.5 + torch.linspace(-0.05, 0.05, 100),
    image_statistics=ImageStatistics(200, 0.9, 0.25, 0.23, 0.0, 0.0, 0.0),
    is_eight_bit=True,
    encoder_statistics=FeatureStatistics(30.0, 0.1, 0.2, 0.8),
    random_encoder_statistics=FeatureStatistics(20.0, 0.1, 0.3, 0.7),
    pixel_statistics=FeatureStatistics(100.0, 0.1, 0.9, 0.0),
)


def found(run, severity="error"):
    return [finding.name for finding in diagnose(run) if finding.severity == severity]


def with_rate(times):
    return OptimConfig(lr=times * compute_reference_lr(64, 64))


def test_a_healthy_run_has_neither_error_nor_warning():
    assert found(HEALTHY) == []
    assert found(HEALTHY, "warning") == []
    assert found(HEALTHY, "ok") == ["features", "reconstruction"]


def test_noisy_normalised_predictions_are_not_a_failure():
    normalised = replace(HEALTHY, model=replace(HEALTHY.model, norm_pix_loss=True))
    assert "normalised targets" in found(normalised, "ok")
    failed = replace(normalised, losses=levels(0.99))
    assert found(failed) == ["nothing learned"]
    assert "normalised targets" not in found(failed, "ok")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image_statistics": HEALTHY.image_statistics._replace(neighbours=0.01)}, "no structure"),
        ({"image_statistics": HEALTHY.image_statistics._replace(difference=0.005)}, "equal images"),
        ({"image_statistics": HEALTHY.image_statistics._replace(difference=0.02)}, "equal images"),
        ({"image_statistics": HEALTHY.image_statistics._replace(repeated=0.9)}, "equal images"),
        (
            {"image_statistics": HEALTHY.image_statistics._replace(constant=0.9, neighbours=None)},
            "equal images",
        ),
        ({"model": MAEConfig("mae_vit_64x3x4_patch4", image_size=(40, 40), mask_ratio=0.99)}, "mask ratio"),
        ({"model": MAEConfig("mae_vit_64x3x4_patch4", image_size=(32, 32), mask_ratio=0.05)}, "mask ratio"),
        ({"optim": with_rate(50), "losses": levels(0.95)}, "learning rate"),
        ({"optim": with_rate(50), "losses": levels(0.7)}, "learning rate"),
        ({"optim": with_rate(5), "losses": levels(0.99)}, "learning rate"),
        ({"history": summarize_history(rows([0.8, 0.5, 0.4, 0.4, 0.4] + [2.0] * 20), 0)}, "diverged"),
        ({"history": summarize_history(rows([0.5] * 50, skipped=30), 0)}, "skipped steps"),
        ({"encoder_statistics": FeatureStatistics(30.0, 0.0, 1e-5, 1.0)}, "collapse"),
        ({"losses": levels(0.9), "history": summarize_history(rows([0.9] * 100), 50)}, "nothing learned"),
        ({"num_broken": 200}, "broken images"),
    ],
)
def test_each_error_is_found(changes, error):
    assert error in found(replace(HEALTHY, **changes))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"losses": levels(0.7)}, "young"),
        (
            {
                "losses": levels(0.92),
                "num_steps": 100,
                "history": summarize_history(rows([1, 0.95, 0.92]), 0),
            },
            "young",
        ),
        ({"optim": with_rate(50)}, "learning rate"),
        ({"optim": with_rate(0.01)}, "low learning rate"),
        ({"warmup_steps": 500}, "warm-up"),
        ({"warmup_steps": 0, "optim": with_rate(3)}, "warm-up"),
        ({"model": replace(HEALTHY.model, mask_ratio=0.3)}, "mask ratio"),
        ({"history": summarize_history(rows([0.5] * 20 + [1.5] + [0.5] * 20), 0)}, "spikes"),
        ({"history": summarize_history(rows([0.5] * 50, data_wait=0.6), 0)}, "data wait"),
        ({"history": summarize_history(rows([0.5] * 500, skipped=2), 0)}, "skipped steps"),
        ({"image_statistics": HEALTHY.image_statistics._replace(neighbours=0.2)}, "noisy images"),
        ({"image_statistics": HEALTHY.image_statistics._replace(repeated=0.1)}, "similar images"),
        ({"num_broken": 3}, "broken images"),
    ],
)
def test_warnings_are_not_errors(changes, warning):
    assert found(replace(HEALTHY, **changes)) == []
    assert warning in found(replace(HEALTHY, **changes), "warning")


def test_overfitting_takes_a_rising_held_out_loss_and_a_gap():
    values = [0.6] * 10 + [0.5] * 20
    rising = [row(10 * i, 0.5, val_loss=v) for i, v in enumerate([0.6, 0.5, 0.45, 0.5, 0.55])]
    known = HEALTHY.train_losses - 0.1
    ill = replace(HEALTHY, history=summarize_history(rising, 0), losses=levels(0.55), train_losses=known)
    assert "overfitting" in found(ill, "warning")
    assert "overfitting" not in found(replace(ill, train_losses=ill.losses[MODEL]), "warning")
    assert "overfitting" not in found(replace(ill, history=summarize_history(rows(values), 0)), "warning")


def test_a_run_that_has_just_begun_is_healthy_and_a_finished_one_of_few_steps_is_not():
    begun = replace(HEALTHY, losses=levels(1.1), history=summarize_history(rows([1.4, 1.3]), 50))
    assert found(begun) == []
    assert found(begun, "warning") == ["young"]
    assert found(replace(begun, num_steps=20)) == ["nothing learned"]


def test_a_high_learning_rate_is_no_error_in_a_run_that_has_just_begun():
    begun = {"losses": levels(1.1), "history": summarize_history(rows([1.4, 1.3]), 50)}
    assert found(replace(HEALTHY, optim=with_rate(50), **begun)) == []
    assert found(replace(HEALTHY, optim=with_rate(5), num_steps=20, **begun)) == ["nothing learned"]
    young = {"losses": levels(0.7), "optim": with_rate(5)}
    assert found(replace(HEALTHY, **young)) == []


def test_findings_have_fixes_and_without_images_only_the_history_is_checked():
    ill = replace(HEALTHY, optim=with_rate(50), losses=levels(0.95))
    finding = diagnose(ill)[0]
    assert "--lr" in finding.fix
    assert "0.950" in finding.evidence
    without_images = replace(
        ill,
        losses=None,
        train_losses=None,
        image_statistics=None,
        encoder_statistics=None,
        random_encoder_statistics=None,
        pixel_statistics=None,
    )
    assert found(without_images) == []


def test_the_reference_lr_is_the_papers_for_its_batch_size_and_width():
    assert compute_reference_lr(4096, 768) == pytest.approx(2.4e-3)
    assert compute_reference_lr(1024, 768) == pytest.approx(1.2e-3)


def test_differences_are_measured_in_standard_errors():
    differences = torch.tensor([1.0, 2.0, 3.0, 2.0])
    relative, errors = compute_mean_difference(differences, 4.0)
    assert relative == pytest.approx(0.5)
    assert errors == pytest.approx(2.0 / (math.sqrt(2 / 3) / 2))


# ---------------------------------------------------------------------- a whole run

TINY = {
    "model": "mae_vit_32x2x2_patch4",
    "image_size": 16,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "norm_pix_loss": False,
    "precision": "fp32",
    "device": "cpu",
    "workers": 0,
    "batch_size": 32,
    "lr": 3e-3,
    "log_every": 5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    pretrain(PretrainConfig.from_flags(data=("shapes:800",), out=str(folder), steps=150, holdout=64, **TINY))
    return folder


def test_a_small_run_is_healthy_and_its_loss_is_that_of_validation(run, capsys):
    config = DoctorConfig(run=str(run), images=64, device="cpu")
    assert diagnose_run(config).is_healthy
    assert not (run / "results").exists()
    assert capsys.readouterr().out == ""
    assert main(config, ["quarterview", "doctor"]) == 0
    written = json.loads((run / "results" / "doctor.json").read_text("utf-8"))
    assert written["results"]["healthy"] is True
    assert {tuple(finding) for finding in written["results"]["findings"]} == {
        ("severity", "name", "seen", "cause", "remedy")
    }
    assert {finding["severity"] for finding in written["results"]["findings"]} <= {"caution", "fine"}
    keys = ["effective_rank", "variance", "share", "similarity"]
    assert list(written["results"]["features"]["fresh encoder"]) == keys
    assert {"rows", "lowest", "falling", "skipped", "waiting"} < set(written["results"]["history"])
    assert written["argv"] == ["quarterview", "doctor"]
    losses = written["results"]["losses"]
    assert set(losses) == {*INPAINTERS, MODEL}
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert losses[MODEL] == pytest.approx(last["val_loss"], rel=1e-4)
    with Image.open(run / "results" / "doctor.png") as image:
        assert image.size == (600, 350)
    shown = capsys.readouterr().out
    assert "interpolation" in shown
    assert "healthy" in shown


def test_missing_and_different_images_are_found(run, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (moved / name).symlink_to(run / name)
    diagnosis = diagnose_run(DoctorConfig(run=str(moved), data=("shapes:300:seed=9",), images=16))
    assert "other images" in [f.name for f in diagnosis.findings]
    with pytest.raises(UserError, match="does not exist"):
        diagnose_run(DoctorConfig(run=str(run), data=(str(tmp_path / "gone"),)))


def test_a_run_without_a_checkpoint_is_checked_as_far_as_possible(tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8))
    folder = tmp_path / "run"
    config = PretrainConfig.from_flags(data=(str(tmp_path / "noise.npy"),), out=str(folder), steps=2, **TINY)
    pretrain(config)
    for path in (folder / "checkpoints").glob("step-*/*"):
        path.unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        path.rmdir()
    diagnosis = diagnose_run(DoctorConfig(run=str(folder), images=32, device="cpu"))
    names = [f.name for f in diagnosis.findings]
    assert names[0] == "no structure"
    assert {"no checkpoint", "no holdout"} <= set(names)
    (tmp_path / "noise.npy").unlink()
    assert "no images" in [f.name for f in diagnose_run(DoctorConfig(run=str(folder))).findings]


def test_a_run_that_stopped_because_of_skipped_steps_has_errors(tmp_path):
    np.save(tmp_path / "x.npy", np.full((60, 16, 16, 3), 3e38, np.float32))
    folder = tmp_path / "run"
    data = str(tmp_path / "x.npy")
    with pytest.raises(RunError, match="not finite"):
        pretrain(
            PretrainConfig.from_flags(
                data=(data,), out=str(folder), steps=9, mean=[0] * 3, std=[1] * 3, **TINY
            )
        )
    diagnosis = diagnose_run(DoctorConfig(run=str(folder), images=32, device="cpu"))
    errors = {f.name for f in diagnosis.findings if f.severity == "error"}
    assert {"skipped steps", "equal images"} <= errors


def test_folders_that_are_not_runs_are_rejected(tmp_path):
    with pytest.raises(
        UserError, match=r"is not a run: it has neither checkpoints nor config\.yaml\. Give the --out"
    ):
        diagnose_run(DoctorConfig(run=str(tmp_path)))
    (tmp_path / "config.yaml").write_text("- a list\n")
    with pytest.raises(UserError, match=r"The configuration of .* has no model\. Give the --out"):
        diagnose_run(DoctorConfig(run=str(tmp_path)))
    with pytest.raises(UserError, match=r"--images 3 is out of range. Give a whole number of at least 8"):
        DoctorConfig(run=str(tmp_path), images=3)


def test_nested_and_flat_configurations_are_read_and_other_methods_are_rejected(tmp_path):
    flat = {"model": "mae_vit_32x2x2_patch4", "image_size": [16, 16], "mask_ratio": 0.5, "batch_size": 7}
    nested = {
        "model": {"model": "mae_vit_32x2x2_patch4", "image_size": [16, 16]},
        "method": {"name": "mae", "mask_ratio": 0.5, "target": "pixels"},
        "loop": {"batch_size": 7},
    }
    records = []
    for config in (flat, nested):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        records.append(read_run_record(tmp_path))
    assert records[0] == records[1]
    assert (records[0].model.mask_ratio, records[0].loop.batch_size) == (0.5, 7)
    for change, message in (
        (
            {"method": {"name": "simclr"}},
            "was trained with --method simclr, but quarterview doctor needs --method mae",
        ),
        ({"method": {"name": "mae", "target": "hog"}}, "was trained with --method mae --target hog, but"),
        (
            {"method": {}, "objective": "byol"},
            "was trained with --method byol, but",
        ),  # the key of version 0.1
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**nested, **change}))
        with pytest.raises(UserError, match=message):
            read_run_record(tmp_path)


@pytest.mark.slow
def test_known_problems_are_found(tmp_path):
    """Check all runs of the benchmark, with a seed that was not used to choose the thresholds."""
    path = Path(__file__).parents[2] / "benchmarks" / "doctor_runs.py"
    spec = importlib.util.spec_from_file_location("doctor_runs", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_arrays("shapes:3000:seed=21", 3000, 21, tmp_path)
    for name, case in benchmark.CASES.items():
        benchmark.train_case(case, tmp_path, tmp_path / name, 21)
        diagnosis = diagnose_run(DoctorConfig(run=str(tmp_path / name), device="cpu"))
        assert benchmark.is_diagnosed_correctly(case, diagnosis), (name, diagnosis.findings)
