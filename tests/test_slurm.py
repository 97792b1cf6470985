"""Tests of --slurm: the request, the script, and jobs that are stopped and requeued."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quarterview import cli
from quarterview.commands import slurm
from quarterview.errors import UserError
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.training.metric_writers import read_metrics

TINY = [
    *("pretrain", "--data", "shapes:64:size=16", "--holdout", "0", "--model", "mae_vit_32x1x2_patch4"),
    *("--image-size", "16", "--decoder-width", "16", "--decoder-depth", "1", "--decoder-heads", "2"),
    *("--precision", "fp32", "--device", "cpu", "--batch-size", "16", "--lr", "1e-3", "--workers", "0"),
]

# ---------------------------------------------------------------------- the request


def test_a_request_is_parsed():
    request = slurm.parse_request(
        ["nodes=2", "gpus=8", "hours=1.5", "partition=main", "mail_user=a=b@c", "memory=500"]
    )
    assert (request.nodes, request.gpus, request.hours, request.world_size) == (2, 8, 1.5, 16)
    assert request.sbatch_options == {"partition": "main", "mail_user": "a=b@c"}
    assert slurm.parse_request([]) == slurm.SlurmRequest()
    assert slurm.parse_request(["gpus=0"]).world_size == 1
    assert slurm.parse_request(["gpus=0", "ranks=3", "nodes=2"]).world_size == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=8"], "Did you mean 'gpus'"),
        (["partitoin=x"], "Did you mean 'partition'"),
        (["sbatch_options=x"], "Unknown setting"),
        (["gpus"], "gpus has no value. Give gpus=VALUE"),
        (["gpus="], "has no value"),
        (["gpus=8", "gpus=8"], "twice"),
        (["qos=a", "qos=b"], "twice"),
        (["nodes=two"], "nodes is two. Give a whole number of at least 1"),
        (["nodes=0"], "nodes is 0. Give a whole number of at least 1"),
        (["gpus=-1"], "gpus is -1. Give a whole number of at least 0"),
        (["hours=nan"], "a number above 0"),
        (["hours=0"], "a number above 0"),
        (["hours=inf"], "a number above 0"),
        (["cluster=slumr"], "Did you mean 'slurm'"),
        (["cluster=local", "nodes=2"], "nodes=2 is not supported with cluster=local"),
        (["hours=0.2"], "Give hours=0.28 or more"),
    ],
)
def test_an_invalid_request_is_refused(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        slurm.parse_request(words)


# ---------------------------------------------------------------------- what is submitted


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put an sbatch on PATH that saves the script and prints a job id."""
    folder = tmp_path / "bin"
    folder.mkdir()
    kept = tmp_path / "script"
    for name, text in (("srun", "exit 1"), ("sbatch", f'cp "$1" {kept}; echo Submitted batch job 4711')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return kept


def test_the_sbatch_script_has_the_requested_resources(tmp_path, sbatch, capsys):
    out = tmp_path / "runs" / "mine"
    words = ["nodes=2", "gpus=4", "hours=1.5", "cpus=6", "memory=100", "partition=main", "mail_user=a@b.c"]
    words += ["setup=module load cuda"]
    assert cli.run([*TINY, "--out", str(out), "--slurm", *words, "--steps=9"]) == 0
    script = sbatch.read_text()
    flags = set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))
    wanted = {
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=90", "--cpus-per-task=6"),
        *("--mem=100GB", "--partition=main", "--mail-user=a@b.c", "--requeue", "--signal=USR2@120"),
        *("--job-name=mine", "--open-mode=append"),
    }
    assert wanted <= flags
    assert re.search(r"^module load cuda$", script, re.MULTILINE)
    command = next(line for line in script.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --cpus-per-task=6 " in command
    assert sys.executable in command
    said = capsys.readouterr().out
    assert "Submitted job 4711: 8 ranks, 4 per node, 1.5 hours at a time" in said
    assert "scancel 4711" in said
    assert str(out / "slurm" / "4711_RANK_log.out") in said
    assert not list(out.glob("checkpoints/*"))  # nothing was trained here


def test_the_pickled_payload_is_only_the_command_line(tmp_path, sbatch):
    from submitit.helpers import DelayedSubmission

    out = tmp_path / "x"
    assert cli.run([*TINY, "--out", str(out), "--slurm", "gpus=2", "hours=1", "--steps", "9"]) == 0
    (pickled,) = (out / "slurm").glob("*_submitted.pkl")
    assert pickled.stat().st_size < 2000  # names of a class and a function, and words
    submission = DelayedSubmission.load(pickled)  # by submitit, of what it has just written
    assert type(submission.function) is slurm.Task
    assert submission.function.run is cli.run
    assert len(submission.args) == 1
    assert not submission.kwargs
    parsed = cli.parse(submission.args[0])
    assert parsed == cli.parse([*TINY, "--out", str(out), "--steps", "9"])
    assert parsed[2].slurm is None
    again = submission._checkpoint_function()
    assert (again.function, again.args) == (submission.function, submission.args)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slurm", "gpus=33"], "is too small for 33 ranks"),
        (["--slurm", "gpu=8"], "Did you mean 'gpus'"),
        (["--data", "nowhere", "--slurm"], "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_not_submitted(tmp_path, sbatch, capsys, words, said):
    rest = [word for word in TINY if "--data" not in words or word not in ("--data", "shapes:64:size=16")]
    assert cli.run([*rest, "--out", str(tmp_path / "x"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not sbatch.exists()
    assert not (tmp_path / "x").exists()


def test_the_run_folder_is_checked_before_submission(tmp_path, sbatch, capsys):
    assert cli.run([*TINY, "--slurm"]) == 2
    assert "The run has no folder. Give --out RUN." in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.run([*TINY, "--out", str(tmp_path), "--slurm"]) == 2
    assert "is not a run: it contains" in capsys.readouterr().err
    assert not sbatch.exists()


def test_missing_slurm_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.run([*TINY, "--out", str(tmp_path / "x"), "--slurm"]) == 2
    assert "needs srun" in capsys.readouterr().err


def test_a_rejected_job_is_reported(tmp_path, sbatch, capsys):
    refusing = Path(os.environ["PATH"].split(":")[0]) / "sbatch"
    refusing.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    assert cli.run([*TINY, "--out", str(tmp_path / "x"), "--slurm", "partition=x"]) == 1
    assert "invalid partition specified: x" in capsys.readouterr().err


def test_finetune_supports_slurm(tmp_path, sbatch, capsys):
    words = [
        "finetune",
        "scratch",
        "--model",
        "mae_vit_32x1x2_patch4",
        "--image-size",
        "16",
        "--batch-size",
        "20",
    ]
    words += ["--train", "shapes:40", "--out", str(tmp_path / "ft"), "--recipe", "small"]
    assert cli.run([*words, "--slurm", "gpus=2"]) == 2
    assert "--test is missing" in capsys.readouterr().err
    words += ["--test", "shapes:20:seed=2"]
    assert cli.run([*words, "--slurm", "gpus=11"]) == 2
    assert "11 ranks" in capsys.readouterr().err
    assert cli.run([*words, "--slurm", "gpus=2"]) == 0
    assert "Submitted job 4711" in capsys.readouterr().out


# ---------------------------------------------------------------------- what a rank does

RANK = '''
import os, signal, sys, time
from pathlib import Path

from quarterview.commands.slurm import Task


def run(argv):
    """In place of training: say who this is; in the first life, wait to be told to stop."""
    folder, how = Path(argv[0]), argv[1]
    rank = os.environ["RANK"]
    with (folder / f"lives-{rank}").open("a") as lives:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        lives.write(" ".join(os.environ[name] for name in names) + "\\n")
    if len((folder / f"lives-{rank}").read_text().splitlines()) > 1:
        return 0
    if how == "fail":
        return 1
    stopped = []
    if how != "early":
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    (folder / f"ready-{rank}").touch()
    while not stopped:
        time.sleep(0.01)
    time.sleep(0.3)  # the step is ended, and saved
    (folder / f"saved-{rank}").touch()
    return 75
'''


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(what, seconds=300):
    """Return the first true result of a function."""
    until = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return answer


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module with a replacement of training that jobs can import."""
    (tmp_path / "stand_in_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    import stand_in_rank

    yield stand_in_rank
    del sys.modules["stand_in_rank"]


@pytest.mark.filterwarnings("ignore:subprocess .* is still running")  # that is what it is for
@pytest.mark.parametrize(
    "how",
    [
        "warned",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("early", "one rank warned", "stopped", "fail")
        ),
    ],
)
def test_a_job_is_requeued_once_after_all_ranks_saved(tmp_path, stand_in, how):
    request = slurm.parse_request(["cluster=local", "gpus=0", "ranks=2", "hours=1"])
    job = int(slurm.submit(request, str(tmp_path / "run"), (), stand_in.run, [str(tmp_path), how], Console()))
    if how != "fail":
        wait_for(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in "01"))
        number = signal.SIGTERM if how == "stopped" else signal.SIGUSR2
        for process in children(job)[: 1 if how == "one rank warned" else 2]:
            os.kill(process, number)
    if how == "one rank warned":  # training would have told the other at the end of the step
        os.kill(children(job)[1], signal.SIGTERM)
    wait_for(lambda: gone(job))
    lives = [(tmp_path / f"lives-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(lives[0]) == len(lives[1]) == (1 if how in ("stopped", "fail") else 2)
    for rank in (0, 1):
        assert {line.rsplit(" ", 1)[0] for line in lives[rank]} == {f"{rank} 2 {rank} 2"}
        assert (tmp_path / f"saved-{rank}").exists() == (how not in ("fail", "early"))
    assert {line.rsplit(" ", 1)[1] for life in lives for line in life} == {lives[0][0].rsplit(" ", 1)[1]}
    log = (tmp_path / "run" / "slurm" / f"{job}_0_log.out").read_text()
    assert log.count("Requeued job") == len(lives[0]) - 1


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", 1), ("COMPLETING", 0)])
def test_sigterm_alone_requeues_under_slurm_unless_the_job_is_cancelled(
    tmp_path, stand_in, sbatch, state, requeued
):
    folder = Path(os.environ["PATH"].split(":")[0])
    for name, text in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" >> {tmp_path}/scontrol')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    request = slurm.parse_request(["gpus=0", "hours=1"])
    slurm.submit(request, str(tmp_path / "run"), (), stand_in.run, [str(tmp_path), "stopped"], Console())
    logs = tmp_path / "run" / "slurm"
    place = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    place |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[03-04]"}
    task = subprocess.Popen(
        [sys.executable, "-m", "submitit.core._submit", str(logs)],
        env={**os.environ, **place, "SUBMITIT_EXECUTOR": "slurm"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for((tmp_path / "ready-0").exists)
    task.terminate()
    code = task.wait(300)
    asked = (tmp_path / "scontrol").read_text().split("\n") if (tmp_path / "scontrol").exists() else []
    assert asked == (["requeue 4711", ""] if requeued else [])
    assert code == (255 if requeued else 75)


# ---------------------------------------------------------------------- the whole


@pytest.mark.slow
def test_a_job_requeued_twice_equals_an_uninterrupted_one(tmp_path):
    """With two ranks and submitit's local executor, weights, optimizer state and metrics are equal."""
    steps = 50
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(name: str) -> int:
        words = [*TINY[:-2], "--workers", "1", "--cache", "none", "--steps", str(steps), "--log-every", "2"]
        words += ["--checkpoint-every", "5"]
        words += ["--out", str(tmp_path / name), "--slurm", "cluster=local", "gpus=0", "ranks=2", "hours=1"]
        said = tmp_path / f"{name}.txt"
        with said.open("w") as file:  # a pipe would stay open until the job ends
            command = [sys.executable, "-m", "quarterview", *words]
            subprocess.run(command, env=env, stdout=file, stderr=file, check=True)
        return int(re.search(r"Submitted job (\d+)", said.read_text())[1])

    whole, job = tmp_path / "whole", start("whole")
    wait_for(lambda: gone(job))
    parts, job = tmp_path / "parts", start("parts")
    stops: list[int] = []

    def saved() -> int:
        newest = checkpoint.find_newest(parts / "checkpoints")
        return int(newest.name.removeprefix("step-")) if newest else 0

    for after in (5, 15):
        wait_for(lambda after=after: saved() >= after)
        ranks = children(job)
        for process in ranks:
            os.kill(process, signal.SIGUSR2)
        wait_for(lambda ranks=ranks: all(map(gone, ranks)))
        stops.append(saved())
    wait_for(lambda: gone(job))
    assert 5 <= stops[0] < stops[1] < steps
    log = next((parts / "slurm").glob("*_0_log.out")).read_text()
    assert log.count("Requeued job") == 2
    assert log.count("Resuming from") == 2
    one, two = (checkpoint.load(checkpoint.find_newest(path / "checkpoints")) for path in (whole, parts))
    assert one.state["step"] == two.state["step"] == steps
    for kind, named in one.tensors.items():
        assert named.keys() == two.tensors[kind].keys()
        assert [name for name in named if not torch.equal(named[name], two.tensors[kind][name])] == []
    clock = ("images_per_s", "data_wait")
    rows = [
        [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(path)]
        for path in (whole, parts)
    ]
    assert rows[0] == rows[1]
    assert json.loads((parts / "run.json").read_text())["argv"].count("--slurm") == 0
