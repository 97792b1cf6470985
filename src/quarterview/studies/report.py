"""Report of a study: an HTML page that loads nothing from a network, a CSV, a JSON and a PNG file.

The report shows the accuracies of the paper beside those of the study, and the decision on each finding by
the rule in `quarterview.studies.rule`.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quarterview.files import write_text_atomic
from quarterview.studies.config import StudyConfig
from quarterview.studies.plan import TOKENIZER_FOLDER, PlannedArm
from quarterview.studies.report_drawings import draw_tables
from quarterview.studies.report_page import render_page
from quarterview.studies.study import Study
from quarterview.studies.study_results import (
    StudyEvaluations,
    StudyProgress,
    TableResults,
    compute_table_results,
)


def write_report(
    study: Study,
    config: StudyConfig,
    arms: Sequence[PlannedArm],
    correct: StudyEvaluations,
    images_per_s: Mapping[str, float],
    progress: StudyProgress,
    provenance: Mapping[str, Any],
    out: Path,
) -> tuple[list[TableResults], Path]:
    """Write ``report.html``, ``study.csv``, ``study.json`` and ``study.png`` into a folder.

    Args:
        images_per_s: arm key -> training images per second.
        provenance: command line, versions, machine and settings of the study.

    Returns:
        The results of the tables, and the path of the HTML page.
    """
    tables = compute_table_results(study, config, arms, correct, images_per_s, str(out / TOKENIZER_FOLDER))
    write_text_atomic(out / "study.csv", format_csv(tables))
    write_text_atomic(
        out / "study.json", json.dumps(_make_json(study, tables, arms, progress, provenance), indent=1) + "\n"
    )
    draw_tables(tables, out / "study.png")
    write_text_atomic(out / "report.html", render_page(study, config, arms, tables, progress, provenance))
    return tables, out / "report.html"


def format_csv(tables: Sequence[TableResults]) -> str:
    """Return a CSV table with a row for each arm, measure and seed.

    Accuracies are fractions; ``paper`` is the accuracy in the paper, ``test_images`` the number of images.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "arm", "measure", "seed", "accuracy", "paper", "test_images"])
    for results in tables:
        for arm in results.table.arms:
            for measure in results.measures:
                estimate = results.estimates.get((arm.name, measure))
                if estimate is None:
                    continue
                paper = f"{arm.paper[measure] / 100:.3f}" if measure in arm.paper else ""
                seeds = results.seeds[arm.name, measure]
                for seed, accuracy in zip(seeds, estimate.by_seed, strict=True):
                    names = (results.table.title, arm.name, measure)
                    writer.writerow((*names, seed, f"{accuracy:.5f}", paper, estimate.images))
    return file.getvalue()


def _make_json(
    study: Study,
    tables: Sequence[TableResults],
    arms: Sequence[PlannedArm],
    progress: StudyProgress,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "study": study.name,
        "done": {"done": progress.num_done, "asked": progress.num_total},
        "updates": {planned.key: planned.steps for planned in arms},
        "tables": [
            {
                "title": results.table.title,
                "figures": [
                    {"arm": arm, "measure": measure, **asdict(estimate)}
                    for (arm, measure), estimate in results.estimates.items()
                ],
                "findings": [asdict(result) for result in results.finding_results],
                "waiting": list(results.pending_claims),
                "images_per_s": dict(results.images_per_s),
                "operations": dict(results.flops_per_image),
            }
            for results in tables
        ],
        **provenance,
    }
