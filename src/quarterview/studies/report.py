"""The report of a study: a page that opens without a network, a CSV file, a JSON file and a picture.

The paper's figures stand beside ours, and each of its findings is marked by the rule of `rule.py`.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quarterview.files import replace_text
from quarterview.studies.config import StudyConfig
from quarterview.studies.plan import TOKENIZER, Planned
from quarterview.studies.report_drawings import draw
from quarterview.studies.report_page import render
from quarterview.studies.study import Study
from quarterview.studies.study_results import Correct, Progress, TableResults, tables_of


def write_report(
    study: Study,
    config: StudyConfig,
    arms: Sequence[Planned],
    correct: Correct,
    rates: Mapping[str, float],
    progress: Progress,
    facts: Mapping[str, Any],
    out: Path,
) -> tuple[list[TableResults], Path]:
    """Write ``report.html``, ``study.csv``, ``study.json`` and ``study.png`` into a folder.

    Args:
        rates: images a second that training made, by arm.
        facts: where the figures come from.

    Returns:
        The tables, and the page.
    """
    found = tables_of(study, config, arms, correct, rates, str(out / TOKENIZER))
    replace_text(out / "study.csv", as_csv(found))
    replace_text(
        out / "study.json", json.dumps(_as_json(study, found, arms, progress, facts), indent=1) + "\n"
    )
    draw(found, out / "study.png")
    replace_text(out / "report.html", render(study, config, arms, found, progress, facts))
    return found, out / "report.html"


def as_csv(found: Sequence[TableResults]) -> str:
    """A row for each arm, measure and seed; the last columns are the paper's figure and the test images."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(["table", "arm", "measure", "seed", "accuracy", "paper", "test_images"])
    for its in found:
        for arm in its.table.arms:
            for measure in its.measures:
                figure = its.figures.get((arm.name, measure))
                if figure is None:
                    continue
                paper = f"{arm.paper[measure] / 100:.3f}" if measure in arm.paper else ""
                seeds = its.seeds[arm.name, measure]
                for seed, value in zip(seeds, figure.by_seed, strict=True):
                    said = (its.table.title, arm.name, measure, seed, f"{value:.5f}", paper, figure.images)
                    rows.writerow(said)
    return written.getvalue()


def _as_json(
    study: Study,
    found: Sequence[TableResults],
    arms: Sequence[Planned],
    progress: Progress,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "study": study.name,
        "done": progress._asdict(),
        "updates": {one.key: one.steps for one in arms},
        "tables": [
            {
                "title": its.table.title,
                "figures": [
                    {"arm": arm, "measure": measure, **asdict(figure)}
                    for (arm, measure), figure in its.figures.items()
                ],
                "findings": [asdict(outcome) for outcome in its.outcomes],
                "waiting": list(its.waiting),
                "images_per_s": dict(its.rates),
                "operations": dict(its.operations),
            }
            for its in found
        ],
        **facts,
    }
