"""Is a run working? The model beside trivial inpainters, its features, its history, its images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examine import examine, read_record, see_images
from quarterview.doctor.examined import MODEL, Examined, usual_rate
from quarterview.doctor.findings import Finding, by_severity, diagnose
from quarterview.doctor.inpainters import INPAINTERS
from quarterview.evaluation.results import write_result
from quarterview.training.distributed import choose_device
from quarterview.training.metric_writers import read_metrics


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a run."""

    run: Examined
    """What was measured."""
    findings: tuple[Finding, ...]
    """Ailments first."""
    figures: dict[str, Any]
    """All that was measured, as in ``results/doctor.json``."""
    settings: dict[str, Any]
    """How it was measured."""
    data: dict[str, Any]
    """Fingerprint and size of the images, where they could be read."""

    @property
    def healthy(self) -> bool:
        """Whether there is no ailment."""
        return all(finding.severity != "ailment" for finding in self.findings)


def doctor(config: DoctorConfig) -> Diagnosis:
    """Examine a run. Nothing is written.

    Raises:
        UserError: if the folder is no run, or `config.data` cannot be read.
    """
    record = read_record(Path(config.run))
    seen, left_out = see_images(record, config.data, config.images, choose_device(config.device))
    run = examine(record, seen)
    return Diagnosis(
        run,
        tuple(by_severity([*diagnose(run), *left_out])),
        figures_of(run),
        settings={"images": config.images or "default", "seed": record.loop.seed, "step": record.step},
        data=({"fingerprint": seen.fingerprint} if seen else {}) | {"images": run.images},
    )


def write_diagnosis(diagnosis: Diagnosis, run: Path, argv: Sequence[str] = ()) -> Path:
    """Write ``doctor.json`` and ``doctor.png`` into the results of a run.

    Args:
        run: the run's folder.
        argv: the command line.

    Returns:
        The folder of the results.
    """
    folder = run.resolve() / "results"
    results = {
        "healthy": diagnosis.healthy,
        "findings": [finding._asdict() for finding in diagnosis.findings],
        **diagnosis.figures,
    }
    write_result(folder, "doctor", argv, diagnosis.settings, diagnosis.data, _finite(results))
    draw_history(read_metrics(run), diagnosis.run, diagnosis.healthy, folder / "doctor.png")
    return folder


def figures_of(run: Examined) -> dict[str, Any]:
    """All that was measured, as JSON holds it."""
    losses = run.losses or {}
    return {
        "space": "normalised pixels" if run.model.normalises_patches else "pixels",
        "on": "held-out images" if run.held_out else "training images",
        "judged": len(next(iter(losses.values()))) if losses else 0,
        "losses": {name: float(values.mean()) for name, values in losses.items()},
        "below": {name: run.gain(name) for name in INPAINTERS} if MODEL in losses else {},
        "loss on training images": None if run.trained_losses is None else float(run.trained_losses.mean()),
        "features": {
            name: None if measured is None else measured._asdict()
            for name, measured in ((MODEL, run.encoder), ("fresh encoder", run.fresh), ("pixels", run.pixels))
        },
        "pictures": None
        if run.pictures is None
        else run.pictures._asdict() | {"between": run.pictures.between},
        "history": run.history._asdict(),
        "learning rate": {
            "peak": run.optim.peak_lr(run.loop.batch_size),
            "usual": usual_rate(run.loop.batch_size, run.model.shape.width),
            "times the usual": run.rate,
            "warm-up steps": run.warmup,
            "steps": run.steps,
        },
        "broken images": run.broken,
    }


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_history(rows: Sequence[Mapping[str, Any]], run: Examined, healthy: bool, path: Path) -> None:
    """Write a PNG of the losses over the steps, with the inpainters' as horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=100)
    axes = figure.subplots()
    drawn = []
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "held out")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
            drawn += [value for _, value in points]
    for place, name in enumerate(INPAINTERS):
        level = run.loss(name)
        if level is not None and math.isfinite(level):
            axes.axhline(
                level, color=f"C{place + 2}", linestyle="--", linewidth=0.8, label=f"{name} {level:.2f}"
            )
            drawn.append(level)
    if drawn and max(drawn) > 20 * max(1e-9, sorted(drawn)[len(drawn) // 2]):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="mean squared error, hidden patches")
    if drawn:
        axes.legend(fontsize=7)
    axes.set_title(f"{run.model.model}: {'healthy' if healthy else 'not healthy'}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
