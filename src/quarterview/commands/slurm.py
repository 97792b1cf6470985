"""Training as a Slurm job: a request, its submission through submitit, and what each of its tasks does.

submitit writes the task, with the command line as its only data, into a pickle file beside the logs,
and reads it again on the node: its own mechanism, for its own files. Nothing else is ever unpickled.
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

from quarterview.errors import RunError, UserError, unknown
from quarterview.training.console import Console
from quarterview.training.lock import lock

STOPPED = 75
"""The exit code of a command that was asked to stop and saved."""
_LEAST_LIFE = 900  # seconds; Slurm's warning may come a minute early, and kills a process that still starts
MOST_LIVES = 1000
"""So often a job that reaches its time limit is queued again."""
TEXTS = (
    *("partition", "account", "qos", "constraint", "reservation", "nodelist", "exclude", "gres"),
    *("dependency", "comment", "mail_user", "mail_type", "wckey"),
)
"""What sbatch is told as it was given."""


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster. Each field is a NAME=VALUE of ``--slurm``."""

    nodes: int = 1
    """Machines."""
    gpus: int = 1
    """GPUs on each machine, with a rank each; 0 trains on the CPU."""
    ranks: int | None = None
    """Ranks on each machine, where that is not the number of its GPUs."""
    hours: float = 24.0
    """The time limit, after which the job goes on in a queue slot of its own."""
    notice: int = 120
    """Seconds before the time limit at which the job is told: time to end a step and save."""
    cpus: int | None = None
    """Cores for each rank."""
    memory: float | None = None
    """GiB on each machine."""
    name: str | None = None
    """Of the job; by default that of the run's folder."""
    setup: str | None = None
    """A shell command before training, such as `module load cuda`."""
    cluster: str = "slurm"
    """slurm, or local: the same without a cluster, on this machine."""
    texts: dict[str, str] = field(default_factory=dict)
    """The `TEXTS` that were given."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each machine."""
        return self.ranks or max(1, self.gpus)

    @property
    def world_size(self) -> int:
        """Ranks altogether."""
        return self.nodes * self.ranks_per_node


def parse(words: Sequence[str]) -> Request:
    """The request that the words after ``--slurm`` make.

    Raises:
        UserError: naming the word, and what is accepted.
    """
    kinds = {f.name: f.type for f in fields(Request) if f.name != "texts"}
    given: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in kinds and name not in TEXTS:
            raise unknown("setting of --slurm:", name, [*kinds, *TEXTS])
        if not equals or not value:
            raise UserError(f"--slurm {word} has no value; accepted: {name}=VALUE")
        if name in given or name in texts:
            raise UserError(f"--slurm {name} is given twice; accepted: once")
        if name in TEXTS:
            texts[name] = value
        else:
            given[name] = _read(name, value, kinds[name])
    request = Request(texts=texts, **given)
    if request.cluster not in ("slurm", "local"):
        raise unknown("value of --slurm cluster:", request.cluster, ("slurm", "local"))
    if request.cluster == "local" and request.nodes > 1:
        raise UserError(f"--slurm cluster=local nodes={request.nodes}; accepted: one node, this machine")
    if 3600 * request.hours < request.notice + _LEAST_LIFE:
        raise UserError(
            f"--slurm hours={request.hours:g} with notice={request.notice} seconds leaves no time to train; "
            f"accepted: {(request.notice + _LEAST_LIFE) / 3600:.2g} hours or more"
        )
    return request


def _read(name: str, value: str, kind: Any) -> Any:
    if kind in (str, str | None):
        return value
    whole = kind in (int, int | None)
    least = 0 if name == "gpus" else 1
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = math.nan
    if not (least <= number < math.inf if whole else 0 < number < math.inf):
        accepted = f"a whole number from {least}" if whole else "a number above 0"
        raise UserError(f"--slurm {name}={value}; accepted: {accepted}")
    return number


def submit_command(
    words: Sequence[str],
    config: Any,
    inputs: Sequence[str],
    check: Callable[[int], object],
    argv: Sequence[str],
) -> None:
    """Hand the same command line, without --slurm, to Slurm.

    Args:
        words: what followed --slurm.
        config: composed, with the part `run`.
        inputs: the sets of images.
        check: refuses what so many ranks could not train.
        argv: the command line, from the program's name on.
    """
    request = parse(words)
    check(request.world_size)
    cli = import_module("quarterview.cli")  # by its name, for it stands above the commands
    arguments = cli.join_data(argv[1:])
    at = arguments.index("--slurm")
    rest = [*arguments[:at], *arguments[at + 1 + len(words) :]]
    submit(request, config.run.out, inputs, cli.run, rest, Console())


def submit(
    request: Request,
    out: str,
    inputs: Sequence[str],
    run: Callable[[Sequence[str]], int],
    argv: Sequence[str],
    console: Console,
) -> str:
    """Hand a command line to Slurm, and say where it went.

    Args:
        request: what is asked of the cluster.
        out: the run's folder, in which ``slurm/`` takes scripts and logs.
        inputs: the sets of images, among which it must not lie.
        run: what carries out a command line and returns its exit code; a function of a module.
        argv: the command line, without ``--slurm``.

    Returns:
        the job's number.

    Raises:
        UserError: if submitit is not installed, there is no Slurm here, or the folder is not a run's or
            is in use.
        RunError: if Slurm refuses the job.
    """
    from quarterview.training import run_folder  # not above: ranks read this module before anything else

    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'quarterview[slurm]'") from None
    folder = Path(out)
    logs = folder.absolute() / "slurm"
    try:
        executor = submitit.AutoExecutor(
            logs,
            cluster=request.cluster,
            slurm_max_num_timeout=MOST_LIVES,
            local_max_num_timeout=MOST_LIVES,
        )
    except RuntimeError:  # no srun
        raise UserError(
            "--slurm finds no srun on this machine; accepted: a machine that can submit to Slurm, "
            "or cluster=local to try it on this one"
        ) from None
    executor.update_parameters(**_parameters(request, folder))
    run_folder.check_folder(folder, inputs)
    with lock(folder):  # nobody trains in it, and the logs lie in a run's folder
        logs.mkdir(exist_ok=True)
    try:
        job = executor.submit(Task(run), list(argv))
    except submitit.core.utils.FailedJobError as error:
        raise RunError(f"Slurm refuses the job: {str(error).strip()}") from None
    console.say(
        f"submitted job {job.job_id}: {request.world_size} ranks, {request.ranks_per_node} a node, "
        f"{request.hours:g} hours at a time; queued again until the run is complete"
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
            console.say(f"  {name:<8}{text}")
    return job.job_id


def _parameters(request: Request, folder: Path) -> dict[str, Any]:
    """A request in submitit's words."""
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
        srun = ["--kill-on-bad-exit=1"]  # else the ranks that are left wait for one that died
        if request.cpus is not None:
            srun.append(f"--cpus-per-task={request.cpus}")  # from 22.05 on, srun does not inherit it
        # Requeueing may be off by default.
        more = {"requeue": True, **{name.replace("_", "-"): text for name, text in request.texts.items()}}
        values |= {
            "slurm_signal_delay_s": request.notice,
            "slurm_srun_args": srun,
            "slurm_additional_parameters": more,
        }
    return values


class Task:
    """One rank of a job: what submitit calls on the node.

    submitit's own handler of the warning signal would requeue the job in the middle of a step. Here
    the signal becomes the SIGTERM that training knows: all ranks end the same step, the first saves,
    and then that rank alone asks for the requeue, by the handler that was put aside. The job that
    starts again gives the same command, which goes on from the newest checkpoint.

    Args:
        run: carries out a command line and returns its exit code.
    """

    def __init__(self, run: Callable[[Sequence[str]], int]) -> None:
        self.run = run

    def __call__(self, argv: Sequence[str]) -> int:
        """Train; returns 0, or `STOPPED` on the ranks that leave the requeue to the first.

        Raises:
            SystemExit: with the code of a command that failed, which fails the job, or was stopped for good.
        """
        from submitit.core.job_environment import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        job = JobEnvironment()
        # Every rank sees all GPUs of its machine and takes the one of its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        warning = job._usr_sig()
        requeue = signal.getsignal(warning)
        warned: list[int] = []

        def stop(number: int, _frame: object) -> None:
            warned.append(number)
            signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # until the loop takes it over
        signal.signal(warning, stop)
        try:
            code = self.run(argv)
        except SystemExit as left:
            code = left.code
        for number in (signal.SIGTERM, warning):
            signal.signal(number, signal.SIG_IGN)  # it has been heard
        if code == STOPPED:
            if job.global_rank != 0:
                return STOPPED  # as if nothing were wrong: a failure would take the first rank along
            if warned or _is_running(job):
                assert callable(requeue)
                requeue(warning, None)  # ends this process
        if code != 0:
            sys.exit(code)
        return 0

    def checkpoint(self, argv: Sequence[str]) -> Any:
        """What a requeued job does: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, argv)


def _is_running(job: Any) -> bool:
    """Whether Slurm thinks that the job goes on.

    SIGTERM alone means that a job is cancelled, or is preempted and has some time left. A cancelled
    one is completing, and is to stay so; a preempted one still runs, and would count as ended if it
    were not requeued.
    """
    if job.name() != "slurm":
        return False
    asked = ["squeue", "--noheader", "--jobs", job.job_id, "--format", "%T"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "RUNNING"
