"""What a study will run: arms once each, lengths within the budget, operations as torch counts them."""

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
from quarterview.methods.base import Setting, build
from quarterview.models.mae import MaskedAutoencoder
from quarterview.models.targets import TokenTarget
from quarterview.studies.arm import images_of
from quarterview.studies.config import StudyConfig, read_budget
from quarterview.studies.lengths import choose_lengths
from quarterview.studies.named import STUDIES
from quarterview.studies.plan import (
    base_of,
    flops_an_image,
    heads_of,
    tokenizer_config,
    unique_arms,
)
from quarterview.studies.study import Arm, Finding, Study, Table, read_study
from quarterview.studies.timing import (
    Timed,
    Training,
    Tuning,
    parts_judged,
    time_training,
    time_tuning,
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
    assert read_budget(text) == expected


@pytest.mark.parametrize("text", ["", "30", "m", "-3m", "0m", "1e400images", "3 m", "1..5h", "nanm", "2days"])
def test_budgets_that_mean_nothing(text):
    with pytest.raises(UserError, match=rf"^--budget {re.escape(text)} is not accepted. Give a time such as"):
        read_budget(text)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"budget": "lots"}, "--budget lots"),
        ({"seeds": 0}, "--seeds 0 is out of range"),
        ({"jobs": 0}, "--jobs 0 is out of range"),
        ({"measures": ("knm",)}, "Did you mean 'knn'"),
        ({"measures": "linear@101"}, "linear@101 is not accepted"),
        ({"device": "gpu"}, "--device"),
    ],
)
def test_values_of_a_study_that_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        StudyConfig(**values)


def test_one_word_and_one_side_are_enough():
    config = StudyConfig(data="a", measures="knn", image_size=32)
    assert (config.data, config.measures, config.image_size) == (("a",), ("knn",), (32, 32))


# ---------------------------------------------------------------------- arms


@pytest.mark.parametrize("name", STUDIES)
def test_every_named_study_can_be_planned(name):
    config = replace(CONFIG, budget="1e5images", model=None)
    arms = choose_lengths(unique_arms(STUDIES[name], config, "words"), config).arms
    assert len({one.key for one in arms}) == len(arms)
    for one in arms:
        expected = (
            0 if one.arm.start != "pretrain" else round(1e5 * one.arm.length / one.config.loop.batch_size)
        )
        assert one.steps == expected
        assert one.measures


def test_arms_that_are_alike_are_run_once():
    config = replace(CONFIG, model=None)
    arms = unique_arms(STUDIES["table1"], config, "words")
    rows = sum(len(table.arms) for table in STUDIES["table1"].tables)
    # The default stands in tables c, d, e, f, and its decoder of two blocks in a, too.
    assert len(arms) == rows - 4
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
    for one in choose_lengths(unique_arms(STUDIES["baselines"], config, "words"), config).arms:
        if one.steps:
            spent = one.steps * one.config.loop.batch_size * flops_an_image(one.config, config.vocabulary)
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
def test_operations_are_those_that_torch_counts(method, changes):
    decoder, heads = (
        {"decoder_width": 32, "decoder_heads": 2, "decoder_depth": 1},
        {"head_width": 40, "head_out": 24},
    )
    sizes = {"mae": decoder, "denoising": decoder, "simclr": heads, "byol": heads, "mocov3": heads}
    config = PretrainConfig.from_flags(
        model="mae_vit_32x2x2_patch4",
        image_size=16,
        method=method,
        **{**sizes.get(method, {}), **changes},
    )
    encoder = replace(config.model, mean=(0.0,) * 3, std=(1.0,) * 3)
    made = build(config.method, Setting(encoder, seed=0, steps=10, vocabulary=512, classes=10)).train()
    if isinstance(made.model, MaskedAutoencoder) and isinstance(made.model.target, TokenTarget):

        class Tokenizer:
            vocabulary = 512

            def tokens(self, images):
                return torch.zeros(len(images), 16, dtype=torch.int64)

        made.model.target.use(Tokenizer())
    ids = torch.arange(4)
    batch = Batch(torch.randn(4, 3, 16, 16), ids, ids * 0, ids, torch.randn(4, 3, 16, 16))
    with FlopCounterMode(display=False) as counter:
        made(batch).loss.backward()
    counted = counter.get_total_flops() / 4
    expected = flops_an_image(config, 512)
    assert abs(expected / counted - 1) < 0.06  # small heads and the first gradient are left out


class Times:
    """What might have been timed."""

    def __init__(self, arms, step=0.01, tokenizer=0.0, once=0.5, frozen=2.0):
        trained = [one for one in arms if one.arm.start == "pretrain"]
        parts = {part for one in arms for part in parts_judged(one)}
        tuned = {part for part in parts if part.measures[0].startswith("finetune")}
        self.timed = Timed(
            {one.key: Training(once, step) for one in trained},
            Training(once if tokenizer else 0.0, tokenizer),
            0.0,
            dict.fromkeys(parts - tuned, frozen),
            dict.fromkeys(tuned, Tuning(1.0, 0.1)),
        )


def test_short_runs_tell_how_long_things_take(tmp_path):
    words = {"data": ("shapes:96:size=16",), "train": ("shapes:80:size=16:seed=1",), "image_size": 16}
    words |= {"test": ("shapes:60:size=16:seed=2",), "labels": 40, "device": "cpu", "workers": 0}
    config = replace(CONFIG, **words, batch_size=16, tune_steps=4)
    one = unique_arms(STUDIES["schedule"], config, "words")[0]
    its = one.config.with_flags(precision="fp32")
    began = time.perf_counter()
    training = time_training(its, tmp_path / "trained")
    took = time.perf_counter() - began
    rows = read_metrics(tmp_path / "trained")
    assert [row["step"] for row in rows] == [6, 12]
    assert training.image == 1 / rows[1]["images_per_s"]  # of the second half, which needs no warming
    assert training.once == pytest.approx(max(0, took - 12 * 16 * training.image), abs=0.5)
    part = next(part for part in parts_judged(one) if part.measures == ("finetune",))
    images_of(config, 3)  # which is no part of it
    began = time.perf_counter()
    tuning = time_tuning(part, its, config, tmp_path / "tuned")
    took = time.perf_counter() - began
    rows = read_metrics(tmp_path / "tuned" / "finetune")
    assert rows[-1]["step"] == 4
    assert tuning.update == 64 / rows[-1]["images_per_s"]
    assert tuning.once == pytest.approx(max(0, took - 4 * tuning.update), abs=0.5)


def test_each_network_is_judged_by_its_own_time():
    config = replace(CONFIG, model=None, budget="90m", seeds=1, tune_steps=100)
    arms = unique_arms(STUDIES["scaling"], config, "words")
    times = Times(arms).timed
    parts = {one.config.model.model: parts_judged(one) for one in arms}
    assert len(parts) == len({part for each in parts.values() for part in each}) == 3
    large = parts["mae_vit_base_patch4"][0]
    slow = replace(times, tuning={**times.tuning, large: Tuning(1.0, 1.0)})
    one, two = (choose_lengths(arms, config, timed).arms for timed in (times, slow))
    spared = 2 * 100 * 0.9 / (3 * 64 * 0.01)  # two arms, 100 updates, 0.9 s more each
    trained = [(a.steps, b.steps) for a, b in zip(one, two, strict=True) if a.steps]
    assert all(a - b == pytest.approx(spared, abs=1) for a, b in trained)


@given(minutes=st.integers(8, 200), seeds=st.integers(1, 5), at_a_time=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_budget_of_minutes_is_kept_by_what_was_timed(minutes, seeds, at_a_time):
    """Whatever way runs are dealt out, the longest first within a seed, they end in time."""
    config = replace(CONFIG, budget=f"{minutes}m", seeds=seeds, tune_steps=50)
    arms = unique_arms(STUDIES["schedule"], config, "words")
    found, tune_steps = choose_lengths(arms, config, Times(arms).timed, 10.0, at_a_time)
    assert tune_steps == 50
    whole = found[-1].steps
    assert [one.steps for one in found] == [
        pytest.approx(whole * share, abs=0.51) for share in (1 / 8, 1 / 4, 1 / 2, 1)
    ]
    took = sorted((0.5 + 2 + 1 + 50 * 0.1 + one.steps * 64 * 0.01 for one in found), reverse=True)
    free = [10.0] * at_a_time
    for seconds in took * seeds:
        free[free.index(min(free))] += seconds
    assert max(free) <= 60 * minutes
    if at_a_time == 1:
        assert max(free) > 0.88 * 60 * minutes  # and little is left over


def test_a_tokenizer_is_trained_once_and_before_the_rest():
    config = replace(CONFIG, budget="20m", seeds=1, measures=("linear",))
    arms = unique_arms(STUDIES["tokens"], config, "words")
    found = choose_lengths(arms, config, Times(arms, tokenizer=0.02).timed).arms
    seconds = 0.5 + sum(0.5 + 2 + one.steps * 64 * 0.01 for one in found) + found[0].steps * 64 * 0.02
    assert 0.88 * 1200 < seconds <= 0.91 * 1200


@pytest.mark.parametrize(("minutes", "expected"), [(200, 500), (1, 30)])
def test_fine_tuning_is_as_long_as_there_is_time(minutes, expected):
    config = replace(CONFIG, budget=f"{minutes}m", seeds=1)
    arms = unique_arms(STUDIES["mask-ratio"], config, "words")
    times = Times(arms, frozen=0.1)
    assert choose_lengths(arms, config, times.timed).tune_steps == expected
    between = choose_lengths(arms, replace(config, budget="6m"), times.timed).tune_steps
    judging = 5 * (0.5 + 0.1 + 1 + between * 0.1)
    assert 30 < between < 500
    assert judging <= 0.9 * 360 / 2 < judging + 5 * 10 * 0.1


def test_a_budget_that_judging_alone_eats_is_refused():
    config = replace(CONFIG, budget="1m")
    arms = unique_arms(STUDIES["mask-ratio"], config, "words")
    with pytest.raises(UserError, match="to be opened and judged alone"):
        choose_lengths(arms, config, Times(arms, frozen=30.0).timed)


def test_a_decoder_as_a_share_of_the_encoder():
    config = replace(CONFIG, model="mae_vit_tiny_patch16")
    widths = {
        one.arm.name: (one.config.method.decoder_width, one.config.method.decoder_heads)
        for one in unique_arms(STUDIES["decoder"], config, "words")
        if one.arm.decoder_share
    }
    assert widths == {
        **{"1/8 of the encoder's": (24, 1), "1/4 of the encoder's": (48, 1)},
        **{"1/2 of the encoder's": (96, 3), "the encoder's": (192, 6)},
    }


@given(st.integers(1, 300).map(lambda n: 4 * n))
def test_heads_share_a_width_evenly(width):
    heads = heads_of(width)
    assert width % heads == 0
    assert heads == 1 or width // heads >= 32


def test_each_arm_has_a_decoder_and_fused_blocks_for_its_own_encoder():
    small, large = {"model": "mae_vit_32x4x2_patch4"}, {"model": "mae_vit_64x8x2_patch4"}
    table = Table(
        "Sizes",
        (
            *(Arm(f"share {i}", its, decoder_share=0.5) for i, its in enumerate((small, large))),
            *(Arm(f"fused {i}", {**its, "fused_blocks": "study"}) for i, its in enumerate((small, large))),
        ),
    )
    arms = {one.arm.name: one.config for one in unique_arms(Study("s", "", (table,)), CONFIG, "words")}
    assert [arms[f"share {i}"].method.decoder_width for i in (0, 1)] == [16, 32]
    assert [arms[f"fused {i}"].method.fused_blocks for i in (0, 1)] == [(1,), (1, 3, 5)]
    with pytest.raises(UserError, match=r"^Arm fused blocks \(MFF\) fuses blocks of an encoder of 2\."):
        unique_arms(STUDIES["later"], CONFIG, "words")


def test_arms_with_their_own_images_or_tokenizer_are_other_arms():
    arms = (
        Arm("default"),
        Arm("others", {"data": ("shapes:9",)}),
        *(
            Arm(f"words {name}", {"target": "tokens", "tokenizer": name})
            for name in ("study", "mine", "theirs")
        ),
        Arm("the same words", {"target": "tokens", "tokenizer": "study"}),
    )
    study = Study("s", "", (Table("Sources", arms),))
    found = {one.arm.name: one for one in unique_arms(study, CONFIG, "words")}
    assert list(found) == ["default", "others", "words study", "words mine", "words theirs"]
    moved = replace(CONFIG, data=("elsewhere",))
    assert [one.key for one in unique_arms(study, moved, "w")] == [one.key for one in found.values()]


def test_the_bases_tokenizer_is_another_than_the_studys(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("target: tokens\ntokenizer: mine\n")
    table = Table("Words", (Arm("the base's"), Arm("the study's", {"tokenizer": "study"})))
    arms = unique_arms(Study("s", "", (table,)), replace(CONFIG, base=str(base)), "words")
    assert [one.config.method.tokenizer for one in arms] == ["mine", "words"]


def test_an_arm_may_have_another_encoder_than_fits_the_base():
    table = Table("Sizes", (Arm("a"), Arm("b", {"model": "mae_vit_32x4x1_patch7", "image_size": (28, 28)})))
    pocket = replace(CONFIG, base="pocket", model=None)
    assert unique_arms(Study("s", "", (table,)), pocket, "words")[1].config.model.patches == 16


def test_methods_bring_their_defaults_and_keep_what_the_base_says():
    config = replace(CONFIG, model=None, base="pocket")
    arms = {one.arm.name: one.config for one in unique_arms(STUDIES["baselines"], config, "words")}
    decay = {name: its.optim.weight_decay for name, its in arms.items()}
    assert [decay[name] for name in ("MAE", "denoising", "SimCLR", "MoCo v3")] == [0.05, 0.05, 0.1, 0.1]
    assert {its.optim.lr for its in arms.values()} == {1e-3}
    assert arms["denoising"].method.decoder_width == arms["MAE"].method.decoder_width == 32
    beit = arms["BEiT"].method
    assert (beit.tokenizer, beit.mask, beit.mask_ratio) == ("words", "block", 0.4)


def test_the_studys_flags_go_before_its_files_base_and_that_before_the_recipe():
    study = Study("s", "", (), {"image_size": 48, "batch_size": 8, "workers": 0, "lr": 0.5, "method": "byol"})
    base = base_of(study, replace(CONFIG, base="pocket", model=None, image_size=None, batch_size=4))
    assert (base.model.model, base.model.image_size) == ("mae_vit_64x4x2_patch8", (48, 48))
    assert (base.loop.batch_size, base.loader.workers, base.optim.lr) == (4, 0, 0.5)
    assert (base.method.name, base.optim.weight_decay) == ("byol", 0.1)


def test_keys_of_arms_do_not_hang_on_where_files_are():
    assert {"out", "data", "tokenizer", "init_from", "resume"} <= PretrainConfig().marked(PATH)
    one, two = (
        [arm.key for arm in unique_arms(STUDIES["tokens"], config, folder)]
        for config, folder in (
            (CONFIG, "words"),
            (replace(CONFIG, data=("moved",), out="moved", workers=3, device="cpu", seed=7), "moved/words"),
        )
    )
    assert one == two
    (fast,) = (
        unique_arms(Study("s", "", (Table("T", arms),)), CONFIG, "words")[1:]
        for arms in ((Arm("a"), Arm("b", {"compile": True})),)
    )
    assert len(fast) == 1  # another arm, though a run may go on with another value


def test_heads_and_tokenizers_may_be_small():
    config = replace(CONFIG, model=None, head_width=32, vocabulary=64, tokenizer_width=16)
    arms = unique_arms(STUDIES["baselines"], config, "words")
    widths = {one.config.method.name: getattr(one.config.method, "head_width", None) for one in arms}
    assert [widths[name] for name in ("simclr", "byol", "mocov3")] == [32] * 3
    tokenizer = tokenizer_config(base_of(STUDIES["baselines"], config), "words", config)
    assert (tokenizer.method.vocabulary, tokenizer.method.tokenizer_width) == (64, 16)
    assert (tokenizer.optim.lr, tokenizer.optim.weight_decay, tokenizer.run.out) == (1e-3, 0.0, "words")


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
    ("old", "new", "said"),
    [
        ("mask_ratio: 0.25", "mask_ration: 0.25", "mask_ratio"),
        ("first: high", "first: hi", "'high'"),
        ("measure: linear", "measure: liner", "liner"),
        ("[linear,", "[probe,", "probe"),
        ("rule: as good", "rule: equal", "as good"),
        ("claim: more is better, ", "", "claim"),
        ("length: 0.5", "length: -1", "length -1"),
        ("length: 0.5", "length: true", "length True"),
        ("x: 25", "x: .nan", "x nan"),
        ("mask_ratio: 0.25", "epochs: 3", "epochs in arm low"),
        ("base: {decoder_depth: 1}", "base: {seed: 1}", "seed in study .* base"),
        ("base: {decoder_depth: 1}", "base: {data: x}", "data in study .* base"),
        ("decoder_share: 0.5", "decoder_share: 0.5, decoder_width: 8", "accepted: either"),
        ("measure: linear}", "measure: linear, over_measure: linear}", "beside over"),
        ("start: random", "start: randum", "randum"),
        ("tables:", "table:", "tables"),
        ("base: {decoder_depth: 1}", "base: {decoder_dept: 1}", "Did you mean --decoder-depth"),
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
            {"mask": "random", "mask_ratio": 0.75, "tokenizer": "words"},
        ),
        ("{objective: denoising, noise: 0.5}", "{noise: 2.0}", {"method": "denoising", "noise": 2.0}),
        ("{objective: supervised}", "{}", {"blr": 1.5e-4, "weight_decay": 0.05}),
        (
            "{method: {name: byol, momentum: 0.9}}",
            "{lr: 2e-3}",
            {"method": "byol", "momentum": 0.9, "lr": 2e-3},
        ),
    ],
)
def test_methods_are_named_as_in_version_0_1_or_as_today(tmp_path, base, arm, expected):
    """What is called `objective` changed no default of other flags in version 0.1, and does not now."""
    path = tmp_path / "mine.yaml"
    table = f"{{title: T, arms: {{this: {arm}, other: {{length: 0.5}}}}}}"
    path.write_text(f"base: {base}\ntables: [{table}]\n")
    flags = unique_arms(read_study(path), CONFIG, "words")[0].config.flags()
    assert {name: flags[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["cpu_slow", "cpu_plain", "cpu_scaling"])
def test_studies_of_the_benchmarks_can_be_planned(name):
    study = read_study(Path(__file__).parents[2] / "benchmarks" / f"{name}.yaml")
    arms = {one.arm.name: one.config for one in unique_arms(study, replace(CONFIG, model=None), "words")}
    if name == "cpu_slow":
        beit = arms["BEiT"].method
        assert (beit.name, beit.mask, beit.mask_ratio) == ("beit", "block", 0.4)
