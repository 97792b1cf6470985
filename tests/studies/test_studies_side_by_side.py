"""Tests of the executors: each task runs once, processes are reused, failures and signals are reported."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from quarterview.errors import RunError, UserError
from quarterview.studies.config import parse_budget
from quarterview.studies.measure import StoppedError
from quarterview.studies.side_by_side import ProcessExecutor, SerialExecutor, Task, list_visible_gpus


def make_sums(count: int) -> list[Task]:
    return [Task(f"sum {i}", operator.add, (i, 100)) for i in range(count)]


@pytest.mark.parametrize("make", [SerialExecutor, lambda: ProcessExecutor(2)])
def test_every_task_runs_once(make):
    started = []
    with make() as executor:
        tasks = make_sums(7)
        results = list(executor.run(tasks, started.append))
        again = list(executor.run(make_sums(2)))
    assert started == tasks
    assert sorted(finished.result for finished in results) == list(range(100, 107))
    assert {id(finished.task) for finished in results} == {id(task) for task in tasks}
    assert sorted(finished.result for finished in again) == [100, 101]


def test_tasks_run_at_the_same_time(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening one end blocks until the other end is opened
    tasks = [Task(str(mode), os.open, (tmp_path / "fifo", mode)) for mode in (os.O_RDONLY, os.O_WRONLY)]
    with ProcessExecutor(2) as executor:
        assert len(list(executor.run(tasks))) == 2


def test_a_process_runs_many_tasks_and_ends():
    with ProcessExecutor(2) as executor:
        pids = {finished.result for finished in executor.run([Task("pid", os.getpid, ())] * 8)}
        pids |= {finished.result for finished in executor.run([Task("pid", os.getpid, ())] * 4)}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_share_the_cores_and_the_environment_is_restored(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with ProcessExecutor(2) as executor:
        tasks = [Task("threads", os.getenv, ("OMP_NUM_THREADS",)), Task("torch", torch.get_num_threads, ())]
        results = {finished.task.name: finished.result for finished in executor.run(tasks)}
    threads = max(1, torch.get_num_threads() // 2)
    assert results == {"threads": str(threads), "torch": threads}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_no_process_is_started_without_tasks():
    with ProcessExecutor(2) as executor:
        assert list(executor.run([])) == []
        assert not executor._pipes


def test_a_failure_is_raised_and_ends_the_other_tasks():
    tasks = [Task("missing", os.stat, ("/does/not/exist",)), *[Task("sleep", time.sleep, (600,))] * 3]
    start = time.monotonic()
    with (
        pytest.raises(RunError, match=r"missing: .*No such file.*\. Run the same command to resume"),
        ProcessExecutor(2) as executor,
    ):
        list(executor.run(tasks))
    assert time.monotonic() - start < 300


def test_a_user_error_stays_a_user_error():
    with (
        pytest.raises(UserError, match="budget: --budget is lots"),
        ProcessExecutor(2) as executor,
    ):
        list(executor.run([Task("budget", parse_budget, ("lots",))]))


def test_a_process_that_dies_while_idle_is_reported():
    with ProcessExecutor(1) as executor:
        (finished,) = executor.run([Task("pid", os.getpid, ())])
        os.kill(finished.result, signal.SIGKILL)
        next(iter(executor._pipes.values())).join()
        with pytest.raises(RunError, match="sum 0: the process ended with exit code -9"):
            list(executor.run(make_sums(1)))


def test_processes_end_when_their_parent_is_killed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    text = f"""
import os, time
from quarterview.studies.side_by_side import ProcessExecutor, Task
if __name__ == "__main__":
    with ProcessExecutor(2) as executor:
        fifo = {str(tmp_path / "fifo")!r}
        tasks = [Task("end", os.open, (fifo, mode)) for mode in (os.O_RDONLY, os.O_WRONLY)]
        list(executor.run(tasks))  # both processes are running now
        list(executor.run([Task("sleep", time.sleep, (600,))] * 2, lambda task: print("started", flush=True)))
"""
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        assert [parent.stdout.readline() for _ in range(2)] == [b"started\n"] * 2
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    assert len(children) >= 2
    deadline = time.monotonic() + 60
    while (
        alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-ab", 1, ["GPU-ab"]), (None, 0, [])],
)
def test_gpus_have_the_names_of_cuda_visible_devices(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert list_visible_gpus() == expected


def test_a_process_that_dies_is_reported():
    with (
        pytest.raises(RunError, match="leaves: the process ended with exit code 3"),
        ProcessExecutor(2) as executor,
    ):
        list(executor.run([Task("leaves", os._exit, (3,)), *make_sums(3)]))


def test_a_signal_ends_tasks_at_once():
    start = time.monotonic()
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(StoppedError, match="SIGTERM"), ProcessExecutor(2) as executor:
            list(executor.run([Task("sleep", time.sleep, (600,))] * 4))
    finally:
        timer.cancel()
        timer.join()
    assert time.monotonic() - start < 300
