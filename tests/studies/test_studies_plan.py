"""What a study will run: arms once each, lengths within the budget, operations as torch counts them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import quarterview as qv
from quarterview.data.loader import Batch
from quarterview.errors import UserError
from quarterview.model.mae import MaskedAutoencoder
from quarterview.model.targets import TokenTarget
from quarterview.objectives.choice import DEFAULTS, fresh_objective, model_config_of
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    Reading,
    StudyConfig,
    base_of,
    flops_an_image,
    planned,
    read_budget,
    seconds_an_image,
    unique_arms,
)
from quarterview.studies.study import Arm, Finding, Study, Table, read_study

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
    assert read_budget(text) == expected


@pytest.mark.parametrize("text", ["", "30", "m", "-3m", "0m", "1e400images", "3 m", "1..5h", "nanm", "2days"])
def test_budgets_that_mean_nothing(text):
    with pytest.raises(UserError, match="a budget of"):
        read_budget(text)


# ---------------------------------------------------------------------- arms


@pytest.mark.parametrize("name", STUDIES)
def test_every_named_study_can_be_planned(name):
    config = replace(CONFIG, budget="1e5images", model=None)
    arms = planned(unique_arms(STUDIES[name], config, "words"), config, {})
    assert len({one.key for one in arms}) == len(arms)
    for one in arms:
        expected = 0 if one.arm.start != "pretrain" else round(1e5 * one.arm.length / one.config.batch_size)
        assert one.steps == expected
        assert one.measures


def test_arms_that_are_alike_are_run_once():
    config = replace(CONFIG, model=None)
    arms = unique_arms(STUDIES["table1"], config, "words")
    rows = sum(len(table.arms) for table in STUDIES["table1"].tables)
    # The default stands in tables c, d, e, f; and its decoder of two blocks of 128 in a and b, too.
    assert len(arms) == rows - 5
    default = next(one for one in arms if one.config == base_of(STUDIES["table1"], config))
    assert set(default.measures) == {"finetune", "linear"}


def test_measures_may_be_fewer():
    arms = unique_arms(STUDIES["baselines"], replace(CONFIG, measures=("knn",)), "words")
    assert {one.measures for one in arms} == {("knn",)}
    with pytest.raises(UserError, match="Mask ratio"):
        unique_arms(STUDIES["mask-ratio"], replace(CONFIG, measures=("knn",)), "words")


def test_the_papers_figures_are_the_papers():
    tables = {table.title: table for study in STUDIES.values() for table in study.tables}
    figures = {arm.name: arm.paper for arm in tables["Mask sampling"].arms}
    assert figures["block 75%"] == {"finetune": 82.8, "linear": 63.9}
    assert figures["grid 75%"] == {"finetune": 84.0, "linear": 66.0}
    assert {arm.name: arm.paper.get("linear") for arm in tables["Mask ratio"].arms} == {
        **{"10%": 54.6, "25%": None, "50%": 69.9, "75%": 73.5, "90%": 66.1}
    }
    mae, moco = tables["Partial fine-tuning"].arms
    assert (mae.paper["finetune:1"], moco.paper["finetune:1"]) == (81.0, 79.9)
    for table in tables.values():  # and each finding is true of them, where it has both
        for finding in table.findings:
            papers = {arm.name: arm.paper.get(finding.measure) for arm in table.arms}
            first, second = papers[finding.first], papers[finding.second]
            if first is not None and second is not None:
                assert first > second - (1 if finding.rule == "as good" else 0), finding


# ---------------------------------------------------------------------- lengths


def test_equal_operations():
    config = replace(CONFIG, budget="1e12flops")
    arms = planned(unique_arms(STUDIES["baselines"], config, "words"), config, {})
    for one in arms:
        if one.steps:
            spent = one.steps * one.config.batch_size * flops_an_image(one.config)
            assert abs(spent / 1e12 - 1) < 0.5 / one.steps + 1e-6


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("mae", {}),
        ("mae", {"encoder_mask_tokens": True}),
        ("mae", {"target": "pca", "pca_components": 7}),
        ("mae", {"target": "hog"}),
        ("beit", DEFAULTS["beit"]),
        ("denoising", {}),
        ("supervised", {}),
        ("simclr", {}),
        ("byol", {}),
        ("mocov3", {}),
    ],
)
def test_operations_are_those_that_torch_counts(objective, changes):
    changes = {**changes, **({"tokenizer": "words"} if objective == "beit" else {})}
    config = qv.PretrainConfig(
        model="mae_vit_32x2x2_patch4", image_size=16, decoder_width=32, decoder_heads=2, precision="fp32",
        **{"objective": objective, "decoder_depth": 1, "head_width": 40, "head_out": 24, **changes}
        if objective in ("simclr", "byol", "mocov3")
        else {"objective": objective, "decoder_depth": 1, **changes},
    )  # fmt: skip
    model = model_config_of(config, (0.0,) * 3, (1.0,) * 3, class_names=None, classes=10, vocabulary=512)
    made = fresh_objective(config, model, 10, lambda rows: rows).train()
    if isinstance(made.model, MaskedAutoencoder) and isinstance(made.model.target, TokenTarget):

        class Words:
            vocabulary = 512

            def tokens(self, images):
                return torch.zeros(len(images), 16, dtype=torch.int64)

        made.model.target.use(Words())
    ids = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 16, 16), ids, ids * 0, ids, torch.randn(4, 3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        made(batch).loss.backward()
    counted = counter.get_total_flops() / 4
    assert abs(flops_an_image(config) / counted - 1) < 0.06  # small heads and the first gradient are left out


def test_a_budget_of_minutes_is_kept_by_what_was_timed():
    config = replace(CONFIG, budget="2m", seeds=2)
    arms = unique_arms(STUDIES["mask-ratio"], config, "words")
    judging = {"finetune": 1.0, "linear": 0.5}
    found = planned(arms, config, judging, Reading(0.5, 0.0), spent=10.0)
    assert len({one.steps for one in found}) == 1
    judged = 2 * (1.5 + 0.5) * len(arms)
    trained = 2 * sum(one.steps * one.config.batch_size * seconds_an_image(one.config) for one in found)
    assert 30 < 10 + judged + trained < 240  # the machine may be slower or faster now than a second ago


def test_a_budget_that_judging_alone_eats_is_refused():
    config = replace(CONFIG, budget="1m")
    arms = unique_arms(STUDIES["mask-ratio"], config, "words")
    with pytest.raises(UserError, match="to be judged alone"):
        planned(arms, config, {"finetune": 30.0, "linear": 30.0})


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
    findings:
      - {claim: more is better, first: high, second: low, measure: linear}
      - {claim: some is as good, first: low, second: none, measure: linear, rule: as good}
"""


def test_a_study_from_a_file(tmp_path):
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
    ("old", "new", "said"),
    [
        ("mask_ratio: 0.25", "mask_ration: 0.25", "mask_ratio"),
        ("first: high", "first: hi", "'high'"),
        ("measure: linear", "measure: liner", "liner"),
        ("[linear,", "[probe,", "probe"),
        ("rule: as good", "rule: equal", "as good"),
        ("claim: more is better, ", "", "claim"),
        ("length: 0.5", "length: -1", "length -1"),
        ("tables:", "table:", "tables"),
        ("base: {decoder_depth: 1}", "base: {decoder_dept: 1}", "decoder_depth"),
        ("base: {decoder_depth: 1}", "base: 3", "base in study"),
        (GIVEN, "[1, 2]", "no table"),
        (GIVEN, "tables: []", "has no tables"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, old, new, said):
    assert old in GIVEN
    path = tmp_path / "mine.yaml"
    path.write_text(GIVEN.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        read_study(path)
