"""`quarterview doctor`: is my run working?"""

from collections.abc import Sequence
from pathlib import Path

from quarterview.doctor.config import DoctorConfig
from quarterview.doctor.examined import MODEL
from quarterview.doctor.run import Diagnosis, doctor, write_diagnosis
from quarterview.training.console import Console


def main(config: DoctorConfig, argv: Sequence[str]) -> int:
    """Examine a run, show what was found, and write ``results/doctor.json`` and ``doctor.png`` into it.

    Returns:
        0 if the run is healthy, 1 if it is not.

    Raises:
        UserError: as `quarterview.doctor.run.doctor`.
    """
    console = Console()
    diagnosis = doctor(config)
    show_losses(diagnosis, console)
    show_findings(diagnosis, console)
    folder = write_diagnosis(diagnosis, Path(config.run), argv)
    ailments = [finding.name for finding in diagnosis.findings if finding.severity == "ailment"]
    verdict = f"not healthy: {', '.join(ailments)}" if ailments else "healthy, as far as this can be seen"
    run = diagnosis.run
    console.say(
        f"{run.history.step} of {run.steps} steps; {verdict}. See {folder}/doctor.png and doctor.json."
    )
    return 0 if diagnosis.healthy else 1


def show_losses(diagnosis: Diagnosis, console: Console) -> None:
    """A table of the model's loss and those of trivial inpainters, the largest first."""
    losses, figures = diagnosis.figures["losses"], diagnosis.figures
    rows = []
    for name in sorted(losses, key=lambda name: -losses[name]):
        gain = diagnosis.run.gain(name) if name != MODEL else None
        rows.append((name, f"{losses[name]:.4f}", "" if gain is None else f"{gain[0]:+.1%}"))
    if rows:
        title = f"masked loss, {figures['space']}, {figures['judged']} {figures['on']}"
        console.table(title, ["what fills the holes", "loss", "the model is below by"], rows)


def show_findings(diagnosis: Diagnosis, console: Console) -> None:
    """What was found, what it may come from, and what to do."""
    for finding in diagnosis.findings:
        console.say(f"{finding.severity}: {finding.name}. {finding.seen}")
        if finding.cause:
            console.say(f"    likely cause: {finding.cause}")
        if finding.remedy:
            console.say(f"    what to do: {finding.remedy}")
