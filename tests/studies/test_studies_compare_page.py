"""Tests of the HTML report of a comparison: escaping, contents, plots, and no network access."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from quarterview.evaluation.results import write_result
from quarterview.studies.compare_page import assign_colors, plot_accuracies, render_page, write_page
from quarterview.studies.compare_results import ArmDifference, CompareStatistics, Point
from quarterview.studies.config import CompareConfig
from quarterview.studies.verdict import Comparison, compute_contrast, decide_verdict, estimate_mean

USER_TEXT = "runs/<script>alert('$x_1$')</script>&\"_a"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class TagChecker(HTMLParser):
    """Parser that collects tags, attributes and texts, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def statistics():
    """The statistics of a comparison of two arms."""
    rng = np.random.default_rng(0)
    points, cells, between = [], {USER_TEXT: [], "other": []}, []
    for protocol, baselines in (("finetune", ["scratch"]), ("knn", ["random encoder", "raw pixels"])):
        for count in (50, 5000):
            right = {
                name: rng.random((3, 200)) < (0.7 if name == USER_TEXT else 0.4)
                for name in (USER_TEXT, "other", *baselines)
            }
            points += [
                Point(protocol, count, name, estimate_mean(x.astype(float))) for name, x in right.items()
            ]
            between.append(
                ArmDifference(
                    protocol, count, "other", compute_contrast(USER_TEXT, right["other"], right[USER_TEXT])
                )
            )
            for arm, rows in cells.items():
                contrasts = tuple(compute_contrast(b, right[arm], right[b]) for b in baselines)
                rows.append(Comparison(protocol, count, contrasts))
    arms = {a: {"network": "mae_vit_tiny_patch4", "image_size": [32, 32], "weights": "0abc"} for a in cells}
    verdicts = tuple(decide_verdict(arm, rows, 0.01) for arm, rows in cells.items())
    return CompareStatistics(verdicts, tuple(points), cells, between, arms, 0.01)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The results file with command, settings and versions."""
    return write_result(
        tmp_path_factory.mktemp("report") / "results",
        "compare",
        ["quarterview", "compare", USER_TEXT],
        CompareConfig.from_flags(train=[USER_TEXT], test=["b"]).to_dict(),
        {"train": "f1", "train_images": 5000, "test": "f2", "test_images": 200},
        {"notes": [f"left out {USER_TEXT}"]},
    )


@pytest.fixture(scope="module")
def html(statistics, record):
    return render_page(statistics, json.loads(record.read_text("utf-8")))


@pytest.fixture(scope="module")
def parsed(html):
    checked = TagChecker()
    checked.feed(html)
    checked.close()
    assert not checked.open
    return checked


def test_the_page_loads_nothing_from_a_network(html, parsed):
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    text = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE.*?>', "", html, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*\"(?!#)|url\((?!#)|@import|https?://", text)


def test_text_from_users_is_escaped(html, parsed):
    assert "<script" not in html
    assert any(USER_TEXT in text for text in parsed.texts)
    assert any(f"left out {USER_TEXT}" in text for text in parsed.texts)


def test_verdicts_come_first_and_all_accuracies_follow(statistics, html, parsed):
    text = " ".join(parsed.texts)
    for verdict in statistics.verdicts:
        assert verdict.sentence in text
    assert html.index('class="verdict') < html.index("<svg")
    assert all(f"−{-100 * row.contrast.difference.mean:.1f}" in text for row in statistics.arm_differences)
    for point in statistics.points:
        assert f"{100 * point.accuracy.mean:.1f}" in text
    assert parsed.tags.count("svg") == 2
    for word in ("5,000, fingerprint f1", "How to read this", "torch", "quarterview compare"):
        assert word in text


def test_ids_in_the_plots_are_unique(parsed):
    names = [value for name, value in parsed.attributes if name == "id"]
    markers = [name for name in names if re.fullmatch(r"[mp][0-9a-f]{10}", name)]
    assert markers
    assert len(set(markers)) == len(markers)


def test_a_plot_is_reproducible_and_uses_the_text_color(statistics):
    points = [p for p in statistics.points if p.protocol == "knn"]
    one, other = (plot_accuracies(points, assign_colors(statistics), "knn") for _ in range(2))
    assert one == other
    assert "currentColor" in one
    assert USER_TEXT not in one
    assert "script" not in one
    ET.fromstring(one)


def test_each_arm_has_its_own_color(statistics):
    colors = assign_colors(statistics)
    assert list(colors)[:2] == [USER_TEXT, "other"]
    assert len(set(colors.values())) == len(colors) == 5


def test_the_page_is_written_atomically(statistics, record, html, tmp_path):
    path = write_page(tmp_path / "report.html", statistics, record)
    assert path.read_text("utf-8") == html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert json.loads(record.read_text("utf-8"))["protocol"] == "compare"
