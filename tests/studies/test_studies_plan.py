"""Tests of the plan of a study: unique arms, steps within the budget, and operations as torch counts them."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from quarterview.commands.config import PretrainConfig
from quarterview.config import PATH
from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.methods.base import MethodContext, build
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import TokenTarget
from quarterview.studies.arm import get_labeled_split
from quarterview.studies.config import StudyConfig, parse_budget
from quarterview.studies.lengths import allocate_budget
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    choose_num_heads,
    compute_flops_per_image,
    make_base_config,
    make_tokenizer_config,
    plan_arms,
)
from quarterview.studies.study import Arm, Finding, Study, Table, read_study
from quarterview.studies.timing import (
    FinetuningTime,
    StudyTimings,
    TrainingTime,
    list_evaluation_parts,
    measure_finetuning_time,
    measure_training_time,
)
from quarterview.training.metric_writers import read_metrics

CONFIG = StudyConfig(
    data=("shapes",),
    train=("shapes",),
    test=("shapes",),
    out="x",
    model="mae_vit_32x2x2_patch4",
    batch_size=64,
)


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[
            ("30m", ("minutes", 30)),
            ("2h", ("minutes", 120)),
            ("90s", ("minutes", 1.5)),
            ("1.5h", ("minutes", 90)),
        ],
        *[("2e6images", ("images", 2e6)), ("500images", ("images", 500)), ("1e15flops", ("flops", 1e15))],
    ],
)
def test_budgets(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "30", "m", "-3m", "0m", "1e400images", "3 m", "1..5h", "nanm", "2days"])
def test_invalid_budgets(text):
    with pytest.raises(UserError, match=rf"^--budget is {re.escape(text)}. Give a time such as"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "lots"}, "--budget is lots"),
        ({"seeds": 0}, "--seeds 0 is out of range"),
        ({"jobs": 0}, "--jobs 0 is out of range"),
        ({"measures": ("knm",)}, "Did you mean 'knn'"),
        ({"measures": "linear@101"}, "linear@101 has an invalid percentage of visible patches"),
        ({"device": "gpu"}, "--device"),
    ],
)
def test_invalid_flags_of_a_study(values, message):
    with pytest.raises(UserError, match=message):
        StudyConfig(**values)


def test_single_values_become_tuples():
    config = StudyConfig(data="a", measures="knn", image_size=32)
    assert (config.data, config.measures, config.image_size) == (("a",), ("knn",), (32, 32))


# ---------------------------------------------------------------------- arms


@pytest.mark.parametrize("name", STUDIES)
def test_every_named_study_can_be_planned(name):
    config = replace(CONFIG, budget="1e5images", model=None)
    arms = allocate_budget(plan_arms(STUDIES[name], config, "tokenizer"), config).arms
    assert len({one.key for one in arms}) == len(arms)
    for one in arms:
        expected = (
            0 if one.arm.start != "pretrain" else round(1e5 * one.arm.length / one.config.loop.batch_size)
        )
        assert one.steps == expected
        assert one.measures


def test_equal_arms_are_planned_once():
    config = replace(CONFIG, model=None)
    arms = plan_arms(STUDIES["table1"], config, "tokenizer")
    rows = sum(len(table.arms) for table in STUDIES["table1"].tables)
    # The default arm is part of tables 1a, 1c, 1d, 1e and 1f.
    assert len(arms) == rows - 4
    default = next(one for one in arms if one.config == make_base_config(STUDIES["table1"], config))
    assert set(default.measures) == {"finetune", "linear"}


def test_measures_can_be_restricted():
    arms = plan_arms(STUDIES["baselines"], replace(CONFIG, measures=("knn",)), "tokenizer")
    assert {one.measures for one in arms} == {("knn",)}
    with pytest.raises(UserError, match="Mask ratio"):
        plan_arms(STUDIES["mask-ratio"], replace(CONFIG, measures=("knn",)), "tokenizer")


def test_accuracies_of_the_paper():
    tables = {table.title: table for study in STUDIES.values() for table in study.tables}
    figures = {arm.name: arm.paper for arm in tables["Mask sampling"].arms}
    assert figures["block 75%"] == {"finetune": 82.8, "linear": 63.9}
    assert figures["grid 75%"] == {"finetune": 84.0, "linear": 66.0}
    assert {arm.name: arm.paper.get("linear") for arm in tables["Mask ratio"].arms} == {
        **{"10%": 54.6, "25%": None, "50%": 69.9, "75%": 73.5, "90%": 66.1}
    }
    mae, moco = tables["Partial fine-tuning"].arms
    assert (mae.paper["finetune:1"], moco.paper["finetune:1"]) == (81.0, 79.9)
    for table in tables.values():  # each finding must hold for the accuracies of the paper, if it has both
        for finding in table.findings:
            papers = {arm.name: arm.paper for arm in table.arms}
            first = papers[finding.first].get(finding.measure)
            second = papers[finding.second].get(finding.second_measure or finding.measure)
            if first is None or second is None:
                continue
            if finding.over and finding.over_measure:
                first -= papers[finding.over[0]][finding.over_measure]
                second -= papers[finding.over[1]][finding.over_measure]
            assert first > second - (1 if finding.rule == "as good" else 0), finding


# ---------------------------------------------------------------------- lengths


def test_equal_operations():
    config = replace(CONFIG, budget="1e12flops")
    for one in allocate_budget(plan_arms(STUDIES["baselines"], config, "tokenizer"), config).arms:
        if one.steps:
            spent = (
                one.steps
                * one.config.loop.batch_size
                * compute_flops_per_image(one.config, config.codebook_size)
            )
            assert abs(spent / 1e12 - 1) < 0.5 / one.steps + 1e-6


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mae", {}),
        ("mae", {"encoder_mask_tokens": True}),
        ("mae", {"target": "pca", "pca_components": 7}),
        ("mae", {"target": "hog"}),
        ("beit", {"tokenizer": "tokens"}),
        ("denoising", {}),
        ("supervised", {}),
        ("simclr", {}),
        ("byol", {}),
        ("mocov3", {}),
        ("mae", {"masks_per_image": 2, "target": "tokens", "tokenizer": "tokens"}),
        ("denoising", {"cls_tokens": 4, "fused_blocks": (1,)}),
        ("simclr", {"cls_tokens": 4}),
    ],
)
def test_flops_agree_with_the_count_of_torch(method, changes):
    decoder, heads = (
        {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1},
        {"proj_hidden_dim": 40, "proj_output_dim": 24},
    )
    sizes = {"mae": decoder, "denoising": decoder, "simclr": heads, "byol": heads, "mocov3": heads}
    config = PretrainConfig.from_flags(
        model="mae_vit_32x2x2_patch4",
        image_size=16,
        method=method,
        **{**sizes.get(method, {}), **changes},
    )
    encoder = replace(config.model, mean=(0.0,) * 3, std=(1.0,) * 3)
    made = build(
        config.method, MethodContext(encoder, seed=0, num_steps=10, codebook_size=512, num_classes=10)
    ).train()
    if isinstance(made.model, MaskedAutoencoder) and isinstance(made.model.target, TokenTarget):

        class Tokenizer:
            codebook_size = 512

            def tokenize(self, images):
                return torch.zeros(len(images), 16, dtype=torch.int64)

        made.model.target.set_tokenizer(Tokenizer())
    ids = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 16, 16), ids, ids * 0, ids, torch.randn(4, 3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        made(batch).loss.backward()
    counted = counter.get_total_flops() / 4
    expected = compute_flops_per_image(config, 512)
    assert abs(expected / counted - 1) < 0.06  # the closed form omits small heads and the first gradient


def make_timings(arms, s_per_image=0.01, tokenizer=0.0, setup_s=0.5, frozen=2.0) -> StudyTimings:
    """Return timings as they might be measured."""
    trained = [planned for planned in arms if planned.arm.start == "pretrain"]
    parts = {part for planned in arms for part in list_evaluation_parts(planned)}
    tuned = {part for part in parts if part.measures[0].startswith("finetune")}
    return StudyTimings(
        {planned.key: TrainingTime(setup_s, s_per_image) for planned in trained},
        TrainingTime(setup_s if tokenizer else 0.0, tokenizer),
        0.0,
        dict.fromkeys(parts - tuned, frozen),
        dict.fromkeys(tuned, FinetuningTime(1.0, 0.1)),
    )


def test_times_are_measured_by_short_runs(tmp_path):
    flags = {"data": ("shapes:96:size=16",), "train": ("shapes:80:size=16:seed=1",), "image_size": 16}
    flags |= {"test": ("shapes:60:size=16:seed=2",), "labels": 40, "device": "cpu", "workers": 0}
    config = replace(CONFIG, **flags, batch_size=16, tune_steps=4)
    one = plan_arms(STUDIES["schedule"], config, "tokenizer")[0]
    its = one.config.with_flags(precision="fp32")
    began = time.perf_counter()
    training = measure_training_time(its, tmp_path / "trained")
    took = time.perf_counter() - began
    rows = read_metrics(tmp_path / "trained")
    assert [row["step"] for row in rows] == [6, 12]
    assert training.s_per_image == 1 / rows[1]["images_per_s"]  # of the second half, after warm-up
    assert training.setup_s == pytest.approx(max(0, took - 12 * 16 * training.s_per_image), abs=0.5)
    part = next(part for part in list_evaluation_parts(one) if part.measures == ("finetune",))
    get_labeled_split(config, 3)  # opened before the measurement, which does not include it
    began = time.perf_counter()
    tuning = measure_finetuning_time(part, its, config, tmp_path / "tuned")
    took = time.perf_counter() - began
    rows = read_metrics(tmp_path / "tuned" / "finetune")
    assert rows[-1]["step"] == 4
    assert tuning.s_per_step == 64 / rows[-1]["images_per_s"]
    assert tuning.setup_s == pytest.approx(max(0, took - 4 * tuning.s_per_step), abs=0.5)


def test_evaluation_times_are_measured_for_each_network():
    config = replace(CONFIG, model=None, budget="90m", seeds=1, tune_steps=100)
    arms = plan_arms(STUDIES["scaling"], config, "tokenizer")
    timings = make_timings(arms)
    parts = {one.config.model.model: list_evaluation_parts(one) for one in arms}
    assert len(parts) == len({part for each in parts.values() for part in each}) == 3
    large = parts["mae_vit_base_patch4"][0]
    slow = replace(timings, finetuning={**timings.finetuning, large: FinetuningTime(1.0, 1.0)})
    one, two = (allocate_budget(arms, config, each).arms for each in (timings, slow))
    difference = 2 * 100 * 0.9 / (3 * 64 * 0.01)  # two arms, 100 steps, 0.9 s more each
    trained = [(a.steps, b.steps) for a, b in zip(one, two, strict=True) if a.steps]
    assert all(a - b == pytest.approx(difference, abs=1) for a, b in trained)


@given(minutes=st.integers(8, 200), seeds=st.integers(1, 5), num_jobs=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_budget_of_minutes_is_met(minutes, seeds, num_jobs):
    """The study ends in time if each free job takes the next run, the longest first within a seed."""
    config = replace(CONFIG, budget=f"{minutes}m", seeds=seeds, tune_steps=50)
    arms = plan_arms(STUDIES["schedule"], config, "tokenizer")
    found, tune_steps = allocate_budget(arms, config, make_timings(arms), 10.0, num_jobs)
    assert tune_steps == 50
    full_length = found[-1].steps
    assert [one.steps for one in found] == [
        pytest.approx(full_length * fraction, abs=0.51) for fraction in (1 / 8, 1 / 4, 1 / 2, 1)
    ]
    took = sorted((0.5 + 2 + 1 + 50 * 0.1 + one.steps * 64 * 0.01 for one in found), reverse=True)
    free = [10.0] * num_jobs
    for seconds in took * seeds:
        free[free.index(min(free))] += seconds
    assert max(free) <= 60 * minutes
    if num_jobs == 1:
        assert max(free) > 0.88 * 60 * minutes  # most of the budget is used


def test_the_budget_includes_the_training_of_the_tokenizer():
    config = replace(CONFIG, budget="20m", seeds=1, measures=("linear",))
    arms = plan_arms(STUDIES["tokens"], config, "tokenizer")
    found = allocate_budget(arms, config, make_timings(arms, tokenizer=0.02)).arms
    seconds = 0.5 + sum(0.5 + 2 + one.steps * 64 * 0.01 for one in found) + found[0].steps * 64 * 0.02
    assert 0.88 * 1200 < seconds <= 0.91 * 1200


@pytest.mark.parametrize(("minutes", "expected"), [(200, 500), (1, 30)])
def test_fine_tuning_is_shortened_to_fit_the_budget(minutes, expected):
    config = replace(CONFIG, budget=f"{minutes}m", seeds=1)
    arms = plan_arms(STUDIES["mask-ratio"], config, "tokenizer")
    timings = make_timings(arms, frozen=0.1)
    assert allocate_budget(arms, config, timings).tune_steps == expected
    between = allocate_budget(arms, replace(config, budget="6m"), timings).tune_steps
    judging = 5 * (0.5 + 0.1 + 1 + between * 0.1)
    assert 30 < between < 500
    assert judging <= 0.9 * 360 / 2 < judging + 5 * 10 * 0.1


def test_a_budget_too_small_for_the_evaluation_is_an_error():
    config = replace(CONFIG, budget="1m")
    arms = plan_arms(STUDIES["mask-ratio"], config, "tokenizer")
    with pytest.raises(UserError, match="without any training, setup and evaluation take"):
        allocate_budget(arms, config, make_timings(arms, frozen=30.0))


def test_decoder_width_as_a_fraction_of_the_encoder_width():
    config = replace(CONFIG, model="mae_vit_tiny_patch16")
    widths = {
        one.arm.name: (one.config.method.decoder_width, one.config.method.decoder_heads)
        for one in plan_arms(STUDIES["decoder"], config, "tokenizer")
        if one.arm.decoder_share
    }
    assert widths == {
        **{"1/8 of the encoder's": (24, 1), "1/4 of the encoder's": (48, 1)},
        **{"1/2 of the encoder's": (96, 3), "the encoder's": (192, 6)},
    }


@given(st.integers(1, 300).map(lambda n: 4 * n))
def test_heads_divide_the_width_evenly(width):
    heads = choose_num_heads(width)
    assert width % heads == 0
    assert heads == 1 or width // heads >= 32


def test_decoder_and_fused_blocks_depend_on_the_encoder_of_the_arm():
    small, large = {"model": "mae_vit_32x4x2_patch4"}, {"model": "mae_vit_64x8x2_patch4"}
    table = Table(
        "Sizes",
        (
            *(Arm(f"share {i}", its, decoder_share=0.5) for i, its in enumerate((small, large))),
            *(Arm(f"fused {i}", {**its, "fused_blocks": "study"}) for i, its in enumerate((small, large))),
        ),
    )
    arms = {one.arm.name: one.config for one in plan_arms(Study("s", "", (table,)), CONFIG, "tokenizer")}
    assert [arms[f"share {i}"].method.decoder_width for i in (0, 1)] == [16, 32]
    assert [arms[f"fused {i}"].method.fused_blocks for i in (0, 1)] == [(1,), (1, 3, 5)]
    with pytest.raises(
        UserError, match=r"^Arm fused blocks \(MFF\) fuses blocks, but the encoder has only 2"
    ):
        plan_arms(STUDIES["later"], CONFIG, "tokenizer")


def test_arms_with_their_own_images_or_tokenizer_are_distinct():
    arms = (
        Arm("default"),
        Arm("others", {"data": ("shapes:9",)}),
        *(
            Arm(f"tokens of {name}", {"target": "tokens", "tokenizer": name})
            for name in ("study", "mine", "theirs")
        ),
        Arm("the same tokens", {"target": "tokens", "tokenizer": "study"}),
    )
    study = Study("s", "", (Table("Sources", arms),))
    found = {one.arm.name: one for one in plan_arms(study, CONFIG, "tokenizer")}
    assert list(found) == ["default", "others", "tokens of study", "tokens of mine", "tokens of theirs"]
    moved = replace(CONFIG, data=("elsewhere",))
    assert [one.key for one in plan_arms(study, moved, "tokenizer")] == [one.key for one in found.values()]


def test_the_base_and_the_study_can_have_different_tokenizers(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("target: tokens\ntokenizer: mine\n")
    table = Table("Tokenizers", (Arm("the base's"), Arm("the study's", {"tokenizer": "study"})))
    arms = plan_arms(Study("s", "", (table,)), replace(CONFIG, base=str(base)), "tokenizer")
    assert [one.config.method.tokenizer for one in arms] == ["mine", "tokenizer"]


def test_an_arm_can_have_an_encoder_that_does_not_fit_the_base():
    table = Table("Sizes", (Arm("a"), Arm("b", {"model": "mae_vit_32x4x1_patch7", "image_size": (28, 28)})))
    pocket = replace(CONFIG, base="pocket", model=None)
    assert plan_arms(Study("s", "", (table,)), pocket, "tokenizer")[1].config.model.num_patches == 16


def test_arms_use_the_defaults_of_their_method_and_the_values_of_the_base():
    config = replace(CONFIG, model=None, base="pocket")
    arms = {one.arm.name: one.config for one in plan_arms(STUDIES["baselines"], config, "tokenizer")}
    decay = {name: its.optim.weight_decay for name, its in arms.items()}
    assert [decay[name] for name in ("MAE", "denoising", "SimCLR", "MoCo v3")] == [0.05, 0.05, 0.1, 0.1]
    assert {its.optim.lr for its in arms.values()} == {1e-3}
    assert arms["denoising"].method.decoder_width == arms["MAE"].method.decoder_width == 32
    beit = arms["BEiT"].method
    assert (beit.tokenizer, beit.mask, beit.mask_ratio) == ("tokenizer", "block", 0.4)


def test_flags_of_the_study_override_its_base_which_overrides_the_recipe():
    study = Study("s", "", (), {"image_size": 48, "batch_size": 8, "workers": 0, "lr": 0.5, "method": "byol"})
    base = make_base_config(study, replace(CONFIG, base="pocket", model=None, image_size=None, batch_size=4))
    assert (base.model.model, base.model.image_size) == ("mae_vit_64x4x2_patch8", (48, 48))
    assert (base.loop.batch_size, base.loader.workers, base.optim.lr) == (4, 0, 0.5)
    assert (base.method.name, base.optim.weight_decay) == ("byol", 0.1)


def test_keys_of_arms_do_not_depend_on_paths():
    assert {"out", "data", "tokenizer", "init_from", "resume"} <= PretrainConfig().flags_marked(PATH)
    one, two = (
        [arm.key for arm in plan_arms(STUDIES["tokens"], config, folder)]
        for config, folder in (
            (CONFIG, "tokenizer"),
            (
                replace(CONFIG, data=("moved",), out="moved", workers=3, device="cpu", seed=7),
                "moved/tokenizer",
            ),
        )
    )
    assert one == two
    (fast,) = (
        plan_arms(Study("s", "", (Table("T", arms),)), CONFIG, "tokenizer")[1:]
        for arms in ((Arm("a"), Arm("b", {"compile": True})),)
    )
    assert len(fast) == 1  # a distinct arm, although a run can be resumed with another value


def test_sizes_of_heads_and_tokenizers_can_be_set():
    config = replace(CONFIG, model=None, proj_hidden_dim=32, codebook_size=64, tokenizer_width=16)
    arms = plan_arms(STUDIES["baselines"], config, "tokenizer")
    widths = {one.config.method.name: getattr(one.config.method, "proj_hidden_dim", None) for one in arms}
    assert [widths[name] for name in ("simclr", "byol", "mocov3")] == [32] * 3
    tokenizer = make_tokenizer_config(make_base_config(STUDIES["baselines"], config), "tokenizer", config)
    assert (tokenizer.method.codebook_size, tokenizer.method.tokenizer_width) == (64, 16)
    assert (tokenizer.optim.lr, tokenizer.optim.weight_decay, tokenizer.run.out) == (1e-3, 0.0, "tokenizer")


# ---------------------------------------------------------------------- files


GIVEN = """
purpose: Does hiding more help?
base: {decoder_depth: 1}
tables:
  - title: Ratios
    axis: ratio
    measures: [linear, "finetune:1"]
    arms:
      low: {mask_ratio: 0.25, x: 25}
      high: {mask_ratio: 0.75, x: 75, length: 0.5}
      none: random
      wide: {model: mae_vit_48x2x2_patch4, start: random, decoder_share: 0.5}
    findings:
      - {claim: more is better, first: high, second: low, measure: linear}
      - {claim: some is as good, first: low, second: none, measure: linear, rule: as good}
"""


def test_read_study(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GIVEN)
    expected = Study(
        "mine",
        "Does hiding more help?",
        (
            Table(
                "Ratios",
                (
                    Arm("low", {"mask_ratio": 0.25}, x=25),
                    Arm("high", {"mask_ratio": 0.75}, length=0.5, x=75),
                    Arm("none", start="random"),
                    Arm("wide", {"model": "mae_vit_48x2x2_patch4"}, "random", decoder_share=0.5),
                ),
                (
                    Finding("more is better", "high", "low", "linear"),
                    Finding("some is as good", "low", "none", "linear", "as good"),
                ),
                ("linear", "finetune:1"),
                axis="ratio",
            ),
        ),
        {"decoder_depth": 1},
    )
    assert read_study(path) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mask_ratio: 0.25", "mask_ration: 0.25", "mask_ratio"),
        ("first: high", "first: hi", "'high'"),
        ("measure: linear", "measure: liner", "liner"),
        ("[linear,", "[probe,", "probe"),
        ("rule: as good", "rule: equal", "as good"),
        ("claim: more is better, ", "", "claim"),
        ("length: 0.5", "length: -1", "length in arm high .* is -1. Give a number above 0"),
        ("length: 0.5", "length: true", "length in arm high .* is True. Give a number"),
        ("x: 25", "x: .nan", "x in arm low .* is nan. Give a number"),
        ("mask_ratio: 0.25", "epochs: 3", "epochs in arm low"),
        ("base: {decoder_depth: 1}", "base: {seed: 1}", "seed in study .* base"),
        ("base: {decoder_depth: 1}", "base: {data: x}", "data in study .* base"),
        ("decoder_share: 0.5", "decoder_share: 0.5, decoder_width: 8", "is not supported with decoder_width"),
        ("measure: linear}", "measure: linear, over_measure: linear}", "over_measure linear without over"),
        ("start: random", "start: randum", "randum"),
        ("tables:", "table:", "tables"),
        ("base: {decoder_depth: 1}", "base: {decoder_dept: 1}", "Did you mean --decoder-depth"),
        ("base: {decoder_depth: 1}", "base: 3", "base in study .* is 3. Give a mapping of fields"),
        (GIVEN, "[1, 2]", "not a mapping of fields"),
        (GIVEN, "tables: []", "has no tables"),
    ],
)
def test_invalid_study_files(tmp_path, old, new, message):
    assert old in GIVEN
    path = tmp_path / "mine.yaml"
    path.write_text(GIVEN.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_study(path)


@pytest.mark.parametrize(
    ("base", "arm", "expected"),
    [
        ("{}", "{method: simclr}", {"weight_decay": 0.1, "lr": 1e-3}),
        ("{}", "{objective: simclr}", {"weight_decay": 0.05, "lr": 1e-3}),
        ("{}", "{objective: simclr, weight_decay: 0.2, decoder_depth: 8}", {"weight_decay": 0.2}),
        (
            "{weight_decay: 0.3}",
            "{objective: mocov3, temperature: null}",
            {"weight_decay": 0.3, "temperature": 0.2},
        ),
        (
            "{}",
            "{objective: beit, tokenizer: study, target: tokens, encoder_mask_tokens: true, "
            "decoder_depth: 0}",
            {"mask": "random", "mask_ratio": 0.75, "tokenizer": "tokenizer"},
        ),
        ("{objective: denoising, noise: 0.5}", "{noise: 2.0}", {"method": "denoising", "noise_std": 2.0}),
        ("{objective: supervised}", "{}", {"blr": 1.5e-4, "weight_decay": 0.05}),
        (
            "{method: {name: byol, momentum: 0.9}}",
            "{lr: 2e-3}",
            {"method": "byol", "momentum": 0.9, "lr": 2e-3},
        ),
    ],
)
def test_methods_of_version_0_1_and_of_this_version(tmp_path, base, arm, expected):
    """With the field `objective` of version 0.1, a method keeps the defaults of that version."""
    path = tmp_path / "mine.yaml"
    table = f"{{title: T, arms: {{this: {arm}, other: {{length: 0.5}}}}}}"
    path.write_text(f"base: {base}\ntables: [{table}]\n")
    flags = plan_arms(read_study(path), CONFIG, "tokenizer")[0].config.flags()
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["cpu_slow", "cpu_plain", "cpu_scaling"])
def test_study_files_in_benchmarks_can_be_planned(name):
    study = read_study(Path(__file__).parents[2] / "benchmarks" / f"{name}.yaml")
    arms = {one.arm.name: one.config for one in plan_arms(study, replace(CONFIG, model=None), "tokenizer")}
    if name == "cpu_slow":
        beit = arms["BEiT"].method
        assert (beit.name, beit.mask, beit.mask_ratio) == ("beit", "block", 0.4)
