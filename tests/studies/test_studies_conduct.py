"""Tests of a whole study on generated images: evaluation, report, resumption and errors."""

import csv
import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from quarterview.cli import run
from quarterview.errors import UserError
from quarterview.studies import study_command
from quarterview.studies.conduct import limit_decoding_workers, open_study, run_study
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import read_evaluations
from quarterview.studies.plain_features import NETWORK_FREE_ENCODERS
from quarterview.studies.plan_file import collect_fixed_settings
from quarterview.studies.report_drawings import _choose_draw_function, _draw_over_measures, _draw_rows
from quarterview.studies.study import Arm, Table
from quarterview.studies.study_results import TableResults
from quarterview.studies.verdict import estimate_mean
from quarterview.training import checkpoint

STUDY = """
purpose: Is <this> a study?
base: {decoder_depth: 1, decoder_width: 32, decoder_heads: 2, workers: 0, precision: fp32}
tables:
  - title: Ratios
    axis: ratio
    measures: [linear]
    arms:
      low: {mask_ratio: 0.25, x: 25}
      high: {mask_ratio: 0.75, x: 75}
    findings:
      - {claim: more is better, first: high, second: low, measure: linear}
  - title: Targets & starts
    measures: [linear, knn, "finetune:1"]
    arms:
      default: {}
      tokens: {target: tokens, tokenizer: study}
      none: random
    findings:
      - {claim: training helps, first: default, second: none, measure: knn}
  - title: Plain
    measures: [knn]
    arms: {pixels: pixels, a: pca, b: pca_patches, c: kmeans, d: kmeans_pixels, default: {}}
  - title: Visible
    measures: [linear, "linear@50", knn, "knn@50"]
    arms: {default: {}, none: random}
    findings:
      - {claim: all, first: default, second: default, measure: linear, second_measure: "linear@50"}
      - {claim: gains, first: default, second: default, measure: linear, over: [none, none]}
      - claim: the rest of the image gains more
        first: default
        second: none
        measure: linear
        over: [default, none]
        over_measure: "linear@50"
"""


def config(out: Path, study: Path | str = "mask-ratio", **changes) -> StudyConfig:
    values = {
        "name": str(study),
        **{"data": ("shapes:96:size=16",), "train": ("shapes:80:size=16:seed=1",)},
        **{"test": ("shapes:60:size=16:seed=2",), "out": str(out), "budget": "64images", "seeds": 2},
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "batch_size": 16, "labels": 40},
        **{"tune_steps": 3, "device": "cpu", "workers": 0},
    }
    return StudyConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "mine.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, study) -> Path:
    """The folder of a study that is complete."""
    out = tmp_path_factory.mktemp("done") / "out"
    result = run_study(config(out, study))
    assert result.status == "complete"
    assert result.report == out / "report.html"
    return out


def read_all_evaluations(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {folder.name: read_evaluations(folder) for folder in sorted((out / "runs").iterdir())}


def test_each_arm_is_trained_and_evaluated_with_each_seed(done):
    # `high` and `default` are one arm, since their settings are equal.
    folders = read_all_evaluations(done)
    assert len(folders) == 2 * 9
    expected = {start: {"knn"} for start in NETWORK_FREE_ENCODERS}
    expected["random"] = {"linear", "knn", "finetune:1", "linear@50", "knn@50"}
    for name, evaluations in folders.items():
        kind = name.split("-")[0]
        assert kind == "mae" or evaluations.keys() == expected[kind]
        assert all(
            is_correct.shape == (60,) and is_correct.dtype == bool for is_correct in evaluations.values()
        )
        trained = done / "runs" / name / "pretrain" / "checkpoints"
        assert trained.exists() == (kind == "mae")
        if trained.exists():
            assert checkpoint.read_state(checkpoint.find_newest(trained))["step"] == 4
    assert (done / "tokenizer" / "checkpoints").is_dir()


@pytest.mark.parametrize("arms", ["{none: random, pixels: pixels}", "{none: random, half: {length: 0.5}}"])
def test_a_study_without_an_arm_of_full_length(tmp_path, arms, caplog):
    path = tmp_path / "mine.yaml"
    path.write_text(f"purpose: x\ntables: [{{title: x, measures: [knn], arms: {arms}}}]\n")
    with caplog.at_level(logging.INFO, "quarterview"):
        result = run_study(config(tmp_path / "out", path))
    assert result.status == "complete"
    assert "2 arms, 2 seeds" in caplog.messages


def test_the_report_contains_the_evaluations(done):
    content = json.loads((done / "study.json").read_text())
    folders = read_all_evaluations(done)
    ratios, targets, plain, visible = content["tables"]
    assert [figure["arm"] for figure in plain["figures"]] == ["pixels", *"abcd", "default"]
    assert visible["findings"][1]["difference"]["mean"] == 0  # a gain minus itself
    means = {(figure["arm"], figure["measure"]): figure["mean"] for figure in visible["figures"]}
    gains = [means[arm, "linear"] - means[arm, "linear@50"] for arm in ("default", "none")]
    assert visible["findings"][2]["difference"]["mean"] == pytest.approx(gains[0] - gains[1])
    assert set(visible["images_per_s"]) == {"default"}
    assert visible["operations"]["default"] > 0
    keys = {figure["arm"]: figure for figure in targets["figures"] if figure["measure"] == "knn"}
    random = [found["knn"] for name, found in folders.items() if name.startswith("random")]
    assert keys["none"]["mean"] == pytest.approx(np.mean(random))
    expected = estimate_mean(np.stack(random).astype(float))
    assert (keys["none"]["low"], keys["none"]["high"]) == pytest.approx((expected.low, expected.high))
    assert [finding["finding"]["claim"] for finding in ratios["findings"]] == ["more is better"]
    shared = {
        f["arm"]: f["mean"]
        for table in (ratios, targets)
        for f in table["figures"]
        if f["measure"] == "linear"
    }
    assert shared["high"] == shared["default"]
    with (done / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 3 * 3 + 6 + 2 * 4)
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert {row["test_images"] for row in rows} == {"60"}
    page = (done / "report.html").read_text()
    assert "Is &lt;this&gt; a study?" in page
    assert "Targets &amp; starts" in page
    assert not [word for word in ('src="', 'href="http', "url(h", "<script", "@import") if word in page]
    assert page.count("<svg") == 1
    assert (done / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_complete_study_runs_nothing_again(done, study):
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    reports = {name: (done / name).read_text() for name in ("study.json", "study.csv", "report.html")}
    assert run_study(config(done, study), ["looked", "again"]).status == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    assert reports == {name: (done / name).read_text() for name in reports}


def test_the_command_shows_tables_and_findings(done, study, capsys):
    assert study_command.main(config(done, study), ["quarterview", "study"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Ratios", "Targets & starts", "GFLOP/image", "cannot tell: gains", "linear probe (paper)"):
        assert text in shown
    assert f"The report is {done}/report.html." in shown


def test_a_folder_with_another_study_is_an_error(done, study):
    with pytest.raises(UserError, match="labels"):
        run_study(config(done, study, labels=50))
    with pytest.raises(UserError, match=r"other settings: train\."):  # other images
        run_study(config(done, study, train=("shapes:81:size=16:seed=1",)))


def test_a_changed_recipe_is_an_error(done, study, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("lr: 2.0e-3\n")
    out = tmp_path / "out"
    asked = config(out, study, base=str(base), seeds=1, measures=("knn", "linear"))
    out.mkdir()
    (out / "plan.json").write_text((done / "plan.json").read_text())
    with pytest.raises(UserError, match="other settings"):
        run_study(asked)
    plan = json.loads((done / "plan.json").read_text())
    plan["settings"] = collect_fixed_settings(open_study(str(study)), asked)
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="has no numbers of steps for the arms low"):
        run_study(asked)
    base.write_text("lr: 3.0e-3\n")
    with pytest.raises(UserError, match=r"other settings: lr of the base\."):
        run_study(asked)
    base.write_text("lr: 2.0e-3\nlog_every: 7\n")  # does not change results
    with pytest.raises(UserError, match="has no numbers of steps for the arms low"):
        run_study(asked)
    del plan["settings"]["pretraining"]
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="another version wrote them"):
        run_study(asked)


@pytest.mark.parametrize(
    ("cores", "jobs", "workers", "expected"),
    [
        (64, 8, None, 8),
        (16, 4, None, 4),
        (2, 2, None, 1),
        (2, 4, None, 1),
        (64, 1, None, None),
        (64, 8, 3, 3),
    ],
)
def test_parallel_runs_share_the_cores_for_decoding(monkeypatch, cores, jobs, workers, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    flags = replace(config(Path("x")), workers=workers)
    assert limit_decoding_workers(open_study("table1"), flags, jobs).workers == expected


def test_tables_are_drawn_as_they_are_judged():
    def way(*measures):
        table = Table("T", tuple(Arm(str(i), {"seed": i}) for i in range(9)), measures=measures)
        figures = {
            (arm.name, measure): estimate_mean(np.eye(9)[[i, i]])
            for i, arm in enumerate(table.arms)
            for measure in measures
        }
        return _choose_draw_function(
            found := TableResults(table, measures, figures, {}, (), (), {}, {})
        ), found

    assert way("finetune", "linear")[0] is _draw_rows
    assert way("finetune", "corrupted", "linear", "knn")[0] is _draw_rows  # of which there is no order
    draws, found = way("linear@10", "linear@50", "knn@75", "knn")
    assert draws is _draw_over_measures
    axes = Figure().subplots()
    draws(axes, found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10%", "50%", "75%", "100%"]
    assert len(axes.containers) == 2 * 9  # a line for each arm and kind
    draws, found = way("finetune:0", "finetune:0.5", "finetune:1", "finetune")
    axes = Figure().subplots()
    draws(axes, found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1", "all"]


@pytest.mark.slow
def test_added_seeds_and_parallel_jobs_give_equal_results(done, study, tmp_path):
    out = tmp_path / "out"
    assert run_study(config(out, study, seeds=1)).status == "complete"
    assert len(read_all_evaluations(out)) == 9
    page = (out / "report.html").read_text()
    assert "with one seed the variance between seeds is unknown" in page
    assert run_study(config(out, study, seeds=2, jobs=2)).status == "complete"
    one, two = read_all_evaluations(done), read_all_evaluations(out)
    assert one.keys() == two.keys()
    for name, evaluations in one.items():
        assert all(np.array_equal(value, two[name][measure]) for measure, value in evaluations.items())


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stopped_study_is_resumed(done, study, tmp_path, jobs):
    out = tmp_path / "out"
    flags = {**asdict(config(out)), "jobs": jobs}
    del flags["name"]
    args = [
        part
        for name, value in flags.items()
        if value not in (None, ())
        for part in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))
    ]
    command = [sys.executable, "-m", "quarterview", "study", str(study), *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any((out / "runs").glob("*/pretrain/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    assert len([evaluations for evaluations in read_all_evaluations(out).values() if evaluations]) < 18
    assert run_study(config(out, study)).status == "complete"
    one, two = read_all_evaluations(done), read_all_evaluations(out)
    for name, evaluations in one.items():
        assert all(np.array_equal(value, two[name][measure]) for measure, value in evaluations.items())


@pytest.mark.slow
def test_a_budget_of_minutes(study, tmp_path):
    out = tmp_path / "out"
    began, worked = time.monotonic(), time.process_time()
    asked = config(out, study, budget="60s", seeds=1, measures=("linear", "knn"))
    assert run_study(asked).status == "complete"
    assert time.monotonic() - began > 15
    assert time.process_time() - worked < 180  # CPU time, which other work on the machine hardly changes
    plan = json.loads((out / "plan.json").read_text())["steps"]
    assert len(set(plan.values()) - {0}) == 1  # equal lengths of all trained arms
    assert max(plan.values()) > 4


def test_invalid_requests(tmp_path):
    with pytest.raises(UserError, match="table1"):
        open_study("tabel1")
    with pytest.raises(UserError, match="--data is missing"):
        run_study(config(tmp_path, study, data=()))
    with pytest.raises(UserError, match="NAME is missing"):
        run_study(config(tmp_path, ""))
    with pytest.raises(UserError, match="needs 4 blocks, but the encoder has 2"):
        run_study(config(tmp_path / "a", "partial"))
    assert run(["study", "mask-ratio", "--budget", "lots"]) == 2
