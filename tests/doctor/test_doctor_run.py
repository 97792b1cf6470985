"""The doctor: its verdicts on measurements made up for the purpose, on tiny runs, and on ill ones (slow)."""

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
from quarterview.doctor.collapse import Spread
from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examine import read_record
from quarterview.doctor.examined import MODEL, Examined, standardised, usual_rate
from quarterview.doctor.findings import diagnose
from quarterview.doctor.history import read_history
from quarterview.doctor.inpainters import INPAINTERS
from quarterview.doctor.run import doctor
from quarterview.errors import RunError, UserError
from quarterview.evaluation.pictures import Pictures
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
    """Losses of 100 images each, a little different from image to image."""
    means = {"zero": 1.0, "mean of visible": 0.9, "nearest patch": 0.8, "interpolation": 0.6} | others
    wobble = torch.linspace(-0.05, 0.05, 100)
    return {name: mean + wobble for name, mean in means.items()} | {MODEL: model + wobble.flip(0)}


HEALTHY = Examined(
    model=MAEConfig("mae_vit_64x3x4_patch4", image_size=(32, 32), norm_pix_loss=False),
    optim=OptimConfig(lr=3e-3),
    loop=LoopConfig(batch_size=64, steps=1000),
    steps=1000,
    warmup=50,
    history=read_history(rows(np.linspace(1.0, 0.5, 100)), 50),
    images=1000,
    broken=0,
    held_out=True,
    losses=levels(0.5),
    trained_losses=0.5 + torch.linspace(-0.05, 0.05, 100),
    pictures=Pictures(200, 0.9, 0.25, 0.23, 0.0, 0.0, 0.0),
    eight_bit=True,
    encoder=Spread(30.0, 0.1, 0.2, 0.8),
    fresh=Spread(20.0, 0.1, 0.3, 0.7),
    pixels=Spread(100.0, 0.1, 0.9, 0.0),
)


def found(run, severity="ailment"):
    return [finding.name for finding in diagnose(run) if finding.severity == severity]


def with_rate(times):
    return OptimConfig(lr=times * usual_rate(64, 64))


def test_a_healthy_run_has_neither_ailment_nor_caution():
    assert found(HEALTHY) == []
    assert found(HEALTHY, "caution") == []
    assert found(HEALTHY, "fine") == ["features", "reconstruction"]


def test_noisy_looking_normalised_predictions_are_told_from_a_failure():
    normalised = replace(HEALTHY, model=replace(HEALTHY.model, norm_pix_loss=True))
    assert "normalised targets" in found(normalised, "fine")
    failed = replace(normalised, losses=levels(0.99))
    assert found(failed) == ["nothing learned"]
    assert "normalised targets" not in found(failed, "fine")


@pytest.mark.parametrize(
    ("changes", "ailment"),
    [
        ({"pictures": HEALTHY.pictures._replace(neighbours=0.01)}, "no structure"),
        ({"pictures": HEALTHY.pictures._replace(difference=0.005)}, "equal images"),
        ({"pictures": HEALTHY.pictures._replace(difference=0.02)}, "equal images"),
        ({"pictures": HEALTHY.pictures._replace(repeated=0.9)}, "equal images"),
        ({"pictures": HEALTHY.pictures._replace(constant=0.9, neighbours=None)}, "equal images"),
        ({"model": MAEConfig("mae_vit_64x3x4_patch4", image_size=(40, 40), mask_ratio=0.99)}, "mask ratio"),
        ({"model": MAEConfig("mae_vit_64x3x4_patch4", image_size=(32, 32), mask_ratio=0.05)}, "mask ratio"),
        ({"optim": with_rate(50), "losses": levels(0.95)}, "learning rate"),
        ({"optim": with_rate(50), "losses": levels(0.7)}, "learning rate"),
        ({"optim": with_rate(5), "losses": levels(0.99)}, "learning rate"),
        ({"history": read_history(rows([0.8, 0.5, 0.4, 0.4, 0.4] + [2.0] * 20), 0)}, "diverged"),
        ({"history": read_history(rows([0.5] * 50, skipped=30), 0)}, "skipped steps"),
        ({"encoder": Spread(30.0, 0.0, 1e-5, 1.0)}, "collapse"),
        ({"losses": levels(0.9), "history": read_history(rows([0.9] * 100), 50)}, "nothing learned"),
        ({"broken": 200}, "broken images"),
    ],
)
def test_each_ailment_is_named(changes, ailment):
    assert ailment in found(replace(HEALTHY, **changes))


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({"losses": levels(0.7)}, "young"),
        ({"losses": levels(0.92), "steps": 100, "history": read_history(rows([1, 0.95, 0.92]), 0)}, "young"),
        ({"optim": with_rate(50)}, "learning rate"),
        ({"optim": with_rate(0.01)}, "low learning rate"),
        ({"warmup": 500}, "warm-up"),
        ({"warmup": 0, "optim": with_rate(3)}, "warm-up"),
        ({"model": replace(HEALTHY.model, mask_ratio=0.3)}, "mask ratio"),
        ({"history": read_history(rows([0.5] * 20 + [1.5] + [0.5] * 20), 0)}, "spikes"),
        ({"history": read_history(rows([0.5] * 50, data_wait=0.6), 0)}, "data wait"),
        ({"history": read_history(rows([0.5] * 500, skipped=2), 0)}, "skipped steps"),
        ({"pictures": HEALTHY.pictures._replace(neighbours=0.2)}, "noisy images"),
        ({"pictures": HEALTHY.pictures._replace(repeated=0.1)}, "similar images"),
        ({"broken": 3}, "broken images"),
    ],
)
def test_what_is_only_worth_a_word_does_not_make_a_run_ill(changes, caution):
    assert found(replace(HEALTHY, **changes)) == []
    assert caution in found(replace(HEALTHY, **changes), "caution")


def test_overfitting_takes_a_rising_held_out_loss_and_a_gap():
    values = [0.6] * 10 + [0.5] * 20
    rising = [row(10 * i, 0.5, val_loss=v) for i, v in enumerate([0.6, 0.5, 0.45, 0.5, 0.55])]
    known = HEALTHY.trained_losses - 0.1
    ill = replace(HEALTHY, history=read_history(rising, 0), losses=levels(0.55), trained_losses=known)
    assert "overfitting" in found(ill, "caution")
    assert "overfitting" not in found(replace(ill, trained_losses=ill.losses[MODEL]), "caution")
    assert "overfitting" not in found(replace(ill, history=read_history(rows(values), 0)), "caution")


def test_a_run_that_has_only_begun_is_not_ill_and_a_finished_one_of_five_steps_is():
    begun = replace(HEALTHY, losses=levels(1.1), history=read_history(rows([1.4, 1.3]), 50))
    assert found(begun) == []
    assert found(begun, "caution") == ["young"]
    assert found(replace(begun, steps=20)) == ["nothing learned"]


def test_a_high_rate_is_not_blamed_for_what_has_only_begun():
    begun = {"losses": levels(1.1), "history": read_history(rows([1.4, 1.3]), 50)}
    assert found(replace(HEALTHY, optim=with_rate(50), **begun)) == []
    assert found(replace(HEALTHY, optim=with_rate(5), steps=20, **begun)) == ["nothing learned"]
    young = {"losses": levels(0.7), "optim": with_rate(5)}
    assert found(replace(HEALTHY, **young)) == []


def test_findings_say_what_to_do_and_without_images_only_the_history_speaks():
    ill = replace(HEALTHY, optim=with_rate(50), losses=levels(0.95))
    finding = diagnose(ill)[0]
    assert "--lr" in finding.remedy
    assert "0.950" in finding.seen
    blind = replace(
        ill, losses=None, trained_losses=None, pictures=None, encoder=None, fresh=None, pixels=None
    )
    assert found(blind) == []


def test_usual_rate_is_the_papers_where_the_paper_is():
    assert usual_rate(4096, 768) == pytest.approx(2.4e-3)
    assert usual_rate(1024, 768) == pytest.approx(1.2e-3)


def test_differences_are_measured_in_standard_errors():
    differences = torch.tensor([1.0, 2.0, 3.0, 2.0])
    share, errors = standardised(differences, 4.0)
    assert share == pytest.approx(0.5)
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


def test_a_small_run_is_healthy_and_the_model_is_judged_as_validation_judged_it(run, capsys):
    config = DoctorConfig(run=str(run), images=64, device="cpu")
    assert doctor(config).healthy
    assert not (run / "results").exists()
    assert capsys.readouterr().out == ""
    assert main(config, ["quarterview", "doctor"]) == 0
    written = json.loads((run / "results" / "doctor.json").read_text("utf-8"))
    assert written["results"]["healthy"] is True
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


def test_lost_images_and_other_ones_are_said(run, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (moved / name).symlink_to(run / name)
    found_there = doctor(DoctorConfig(run=str(moved), data=("shapes:300:seed=9",), images=16))
    assert "other images" in [f.name for f in found_there.findings]
    with pytest.raises(UserError, match="does not exist"):
        doctor(DoctorConfig(run=str(run), data=(str(tmp_path / "gone"),)))


def test_a_run_that_died_before_its_first_checkpoint_is_examined_as_far_as_it_goes(tmp_path):
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8))
    folder = tmp_path / "run"
    config = PretrainConfig.from_flags(data=(str(tmp_path / "noise.npy"),), out=str(folder), steps=2, **TINY)
    pretrain(config)
    for path in (folder / "checkpoints").glob("step-*/*"):
        path.unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        path.rmdir()
    diagnosis = doctor(DoctorConfig(run=str(folder), images=32, device="cpu"))
    names = [f.name for f in diagnosis.findings]
    assert names[0] == "no structure"
    assert {"no checkpoint", "no holdout"} <= set(names)
    (tmp_path / "noise.npy").unlink()
    assert "no images" in [f.name for f in doctor(DoctorConfig(run=str(folder))).findings]


def test_a_run_that_the_loop_gave_up_is_ill(tmp_path):
    np.save(tmp_path / "x.npy", np.full((60, 16, 16, 3), 3e38, np.float32))
    folder = tmp_path / "run"
    data = str(tmp_path / "x.npy")
    with pytest.raises(RunError, match="not finite"):
        pretrain(
            PretrainConfig.from_flags(
                data=(data,), out=str(folder), steps=9, mean=[0] * 3, std=[1] * 3, **TINY
            )
        )
    diagnosis = doctor(DoctorConfig(run=str(folder), images=32, device="cpu"))
    ailments = {f.name for f in diagnosis.findings if f.severity == "ailment"}
    assert {"skipped steps", "equal images"} <= ailments


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no run"):
        doctor(DoctorConfig(run=str(tmp_path)))
    (tmp_path / "config.yaml").write_text("- a list\n")
    with pytest.raises(UserError, match="how it was trained"):
        doctor(DoctorConfig(run=str(tmp_path)))
    with pytest.raises(UserError, match=r"--images 3 is out of range. Give a whole number of at least 8"):
        DoctorConfig(run=str(tmp_path), images=3)


def test_a_configuration_by_parts_is_read_as_a_flat_one_and_other_methods_are_refused(tmp_path):
    flat = {"model": "mae_vit_32x2x2_patch4", "image_size": [16, 16], "mask_ratio": 0.5, "batch_size": 7}
    nested = {
        "model": {"model": "mae_vit_32x2x2_patch4", "image_size": [16, 16]},
        "method": {"name": "mae", "mask_ratio": 0.5, "target": "pixels"},
        "loop": {"batch_size": 7},
    }
    records = []
    for config in (flat, nested):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        records.append(read_record(tmp_path))
    assert records[0] == records[1]
    assert (records[0].model.mask_ratio, records[0].loop.batch_size) == (0.5, 7)
    for change, said in (
        ({"method": {"name": "simclr"}}, "was trained with --method simclr, and"),
        ({"method": {"name": "mae", "target": "hog"}}, "was trained with --method mae --target hog, and"),
        ({"method": {}, "objective": "byol"}, "was trained with --method byol, and"),  # as 0.1 calls it
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**nested, **change}))
        with pytest.raises(UserError, match=said):
            read_record(tmp_path)


@pytest.mark.slow
def test_made_to_be_ill(tmp_path):
    """Every run of the benchmark, with a seed on which no threshold was fixed."""
    path = Path(__file__).parents[2] / "benchmarks" / "doctor_runs.py"
    spec = importlib.util.spec_from_file_location("doctor_runs", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_arrays("shapes:3000:seed=21", 3000, 21, tmp_path)
    for name, case in benchmark.CASES.items():
        benchmark.make_run(case, tmp_path, tmp_path / name, 21)
        diagnosis = doctor(DoctorConfig(run=str(tmp_path / name), device="cpu"))
        assert benchmark.judged_well(case, diagnosis), (name, diagnosis.findings)
