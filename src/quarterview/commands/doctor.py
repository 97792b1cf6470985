"""``quarterview doctor``: check a run for problems."""

from collections.abc import Sequence
from pathlib import Path

from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examined import MODEL
from quarterview.doctor.run import Diagnosis, diagnose_run, write_diagnosis
from quarterview.training.console import Console


def main(config: DoctorConfig, argv: Sequence[str]) -> int:
    """Examine a run, print the findings, and write ``results/doctor.json`` and ``doctor.png`` into it.

    Returns:
        0 if the run is healthy, 1 if it is not.

    Raises:
        UserError: as `quarterview.doctor.run.diagnose_run`.
    """
    console = Console()
    diagnosis = diagnose_run(config)
    print_losses(diagnosis, console)
    print_findings(diagnosis, console)
    folder = write_diagnosis(diagnosis, Path(config.run), argv)
    errors = [finding.name for finding in diagnosis.findings if finding.severity == "error"]
    verdict = f"not healthy: {', '.join(errors)}" if errors else "healthy: no errors found"
    run = diagnosis.measurements
    console.info(
        f"{run.history.step} of {run.num_steps} steps; {verdict}. See {folder}/doctor.png and doctor.json."
    )
    return 0 if diagnosis.is_healthy else 1


def print_losses(diagnosis: Diagnosis, console: Console) -> None:
    """Print a table of the losses of the model and of trivial inpainters, the largest first."""
    losses, metrics = diagnosis.metrics["losses"], diagnosis.metrics
    rows = []
    for name in sorted(losses, key=lambda name: -losses[name]):
        improvement = diagnosis.measurements.compute_improvement(name) if name != MODEL else None
        rows.append((name, f"{losses[name]:.4f}", "" if improvement is None else f"{improvement[0]:+.1%}"))
    if rows:
        title = f"masked loss, {metrics['space']}, {metrics['judged']} {metrics['on']}"
        console.table(title, ["prediction of masked patches", "loss", "improvement by the model"], rows)


def print_findings(diagnosis: Diagnosis, console: Console) -> None:
    """Print all findings, with their likely causes and fixes."""
    for finding in diagnosis.findings:
        console.info(f"{finding.severity}: {finding.name}. {finding.evidence}")
        if finding.cause:
            console.info(f"    likely cause: {finding.cause}")
        if finding.fix:
            console.info(f"    fix: {finding.fix}")
