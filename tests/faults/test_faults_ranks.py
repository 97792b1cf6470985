"""Tests of several ranks and of failures of one: rows 2, 3, 6, 7, 8 and 9 of docs/reliability.md."""

import contextlib
import datetime
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import elastic
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import BATCH, CONTEXT, STEPS, begin, config, different, end, killing, said, tensors, train

from quarterview.data.loader import split_evenly
from quarterview.errors import RunError
from quarterview.training import checkpoint, distributed
from quarterview.training.lock import lock_folder
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.step import TrainStep
from quarterview.training.trainer import Trainer


def note_ids(rank: int, log: Path) -> None:
    """Record the samples of every step of this rank."""
    real = Trainer._run_update

    def update(self, batch):
        with (log / f"ids{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.step, batch.epochs.tolist(), batch.ids.tolist()]) + "\n")
        real(self, batch)

    Trainer._run_update = update


def order(log: Path, size: int) -> list[tuple[int, list[int], list[int]]]:
    """Return the epochs and samples of all ranks for each step, in rank order."""
    ranks = [
        [json.loads(line) for line in (log / f"ids{rank}.jsonl").read_text().splitlines()]
        for rank in range(size)
    ]
    return [
        (rows[0][0], [e for row in rows for e in row[1]], [i for row in rows for i in row[2]])
        for rows in zip(*ranks, strict=True)
    ]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def wait_until(what: Callable[[], object], log: Path, seconds: float = 300) -> None:
    """Wait until a condition is true, with a deadline."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, log.read_text()[-3000:] if log.exists() else ""
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """An uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(config(folder / "run", ema=0.9, clip_grad=1.0), 1, folder, note_ids) == [0]
    return folder


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"parallel": "ddp", "accum_iter": 2}),
        (2, {"parallel": "fsdp"}),
        pytest.param(3, {"parallel": "ddp"}, marks=pytest.mark.slow),
    ],
)
def test_several_ranks_have_the_samples_and_losses_of_a_single_rank(tmp_path, alone, size, changes):
    run = config(tmp_path / "run", ema=0.9, clip_grad=1.0, **changes)
    assert train(run, size, tmp_path, note_ids) == [0] * size, said(tmp_path)
    assert order(tmp_path, size) == order(alone, 1)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone / "run"), rtol=1e-5, atol=0)
    one, many = tensors(alone / "run"), tensors(tmp_path / "run")
    assert one.keys() == many.keys()
    for name, value in one.items():
        # Keys have a bias whose gradient is 0 but for rounding, and AdamW magnifies what is left.
        atol = 1e-3 if name.endswith("qkv.bias") else 1e-4
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes", "rtol"),
    [
        (4, {"parallel": "fsdp", "ranks_per_copy": 2}, 1e-5),
        (2, {"parallel": "fsdp", "grad_checkpointing": True, "accum_iter": 2}, 1e-5),
        (2, {"parallel": "fsdp", "compile": True}, 1e-5),
        (2, {"parallel": "ddp", "compile": True}, 1e-5),
        (2, {"parallel": "fsdp", "precision": "bf16"}, 3e-3),
        (2, {"parallel": "ddp", "precision": "bf16"}, 3e-3),
    ],
    ids=str,
)
def test_all_kinds_of_parallelism_give_the_same_losses(tmp_path, alone, size, changes, rtol):
    run = config(tmp_path / "run", ema=0.9, clip_grad=1.0, **changes)
    assert train(run, size, tmp_path) == [0] * size, said(tmp_path)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone / "run"), rtol=rtol, atol=0)


@pytest.mark.slow
def test_several_ranks_read_tar_shards_in_the_order_of_a_single_rank(tmp_path):
    make_shards(tmp_path / "shards", shards=5, images=23)
    data = {"data": (str(tmp_path / "shards"),), "shuffle": "shards", "shuffle_shards": 2, "steps": 12}
    assert train(config(tmp_path / "one", **data), 1, tmp_path / "1", note_ids) == [0], said(tmp_path / "1")
    run = config(tmp_path / "run", **data)
    assert train(run, 2, tmp_path / "2", stop_at_7) == [75, 75], said(tmp_path / "2")
    assert train(run, 3, tmp_path / "3", note_ids) == [0] * 3, said(tmp_path / "3")
    assert order(tmp_path / "3", 3) == order(tmp_path / "1", 1)[-len(order(tmp_path / "3", 3)) :]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-5, atol=0)


def make_shards(folder: Path, shards: int, images: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"x-{shard:03d}.tar", "w") as archive:
            for number in range(images):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
                member = tarfile.TarInfo(f"{shard:03d}{number:04d}.png")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)


@pytest.mark.slow
def test_a_run_resumes_with_any_number_of_ranks_sharded_or_not(tmp_path, alone):
    layouts = [(3, "ddp", 0), (2, "fsdp", 2), (1, "auto", 1), (2, "fsdp", 0)]
    for part, (size, parallel, workers) in enumerate(layouts, 1):
        changes = {"parallel": parallel, "workers": workers, "ema": 0.9, "clip_grad": 1.0}
        log = tmp_path / str(part)
        stop = {1: stop_at_7, 2: stop_at_12, 3: stop_at_15}.get(part)
        codes = train(config(tmp_path / "run", **changes), size, log, stop)
        assert codes == [75 if stop else 0] * size, said(log)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone / "run"), rtol=1e-5, atol=0)
    assert metrics(tmp_path / "run")[-1]["step"] == STEPS


def stop(at: int) -> None:
    """Send this process SIGTERM in a step."""
    real = Trainer._run_update

    def update(self, batch):
        real(self, batch)
        if self.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._run_update = update


def stop_at_7(rank: int, log: Path) -> None:
    if rank == 0:
        stop(7)


def stop_at_12(rank: int, log: Path) -> None:
    if rank == 1:
        stop(12)


def stop_at_15(rank: int, log: Path) -> None:
    stop(15)


@pytest.mark.slow
def test_a_checkpoint_does_not_depend_on_sharding(tmp_path, alone):
    """Weights that are sharded on reading and gathered on writing are unchanged."""
    source = checkpoint.find_newest(alone / "run" / "checkpoints").parent / "step-00000015"
    run = config(tmp_path / "run", parallel="fsdp", ema=0.9, clip_grad=1.0, resume=str(source))
    assert train(run, 2, tmp_path, stop_before_a_step) == [1, 1]
    again = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-00000015")
    for kind, named in checkpoint.load(source).tensors.items():
        assert named.keys() == again.tensors[kind].keys()
        assert all(torch.equal(again.tensors[kind][name], value) for name, value in named.items())


def stop_before_a_step(rank: int, log: Path) -> None:
    def run(self):
        raise RunError("nothing is trained here")

    Trainer.run = run


def test_two_equal_runs_have_the_same_weights(tmp_path, alone):
    assert train(config(tmp_path / "run", ema=0.9, clip_grad=1.0), 1, tmp_path) == [0]
    assert different(tmp_path / "run", alone / "run") == []


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 10**12))
def test_a_batch_is_split_evenly_over_ranks(batch, count, start):
    positions = range(start, start + batch)
    parts = split_evenly(positions, count)
    assert [p for part in parts for p in part] == list(positions)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 2 - batch % 2
    if batch % 2 == 0:  # pairs of neighbours stay together
        assert all((part.start - start) % 2 == 0 for part in parts)


# ---------------------------------------------------------------------- one of two is asked to stop


def stop_the_second_at_7(rank: int, log: Path) -> None:
    if rank == 1:
        real = os.kill

        def kill(*arguments: int) -> None:
            (log / "asked").touch()
            real(*arguments)

        os.kill = kill
        stop(7)


def test_a_stop_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, alone):
    processes = begin(config(tmp_path / "run", ema=0.9, clip_grad=1.0), 2, tmp_path, stop_the_second_at_7)
    with killing(processes):
        wait_until((tmp_path / "asked").exists, tmp_path / "rank0.out")
        began = time.monotonic()
        assert end(processes, 60) == [75, 75]
    assert time.monotonic() - began < 30
    assert "Stopped by SIGTERM after step 8" in said(tmp_path)  # asked at 7, decided together at 8
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [5, 8]


# ---------------------------------------------------------------------- one of two dies


def die_at_8(rank: int, log: Path) -> None:
    if rank == 1:
        real = Trainer._run_update

        def update(self, batch):
            if self.step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, batch)

        Trainer._run_update = update


def hurried(rank: int, log: Path) -> None:
    """Set a timeout of ten seconds, and make evaluations take fifteen."""
    distributed._TIMEOUT = datetime.timedelta(seconds=10)
    real = Trainer.__init__

    def init(self, *arguments, **named):
        real(self, *arguments, **named)
        self.evaluators = [*self.evaluators, lambda step: time.sleep(15) or {}]

    Trainer.__init__ = init


@pytest.mark.slow
def test_ranks_wait_for_a_long_evaluation_on_the_main_rank(tmp_path):
    run = config(tmp_path / "run", steps=4, eval_every=4)
    assert train(run, 2, tmp_path, hurried) == [0, 0], said(tmp_path)


@pytest.mark.slow
def test_checkpoint_minutes_asks_for_one_checkpoint(tmp_path):
    changes = {"checkpoint_every": None, "checkpoint_minutes": 1e-9, "keep_checkpoints": 99, "steps": 9}
    assert train(config(tmp_path / "run", **changes), 2, tmp_path) == [0, 0], said(tmp_path)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6, 8, 9]


def test_when_a_rank_fails_the_other_stops_with_an_error(tmp_path):
    processes = begin(config(tmp_path / "run"), 2, tmp_path, die_at_8)
    with killing(processes):
        processes[1].join(120)
        began = time.monotonic()
        assert end(processes, 60) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    assert "Another rank failed or does not answer" in said(tmp_path)
    assert "Run the same command again to resume from the newest checkpoint" in said(tmp_path)
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [5]


def flags(folder: Path, **changes: object) -> list[str]:
    """Return the command line of `config`."""
    given = config(folder, checkpoint_every=2, **changes).flags()
    names = ["model", "precision", "out", "decoder_width", "decoder_depth", "decoder_heads", "lr"]
    names += ["batch_size", "workers", "holdout", "steps", "log_every", "eval_every", "checkpoint_every"]
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(given[name]))]
    return [*words, "--device", "cpu", "--image-size", "16", "--data", *given["data"]]


@contextlib.contextmanager
def stopping(agents: list[subprocess.Popen]) -> Iterator[None]:
    """Kill the agents and their ranks at the end of this context."""
    try:
        yield
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()


def begin_agent(words: list[str], log: TextIO, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
        "1"  # or one that is late ends both: docs/reliability.md
    )
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_the_result_is_the_same(tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    ranks += ["--standalone", elastic.__file__, str(tmp_path), "pretrain"]
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as file:
        agent = begin_agent([*ranks, *flags(folder)], file, LOST="1")
        with stopping([agent]):
            wait_until((tmp_path / "held").exists, log)
            wait_until(lambda: checkpoint.list_steps(folder / "checkpoints"), log)
            (tmp_path / "lost").touch()  # those that come in its place are not held
            os.kill(int((tmp_path / "held").read_text()), signal.SIGKILL)
            assert agent.wait(300) == 0, log.read_text()[-3000:]
        whole = begin_agent([*ranks, *flags(tmp_path / "whole")], file)
        with stopping([whole]):
            assert whole.wait(300) == 0, log.read_text()[-3000:]
    assert "Resuming from" in log.read_text()
    assert different(folder, tmp_path / "whole") == []


def listens(place: str) -> bool:
    """Whether a server listens at the address."""
    host, _, port = place.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def rendezvous() -> str:
    """A free address for the rendezvous of two agents."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def agent_of(place: str, folder: Path, *, dying: str = "", host: bool = False, read: int = 60) -> list[str]:
    """Start torchrun for one of one or two machines, with one rank of a run in ``folder/run``.

    Args:
        place: where the agents meet.
        folder: for the run, and for what its ranks write down.
        dying: a method of the agent that kills it instead.
        host: whether this one holds the rendezvous.
        read: seconds that the agent waits for another one's word.
    """
    torchrun = ["-c", elastic.DYING.format(dying)] if dying else ["-m", "torch.distributed.run"]
    # A machine without a heartbeat for 3 intervals is lost. Those that start last have 10 s to come.
    conf = f"last_call_timeout=10,keep_alive_interval=2,read_timeout={read},is_host={int(host)}"
    words = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    words += ["--rdzv-id", "x", "--rdzv-endpoint", place, "--rdzv-conf", conf, "--local-addr", "127.0.0.1"]
    words += [elastic.__file__, str(folder), "pretrain", *flags(folder / "run", steps=60)]
    return [sys.executable, *torchrun, *words]


def as_one_alone(folder: Path) -> None:
    """Check that a run of two machines has every step once, and the losses of a single rank."""
    assert [row["step"] for row in metrics(folder / "run")] == list(range(1, 61))
    assert train(config(folder / "whole", steps=60), 1, folder / "1") == [0]
    torch.testing.assert_close(losses(folder / "run"), losses(folder / "whole"), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_an_elastic_run_continues_without_a_lost_machine(tmp_path):
    """One of two agents of an elastic run is killed with its rank, and the other continues."""
    place, log = rendezvous(), tmp_path / "log"
    agents: list[subprocess.Popen] = []
    with log.open("w") as file, stopping(agents):
        agents.append(begin_agent(agent_of(place, tmp_path, host=True), file))
        wait_until(lambda: listens(place), log)
        agents.append(begin_agent(agent_of(place, tmp_path), file, LOST="0 1"))
        # Both are in the same step: one waits to be killed, the other for its gradients.
        wait_until((tmp_path / "held").exists, log)
        wait_until(lambda: checkpoint.list_steps(tmp_path / "run" / "checkpoints"), log)
        (tmp_path / "lost").touch()
        ranks = children_of(agents[1].pid)
        assert len(ranks) == 1
        for pid in [agents[1].pid, *ranks]:  # the agent first, which would start another rank
            os.kill(pid, signal.SIGKILL)
        assert agents[0].wait(300) == 0, log.read_text()[-3000:]
    assert "Resuming from" in log.read_text()
    trained = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    together = [step for step, _, size in trained if size == 2]
    assert len(together) == 2 * len(set(together))  # both ranks in every step, the last one too
    assert trained[-1] == [59, 0, 1]
    as_one_alone(tmp_path)


@pytest.mark.slow
def test_a_machine_can_join_an_elastic_run_late(tmp_path):
    place, log = rendezvous(), tmp_path / "log"
    agents: list[subprocess.Popen] = []
    with log.open("w") as file, stopping(agents):
        agents.append(begin_agent(agent_of(place, tmp_path, host=True), file))
        wait_until((tmp_path / "steps.jsonl").exists, log)  # the first trains alone
        agents.append(begin_agent(agent_of(place, tmp_path), file))
        assert [agent.wait(300) for agent in agents] == [0, 0], log.read_text()[-3000:]
    trained = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert trained[0] == [0, 0, 1]
    assert [sorted(row[1:] for row in trained if row[0] == 59)] == [[[0, 2], [1, 2]]]
    as_one_alone(tmp_path)


def again() -> str:
    """The start script of docs/reliability.md, which restarts the run."""
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    (script,) = re.findall(r"```bash\n(# again\.sh.*?)```", text, re.DOTALL)
    return script


@pytest.mark.slow
def test_a_machine_lost_in_the_rendezvous_ends_the_run_and_the_start_script_restarts_it(tmp_path):
    place, log, script = rendezvous(), tmp_path / "log", tmp_path / "again.sh"
    script.write_text(again())
    agents: list[subprocess.Popen] = []
    with log.open("w") as file, stopping(agents):
        words = ["bash", str(script), *agent_of(place, tmp_path, host=True, read=30)]
        agents.append(begin_agent(words, file, PAUSE="1"))
        wait_until(lambda: listens(place), log)
        agents.append(begin_agent(agent_of(place, tmp_path, dying="_assign_worker_ranks"), file))
        assert agents[1].wait(300) == -signal.SIGKILL, log.read_text()[-3000:]
        (tmp_path / "lost").touch()
        assert agents[0].wait(300) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "DistStoreError" in text  # torchrun itself had given up, with restarts left
    assert text.count("again.sh: ended with") == 1
    as_one_alone(tmp_path)


@pytest.mark.slow
def test_a_machine_lost_before_all_ranks_connected_does_not_stop_the_run(tmp_path):
    place, log = rendezvous(), tmp_path / "log"
    agents: list[subprocess.Popen] = []
    with log.open("w") as file, stopping(agents):
        agents.append(begin_agent(agent_of(place, tmp_path, host=True), file, TIMEOUT="20"))
        wait_until(lambda: listens(place), log)
        agents.append(begin_agent(agent_of(place, tmp_path, dying="_start_workers"), file))
        assert agents[1].wait(300) == -signal.SIGKILL, log.read_text()[-3000:]
        (tmp_path / "lost").touch()
        assert agents[0].wait(300) == 0, log.read_text()[-3000:]
    # It was waited for: by the rank, or already by its store.
    assert re.search(r"did not connect|Not all of the 2 ranks connected", log.read_text())
    as_one_alone(tmp_path)


def test_the_start_script_ends_on_a_signal_and_after_five_failures(tmp_path):
    script = tmp_path / "again.sh"
    script.write_text(again())

    def run(*words: str) -> tuple[int, str]:
        environment = {**os.environ, "PAUSE": "0"}
        done = subprocess.run(
            ["bash", script, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, done.stderr

    assert run("true") == (0, "")
    code, said = run("sh", "-c", "exit 3")
    assert code == 3
    assert said.count("again.sh: ended with 3") == 5
    # The command begins, and is asked to stop by way of the script: it saves before both end.
    words = [
        "sh",
        "-c",
        "trap 'echo saved >> $0; exit 75' TERM; echo begun >> $0; while :; do sleep 0.1; done",
    ]
    told = tmp_path / "told"
    with subprocess.Popen(["bash", script, *words, told], stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: told.exists() and told.read_text() == "begun\n", told)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    assert told.read_text() == "begun\nsaved\n"


def children_of(pid: int) -> list[int]:
    """Return the processes of an agent's ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes()]


# ---------------------------------------------------------------------- not finite on one rank


def spoil(rank: int, steps: set[int]) -> None:
    """Make this rank's loss NaN in these steps, counted from 1."""
    real, done = TrainStep.forward, [0]

    def forward(self, part):
        done[0] += 1
        out = real(self, part)
        return out._replace(loss=out.loss * float("nan")) if done[0] in steps else out

    if rank == 1:
        TrainStep.forward = forward


def spoilt_at_6(rank: int, log: Path) -> None:
    spoil(rank, {6})


def spoilt_from_6(rank: int, log: Path) -> None:
    spoil(rank, {6, 7, 8})


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path, parallel):
    run = config(tmp_path / "run", steps=6, checkpoint_every=1, keep_checkpoints=9, parallel=parallel)
    assert train(run, 2, tmp_path, spoilt_at_6) == [0, 0], said(tmp_path)
    before, after = (
        checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-0000000{step}").tensors for step in (5, 6)
    )
    for kind, named in before.items():
        assert all(torch.equal(after[kind][name], value) for name, value in named.items()), kind
    (row,) = map(json.loads, (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines())
    assert row["step"] == 6
    assert len(set(row["ids"])) == BATCH  # of both ranks


@pytest.mark.slow
def test_three_skipped_steps_in_a_row_stop_all_ranks(tmp_path):
    assert train(config(tmp_path / "run"), 2, tmp_path, spoilt_from_6) == [1, 1]
    for rank in (0, 1):
        assert "The gradients of steps 6 to 8 are not finite" in " ".join(said(tmp_path, rank).split())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert checkpoint.list_steps(checkpoints) == [5]
    loaded = checkpoint.load(checkpoints / "last")
    assert all(bool(t.isfinite().all()) for named in loaded.tensors.values() for t in named.values())


# ---------------------------------------------------------------------- broken images on any rank


@pytest.mark.slow
def test_broken_images_of_all_ranks_are_recorded_once(tmp_path):
    folder, noise = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(64):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i:02}.png")
    for i in range(0, 64, 16):
        (folder / f"{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    changes = {"data": (str(folder),), "holdout": 0, "cache": "none", "mean": (0.5,) * 3, "std": (0.3,) * 3}
    rows = {}
    for size in (1, 2):
        log = tmp_path / str(size)
        run = config(log / "run", steps=9, max_bad_samples=0.5, **changes)
        assert train(run, size, log, note_ids) == [0] * size, said(log)
        lines = (log / "run" / "bad_samples.jsonl").read_text().splitlines()
        rows[size] = sorted(lines)
    assert len(rows[1]) == 4
    assert rows[2] == rows[1]
    assert order(tmp_path / "2", 2) == order(tmp_path / "1", 1)
    run = config(tmp_path / "few", steps=9, max_bad_samples=0.01, **changes)
    assert train(run, 2, tmp_path / "few log") == [1, 1]
    for rank in (0, 1):
        assert "more than the 1.00% that --max-bad-samples allows" in said(tmp_path / "few log", rank)


def test_ranks_with_different_images_are_refused(tmp_path):
    assert train(config(tmp_path / "run"), 2, tmp_path, other_images) == [2, 2]
    for rank in (0, 1):
        text = " ".join(said(tmp_path, rank).split())
        assert f"Rank {rank} has other images than another rank" in text


def other_images(rank: int, log: Path) -> None:
    from quarterview.data.sources.shapes import ShapesSource

    ShapesSource.fingerprint = lambda self: f"{rank:016x}"


# ---------------------------------------------------------------------- whose folder it is


def hold_for_a_while(folder: Path) -> None:
    with lock_folder(folder):
        (folder / "held").touch()
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_with_timeout_waits_until_the_owner_ends(tmp_path):
    process = CONTEXT.Process(target=hold_for_a_while, args=(tmp_path,))
    process.start()
    with killing([process]):
        wait_until((tmp_path / "held").exists, tmp_path / "held")
        with lock_folder(tmp_path, timeout=60):
            pass
        process.join()
        assert process.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------------- views that are compared


@pytest.mark.parametrize(
    "kind", ["mocov3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("simclr", "byol", "mae"))]
)
def test_contrastive_methods_compare_the_images_of_all_ranks(tmp_path, kind):
    changes = {"method": kind, "steps": 8, "checkpoint_every": None}
    changes |= {"uniformity": 0.5} if kind == "mae" else {"proj_hidden_dim": 48, "proj_output_dim": 16}
    for size in (1, 2):
        assert train(config(tmp_path / str(size), **changes), size, tmp_path / f"log{size}") == [0] * size
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    np.testing.assert_allclose(two, one, rtol=1e-4)
    a, b = tensors(tmp_path / "1"), tensors(tmp_path / "2")
    for name in a:
        if not name.endswith("bias"):  # some have no gradient, but noise that AdamW makes large
            torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-3)
    norms = [[row["grad_norm"] for row in metrics(tmp_path / name)] for name in ("1", "2")]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)


def test_contrastive_methods_need_equal_parts_of_a_batch(tmp_path):
    given = config(tmp_path / "run", method="byol", proj_hidden_dim=8, proj_output_dim=8, batch_size=18)
    assert train(given, 2, tmp_path) == [2, 2]
    assert "Give a multiple of 4" in said(tmp_path)
