"""Tests of interrupted and damaged checkpoints and of full disks: rows 1, 4, 5 and 6 of
docs/reliability.md."""

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from threading import Event

import pytest
import torch
from ranks import CONTEXT, STEPS, begin, config, different, end, killing, said, train

import quarterview as qv
from quarterview.errors import RunError, UserError
from quarterview.training import checkpoint
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.trainer import Trainer
from quarterview.training.writer import CheckpointWriter


def once_at(step: int, act) -> None:
    """Call a function in this process after an update."""
    real = Trainer._run_update

    def update(self, batch):
        real(self, batch)
        if self.step == step:
            act()

    Trainer._run_update = update


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminated_at_7(rank: int, log: Path) -> None:
    once_at(7, terminate)


def terminated_at_12(rank: int, log: Path) -> None:
    once_at(12, terminate)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(config(folder / "run"), 1, folder) == [0]
    return folder / "run"


def test_a_run_stopped_twice_equals_an_uninterrupted_run(tmp_path, alone):
    """Both stops are in the first epoch, which has 15.5 steps."""
    for part, prepare in enumerate([terminated_at_7, terminated_at_12, None]):
        codes = train(config(tmp_path / "run", workers=part), 1, tmp_path, prepare)
        assert codes == [75 if prepare else 0], said(tmp_path)
    assert different(tmp_path / "run", alone) == []
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(alone)]


def test_a_stopped_run_saves_and_ends_within_ten_seconds(tmp_path):
    processes = begin(config(tmp_path / "run", steps=100_000, checkpoint_every=90_000), 1, tmp_path)
    with killing(processes):
        wait_for_row(tmp_path / "run", 3)
        began = time.monotonic()
        os.kill(processes[0].pid, signal.SIGTERM)
        assert end(processes, 60) == [75]
    assert time.monotonic() - began < 10
    step = checkpoint.list_steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"Stopped by SIGTERM after step {step}" in said(tmp_path)


def wait_for_row(folder: Path, step: int) -> None:
    until = time.monotonic() + 300
    while not any(row["step"] >= step for row in metrics(folder)):
        assert time.monotonic() < until
        time.sleep(0.02)


# ---------------------------------------------------------------------- killed in a save


def keep_saving(folder: Path) -> None:
    """Save checkpoints of 4 MB, one after the other, until killed."""
    writer = CheckpointWriter(folder, 2, None, {})
    for step in range(1, 100_000):
        tensors = {"model": {"a": torch.full((1000, 1000), float(step))}}
        writer.save(step, tensors, {"step": step})


@pytest.mark.slow
def test_the_newest_checkpoint_is_complete_after_kills_during_a_save(tmp_path):
    dice = random.Random(0)
    for life in range(20):
        process = CONTEXT.Process(target=keep_saving, args=(tmp_path,))
        process.start()
        try:
            until = time.monotonic() + 300
            before = checkpoint.find_newest(tmp_path)
            while checkpoint.find_newest(tmp_path) in (None, before):
                assert time.monotonic() < until
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.05))
        finally:
            process.kill()
            process.join()
        newest = checkpoint.find_newest(tmp_path)
        assert newest is not None
        checkpoint.verify(newest)
        loaded = checkpoint.load(newest)
        assert bool((loaded.tensors["model"]["a"] == loaded.state["step"]).all()), life
        for path in checkpoint.list_steps(tmp_path):  # the next life begins at step 1
            checkpoint._remove(tmp_path / f"step-{path:08d}")


# ---------------------------------------------------------------------- damaged


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (path / "model.safetensors").write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path / "optimizer.safetensors", 1000)


def lose_a_file(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def change_the_step(path: Path) -> None:
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 15', '"step": 16'))


def empty_the_sums(path: Path) -> None:
    (path / "SHA256SUMS").write_text("")


def leave_a_file_out_of_the_sums(path: Path) -> None:
    kept = (path / "SHA256SUMS").read_text().splitlines()[1:]
    (path / "SHA256SUMS").write_text("\n".join(kept))


def name_a_device_in_the_sums(path: Path) -> None:
    with (path / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  /dev/zero\n")


DAMAGES = [flip_a_bit, cut_off, lose_a_file, change_the_step, empty_the_sums]
DAMAGES += [leave_a_file_out_of_the_sums, name_a_device_in_the_sums]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys, damage):
    for step in (10, 15):
        checkpoint.save(
            tmp_path / "checkpoints",
            step,
            {name: {"a": torch.rand(9, 99)} for name in ("model", "optimizer")},
            {"step": step},
            {},
        )
    newest = tmp_path / "checkpoints" / "step-00000015"
    damage(newest)
    found, lines = checkpoint.find_newest_undamaged(tmp_path / "checkpoints")
    assert found == newest.with_name("step-00000010")
    assert "step-00000015 is damaged: " in lines[0]
    assert "renamed to damaged-step-00000015, and the run resumes from step-00000010" in lines[0]
    assert (tmp_path / "checkpoints" / "last").resolve() == found.resolve()
    assert (tmp_path / "checkpoints" / "damaged-step-00000015").is_dir()
    assert checkpoint.find_newest_undamaged(tmp_path / "checkpoints") == (found, [])  # said once


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_equals_an_undamaged_run(tmp_path, alone):
    assert train(config(tmp_path / "run"), 1, tmp_path, terminated_at_12) == [75]
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert train(config(tmp_path / "run"), 1, tmp_path) == [0]
    assert "model.safetensors was changed" in " ".join(said(tmp_path).split())
    assert different(tmp_path / "run", alone) == []


def test_no_checkpoint_is_renamed_if_all_are_damaged(tmp_path):
    for step in (10, 15):
        path = checkpoint.save(tmp_path, step, {"model": {"a": torch.rand(99)}}, {"step": step}, {})
        os.truncate(path / "model.safetensors", 50)
    with pytest.raises(UserError, match="step-00000015 is damaged"):
        checkpoint.find_newest_undamaged(tmp_path)
    assert checkpoint.list_steps(tmp_path) == [10, 15]


def test_checkpoints_without_checksums_are_read(tmp_path):
    for step in (10, 15):
        path = checkpoint.save(tmp_path, step, {"model": {"a": torch.rand(99)}}, {"step": step}, {})
        (path / "SHA256SUMS").unlink()
    assert checkpoint.find_newest_undamaged(tmp_path) == (path, [])
    os.truncate(path / "model.safetensors", 50)
    assert checkpoint.find_newest_undamaged(tmp_path)[0] == tmp_path / "step-00000010"


def test_checksums_equal_those_of_sha256sum(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"a": torch.rand(99)}}, {}, {})
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=path, capture_output=True, check=True)
    assert done.stdout == b"model.safetensors: OK\nstate.json: OK\n"


# ---------------------------------------------------------------------- no room


def small_files_alone() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def limited_at_7(rank: int, log: Path) -> None:
    def limit() -> None:
        while not (log / "run" / "checkpoints" / "step-00000005").exists():  # it is written behind training
            time.sleep(0.01)
        small_files_alone()

    once_at(7, limit)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_file_size_limit_stops_the_run_and_keeps_checkpoints(tmp_path, alone, size):
    folder = tmp_path / "run"
    codes = train(config(folder), size, tmp_path, limited_at_7)
    assert codes == [1] * size
    text = " ".join(said(tmp_path).split())
    assert "The checkpoint of step 10, " in text
    assert f" bytes, could not be written to {folder / 'checkpoints'}: " in text
    assert checkpoint.list_steps(folder / "checkpoints") == [5]
    assert not list((folder / "checkpoints").glob(".partial*"))
    checkpoint.verify(folder / "checkpoints" / "last")
    if size == 1:
        assert train(config(folder), 1, tmp_path) == [0]
        assert different(folder, alone) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_is_reported_before_writing(tmp_path):
    mounted = ["mount", "-t", "tmpfs", "-o", "size=3m", "quarterview-test", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        tensors = {"model": {"a": torch.rand(400, 1000)}}
        checkpoint.save(tmp_path, 1, tensors, {}, {})
        with pytest.raises(
            RunError,
            match=r"1,600,000 bytes, could not be written to .*: only [\d,]+ bytes are free\.",
        ):
            checkpoint.save(tmp_path, 2, tensors, {}, {})
        assert checkpoint.find_newest_undamaged(tmp_path) == (tmp_path / "step-00000001", [])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ---------------------------------------------------------------------- behind training


def test_a_checkpoint_has_the_state_of_its_step(tmp_path, monkeypatch):
    real, go = checkpoint.save_file, Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: (go.wait(60), real(*arguments)))
    writer, weights = CheckpointWriter(tmp_path, 2, None, {"k": "v"}), torch.ones(5)
    writer.save(1, {"model": {"a": weights}}, {"step": 1})
    assert checkpoint.list_steps(tmp_path) == []  # it is not waited for
    weights += 1
    go.set()
    writer.finish()
    assert checkpoint.load(tmp_path / "last").tensors["model"]["a"].tolist() == [1] * 5
    assert not writer.has_failed


def test_a_failed_write_is_raised_at_the_next_save(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, None, {})
    writer.save(1, {"model": {"a": torch.ones(5)}}, {})
    while not writer.has_failed:
        time.sleep(0.01)
    with pytest.raises(OSError, match="checkpoints"):
        writer.save(2, {"model": {"a": torch.ones(5)}}, {})
    writer.finish()  # once


def test_keep_every_keeps_checkpoints(tmp_path):
    run = config(tmp_path / "run", steps=10, checkpoint_every=4, keep_every=3, keep_checkpoints=1)
    assert qv.pretrain(run).status == "complete"
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [3, 6, 9, 10]


def test_an_interrupted_save_is_reported(tmp_path, capsys):
    run = config(tmp_path / "run", steps=6)
    once = Trainer._run_update
    try:
        once_at(3, terminate)
        assert qv.pretrain(run).status == "SIGTERM"
    finally:
        Trainer._run_update = once
    (tmp_path / "run" / "checkpoints" / ".partial-step-00000005").mkdir()
    assert qv.pretrain(run).status == "complete"
    assert (
        "The checkpoint step-00000005 is incomplete because its saving was interrupted. It is ignored"
        in capsys.readouterr().out
    )
    assert STEPS > 6
