"""Several ranks, and what befalls one of them: rows 2, 3, 6, 7, 8 and 9 of docs/reliability.md."""

import datetime
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import BATCH, CONTEXT, STEPS, begin, config, different, end, killing, said, tensors, train

from quarterview.data.loader import shares
from quarterview.errors import RunError
from quarterview.training import checkpoint, distributed
from quarterview.training.lock import lock
from quarterview.training.logging import metrics
from quarterview.training.step import Step
from quarterview.training.trainer import Trainer


def note_ids(rank: int, log: Path) -> None:
    """Write down the samples of every step of this rank."""
    real = Trainer._update

    def update(self, batch):
        with (log / f"ids{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.step, batch.epochs.tolist(), batch.ids.tolist()]) + "\n")
        real(self, batch)

    Trainer._update = update


def order(log: Path, size: int) -> list[tuple[int, list[int], list[int]]]:
    """Per step, the epochs and samples of all ranks, in the order of the ranks."""
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run on one rank, and its log beside it."""
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
def test_ranks_see_the_same_samples_and_losses_as_one_alone(tmp_path, alone, size, changes):
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
def test_ranks_share_the_work_in_every_way_there_is(tmp_path, alone, size, changes, rtol):
    run = config(tmp_path / "run", ema=0.9, clip_grad=1.0, **changes)
    assert train(run, size, tmp_path) == [0] * size, said(tmp_path)
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone / "run"), rtol=rtol, atol=0)


@pytest.mark.slow
def test_ranks_read_tar_shards_in_the_order_of_one_alone(tmp_path):
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
def test_a_run_goes_on_under_any_layout(tmp_path, alone):
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
    real = Trainer._update

    def update(self, batch):
        real(self, batch)
        if self.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer._update = update


def stop_at_7(rank: int, log: Path) -> None:
    if rank == 0:
        stop(7)


def stop_at_12(rank: int, log: Path) -> None:
    if rank == 1:
        stop(12)


def stop_at_15(rank: int, log: Path) -> None:
    stop(15)


@pytest.mark.slow
def test_a_checkpoint_is_the_same_whatever_layout_read_it(tmp_path, alone):
    """Read by shards, written again at once: gathered weights are what they were."""
    source = checkpoint.newest(alone / "run" / "checkpoints").parent / "step-00000015"
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


def test_two_runs_alike_have_the_same_weights(tmp_path, alone):
    assert train(config(tmp_path / "run", ema=0.9, clip_grad=1.0), 1, tmp_path) == [0]
    assert different(tmp_path / "run", alone / "run") == []


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 10**12))
def test_shares_are_the_whole_batch_as_equal_as_can_be(batch, count, start):
    positions = range(start, start + batch)
    parts = shares(positions, count)
    assert [p for part in parts for p in part] == list(positions)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 2 - batch % 2
    if batch % 2 == 0:  # pairs of neighbours stay together
        assert all((part.start - start) % 2 == 0 for part in parts)


# ---------------------------------------------------------------------- one of two is asked to stop


def stop_the_second_at_7(rank: int, log: Path) -> None:
    if rank == 1:
        stop(7)


def test_one_of_two_ranks_is_asked_to_stop_and_both_save_the_same_step(tmp_path, alone):
    began = time.monotonic()
    run = config(tmp_path / "run", ema=0.9, clip_grad=1.0)
    assert train(run, 2, tmp_path, stop_the_second_at_7) == [75, 75]
    assert time.monotonic() - began < 15 + 45  # the ranks have to start first
    assert "stopped by SIGTERM after step 8" in said(tmp_path)  # asked at 7, decided together at 8
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5, 8]


# ---------------------------------------------------------------------- one of two dies


def die_at_8(rank: int, log: Path) -> None:
    if rank == 1:
        real = Trainer._update

        def update(self, batch):
            if self.step == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, batch)

        Trainer._update = update


def hurried(rank: int, log: Path) -> None:
    """Ranks that give up after two seconds, and validations that take four."""
    distributed._TIMEOUT = datetime.timedelta(seconds=2)
    real = Trainer.__init__

    def init(self, *arguments, **named):
        real(self, *arguments, **named)
        self.hooks = [*self.hooks, lambda step: time.sleep(4) or {}]

    Trainer.__init__ = init


@pytest.mark.slow
def test_ranks_wait_for_the_main_one_to_judge_however_long_it_takes(tmp_path):
    run = config(tmp_path / "run", steps=4, eval_every=2)
    assert train(run, 2, tmp_path, hurried) == [0, 0], said(tmp_path)


@pytest.mark.slow
def test_the_clock_asks_for_a_checkpoint_once(tmp_path):
    changes = {"checkpoint_every": None, "checkpoint_minutes": 1e-9, "keep_checkpoints": 99, "steps": 9}
    assert train(config(tmp_path / "run", **changes), 2, tmp_path) == [0, 0], said(tmp_path)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 4, 6, 8, 9]


def test_when_a_rank_dies_the_other_stops_at_once_and_says_so(tmp_path):
    processes = begin(config(tmp_path / "run"), 2, tmp_path, die_at_8)
    with killing(processes):
        processes[1].join(120)
        began = time.monotonic()
        assert end(processes, 60) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    assert "another rank is gone or does not answer" in said(tmp_path)
    assert "the same command goes on from the newest checkpoint" in said(tmp_path)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]


def flags(folder: Path, **changes: object) -> list[str]:
    """The command line of `config`."""
    given = config(folder, checkpoint_every=2, **changes)
    names = ["model", "precision", "out", "decoder_width", "decoder_depth", "decoder_heads", "lr"]
    names += ["batch_size", "workers", "holdout", "steps", "log_every", "eval_every", "checkpoint_every"]
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
    return [*words, "--device", "cpu", "--image-size", "16", "--data", *given.data]


@pytest.mark.slow
def test_a_rank_killed_under_torchrun_is_replaced_and_the_run_ends_as_it_would_have(tmp_path):
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    ranks += ["--standalone", "-m", "quarterview", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*ranks, *flags(tmp_path / "whole")], env=environment, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    log = (tmp_path / "log").open("w")
    folder = tmp_path / "run"
    with log, subprocess.Popen([*ranks, *flags(folder)], env=environment, stdout=log, stderr=log) as agent:
        until = time.monotonic() + 200
        while not checkpoint.steps(folder / "checkpoints") and time.monotonic() < until:
            time.sleep(0.005)
        ours = children_of(agent.pid)
        assert len(ours) == 2
        os.kill(ours[1], signal.SIGKILL)
        assert agent.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    text = (tmp_path / "log").read_text()
    assert "going on from" in text
    assert different(folder, tmp_path / "whole") == []


def listens(place: str) -> bool:
    """Whether a server is there."""
    host, _, port = place.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_machine_that_is_lost_is_gone_without(tmp_path):
    """Two agents of an elastic run, as of two machines. One is killed with its rank; the other goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    elastic = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    elastic += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", place]
    elastic += ["--rdzv-conf", "last_call_timeout=3,keep_alive_interval=1", "--local-addr", "127.0.0.1"]
    words = [*elastic, "-m", "quarterview", "pretrain", *flags(tmp_path / "run", steps=60)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = []
    with (tmp_path / "log").open("w") as log:
        try:
            for _ in range(2):
                agents.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
                until = time.monotonic() + 200
                while not listens(place) and time.monotonic() < until:
                    time.sleep(0.1)  # the first holds the rendezvous
            while not checkpoint.steps(tmp_path / "run" / "checkpoints") and time.monotonic() < until:
                time.sleep(0.005)
            for pid in [*children_of(agents[1].pid), agents[1].pid]:
                os.kill(pid, signal.SIGKILL)
            assert agents[0].wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            for agent in agents:
                agent.kill()
                agent.wait()
    assert "going on from" in (tmp_path / "log").read_text()
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 61))
    whole = config(tmp_path / "whole", steps=60)
    assert train(whole, 1, tmp_path / "1") == [0]
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-4, atol=0)


def children_of(pid: int) -> list[int]:
    """The ranks of an agent."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"quarterview" in Path(f"/proc/{child}/cmdline").read_bytes()]


# ---------------------------------------------------------------------- not finite on one rank


def spoil(rank: int, steps: set[int]) -> None:
    """Make this rank's loss NaN in these steps, counted from 1."""
    real, done = Step.forward, [0]

    def forward(self, part):
        done[0] += 1
        out = real(self, part)
        return out._replace(loss=out.loss * float("nan")) if done[0] in steps else out

    if rank == 1:
        Step.forward = forward


def spoilt_at_6(rank: int, log: Path) -> None:
    spoil(rank, {6})


def spoilt_from_6(rank: int, log: Path) -> None:
    spoil(rank, {6, 7, 8})


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight_on_any(tmp_path, parallel):
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
def test_three_in_a_row_stop_all_ranks(tmp_path):
    assert train(config(tmp_path / "run"), 2, tmp_path, spoilt_from_6) == [1, 1]
    for rank in (0, 1):
        assert "steps 6 to 8 all gave gradients that are not finite" in " ".join(said(tmp_path, rank).split())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [5]
    loaded = checkpoint.load(checkpoints / "last")
    assert all(bool(t.isfinite().all()) for named in loaded.tensors.values() for t in named.values())


# ---------------------------------------------------------------------- broken images on any rank


@pytest.mark.slow
def test_broken_images_of_every_rank_are_recorded_once(tmp_path):
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
        assert f"rank {rank} sees other images than another rank does" in text


def other_images(rank: int, log: Path) -> None:
    from quarterview.data.sources.shapes import ShapesSource

    ShapesSource.fingerprint = lambda self: f"{rank:016x}"


# ---------------------------------------------------------------------- whose folder it is


def hold_for_a_while(folder: Path) -> None:
    with lock(folder):
        (folder / "held").touch()
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)


def test_who_is_patient_gets_the_folder_of_one_that_dies(tmp_path):
    process = CONTEXT.Process(target=hold_for_a_while, args=(tmp_path,))
    process.start()
    with killing([process]):
        until = time.monotonic() + 60
        while not (tmp_path / "held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        with lock(tmp_path, patience=30):
            pass
        process.join()
        assert process.exitcode == -signal.SIGKILL


# ---------------------------------------------------------------------- views that are compared


@pytest.mark.parametrize(
    "kind", ["mocov3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("simclr", "byol", "mae"))]
)
def test_ranks_compare_the_images_of_the_whole_batch(tmp_path, kind):
    changes = {"objective": kind, "steps": 8, "checkpoint_every": None}
    changes |= {"uniformity": 0.5} if kind == "mae" else {"head_width": 48, "head_out": 16}
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


def test_unequal_parts_of_a_batch_cannot_be_compared(tmp_path):
    given = config(tmp_path / "run", objective="byol", head_width=8, head_out=8, batch_size=18)
    assert train(given, 2, tmp_path) == [2, 2]
    assert "multiples of 4" in said(tmp_path)
