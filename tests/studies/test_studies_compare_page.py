"""The page of a comparison: one file, nothing from elsewhere, every text escaped, every figure there."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from quarterview.evaluation.results import write_result
from quarterview.studies.compare_page import colours_of, plot, render, write_page
from quarterview.studies.compare_results import Between, Point, Results
from quarterview.studies.config import CompareConfig
from quarterview.studies.verdict import Comparison, contrast, estimate, judge

NASTY = "runs/<script>alert('$x_1$')</script>&\"_a"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checked(HTMLParser):
    """Collects tags, attributes and texts, and that every tag is closed in order."""

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
def page():
    """The results of two arms."""
    rng = np.random.default_rng(0)
    points, cells, between = [], {NASTY: [], "other": []}, []
    for protocol, baselines in (("finetune", ["scratch"]), ("knn", ["random encoder", "raw pixels"])):
        for count in (50, 5000):
            right = {
                name: rng.random((3, 200)) < (0.7 if name == NASTY else 0.4)
                for name in (NASTY, "other", *baselines)
            }
            points += [Point(protocol, count, name, estimate(x.astype(float))) for name, x in right.items()]
            between.append(Between(protocol, count, "other", contrast(NASTY, right["other"], right[NASTY])))
            for arm, rows in cells.items():
                contrasts = tuple(contrast(b, right[arm], right[b]) for b in baselines)
                rows.append(Comparison(protocol, count, contrasts))
    arms = {a: {"network": "mae_vit_tiny_patch4", "image_size": [32, 32], "weights": "0abc"} for a in cells}
    verdicts = tuple(judge(arm, rows, 0.01) for arm, rows in cells.items())
    return Results(verdicts, tuple(points), cells, between, arms, 0.01)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The file that tells where they come from."""
    return write_result(
        tmp_path_factory.mktemp("report") / "results",
        "compare",
        ["quarterview", "compare", NASTY],
        CompareConfig.from_flags(train=[NASTY], test=["b"]).to_plain(),
        {"train": "f1", "train_images": 5000, "test": "f2", "test_images": 200},
        {"notes": [f"left out {NASTY}"]},
    )


@pytest.fixture(scope="module")
def html(page, record):
    return render(page, json.loads(record.read_text("utf-8")))


@pytest.fixture(scope="module")
def parsed(html):
    checked = Checked()
    checked.feed(html)
    checked.close()
    assert not checked.open
    return checked


def test_the_page_asks_nothing_of_a_network(html, parsed):
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    text = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE.*?>', "", html, flags=re.S)
    assert not re.search(r"(?:src|href)\s*=\s*\"(?!#)|url\((?!#)|@import|https?://", text)


def test_texts_of_users_are_texts(html, parsed):
    assert "<script" not in html
    assert any(NASTY in text for text in parsed.texts)
    assert any(f"left out {NASTY}" in text for text in parsed.texts)


def test_verdicts_come_first_and_every_figure_is_there(page, html, parsed):
    text = " ".join(parsed.texts)
    for verdict in page.verdicts:
        assert verdict.sentence in text
    assert html.index('class="verdict') < html.index("<svg")
    assert all(f"−{-100 * row.contrast.difference.mean:.1f}" in text for row in page.between)
    for point in page.points:
        assert f"{100 * point.accuracy.mean:.1f}" in text
    assert parsed.tags.count("svg") == 2
    for word in ("5,000, fingerprint f1", "How to read this", "torch", "quarterview compare"):
        assert word in text


def test_names_inside_the_drawings_do_not_clash(parsed):
    names = [value for name, value in parsed.attributes if name == "id"]
    markers = [name for name in names if re.fullmatch(r"[mp][0-9a-f]{10}", name)]
    assert markers
    assert len(set(markers)) == len(markers)


def test_a_drawing_is_the_same_each_time_and_takes_the_colour_of_the_text(page):
    points = [p for p in page.points if p.protocol == "knn"]
    one, other = (plot(points, colours_of(page), "knn") for _ in range(2))
    assert one == other
    assert "currentColor" in one
    assert NASTY not in one
    assert "script" not in one
    ET.fromstring(one)


def test_colours_tell_arms_apart(page):
    colours = colours_of(page)
    assert list(colours)[:2] == [NASTY, "other"]
    assert len(set(colours.values())) == len(colours) == 5


def test_the_page_is_written_whole(page, record, html, tmp_path):
    path = write_page(tmp_path / "report.html", page, record)
    assert path.read_text("utf-8") == html
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert json.loads(record.read_text("utf-8"))["protocol"] == "compare"
