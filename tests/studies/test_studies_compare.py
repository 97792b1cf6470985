"""Tests of compare: images of the arms, accuracies, resuming, errors and verdicts."""

import json
import logging

import numpy as np
import pytest
import timm
import torch

from quarterview.commands.config import RecipeOptions
from quarterview.commands.pretrain import pretrain
from quarterview.data.sources.open import open_source
from quarterview.demo import make_demo_config
from quarterview.errors import UserError
from quarterview.evaluation.config import LabeledImagesConfig, ProbeConfig
from quarterview.evaluation.knn import compute_knn_accuracies
from quarterview.evaluation.labelled import choose_labeled
from quarterview.evaluation.linear import LogisticRegression
from quarterview.evaluation.probe import open_probe
from quarterview.evaluation.timm_backbone import TimmBackbone, load_timm_backbone
from quarterview.models.classifier import Classifier, ClassifierConfig
from quarterview.models.create import create_model
from quarterview.studies import compare_command
from quarterview.studies.compare import compare
from quarterview.studies.compare_arms import create_untrained_backbone, load_arms, make_arm_finetune_config
from quarterview.studies.compare_results import RANDOM_ENCODER, compare_with_baselines, compare_with_first_arm
from quarterview.studies.config import CompareConfig, parse_num_labels
from quarterview.training import checkpoint
from quarterview.weights.loading import make_metadata

TRAIN, TEST = "shapes:120:size=16", "shapes:60:seed=1:size=16"
FLAGS = {
    "train": (TRAIN,),
    "test": (TEST,),
    "counts": ("1%", "40", "100%"),
    "seeds": 2,
    "k": 5,
    "batch_size": 20,
    "epochs": 1,
    "min_steps": 3,
    "randaugment": None,
    "precision": "fp32",
    "workers": 0,
    "lr": 1e-3,
    "device": "cpu",
}


def save(folder, model):
    checkpoint.save(
        folder / "checkpoints", 1, {"model": model.state_dict()}, {"step": 1}, make_metadata(model.config)
    )
    return str(folder)


def autoencoder(seed, **options):
    torch.manual_seed(seed)
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    sizes = {"image_size": 16, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return create_model("mae_vit_32x2x2_patch4", **{**sizes, **statistics, **options})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return save(folder / "a", autoencoder(0)), save(folder / "b", autoencoder(1))


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """A comparison of two arms by all protocols, run twice into the same folder."""
    out = tmp_path_factory.mktemp("compare") / "out"
    config = CompareConfig.from_flags(arms=(*runs, "scratch", "random"), out=str(out), **FLAGS)
    found = compare(config, ["quarterview", "compare"])
    record = json.loads((out / "results" / "compare.json").read_text("utf-8"))
    weights = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/model.safetensors")}
    again = compare(config)
    assert weights == {path: path.stat().st_mtime_ns for path in weights}, "complete runs were trained again"
    assert again.statistics.verdicts == found.statistics.verdicts
    return config, found, record, out


def accuracies(record, protocol, arm):
    return {
        row["labels"]: row["accuracy"]["by_seed"]
        for row in record["results"]["accuracies"]
        if (row["protocol"], row["arm"]) == (protocol, arm)
    }


# ---------------------------------------------------------------------- accuracies


def test_results_contain_every_protocol_count_and_arm(compared, runs):
    _, found, record, out = compared
    rows = {(r["protocol"], r["labels"], r["arm"]) for r in record["results"]["accuracies"]}
    frozen = {
        (p, n, a) for p in ("knn", "linear") for n in (40, 120) for a in (*runs, RANDOM_ENCODER, "raw pixels")
    }
    assert rows == frozen | {("finetune", n, a) for n in (40, 120) for a in (*runs, "scratch")}
    assert all(len(r["accuracy"]["by_seed"]) == 2 for r in record["results"]["accuracies"])
    verdicts = found.statistics.verdicts
    assert [v.arm for v in verdicts] == list(runs)
    assert found.status == verdicts[0].answer
    assert (found.report, found.results_file) == (out / "report.html", out / "results" / "compare.json")
    assert all(v.sentence.startswith(("Pre-", "Cannot")) for v in verdicts)
    assert "1% is left out: of 120" in record["results"]["notes"][0]
    assert {(r["protocol"], r["labels"]) for r in record["results"]["between"]} == {
        (p, n) for p in ("knn", "linear", "finetune") for n in (40, 120)
    }


def test_frozen_accuracies_equal_those_of_the_probe_commands(compared, runs):
    """The commands knn and linear do not use the code of compare; the seeds are the same."""
    _, _, record, _ = compared
    names = {"this model": runs[0], "random encoder": RANDOM_ENCODER, "raw pixels": "raw pixels"}
    for seed in (0, 1):
        probe = ProbeConfig(run=runs[0], labels=40, seed=seed, device="cpu")
        data = open_probe(LabeledImagesConfig((TRAIN,), (TEST,)), probe).extract_features()
        knn = {
            row.features: row.accuracy for row in compute_knn_accuracies(data, (5,)) if row.vote == "weighted"
        }
        for name, arm in names.items():
            assert accuracies(record, "knn", arm)[40][seed] == pytest.approx(knn[name])
            linear = dict(LogisticRegression(0)(data[name]))["accuracy"]
            assert accuracies(record, "linear", arm)[40][seed] == pytest.approx(linear)


def test_fine_tuned_accuracies_equal_those_of_the_runs(compared, runs):
    _, _, record, out = compared
    for arm, start in ((runs[0], "a-"), (runs[1], "b-"), ("scratch", "scratch-")):
        for count in (40, 120):
            for seed in (0, 1):
                (folder,) = out.glob(f"runs/{start}*-{count}-seed{seed}")
                result = json.loads((folder / "results" / "finetune.json").read_text("utf-8"))
                assert accuracies(record, "finetune", arm)[count][seed] == result["results"]["accuracy"]
                assert result["settings"]["loop"]["seed"] == seed
                assert result["data"]["train_images"] == count


def test_arms_use_the_same_images_with_the_same_seed_and_others_with_another_seed(compared):
    config, _, _, out = compared
    trained = {
        folder.name: json.loads((folder / "results" / "finetune.json").read_text("utf-8"))["data"]["train"]
        for folder in out.glob("runs/*-40-seed*")
    }
    for seed in (0, 1):
        assert len({data for name, data in trained.items() if name.endswith(f"seed{seed}")}) == 1
    assert len(set(trained.values())) == 2
    labels = torch.tensor([open_source(TRAIN, 3).label(i) for i in range(120)])
    chosen = [set(choose_labeled(labels, n, config.loop.seed).tolist()) for n in (40, 80)]
    assert chosen[0] < chosen[1]


def test_the_recipe_differs_only_in_the_start_and_the_layer_decay_of_scratch(runs, tmp_path):
    config = CompareConfig.from_flags(
        arms=runs, out=str(tmp_path), **{**FLAGS, "layer_decay": 0.6, "pool": "cls"}
    )
    arms = load_arms(config)
    ours, theirs = (
        make_arm_finetune_config(config, arms, start, 40, 3, tmp_path / "r").flags()
        for start in (runs[0], "scratch")
    )
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ == {"run", "model", "image_size", "cls_tokens", "layer_decay"}
    assert (ours["layer_decay"], theirs["layer_decay"]) == (0.6, 1.0)
    assert [ours[name] for name in ("steps", "seed", "labels", "pool")] == [3, 3, 40, "cls"]
    longer = make_arm_finetune_config(config, arms, runs[0], 120, 0, tmp_path / "r").loop
    assert (longer.steps, longer.total_steps(120)) == (None, 6)


def test_protocols_of_frozen_features_do_not_fine_tune(runs, tmp_path):
    config = CompareConfig.from_flags(
        arms=(runs[0],), out=str(tmp_path), **{**FLAGS, "protocols": ("knn",), "counts": ("50%",)}
    )
    found = compare(config)
    assert not (tmp_path / "runs").exists()
    assert "nearest neighbours among 60 labelled images" in found.statistics.verdicts[0].sentence


def test_the_command_prints_accuracies_and_verdicts_and_the_function_prints_nothing(
    runs, tmp_path, capsys, caplog
):
    flags = {**FLAGS, "protocols": ("knn", "knn"), "counts": ("1%", "50%", "50%")}
    config = CompareConfig.from_flags(arms=runs * 2, out=str(tmp_path), **flags)
    with caplog.at_level(logging.INFO, "quarterview"):
        found = compare(config)
    assert capsys.readouterr().out == ""
    assert "Evaluated random encoder, seed 1" in caplog.messages
    assert any(text.startswith("--counts 1% is left out: of 120 labelled images") for text in caplog.messages)
    assert [verdict.arm for verdict in found.statistics.verdicts] == list(runs)  # without duplicates
    code = compare_command.main(config, ["quarterview", "compare"], RecipeOptions())
    assert code == (0 if found.status == "helped" else 1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "nearest neighbours: accuracies, and differences in percentage points, with 95% intervals" in shown
    for verdict in found.statistics.verdicts:
        assert verdict.sentence in shown
    assert f"The report is {found.report}, and the results are in {found.results_file}." in shown


def test_arms_are_compared_with_the_first_one():
    right = {name: np.arange(10)[None] < n for name, n in (("x", 5), ("y", 8), ("scratch", 2))}
    correct = {("finetune", 5, name): is_correct for name, is_correct in right.items()}
    (row,) = compare_with_first_arm(correct, ["x", "y"])
    assert (row.arm, row.contrast.baseline) == ("y", "x")
    assert row.contrast.difference.mean == pytest.approx(0.3)


def test_frozen_features_are_compared_with_raw_pixels_too():
    right = np.ones((2, 10), dtype=bool)
    correct = {("knn", 5, arm): right for arm in ("x", RANDOM_ENCODER, "raw pixels")}
    correct |= {("finetune", 5, arm): right for arm in ("x", "scratch")}
    tuned, knn = compare_with_baselines(correct, "x")
    assert [c.baseline for c in tuned.contrasts] == ["scratch"]
    assert [c.baseline for c in knn.contrasts] == [RANDOM_ENCODER, "raw pixels"]


# ---------------------------------------------------------------------- arms of other kinds


def test_a_classifier_is_evaluated_frozen_only(tmp_path):
    model = Classifier(ClassifierConfig("mae_vit_32x2x2_patch4", (16, 16), classes=10))
    run = save(tmp_path / "c", model)
    config = CompareConfig.from_flags(
        arms=(run,), out=str(tmp_path / "o"), **{**FLAGS, "protocols": ("knn", "linear")}
    )
    assert len(compare(config).statistics.verdicts) == 1
    with pytest.raises(UserError, match="fine-tuned classifier"):
        compare(config.with_flags(protocols="finetune"))


def test_vision_transformers_of_timm_are_backbones():
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)
    backbone = TimmBackbone(vit, "vit_tiny_patch16_224").eval()
    images = torch.rand(2, 3, 32, 32)
    assert backbone.config.image_size == (32, 32)
    assert torch.equal(backbone.encode(images), vit.forward_features(images))
    assert backbone.encode(images).shape == (2, 5, 192)


def test_an_untrained_timm_backbone_depends_on_the_seed_only():
    model, _ = load_timm_backbone("vit_tiny_patch16_224", pretrained=False)
    one, same, other = (
        create_untrained_backbone(model, seed).blocks[0].attn.qkv.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_other_models_of_timm_are_errors():
    with pytest.raises(UserError, match="is not a plain vision transformer"):
        load_timm_backbone("resnet10t", pretrained=False)
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        load_timm_backbone("vit_tiny_patch16_225")


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("count", "means"), [("1%", 10), ("0.5%", 5), ("100%", 1000), ("7", 7), ("0.01%", 1)]
)
def test_counts_are_percentages_or_integers(count, means):
    assert parse_num_labels(count, 1000) == means


@pytest.mark.parametrize("count", ["", "%", "0", "0%", "101%", "-5", "ten", "1.5", "nan%"])
def test_other_counts_are_errors(count):
    with pytest.raises(UserError, match=rf"^--counts is {count or 'empty'}. Give a percentage such as 10%"):
        parse_num_labels(count, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocols": ("knm",)}, "Did you mean 'knn'"),
        ({"seeds": 0}, "--seeds 0 is out of range"),
        ({"counts": ("0%",)}, "--counts is 0%. Give"),
        ({"min_difference": 0.0}, "--min-difference 0.0 is out of range"),
        ({"scratch_layer_decay": 0.0}, "--scratch-layer-decay 0.0 is out of range"),
        ({"labels": 5}, "Unknown flag --labels"),
        ({"blocks": ("1", "2")}, "--blocks 1 2 is not supported with compare"),
        ({"batch_size": 3}, "--batch-size is 3, but mixup and CutMix"),
    ],
)
def test_invalid_flags_of_a_comparison(options, message):
    with pytest.raises(UserError, match=message):
        CompareConfig.from_flags(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("scratch", "random")}, "no pre-trained arm"),
        ({"arms": ("nowhere",)}, "Cannot read nowhere: it does not exist"),
        ({"train": ()}, "--train is missing"),
        ({"protocols": ()}, "--protocols is missing"),
        (
            {"arms": ("timm:vit_tiny_patch16_224",), "protocols": ("finetune",)},
            "is not supported with --protocols finetune",
        ),
        ({"counts": ("1%",)}, "--counts 1% leaves nothing to compare. Give 20 to 120"),
        ({"counts": ("500",)}, "--counts 500 leaves nothing to compare"),
    ],
)
def test_impossible_comparisons_are_errors(options, message, runs, tmp_path):
    config = CompareConfig.from_flags(
        **{**FLAGS, "arms": (runs[0],), "out": str(tmp_path / "out"), **options}
    )
    with pytest.raises(UserError, match=message):
        compare(config)
    assert not (tmp_path / "out").exists()


def test_arms_with_different_channels_are_an_error(runs, tmp_path):
    gray = save(tmp_path / "gray", autoencoder(0, in_chans=1, mean=(0.5,), std=(0.25,)))
    with pytest.raises(UserError, match=r"has 3 input channels, but \S+ has 1\."):
        load_arms(CompareConfig.from_flags(arms=(runs[0], gray)))


# ---------------------------------------------------------------------- the verdict on real runs


@pytest.mark.slow
def test_the_demo_run_helped_and_a_run_of_five_steps_did_not(tmp_path):
    pretrain(make_demo_config(str(tmp_path / "demo"), 0))
    pretrain(make_demo_config(str(tmp_path / "five"), 0).with_flags(steps=5))
    config = CompareConfig.from_flags(
        arms=(str(tmp_path / "demo"), str(tmp_path / "five")),
        out=str(tmp_path / "out"),
        train=("shapes:500:seed=1",),
        test=("shapes:1500:seed=2",),
        counts=("100%",),
        steps=100,
        batch_size=32,
        lr=1e-3,
        warmup_epochs=None,
        smoothing=0.0,
        mixup=0.0,
        cutmix=0.0,
        randaugment=None,
        erase_prob=0.0,
        crop_min=0.4,
        device="cpu",
    )
    demo, five = compare(config).statistics.verdicts
    assert demo.answer == "helped", demo.sentence
    assert five.answer in ("did not help", "cannot tell"), five.sentence
