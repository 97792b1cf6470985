"""A whole study on generated shapes: it is resumed, it is judged as it says, and its report tells it."""

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
from quarterview.studies.conduct import conduct, open_study, share_cores
from quarterview.studies.config import StudyConfig
from quarterview.studies.measure import read_judged
from quarterview.studies.plain_features import PLAIN
from quarterview.studies.plan_file import lasting_settings
from quarterview.studies.report_drawings import _draw_across, _draw_bars, _drawing
from quarterview.studies.study import Arm, Table
from quarterview.studies.study_results import TableResults
from quarterview.studies.verdict import estimate
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
      words: {target: tokens, tokenizer: study}
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
      - claim: the rest of the picture gains more
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
    studied = conduct(config(out, study))
    assert studied.status == "complete"
    assert studied.report == out / "report.html"
    return out


def judged(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {folder.name: read_judged(folder) for folder in sorted((out / "runs").iterdir())}


def test_each_arm_is_trained_and_judged_under_each_seed(done):
    # `high` and `default` are one arm, for nothing in them differs.
    folders = judged(done)
    assert len(folders) == 2 * 9
    wanted = {start: {"knn"} for start in PLAIN}
    wanted["random"] = {"linear", "knn", "finetune:1", "linear@50", "knn@50"}
    for name, found in folders.items():
        kind = name.split("-")[0]
        assert kind == "mae" or found.keys() == wanted[kind]
        assert all(right.shape == (60,) and right.dtype == bool for right in found.values())
        trained = done / "runs" / name / "pretrain" / "checkpoints"
        assert trained.exists() == (kind == "mae")
        if trained.exists():
            assert checkpoint.read_state(checkpoint.newest(trained))["step"] == 4
    assert (done / "tokenizer" / "checkpoints").is_dir()


@pytest.mark.parametrize("arms", ["{none: random, pixels: pixels}", "{none: random, half: {length: 0.5}}"])
def test_a_study_need_train_nothing_whole(tmp_path, arms, caplog):
    path = tmp_path / "mine.yaml"
    path.write_text(f"purpose: x\ntables: [{{title: x, measures: [knn], arms: {arms}}}]\n")
    with caplog.at_level(logging.INFO, "quarterview"):
        studied = conduct(config(tmp_path / "out", path))
    assert studied.status == "complete"
    assert "2 arms under 2 seeds" in caplog.messages


def test_the_report_tells_what_was_judged(done):
    content = json.loads((done / "study.json").read_text())
    folders = judged(done)
    ratios, targets, plain, visible = content["tables"]
    assert [figure["arm"] for figure in plain["figures"]] == ["pixels", *"abcd", "default"]
    assert visible["findings"][1]["difference"]["mean"] == 0  # its own gain over its own
    means = {(figure["arm"], figure["measure"]): figure["mean"] for figure in visible["figures"]}
    gains = [means[arm, "linear"] - means[arm, "linear@50"] for arm in ("default", "none")]
    assert visible["findings"][2]["difference"]["mean"] == pytest.approx(gains[0] - gains[1])
    assert set(visible["images_per_s"]) == {"default"}
    assert visible["operations"]["default"] > 0
    keys = {figure["arm"]: figure for figure in targets["figures"] if figure["measure"] == "knn"}
    random = [found["knn"] for name, found in folders.items() if name.startswith("random")]
    assert keys["none"]["mean"] == pytest.approx(np.mean(random))
    expected = estimate(np.stack(random).astype(float))
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


def test_what_is_done_is_not_done_again(done, study):
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    told = {name: (done / name).read_text() for name in ("study.json", "study.csv", "report.html")}
    assert conduct(config(done, study), ["looked", "again"]).status == "complete"
    assert before == {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    assert told == {name: (done / name).read_text() for name in told}


def test_the_command_shows_tables_and_findings(done, study, capsys):
    assert study_command.main(config(done, study), ["quarterview", "study"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Ratios", "Targets & starts", "GFLOP/image", "cannot tell: gains", "linear probe (paper)"):
        assert text in shown
    assert f"See {done}/report.html" in shown


def test_another_study_in_the_folder_is_refused(done, study):
    with pytest.raises(UserError, match="labels"):
        conduct(config(done, study, labels=50))
    with pytest.raises(UserError, match=r"settings \(train\)"):  # other images
        conduct(config(done, study, train=("shapes:81:size=16:seed=1",)))


def test_a_recipe_that_changed_is_another_study(done, study, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("lr: 2.0e-3\n")
    out = tmp_path / "out"
    asked = config(out, study, base=str(base), seeds=1, measures=("knn", "linear"))
    out.mkdir()
    (out / "plan.json").write_text((done / "plan.json").read_text())
    with pytest.raises(UserError, match="other settings"):
        conduct(asked)
    plan = json.loads((done / "plan.json").read_text())
    plan["settings"] = lasting_settings(open_study(str(study)), asked)
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="says nothing of low"):
        conduct(asked)
    base.write_text("lr: 3.0e-3\n")
    with pytest.raises(UserError, match=r"other settings \(lr of the base\)"):
        conduct(asked)
    base.write_text("lr: 2.0e-3\nlog_every: 7\n")  # of which no figure depends
    with pytest.raises(UserError, match="says nothing of low"):
        conduct(asked)
    del plan["settings"]["pretraining"]
    (out / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="another version wrote them"):
        conduct(asked)


@pytest.mark.parametrize(
    ("cores", "jobs", "given", "expected"),
    [
        (64, 8, None, 8),
        (16, 4, None, 4),
        (2, 2, None, 1),
        (2, 4, None, 1),
        (64, 1, None, None),
        (64, 8, 3, 3),
    ],
)
def test_runs_beside_each_other_share_the_cores_to_decode(monkeypatch, study, cores, jobs, given, expected):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    given = replace(config(Path("x")), workers=given)
    assert share_cores(open_study("table1"), given, jobs).workers == expected


def test_tables_are_drawn_as_they_are_judged():
    def way(*measures):
        table = Table("T", tuple(Arm(str(i), {"seed": i}) for i in range(9)), measures=measures)
        figures = {
            (arm.name, measure): estimate(np.eye(9)[[i, i]])
            for i, arm in enumerate(table.arms)
            for measure in measures
        }
        return _drawing(found := TableResults(table, measures, figures, {}, (), (), {}, {})), found

    assert way("finetune", "linear")[0] is _draw_bars
    assert way("finetune", "corrupted", "linear", "knn")[0] is _draw_bars  # of which there is no order
    draws, found = way("linear@10", "linear@50", "knn@75", "knn")
    assert draws is _draw_across
    axes = Figure().subplots()
    draws(axes, found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["10%", "50%", "75%", "100%"]
    assert len(axes.containers) == 2 * 9  # a line for each arm and kind
    draws, found = way("finetune:0", "finetune:0.5", "finetune:1", "finetune")
    axes = Figure().subplots()
    draws(axes, found)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1", "all"]


@pytest.mark.slow
def test_seeds_may_be_added_and_two_at_a_time_are_the_same(done, study, tmp_path):
    out = tmp_path / "out"
    assert conduct(config(out, study, seeds=1)).status == "complete"
    assert len(judged(out)) == 9
    page = (out / "report.html").read_text()
    assert "with one seed nothing is known" in page
    assert conduct(config(out, study, seeds=2, jobs=2)).status == "complete"
    one, two = judged(done), judged(out)
    assert one.keys() == two.keys()
    for name, found in one.items():
        assert all(np.array_equal(right, two[name][measure]) for measure, right in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stopped_study_goes_on(done, study, tmp_path, jobs):
    out = tmp_path / "out"
    flags = {**asdict(config(out)), "jobs": jobs}
    del flags["name"]
    words = [
        part
        for name, value in flags.items()
        if value not in (None, ())
        for part in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))
    ]
    command = [sys.executable, "-m", "quarterview", "study", str(study), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not any((out / "runs").glob("*/pretrain/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    assert len([found for found in judged(out).values() if found]) < 18
    assert conduct(config(out, study)).status == "complete"
    one, two = judged(done), judged(out)
    for name, found in one.items():
        assert all(np.array_equal(right, two[name][measure]) for measure, right in found.items())


@pytest.mark.slow
def test_a_budget_of_minutes(study, tmp_path):
    out = tmp_path / "out"
    began, worked = time.monotonic(), time.process_time()
    asked = config(out, study, budget="60s", seeds=1, measures=("linear", "knn"))
    assert conduct(asked).status == "complete"
    assert time.monotonic() - began > 15
    assert time.process_time() - worked < 180  # its own work, which others on the machine do not lengthen
    plan = json.loads((out / "plan.json").read_text())["steps"]
    assert len(set(plan.values()) - {0}) == 1  # equal epochs, but for arms without any
    assert max(plan.values()) > 4


def test_wrong_requests(tmp_path, study):
    with pytest.raises(UserError, match="table1"):
        open_study("tabel1")
    with pytest.raises(UserError, match="--data is missing"):
        conduct(config(tmp_path, study, data=()))
    with pytest.raises(UserError, match="NAME is missing"):
        conduct(config(tmp_path, ""))
    with pytest.raises(UserError, match="more blocks than the encoder's 2"):
        conduct(config(tmp_path / "a", "partial"))
    assert run(["study", "mask-ratio", "--budget", "lots"]) == 2
