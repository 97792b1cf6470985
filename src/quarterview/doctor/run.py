"""Is my run working? The model beside trivial inpainters, its features, its history, its images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quarterview.doctor.examine import FEWEST, examine, read_record, see_images
from quarterview.doctor.examined import MODEL, Examined, usual_rate
from quarterview.doctor.findings import Finding, by_severity, diagnose
from quarterview.doctor.inpainters import INPAINTERS
from quarterview.errors import UserError, check_types
from quarterview.evaluation.results import write_result
from quarterview.training.distributed import choose_device
from quarterview.training.logging import Journal, metrics


@dataclass(frozen=True)
class DoctorConfig:
    """Which run is examined, and how closely."""

    run: str
    """The folder of a run, finished or not."""
    data: tuple[str, ...] = ()
    """The images of the run, if they are not where they were."""
    images: int | None = None
    """How many held-out images, and as many training images, are looked at; by default 256, and fewer,
    down to 48, of more than 128 × 128 pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        data = (self.data,) if isinstance(self.data, str) else tuple(map(str, self.data))
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "run", str(self.run))
        check_types(self, DoctorConfig)
        if self.images is not None and self.images < FEWEST:
            raise UserError(f"{self.images} images; accepted: {FEWEST} or more")


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a run."""

    findings: tuple[Finding, ...]
    """Ailments first."""
    figures: dict[str, Any]
    """All that was measured, as in ``results/doctor.json``."""

    @property
    def healthy(self) -> bool:
        """Whether there is no ailment."""
        return all(finding.severity != "ailment" for finding in self.findings)


def doctor(config: DoctorConfig, journal: Journal, argv: Sequence[str] = ()) -> Diagnosis:
    """Examine a run, show what was found, and write ``results/doctor.json`` and ``doctor.png`` into it.

    Raises:
        UserError: if the folder is no run, or `config.data` cannot be read.
    """
    record = read_record(Path(config.run))
    device = choose_device(config.device)
    seen, left_out = see_images(record, config.data, config.images, device)
    run = examine(record, seen)
    findings = tuple(by_severity([*diagnose(run), *left_out]))
    diagnosis = Diagnosis(findings, figures_of(run))
    folder = Path(config.run).resolve() / "results"
    data = {"fingerprint": seen.fingerprint, "images": run.images} if seen else {"images": run.images}
    results = {
        "healthy": diagnosis.healthy,
        "findings": [finding._asdict() for finding in findings],
        **diagnosis.figures,
    }
    settings = {"images": config.images or "default", "seed": record.loop.seed, "step": record.step}
    write_result(folder, "doctor", argv, settings, data, _finite(results))
    draw_history(metrics(record.folder), run, diagnosis.healthy, folder / "doctor.png")
    show(run, diagnosis, folder, journal)
    return diagnosis


# ---------------------------------------------------------------------- telling


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


def show(run: Examined, diagnosis: Diagnosis, folder: Path, journal: Journal) -> None:
    """The table of losses, the findings and the verdict."""
    if run.losses:
        figures = diagnosis.figures
        title = f"masked loss, {figures['space']}, {figures['judged']} {figures['on']}"
        rows = []
        for name in sorted(run.losses, key=lambda name: -float(run.losses[name].mean() if run.losses else 0)):
            gain = run.gain(name) if name != MODEL else None
            below = "" if gain is None else f"{gain[0]:+.1%}"
            rows.append((name, f"{run.loss(name):.4f}", below))
        journal.table(title, ["what fills the holes", "loss", "the model is below by"], rows)
    for finding in diagnosis.findings:
        journal.say(f"{finding.severity}: {finding.name}. {finding.seen}")
        if finding.cause:
            journal.say(f"    likely cause: {finding.cause}")
        if finding.remedy:
            journal.say(f"    what to do: {finding.remedy}")
    ailments = [finding.name for finding in diagnosis.findings if finding.severity == "ailment"]
    verdict = f"not healthy: {', '.join(ailments)}" if ailments else "healthy, as far as this can be seen"
    journal.say(
        f"{run.history.step} of {run.steps} steps; {verdict}. See {folder}/doctor.png and doctor.json."
    )


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
