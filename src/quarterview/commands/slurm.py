"""Slurm jobs (``--slurm``): the request, its submission through submitit, and the task of each rank.

submitit pickles the task, whose only data is the command line, into a file beside the logs, and unpickles it
on the node. Nothing else is ever unpickled.
"""

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from quarterview.errors import RunError, UserError, invalid, missing_package, not_supported, unknown
from quarterview.training.console import Console
from quarterview.training.lock import lock_folder

EXIT_STOPPED = 75
"""The exit code of a command that was stopped by SIGTERM and saved."""
_MIN_TRAINING_SECONDS = (
    900  # Slurm's signal may come a minute early, and kills a process that is still starting
)
MAX_REQUEUES = 1000
"""Maximum number of times that a job is requeued at its time limit."""
SBATCH_OPTIONS = (
    *("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "gres"),
    *("dependency", "comment", "mail_user", "mail_type", "wckey"),
)
"""Settings that are passed to sbatch unchanged."""


@dataclass(frozen=True)
class SlurmRequest:
    """The resources of a job. Each field is a setting NAME=VALUE of ``--slurm``."""

    nodes: int = 1
    """Number of nodes."""
    gpus: int = 1
    """GPUs per node, with one rank each; 0 trains on the CPU."""
    ranks: int | None = None
    """Ranks per node; by default the number of GPUs."""
    hours: float = 24.0
    """Time limit, after which the job is requeued and resumes."""
    notice: int = 120
    """Seconds before the time limit at which the job gets a signal, to end a step and save."""
    cpus: int | None = None
    """CPU cores per rank."""
    memory: float | None = None
    """Memory per node in GiB."""
    name: str | None = None
    """Name of the job; by default that of the run's folder."""
    setup: str | None = None
    """A shell command before training, such as `module load cuda`."""
    cluster: str = "slurm"
    """slurm, or local to run on this machine without Slurm."""
    sbatch_options: dict[str, str] = field(default_factory=dict)
    """Values of the given `SBATCH_OPTIONS`."""

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks per node."""
        return self.ranks or max(1, self.gpus)

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.nodes * self.ranks_per_node


def parse_request(settings: Sequence[str]) -> SlurmRequest:
    """Parse the settings NAME=VALUE of ``--slurm``.

    Raises:
        UserError: if a setting is unknown or its value is invalid.
    """
    types = {f.name: f.type for f in fields(SlurmRequest) if f.name != "sbatch_options"}
    values: dict[str, Any] = {}
    sbatch_options: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in types and name not in SBATCH_OPTIONS:
            raise unknown("setting of --slurm:", name, [*types, *SBATCH_OPTIONS])
        if not equals or not value:
            raise UserError(f"--slurm {setting} has no value. Give {name}=VALUE.")
        if name in values or name in sbatch_options:
            raise UserError(f"--slurm {name} is given twice. Give it once.")
        if name in SBATCH_OPTIONS:
            sbatch_options[name] = value
        else:
            values[name] = _parse_value(name, value, types[name])
    request = SlurmRequest(sbatch_options=sbatch_options, **values)
    if request.cluster not in ("slurm", "local"):
        raise unknown("value of --slurm cluster:", request.cluster, ("slurm", "local"))
    if request.cluster == "local" and request.nodes > 1:
        raise not_supported(f"--slurm nodes={request.nodes}", "cluster=local", "Give nodes=1.")
    if 3600 * request.hours < request.notice + _MIN_TRAINING_SECONDS:
        raise UserError(
            f"--slurm hours={request.hours:g} is too short for notice={request.notice} seconds. Give "
            f"hours={(request.notice + _MIN_TRAINING_SECONDS) / 3600:.2g} or more."
        )
    return request


def _parse_value(name: str, value: str, field_type: Any) -> Any:
    if field_type in (str, str | None):
        return value
    is_int = field_type in (int, int | None)
    minimum = 0 if name == "gpus" else 1
    try:
        number = int(value) if is_int else float(value)
    except ValueError:
        number = math.nan
    if not (minimum <= number < math.inf if is_int else 0 < number < math.inf):
        expected = f"a whole number of at least {minimum}" if is_int else "a number above 0"
        raise invalid(f"--slurm {name}", value, expected)
    return number


def submit_command(
    settings: Sequence[str],
    config: Any,
    data: Sequence[str],
    check: Callable[[int], object],
    argv: Sequence[str],
) -> None:
    """Submit a command line, without --slurm, as a Slurm job.

    Args:
        settings: the settings after --slurm.
        config: composed configuration with the part `run`.
        data: paths of the images.
        check: called with the number of ranks before the submission; raises UserError if they cannot train.
        argv: the command line, with the program's name.
    """
    request = parse_request(settings)
    check(request.world_size)
    cli = import_module("quarterview.cli")  # by name, because it imports the commands
    arguments = cli.normalize_args(argv[1:])
    index = arguments.index("--slurm")
    rest = [*arguments[:index], *arguments[index + 1 + len(settings) :]]
    submit(request, config.run.out, data, cli.run, rest, Console())


def submit(
    request: SlurmRequest,
    out: str,
    data: Sequence[str],
    run: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    console: Console,
) -> str:
    """Submit a command line as a Slurm job, and print the job's id, files and commands.

    Args:
        request: the resources of the job.
        out: the run's folder, with scripts and logs in ``slurm/``.
        data: paths of the images, which must not contain the run's folder.
        run: a module-level function that runs a command line and returns its exit code.
        argv: the command line, without ``--slurm``.
        console: prints the messages.

    Returns:
        The job's id.

    Raises:
        UserError: if submitit or Slurm is not installed, or the run's folder cannot be used.
        RunError: if Slurm rejects the job.
    """
    from quarterview.training import run_folder  # here, because ranks import this module before anything else

    try:
        import submitit
    except ImportError:
        raise missing_package("submitit", "--slurm", "slurm") from None
    folder = Path(out)
    logs = folder.absolute() / "slurm"
    try:
        executor = submitit.AutoExecutor(
            logs,
            cluster=request.cluster,
            slurm_max_num_timeout=MAX_REQUEUES,
            local_max_num_timeout=MAX_REQUEUES,
        )
    except RuntimeError:  # no srun
        raise UserError(
            "--slurm needs srun, which this machine does not have. Use a machine that can submit Slurm jobs, "
            "or give cluster=local."
        ) from None
    executor.update_parameters(**_make_submitit_parameters(request, folder))
    run_folder.check_folder(folder, data)
    with lock_folder(folder):  # checks that no run uses it, and marks it as a run folder
        logs.mkdir(exist_ok=True)
    try:
        job = executor.submit(Task(run), list(argv))
    except submitit.core.utils.FailedJobError as error:
        raise RunError(f"Slurm rejected the job: {str(error).strip()}") from None
    console.info(
        f"Submitted job {job.job_id}: {request.world_size} ranks, {request.ranks_per_node} per node, "
        f"{request.hours:g} hours at a time. It is requeued until the run is complete."
    )
    local = request.cluster == "local"
    for name, text in (
        ("script", "" if local else str(job.paths.submission_file)),
        ("logs", str(logs / f"{job.job_id}_RANK_log.out") + " and .err"),
        ("follow", f"tail -F {job.paths.stdout} {job.paths.stderr}"),
        ("state", f"ps {job.job_id}" if local else f"squeue --jobs {job.job_id}"),
        ("stop", (f"kill {job.job_id}" if local else f"scancel {job.job_id}") + " (it saves first)"),
    ):
        if text:
            console.info(f"  {name:<8}{text}")
    return job.job_id


def _make_submitit_parameters(request: SlurmRequest, folder: Path) -> dict[str, Any]:
    """Return the parameters of a request for submitit."""
    values: dict[str, Any] = {
        "name": request.name or folder.name,
        "nodes": request.nodes,
        "tasks_per_node": request.ranks_per_node,
        "gpus_per_node": request.gpus or None,
        "timeout_min": math.ceil(60 * request.hours),
        "cpus_per_task": request.cpus,
        "mem_gb": request.memory,
    }
    if request.setup is not None:
        values |= {f"{request.cluster}_setup": [request.setup]}
    if request.cluster == "slurm":
        srun = ["--kill-on-bad-exit=1"]  # else the other ranks would wait for one that failed
        if request.cpus is not None:
            srun.append(f"--cpus-per-task={request.cpus}")  # since 22.05 srun does not inherit it
        # Requeueing may be disabled by default.
        more = {
            "requeue": True,
            **{name.replace("_", "-"): text for name, text in request.sbatch_options.items()},
        }
        values |= {
            "slurm_signal_delay_s": request.notice,
            "slurm_srun_args": srun,
            "slurm_additional_parameters": more,
        }
    return values


class Task:
    """The task of one rank, which submitit calls on the node.

    submitit's own handler of Slurm's warning signal would requeue the job in the middle of a step. Here the
    signal is turned into SIGTERM, which the training loop handles: all ranks end the same step, rank 0 saves,
    and then rank 0 requeues the job by submitit's handler. The restarted job runs the same command, which
    resumes from the newest checkpoint.

    Args:
        run: runs a command line and returns its exit code.
    """

    def __init__(self, run: Callable[[Sequence[str]], int]) -> None:
        self.run = run

    def __call__(self, argv: Sequence[str]) -> int:
        """Run the command line.

        Returns:
            0, or `EXIT_STOPPED` on other ranks than 0 if the job is requeued.

        Raises:
            SystemExit: with the exit code of a command that failed, which fails the job, or was cancelled.
        """
        from submitit.core.job_environment import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        # Every rank sees all GPUs of its node and uses the one of its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        warning = job._usr_sig()
        requeue = signal.getsignal(warning)
        warned: list[int] = []

        def stop(number: int, _frame: object) -> None:
            warned.append(number)
            signal.raise_signal(signal.SIGTERM)

        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED)
        )  # until the training loop sets its own handler
        signal.signal(warning, stop)
        try:
            code = self.run(argv)
        except SystemExit as exit_error:
            code = exit_error.code
        for number in (signal.SIGTERM, warning):
            signal.signal(number, signal.SIG_IGN)  # the stop is handled already
        if code == EXIT_STOPPED:
            if job.global_rank != 0:
                return EXIT_STOPPED  # not a failure, which would end rank 0, too
            if warned or _is_running(job):
                assert callable(requeue)
                requeue(warning, None)  # ends this process
        if code != 0:
            sys.exit(code)
        return 0

    def checkpoint(self, argv: Sequence[str]) -> Any:
        """Return the task of the requeued job, which is the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, argv)


def _is_running(job: Any) -> bool:
    """Return whether Slurm's state of the job is RUNNING.

    SIGTERM without the warning signal means that the job is cancelled or preempted. A cancelled job is
    COMPLETING and must not be requeued. A preempted one is still RUNNING and would end if it were not
    requeued.
    """
    if job.name() != "slurm":
        return False
    command = ["squeue", "--noheader", "--jobs", job.job_id, "--format", "%T"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "RUNNING"
