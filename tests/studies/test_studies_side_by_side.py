"""Work in several processes: all of it is done once, a process serves many pieces, and a failure is told."""

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
from quarterview.studies.config import read_budget
from quarterview.studies.measure import StoppedError
from quarterview.studies.side_by_side import Here, Piece, Workers, visible_gpus


def sums(count: int) -> list[Piece]:
    return [Piece(f"sum {i}", operator.add, (i, 100)) for i in range(count)]


@pytest.mark.parametrize("make", [Here, lambda: Workers(2)])
def test_every_piece_is_done_once(make):
    begun = []
    with make() as workers:
        pieces = sums(7)
        found = list(workers.each(pieces, begun.append))
        again = list(workers.each(sums(2)))
    assert begun == pieces
    assert sorted(done.result for done in found) == list(range(100, 107))
    assert {id(done.piece) for done in found} == {id(piece) for piece in pieces}
    assert sorted(done.result for done in again) == [100, 101]


def test_pieces_go_on_at_the_same_time(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # which opens for each when the other one opens it
    ends = [Piece(str(how), os.open, (tmp_path / "fifo", how)) for how in (os.O_RDONLY, os.O_WRONLY)]
    with Workers(2) as workers:
        assert len(list(workers.each(ends))) == 2


def test_a_process_serves_many_pieces_and_ends():
    with Workers(2) as workers:
        found = {done.result for done in workers.each([Piece("pid", os.getpid, ())] * 8)}
        found |= {done.result for done in workers.each([Piece("pid", os.getpid, ())] * 4)}
    assert 1 <= len(found) <= 2
    assert os.getpid() not in found
    for pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_cores_are_shared_out_and_the_environment_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with Workers(2) as workers:
        asked = [Piece("threads", os.getenv, ("OMP_NUM_THREADS",)), Piece("torch", torch.get_num_threads, ())]
        found = {done.piece.name: done.result for done in workers.each(asked)}
    share = max(1, torch.get_num_threads() // 2)
    assert found == {"threads": str(share), "torch": share}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_nothing_is_started_where_there_is_nothing_to_do():
    with Workers(2) as workers:
        assert list(workers.each([])) == []
        assert not workers._pipes


def test_a_failure_is_told_and_ends_the_rest():
    pieces = [Piece("missing", os.stat, ("/does/not/exist",)), *[Piece("sleep", time.sleep, (600,))] * 3]
    began = time.monotonic()
    with pytest.raises(RunError, match=r"missing: .*No such file"), Workers(2) as workers:
        list(workers.each(pieces))
    assert time.monotonic() - began < 300


def test_what_a_user_got_wrong_stays_so():
    with pytest.raises(UserError, match="budget: --budget lots is not accepted"), Workers(2) as workers:
        list(workers.each([Piece("budget", read_budget, ("lots",))]))


def test_a_process_that_dies_without_work_is_told():
    with Workers(1) as workers:
        (done,) = workers.each([Piece("pid", os.getpid, ())])
        os.kill(done.result, signal.SIGKILL)
        next(iter(workers._pipes.values())).join()
        with pytest.raises(RunError, match="sum 0: its process ended with exit code -9"):
            list(workers.each(sums(1)))


def test_processes_end_when_their_parent_is_killed(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    text = f"""
import os, time
from quarterview.studies.side_by_side import Piece, Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        fifo = {str(tmp_path / "fifo")!r}
        ends = [Piece("end", os.open, (fifo, how)) for how in (os.O_RDONLY, os.O_WRONLY)]
        list(workers.each(ends))  # both are there now
        list(workers.each([Piece("sleep", time.sleep, (600,))] * 2, lambda piece: print("begun", flush=True)))
"""
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        assert [parent.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    assert len(children) >= 2
    until = time.monotonic() + 60
    while (left := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-ab", 1, ["GPU-ab"]), (None, 0, [])],
)
def test_gpus_are_called_as_the_user_calls_them(monkeypatch, named, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == expected


def test_a_process_that_dies_is_told():
    with pytest.raises(RunError, match="leaves: its process ended with exit code 3"), Workers(2) as workers:
        list(workers.each([Piece("leaves", os._exit, (3,)), *sums(3)]))


def test_a_signal_ends_what_is_no_run_at_once():
    began = time.monotonic()
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        with pytest.raises(StoppedError, match="SIGTERM"), Workers(2) as workers:
            list(workers.each([Piece("sleep", time.sleep, (600,))] * 4))
    finally:
        timer.cancel()
        timer.join()
    assert time.monotonic() - began < 300
