"""The commands around a run: knn, linear, reconstruct, inspect, recipes, the dry run and the demo."""

import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

from quarterview import cli, recipes
from quarterview.dry_run import measure
from quarterview.pretraining import PretrainConfig, pretrain
from quarterview.train.distributed import choose_device

TINY = {
    "model": "mae_vit_32x2x2_patch4",
    "image_size": 16,
    "decoder_width": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "precision": "fp32",
    "device": "cpu",
}


def width(path):
    with Image.open(path) as image:
        return image.size[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    pretrain(PretrainConfig(data=("shapes:200",), out=str(folder), steps=4, batch_size=16, ema=0.9, **TINY))
    return folder


def test_knn_and_linear(run, capsys):
    for command in (
        ["knn", "--k", "3"],
        ["linear", "--features", "cls"],
        ["linear", "--labels", "30", "--ema"],
    ):
        words = [
            command[0],
            str(run),
            "--train",
            "shapes:60:seed=1",
            "--test",
            "shapes:40:seed=2",
            *command[1:],
        ]
        assert cli.run(words) == 0
        assert "this model" in capsys.readouterr().out


def test_reconstruct_takes_files_and_sets(run, tmp_path, capsys):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.png")
    out = tmp_path / "out" / "panel.png"
    assert cli.run(["reconstruct", str(run), str(tmp_path / "a.png"), "shapes:3", "--out", str(out)]) == 0
    assert width(out) > 200
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert cli.run(["reconstruct", str(run), str(tmp_path / "b.png"), "--out", str(out)]) == 2
    assert "b.png" in capsys.readouterr().err
    assert cli.run(["reconstruct", str(run), str(tmp_path / "c.png"), "--out", str(out)]) == 2


def test_inspect_tells_what_it_is(run, capsys):
    for path in (run, run / "checkpoints" / "last", run / "checkpoints" / "last" / "model.safetensors"):
        assert cli.run(["inspect", str(path)]) == 0
        assert "32 wide, 2 blocks, 2 heads" in capsys.readouterr().out
    assert cli.run(["inspect", str(run.parent)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_recipes_are_listed_and_resolve(capsys):
    assert cli.run(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name, recipe in recipes.RECIPES.items():
        assert name in shown
        config = recipes.read(name)
        assert all(getattr(config, key) in (value, (value, value)) for key, value in recipe.values.items())
        assert f"--recipe {name} " in recipe.command


def test_a_runs_configuration_is_a_recipe(run):
    again = recipes.read(str(run / "config.yaml"))
    assert again == PretrainConfig(
        data=("shapes:200",), out=str(run), steps=4, batch_size=16, ema=0.9, **TINY
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["image_size"] == [16, 16]


def test_the_dry_run_trains_nothing(tmp_path, capsys):
    words = [
        "pretrain",
        "--recipe",
        "cifar",
        "--data",
        "shapes:1000",
        "--out",
        str(tmp_path / "x"),
        "--dry-run",
    ]
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert "5,776,176 trained, 20,800 in fixed position tables" in shown
    assert "78, the first 4 of them warm-up to a learning rate of 1.00e-03" in shown
    assert not (tmp_path / "x").exists()


def test_the_memory_estimate_grows_as_the_batch_and_without_accumulation():
    config = PretrainConfig(data=("shapes",), out="x", **{**TINY, "precision": "bf16"})
    device = choose_device("cpu")
    sizes = [
        measure(PretrainConfig(**{**vars(config), "batch_size": b}), "bf16", device)[2] for b in (64, 128)
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    parts = measure(PretrainConfig(**{**vars(config), "batch_size": 128, "accum_iter": 2}), "bf16", device)[2]
    assert parts == sizes[0]


@pytest.mark.slow
def test_the_demo_shows_what_it_promises_in_under_five_minutes(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "quarterview", "demo", "--out", str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 300
    assert "times as accurate" in " ".join(done.stdout.split())
    assert width(tmp_path / "demo" / "panel.png") > 500
    assert (tmp_path / "demo" / "curve.png").is_file()


def test_the_demo_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.run(["demo", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists()
    assert "something else" in capsys.readouterr().err
