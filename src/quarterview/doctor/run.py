"""Diagnosis of a run, and the result files ``doctor.json`` and ``doctor.png``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarterview.doctor.collapse import FeatureStatistics
from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examine import combine_measurements, measure_images, read_run_record
from quarterview.doctor.examined import MODEL, RunMeasurements, compute_reference_lr
from quarterview.doctor.findings import Finding, diagnose, sort_by_severity
from quarterview.doctor.history import TrainingHistory
from quarterview.doctor.inpainters import INPAINTERS
from quarterview.evaluation.results import write_result
from quarterview.training.distributed import choose_device
from quarterview.training.metric_writers import read_metrics

_SEVERITY_VALUES = {"error": "ailment", "warning": "caution", "ok": "fine"}
_KEYS = {
    "evidence": "seen",
    "fix": "remedy",
    "between_variance_ratio": "share",
    "mean_cosine": "similarity",
    "num_rows": "rows",
    "min_loss": "lowest",
    "recent_decrease": "falling",
    "num_skipped": "skipped",
    "grad_norm_growth": "gradient_growth",
    "data_wait": "waiting",
    "first_val_loss": "val_first",
    "min_val_loss": "val_lowest",
    "min_val_loss_step": "val_lowest_step",
    "last_val_loss": "val_last",
}
"""Severities and keys in ``doctor.json``, whose format is fixed, where they differ from names in the code."""


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of a run."""

    measurements: RunMeasurements
    findings: tuple[Finding, ...]
    """All findings, errors first."""
    metrics: dict[str, Any]
    """The measurements, with the keys of ``results/doctor.json``."""
    settings: dict[str, Any]
    """Settings of the diagnosis."""
    data: dict[str, Any]
    """Fingerprint (if the images can be read) and number of images."""

    @property
    def is_healthy(self) -> bool:
        """True if no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)


def diagnose_run(config: DoctorConfig) -> Diagnosis:
    """Diagnose a run, without writing anything.

    Raises:
        UserError: if the folder is not a run of --method mae, or `config.data` cannot be read.
    """
    record = read_run_record(Path(config.run))
    measured, image_findings = measure_images(
        record, config.data, config.images, choose_device(config.device)
    )
    run = combine_measurements(record, measured)
    return Diagnosis(
        run,
        tuple(sort_by_severity([*diagnose(run), *image_findings])),
        collect_metrics(run),
        settings={"images": config.images or "default", "seed": record.loop.seed, "step": record.step},
        data=({"fingerprint": measured.fingerprint} if measured else {}) | {"images": run.num_images},
    )


def write_diagnosis(diagnosis: Diagnosis, run_folder: Path, argv: Sequence[str] = ()) -> Path:
    """Write ``doctor.json`` and ``doctor.png`` into the results of a run.

    Args:
        run_folder: the folder of the run.
        argv: the command line.

    Returns:
        The folder of the result files.
    """
    folder = run_folder.resolve() / "results"
    results = {
        "healthy": diagnosis.is_healthy,
        "findings": [
            _rename_keys(finding) | {"severity": _SEVERITY_VALUES[finding.severity]}
            for finding in diagnosis.findings
        ],
        **diagnosis.metrics,
    }
    write_result(folder, "doctor", argv, diagnosis.settings, diagnosis.data, _replace_nonfinite(results))
    plot_history(
        read_metrics(run_folder), diagnosis.measurements, diagnosis.is_healthy, folder / "doctor.png"
    )
    return folder


def collect_metrics(run: RunMeasurements) -> dict[str, Any]:
    """Convert the measurements to the entries of ``doctor.json``."""
    losses = run.losses or {}
    return {
        "space": "normalised pixels" if run.model.normalizes_patches else "pixels",
        "on": "held-out images" if run.is_held_out else "training images",
        "judged": len(next(iter(losses.values()))) if losses else 0,
        "losses": {name: float(values.mean()) for name, values in losses.items()},
        "below": {name: run.compute_improvement(name) for name in INPAINTERS} if MODEL in losses else {},
        "loss on training images": None if run.train_losses is None else float(run.train_losses.mean()),
        "features": {
            name: None if features is None else _rename_keys(features)
            for name, features in (
                (MODEL, run.encoder_statistics),
                ("fresh encoder", run.random_encoder_statistics),
                ("pixels", run.pixel_statistics),
            )
        },
        "pictures": None
        if run.image_statistics is None
        else run.image_statistics._asdict() | {"between": run.image_statistics.between_variance_ratio},
        "history": _rename_keys(run.history),
        "learning rate": {
            "peak": run.optim.peak_lr(run.loop.batch_size),
            "usual": compute_reference_lr(run.loop.batch_size, run.model.shape.width),
            "times the usual": run.relative_lr,
            "warm-up steps": run.warmup_steps,
            "steps": run.num_steps,
        },
        "broken images": run.num_broken,
    }


def _rename_keys(values: Finding | FeatureStatistics | TrainingHistory) -> dict[str, Any]:
    """Convert a tuple to a dictionary with the keys of ``doctor.json``."""
    return {_KEYS.get(name, name): value for name, value in values._asdict().items()}


def _replace_nonfinite(value: Any) -> Any:
    """Replace infinities and nan, which JSON does not support, by None."""
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_history(
    rows: Sequence[Mapping[str, Any]], run: RunMeasurements, is_healthy: bool, path: Path
) -> None:
    """Write a PNG plot of the losses over the steps, with those of the inpainters as horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=100)
    axes = figure.subplots()
    plotted = []
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "held out")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1)
            plotted += [value for _, value in points]
    for i, name in enumerate(INPAINTERS):
        level = run.get_mean_loss(name)
        if level is not None and math.isfinite(level):
            axes.axhline(level, color=f"C{i + 2}", linestyle="--", linewidth=0.8, label=f"{name} {level:.2f}")
            plotted.append(level)
    if plotted and max(plotted) > 20 * max(1e-9, sorted(plotted)[len(plotted) // 2]):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="mean squared error, masked patches")
    if plotted:
        axes.legend(fontsize=7)
    axes.set_title(f"{run.model.model}: {'healthy' if is_healthy else 'not healthy'}", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
