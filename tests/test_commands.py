"""Tests of the commands besides pretrain: knn, linear, reconstruct, inspect, recipes, dry run, demo and
others."""

import json

import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from quarterview import cli, recipes
from quarterview.commands.config import PretrainConfig
from quarterview.commands.dry_run import estimate_memory
from quarterview.commands.pretrain import pretrain
from quarterview.errors import UserError

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
    pretrain(
        PretrainConfig.from_flags(
            data=("shapes:200",), out=str(folder), steps=4, batch_size=16, ema=0.9, **TINY
        )
    )
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


SETS = ["--train", "shapes:60:seed=1", "--test", "shapes:40:seed=2"]


def test_several_k_and_both_votes_are_recorded(run, capsys):
    assert cli.run(["knn", str(run), *SETS, "--k", "1", "5", "--labels", "50"]) == 0
    assert "5" in capsys.readouterr().out
    written = json.loads((run / "results" / "knn-50.json").read_text())
    ours = {
        (row["k"], row["vote"]) for row in written["results"]["accuracies"] if row["features"] == "this model"
    }
    assert ours == {(k, vote) for k in (1, 5) for vote in ("majority", "weighted")}
    assert written["argv"][:2] == ["quarterview", "knn"]


def test_the_linear_protocol_of_the_paper(run, capsys):
    words = ["--protocol", "paper", "--epochs", "2", "--warmup-epochs", "1"]
    assert cli.run(["linear", str(run), *SETS, *words]) == 0
    assert "this model" in capsys.readouterr().out


FAST = ["--recipe", "small", "--steps", "3", "--batch-size", "20", "--device", "cpu"]


def test_finetune_and_its_curve(run, tmp_path, capsys):
    out = tmp_path / "ft"
    assert cli.run(["finetune", str(run), *SETS, *FAST, "--out", str(out)]) == 0
    assert "on 40 images, after 3 steps" in capsys.readouterr().out
    assert cli.run(["inspect", str(out)]) == 0
    assert "10 classes" in capsys.readouterr().out
    curve = ["--blocks", "0", "0.5", "all", "--out", str(tmp_path / "curve")]
    assert cli.run(["finetune", str(run), *SETS, *FAST, *curve]) == 0
    assert width(tmp_path / "curve" / "results" / "partial.png") == 500
    written = json.loads((tmp_path / "curve" / "results" / "partial.json").read_text())
    assert list(written["results"]) == ["0", "0.5", "all"]
    capsys.readouterr()
    assert cli.run(["finetune", str(run), *SETS, *FAST, *curve]) == 0  # complete runs are not trained again
    assert capsys.readouterr().out.count("is complete") == 3


def test_finetune_table(run, capsys):
    assert cli.run(["finetune", str(run), "--table", "--blocks", "1", "--lr", "1.0"]) == 0
    shown = capsys.readouterr().out
    assert "frozen" in shown
    assert "blocks.1.mlp.fc1.weight" in shown
    assert "7.500e-01" in shown
    assert cli.run(["finetune", str(run), "--table", "--blocks", "0", "all"]) == 0
    shown = capsys.readouterr().out
    assert "blocks trained: 0" in shown
    assert "blocks trained: all" in shown


def test_missing_flags_of_finetune_are_reported(run, tmp_path, capsys):
    for words, said in (
        ([str(run), *SETS], "--out"),
        ([str(run), "--out", str(tmp_path / "x")], "--train is missing"),
        (["scratch", *SETS, "--out", str(tmp_path / "y")], "scratch, so the network must be given"),
        ([str(run), *SETS, "--out", str(tmp_path / "z"), "--recipe", "smal"], "Did you mean 'small'"),
        (
            [str(run), *SETS, "--out", str(tmp_path / "z"), "--blocks", "7"],
            "--blocks is 7, and the model has 2 blocks",
        ),
    ):
        assert cli.run(["finetune", *words]) == 2
        assert said in capsys.readouterr().err


def test_look_and_embed(run, tmp_path, capsys):
    assert cli.run(["look", str(run), "shapes:3", "--out", str(tmp_path / "look.png")]) == 0
    assert width(tmp_path / "look.png") > 200
    folder = tmp_path / "vectors"
    assert cli.run(["embed", str(run), "--data", "shapes:30", "--out", str(folder)]) == 0
    assert pyarrow.parquet.read_table(sorted(folder.glob("*.parquet"))).num_rows == 30


def test_reconstruct_accepts_files_and_data_sets(run, tmp_path, capsys):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.png")
    out = tmp_path / "out" / "panel.png"
    assert cli.run(["reconstruct", str(run), str(tmp_path / "a.png"), "shapes:3", "--out", str(out)]) == 0
    assert width(out) > 200
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert cli.run(["reconstruct", str(run), str(tmp_path / "b.png"), "--out", str(out)]) == 2
    assert "b.png" in capsys.readouterr().err
    assert cli.run(["reconstruct", str(run), str(tmp_path / "c.png"), "--out", str(out)]) == 2


def test_inspect_describes_weights(run, capsys):
    for path in (run, run / "checkpoints" / "last", run / "checkpoints" / "last" / "model.safetensors"):
        assert cli.run(["inspect", str(path)]) == 0
        assert "32 wide, 2 blocks, 2 heads" in capsys.readouterr().out
    assert cli.run(["inspect", str(run.parent)]) == 2
    assert "it has no checkpoint" in capsys.readouterr().err


def test_recipes_are_listed_and_resolve(capsys):
    assert cli.run(["recipes"]) == 0
    shown = capsys.readouterr().out
    for read, table in (
        (recipes.read_pretrain_recipe, recipes.RECIPES),
        (recipes.read_finetune_recipe, recipes.FINETUNE_RECIPES),
    ):
        for name, recipe in table.items():
            assert name in shown
            assert read(name) == recipe()
            assert f"{'--base' if name == 'pocket' else '--recipe'} {name} " in recipe.__doc__


def test_a_runs_configuration_is_a_recipe(run):
    again = recipes.read_pretrain_recipe(str(run / "config.yaml"))
    assert again == PretrainConfig.from_flags(
        data=("shapes:200",), out=str(run), steps=4, batch_size=16, ema=0.9, **TINY
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["image_size"] == [16, 16]


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
    assert "5,776,176 trained, 20,800 in fixed position embeddings" in shown
    assert "78, of which 4 are warm-up to a learning rate of 1.00e-03" in shown
    assert not (tmp_path / "x").exists()


def test_the_memory_estimate_grows_as_the_batch_and_without_accumulation():
    config = PretrainConfig.from_flags(data=("shapes",), out="x", **{**TINY, "precision": "bf16"})
    sizes = [
        estimate_memory(PretrainConfig.from_flags(**{**vars(config), "batch_size": b}), "bf16")[2]
        for b in (64, 128)
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.05)
    parts = estimate_memory(config.with_flags(batch_size=128, accum_iter=2), "bf16")[2]
    assert parts == sizes[0]
    for decoder in ("standard", "cross"):
        both = [
            estimate_memory(config.with_flags(decoder=decoder, grad_checkpointing=again), "bf16")[2]
            for again in (False, True)
        ]
        assert both[1] < 0.8 * both[0]


def test_the_memory_estimate_grows_with_masks_and_shrinks_with_what_is_predicted():
    config = PretrainConfig.from_flags(data=("shapes",), out="x", **{**TINY, "batch_size": 64})

    def activations(**changes) -> int:
        return estimate_memory(config.with_flags(**changes), "fp32")[2]

    one = activations()
    assert activations(masks_per_image=3) == pytest.approx(3 * one, rel=0.05)
    cross, part = activations(decoder="cross"), activations(decoder="cross", predict_ratio=0.5)
    assert part < cross < one


def test_the_dry_run_shows_the_number_of_masks(tmp_path, capsys):
    words = ["pretrain", "--recipe", "cifar", "--data", "shapes:1000", "--out", str(tmp_path / "x")]
    assert cli.run([*words, "--masks-per-image", "4", "--accum-iter", "2", "--dry-run"]) == 0
    assert "for 128 images with 4 masks each at a time" in " ".join(capsys.readouterr().out.split())


def test_the_demo_refuses_a_folder_with_other_files(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.run(["demo", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists()
    assert "is not a run: it contains thesis.txt" in capsys.readouterr().err


def test_compare_gives_a_verdict_and_a_page(run, tmp_path, capsys):
    words = ["--seeds", "1", "--counts", "40", "--min-steps", "1", "--protocols", "knn", "linear"]
    assert cli.run(["compare", str(run), *SETS, *FAST, *words, "--out", str(tmp_path / "c")]) in (0, 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "re-training" in shown
    assert (
        "<svg" in (tmp_path / "c" / "report.html").read_text()
        or "data:image/png" in (tmp_path / "c" / "report.html").read_text()
    )


def test_doctor_exits_with_0_or_1(run, capsys):
    assert cli.run(["doctor", str(run), "--device", "cpu"]) in (0, 1)
    assert "interpolation" in capsys.readouterr().out


def test_several_grid_masks_per_image_are_refused():
    with pytest.raises(UserError, match=r"all masks are the same\. Give 1, or a --predict-ratio below 1"):
        PretrainConfig.from_flags(mask="grid", masks_per_image=2)
    PretrainConfig.from_flags(mask="grid", masks_per_image=2, decoder="cross", predict_ratio=0.5)
