"""Partial fine-tuning: accuracy over the number of blocks that are trained (figure 9)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from quarterview.commands.finetune import (
    FinetuneConfig,
    Finetuned,
    count_blocks,
    finetune,
    start_of,
)
from quarterview.errors import UserError
from quarterview.evaluation.report import standard_error
from quarterview.evaluation.results import write_result
from quarterview.training.distributed import ranks
from quarterview.training.logging import Journal
from quarterview.training.run import to_plain


def partial(config: FinetuneConfig, journal: Journal, argv: Sequence[str] = ()) -> dict[str, Finetuned]:
    """Fine-tune once for each value of `blocks`, each in its folder ``blocks-K``, and draw the curve.

    What is complete is not trained again, so an interrupted curve goes on where it was.

    Returns:
        What came of each, by the value; it ends early if a run is stopped.

    Raises:
        UserError, RunError: as `finetune`.
    """
    if not config.out:
        raise UserError("no folder for the runs; accepted: --out FOLDER")
    if ranks() > 1:
        raise UserError("several values of --blocks are several runs; accepted under torchrun: one")
    depth = start_of(config).shape.depth
    for blocks in config.blocks:
        if depth < count_blocks(blocks) < math.inf:
            raise UserError(f"{blocks} blocks of {depth}; accepted: at most {depth}, or all")
    folder = Path(config.out)
    found: dict[str, Finetuned] = {}
    for blocks in config.blocks:
        journal.say(f"blocks trained: {blocks}")
        one = replace(config, blocks=(blocks,), out=str(folder / f"blocks-{blocks}"))
        found[blocks] = finetune(one, argv)
        if found[blocks].run.status != "complete":
            return found
    points = {
        blocks: (result.accuracy, standard_error(result.accuracy, result.test_images))
        for blocks, result in found.items()
        if result.accuracy is not None
    }
    rows = [(blocks, f"{accuracy:.1%}", f"± {error:.1%}") for blocks, (accuracy, error) in points.items()]
    journal.table("fine-tuning the last blocks", ["blocks", "accuracy", "standard error"], rows)
    results = {blocks: {"accuracy": a, "standard_error": e} for blocks, (a, e) in points.items()}
    data = found[config.blocks[-1]].data
    write_result(folder / "results", "partial", argv, to_plain(config), data, results)
    draw(points, folder / "results" / "partial.png", f"from {config.run}")
    journal.say(f"See {folder}/results/partial.png")
    return found


def draw(points: dict[str, tuple[float, float]], path: Path, title: str) -> None:
    """Write a PNG of accuracies and their errors over the blocks that were trained."""
    figure = Figure(figsize=(5, 3), dpi=100)
    axes = figure.subplots()
    accuracies, errors = ([100 * x for x in column] for column in zip(*points.values(), strict=True))
    axes.errorbar(range(len(points)), accuracies, errors, marker="o", linewidth=1, markersize=4, capsize=3)
    axes.set_xticks(range(len(points)), list(points))
    axes.set_xlabel("blocks fine-tuned")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
