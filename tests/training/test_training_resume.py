import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter, defaultdict
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

import quarterview as qv
from quarterview.data.sampler import SampleStream
from quarterview.errors import RunError, UserError
from quarterview.training import checkpoint
from quarterview.training.lock import lock_folder
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.trainer import Trainer

# A server that has imported everything and run nothing forks the processes that are killed here.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quarterview.commands.pretrain", "torch.utils.tensorboard"])

IMAGES, HOLDOUT, BATCH, STEPS = 200, 5, 16, 50  # four epochs and a bit
CLOCK = ("images_per_s", "data_wait")  # the columns that no two runs share


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(out: Path, **changes) -> qv.PretrainConfig:
    values = {
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "lr": 1e-3, "batch_size": BATCH},
        **{"data": (f"shapes:{IMAGES}:size=16",), "workers": 0, "holdout": HOLDOUT, "steps": STEPS},
        **{"log_every": 4, "eval_every": 25, "checkpoint_every": 7, "ema": 0.9},
    }
    return qv.PretrainConfig.from_flags(**{**values, **changes})


# ---------------------------------------------------------------------- looking at runs


def assert_same_run(folder: Path, reference: Path) -> None:
    """Check that tensors, metrics without times, and TensorBoard of two runs are equal."""
    one, two = (checkpoint.load(checkpoint.find_newest(path / "checkpoints")) for path in (folder, reference))
    assert one.state["step"] == two.state["step"]
    assert one.tensors.keys() == two.tensors.keys() >= {"model", "optimizer", "ema"}
    for kind, named in two.tensors.items():
        assert one.tensors[kind].keys() == named.keys()
        different = [name for name in named if not torch.equal(one.tensors[kind][name], named[name])]
        assert different == []
    timeless = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(path)]
        for path in (folder, reference)
    ]
    assert timeless[0] == timeless[1]
    for name in ("skipped_steps.jsonl",):
        assert (folder / name).exists() == (reference / name).exists()
        if (folder / name).exists():
            assert (folder / name).read_text() == (reference / name).read_text()
    rows = metrics(folder)
    for column, curve in tensorboard(folder).items():
        assert curve == [row["step"] for row in rows if row[column] is not None]


def tensorboard(folder: Path) -> dict[str, list[int]]:
    """Return the steps of every TensorBoard curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ---------------------------------------------------------------------- asked to stop


def stop_at(monkeypatch, steps: set[int], number: int = signal.SIGTERM) -> list[int]:
    """Send this process a signal during each of these steps. Returns the list of steps done."""
    real, done = Trainer._run_update, []

    def update(self, batch):
        real(self, batch)
        done.append(self.step)
        if self.step in steps:
            steps.discard(self.step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_run_update", update)
    return done


def hostile(path: Path) -> dict:
    """Streamed images, one of which makes the loss overflow, so that steps are skipped."""
    images = np.random.default_rng(0).random((60, 16, 16, 3), np.float32)
    images[11] *= 1e30
    np.save(path, images)
    return {"data": (str(path),), "mean": (0.5,) * 3, "std": (0.3,) * 3, "holdout": 0, "workers": 1}


CROSS = {"decoder": "cross", "predict_ratio": 0.5, "masks_per_image": 2, "mask": "block"}


@pytest.mark.parametrize("kind", ["held", "cross", "streamed and skipping"])
def test_stopped_and_resumed_is_the_same_run(tmp_path, monkeypatch, kind):
    changes = {"held": {"clip_grad": 1.0}, "cross": CROSS}.get(kind) or hostile(tmp_path / "x.npy")
    changes["precision"] = "fp32" if kind == "held" else "bf16"
    assert qv.pretrain(tiny(tmp_path / "whole", **changes)).status == "complete"
    stops = set(random.Random(kind).sample(range(1, STEPS), 4))
    waiting = sorted(stops)
    done = stop_at(monkeypatch, stops)
    for step in waiting:
        run = qv.pretrain(tiny(tmp_path / "parts", **changes))
        assert (run.status, run.step) == ("SIGTERM", step)
        assert checkpoint.find_newest(tmp_path / "parts" / "checkpoints").name == f"step-{step:08d}"
    assert qv.pretrain(tiny(tmp_path / "parts", **changes)).status == "complete"
    assert done == list(range(1, STEPS + 1))  # none twice, none left out
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert (metrics(tmp_path / "parts")[-1]["skipped"] > 0) == (kind == "streamed and skipping")


def test_ctrl_c_stops_a_run_and_the_last_step_completes_it(tmp_path, monkeypatch):
    qv.pretrain(tiny(tmp_path / "whole", steps=6))
    stop_at(monkeypatch, {3, 6}, signal.SIGINT)
    run = qv.pretrain(tiny(tmp_path / "parts", steps=6))
    assert (run.status, run.step) == ("SIGINT", 3)
    run = qv.pretrain(tiny(tmp_path / "parts", steps=6))
    assert (run.status, run.step) == ("complete", 6)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_bad_steps_in_a_row_are_counted_across_a_stop(tmp_path, monkeypatch):
    changes = hostile(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.full((60, 16, 16, 3), 1e30, np.float32))
    stop_at(monkeypatch, {2})
    assert qv.pretrain(tiny(tmp_path / "run", **changes)).status == "SIGTERM"
    with pytest.raises(RunError, match="steps 1 to 3"):
        qv.pretrain(tiny(tmp_path / "run", **changes))


# ---------------------------------------------------------------------- killed


def life(config: qv.PretrainConfig, log: Path, held: bool = False) -> None:
    """Train in a new process and record every batch.

    Args:
        held: it is to be killed, and waits for that before its last step, however late that comes.
    """
    multiprocessing.set_start_method("fork", force=True)  # of its workers: as usual, not as this test's
    torch.set_num_threads(1)
    real = Trainer._run_update

    def update(self, batch):
        row = {"step": self.step + 1, "ids": batch.ids.tolist(), "epochs": batch.epochs.tolist()}
        file.write(json.dumps(row) + "\n")
        file.flush()
        if held and self.step + 1 == config.loop.steps:
            time.sleep(600)
        real(self, batch)

    Trainer._run_update = update
    with log.open("a") as file, log.with_suffix(".out").open("a") as said, contextlib.redirect_stdout(said):
        qv.pretrain(config)


def begin(config: qv.PretrainConfig, log: Path, held: bool = False) -> BaseProcess:
    process = CONTEXT.Process(target=life, args=(config, log, held))
    process.start()
    return process


def lines(log: Path) -> list[dict]:
    """Return the complete lines of a log."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(log: Path, count: int, process: BaseProcess) -> None:
    """Wait for a number of further batches, or for the last one."""
    until, before = time.monotonic() + 300, len(lines(log))
    while len(now := lines(log)) < count and process.is_alive():
        if len(now) > before and now[-1]["step"] == STEPS:
            return
        assert time.monotonic() < until
        time.sleep(0.002)


def live(config: qv.PretrainConfig, log: Path) -> None:
    """Train in a new process to the end."""
    process = begin(config, log)
    process.join(300)
    assert process.exitcode == 0


def kill_soon(config: qv.PretrainConfig, log: Path, dice: random.Random, span: int) -> None:
    """Train in a new process that is killed after a random number of steps and a random time."""
    process = begin(config, log, held=True)
    wait_for(log, len(lines(log)) + dice.randint(1, span), process)
    time.sleep(dice.uniform(0, 0.04))
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def assert_every_sample_once(log: Path, config: qv.PretrainConfig) -> None:
    """Check that repeated steps are equal, and that every epoch has every training image once."""
    batches: dict[int, dict] = {}
    for row in lines(log):
        first = batches.setdefault(row["step"], row)
        assert (row["ids"], row["epochs"]) == (first["ids"], first["epochs"])
    assert sorted(batches) == list(range(1, STEPS + 1))
    seen: defaultdict[int, Counter] = defaultdict(Counter)
    for row in batches.values():
        for sample, epoch in zip(row["ids"], row["epochs"], strict=True):
            seen[epoch][sample] += 1
    training = set(range(IMAGES)) - set(
        SampleStream(IMAGES, HOLDOUT, config.loop.seed).get_held_out_ids().tolist()
    )
    whole = STEPS * BATCH // len(training)
    assert whole == 4
    for epoch in range(whole):
        assert seen[epoch] == Counter(training)
    assert seen[whole].total() == STEPS * BATCH - whole * len(training)
    assert set(seen[whole].values()) == {1}
    assert set(seen[whole]) <= training


def survive(tmp_path: Path, kills: int, changes: dict, workers: list[int], seed: int) -> None:
    """Kill and resume a run several times, and compare it with an uninterrupted run."""
    dice, changes = random.Random(seed), {**changes, "eval_every": STEPS}
    live(tiny(tmp_path / "whole", **changes), tmp_path / "whole.jsonl")
    log = tmp_path / "parts.jsonl"
    for i in range(kills):
        config = tiny(tmp_path / "parts", **changes, workers=workers[i % len(workers)])
        kill_soon(config, log, dice, span=max(3, 2 * STEPS // (kills + 2)))
        if checkpoint.find_newest(tmp_path / "parts" / "checkpoints") is not None:
            qv.load(tmp_path / "parts")
    live(tiny(tmp_path / "parts", **changes), log)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert_every_sample_once(log, tiny(tmp_path, **changes))
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("cache", "workers"),
    [("device", [0]), pytest.param("none", [2, 0, 1], marks=pytest.mark.slow)],
)
def test_killed_three_times_and_resumed_is_the_same_run(tmp_path, cache, workers):
    survive(tmp_path, 3, {"cache": cache}, workers, seed=len(workers))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "workers"),
    [
        ({"cache": "device", "checkpoint_every": 2}, [0]),
        ({"cache": "none", "checkpoint_every": 3, "keep_checkpoints": 1}, [2, 0, 1, 3]),
        ({"cache": "none", "precision": "bf16", "accum_iter": 4, "clip_grad": 1.0}, [1, 2]),
    ],
)
def test_killed_a_dozen_times_and_resumed_is_the_same_run(tmp_path, changes, workers, seed):
    survive(tmp_path, 12, changes, workers, seed)


def test_no_second_process_trains_in_the_same_folder(tmp_path):
    config, log = tiny(tmp_path / "run", steps=100_000), tmp_path / "log.jsonl"
    process = begin(config, log)
    try:
        wait_for(log, 3, process)
        for resume in ("auto", "never"):
            with pytest.raises(UserError, match=rf"run is in use by process {process.pid} on "):
                qv.pretrain(tiny(tmp_path / "run", steps=100_000, resume=resume))
        count = len(lines(log))
        wait_for(log, count + 3, process)  # the first goes on unharmed
        assert process.is_alive()
    finally:
        process.kill()
        process.join(60)
    steps = [row["step"] for row in lines(log)]
    assert steps == list(range(1, len(steps) + 1))


def test_the_workers_of_a_killed_process_do_not_keep_the_lock(tmp_path):
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with lock_folder(tmp_path):
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(UserError, match=f"in use by process {process} "), lock_folder(tmp_path):
            pass
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    try:
        with lock_folder(tmp_path):
            os.kill(worker, 0)  # which lives, else this would fail
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


# ---------------------------------------------------------------------- edges


def test_leftovers_of_a_run_killed_at_once_are_removed(tmp_path):
    qv.pretrain(tiny(tmp_path / "whole", steps=4))
    folder = tmp_path / "run"
    for name in ("tensorboard", "samples", "checkpoints/.partial-step-00000007"):
        (folder / name).mkdir(parents=True)
    (folder / "tensorboard" / "events.out.tfevents.1.x.1.0").write_bytes(b"half")
    (folder / "samples" / "step-00000099.png").write_bytes(b"half")
    (folder / "config.yaml").write_text("model: mae_vit_h")
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 9.0}\n{"step": 99, "lo')
    (folder / "skipped_steps.jsonl").write_text('{"st')
    (folder / "bad_samples.jsonl").write_text('{"id": 1, "name": "x", "reason": "y"}\n{"i')
    assert qv.pretrain(tiny(folder, steps=4, resume="never")).status == "complete"
    assert_same_run(folder, tmp_path / "whole")
    assert not (folder / "bad_samples.jsonl").exists()
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-00000004.png"]


def content(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return the time and contents of each file of a run, without the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_complete_run_is_not_changed(tmp_path, monkeypatch, capsys):
    first = qv.pretrain(tiny(tmp_path / "run", steps=5))
    before = content(tmp_path / "run")
    capsys.readouterr()
    done = stop_at(monkeypatch, set())
    again = qv.pretrain(tiny(tmp_path / "run", steps=5))
    assert again == first
    assert again.status == "complete"
    assert done == []
    assert "is complete: 5 steps." in capsys.readouterr().out
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "mae_vit_32x1x2_patch4"}, ["model: was mae_vit_32x2x2_patch4, now mae_vit_32x1x2_patch4"]),
        ({"data": ("shapes:200:size=16:seed=1",)}, ["data: the images differ"]),
        ({"batch_size": 8}, ["batch_size: was 16, now 8"]),
        ({"steps": None, "epochs": 3.0}, ["epochs: was 800.0, now 3.0", "steps: was 5, now None"]),
        ({"lr": 0.1, "mask_ratio": 0.5, "seed": 4}, ["lr: was 0.001", "mask_ratio: was 0.75", "seed: was 0"]),
        ({"image_size": (16, 32)}, [r"image_size: was \[16, 16\], now \[16, 32\]"]),
        ({"cache": "none"}, ["cache: was auto, now none"]),
    ],
)
def test_changed_flags_are_refused_and_named(tmp_path_factory, monkeypatch, changes, named):
    folder = tmp_path_factory.getbasetemp() / "stopped at two"
    if not folder.exists():
        stop_at(monkeypatch, {2})
        qv.pretrain(tiny(folder, steps=5))
    before = content(folder)
    with pytest.raises(UserError, match=r"--init-from .*step-00000002 --out NEW") as caught:
        qv.pretrain(tiny(folder, **{"steps": 5, **changes}))
    said = str(caught.value).splitlines()
    assert len(said) == len(named) + 2
    for line in named:
        caught.match(line)
    assert content(folder) == before


def test_some_settings_may_change(tmp_path, monkeypatch):
    qv.pretrain(tiny(tmp_path / "whole", steps=8, log_every=1))
    stop_at(monkeypatch, {4})
    qv.pretrain(tiny(tmp_path / "parts", steps=8, log_every=1))
    monkeypatch.undo()
    changes = {"checkpoint_every": 3, "keep_checkpoints": 4, "workers": 1, "max_bad_samples": 0.5}
    assert qv.pretrain(tiny(tmp_path / "parts", steps=8, log_every=1, **changes)).status == "complete"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert checkpoint.list_steps(tmp_path / "parts" / "checkpoints") == [4, 6, 8]


def test_resume_never_refuses_a_folder_with_a_run(tmp_path):
    qv.pretrain(tiny(tmp_path / "run", steps=2))
    with pytest.raises(UserError, match="already has a run, and --resume is never"):
        qv.pretrain(tiny(tmp_path / "run", steps=2, resume="never"))


def test_an_older_checkpoint_can_be_resumed(tmp_path, monkeypatch):
    many = {"steps": 12, "checkpoint_every": 2, "keep_checkpoints": 99, "log_every": 1}
    qv.pretrain(tiny(tmp_path / "whole", **many))
    qv.pretrain(tiny(tmp_path / "run", **many))
    older = tmp_path / "run" / "checkpoints" / "step-00000004"
    done = stop_at(monkeypatch, {7})
    run = qv.pretrain(tiny(tmp_path / "run", **many, resume=str(older)))
    assert (run.status, run.step, done) == ("SIGTERM", 7, [5, 6, 7])
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 8))
    assert checkpoint.list_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6, 7]
    qv.pretrain(tiny(tmp_path / "run", **many))
    assert done == list(range(5, 13))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_another_run_can_be_resumed(tmp_path, monkeypatch):
    qv.pretrain(tiny(tmp_path / "whole", steps=8))
    done = stop_at(monkeypatch, {5})
    qv.pretrain(tiny(tmp_path / "first", steps=8))
    kept = checkpoint.load(tmp_path / "first" / "checkpoints" / "last").state
    monkeypatch.chdir(tmp_path)
    qv.pretrain(tiny(Path("second"), steps=8, resume="first"))
    assert done == list(range(1, 9))
    assert checkpoint.load(tmp_path / "first" / "checkpoints" / "last").state == kept
    one, two = (checkpoint.load(tmp_path / name / "checkpoints" / "last") for name in ("second", "whole"))
    assert all(torch.equal(one.tensors["model"][name], t) for name, t in two.tensors["model"].items())
    for path in ("nothing", "."):
        with pytest.raises(UserError, match=rf"--resume {path} has no complete checkpoint"):
            qv.pretrain(tiny(tmp_path / "third", steps=8, resume=path))


def test_the_same_data_may_be_at_another_path(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "here.npy", images)
    qv.pretrain(tiny(tmp_path / "whole", steps=8, data=(str(tmp_path / "here.npy"),)))
    stop_at(monkeypatch, {5})
    qv.pretrain(tiny(tmp_path / "parts", steps=8, data=(str(tmp_path / "here.npy"),)))
    (tmp_path / "here.npy").rename(tmp_path / "there.npy")
    qv.pretrain(tiny(tmp_path / "parts", steps=8, data=(str(tmp_path / "there.npy"),)))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_init_from_starts_with_the_weights_of_another_run(tmp_path):
    qv.pretrain(tiny(tmp_path / "first", steps=10))
    given = qv.load(tmp_path / "first").state_dict()
    config = tiny(tmp_path / "second", steps=1, lr=1e-12, seed=7, init_from=str(tmp_path / "first"))
    qv.pretrain(config)
    for kind in (False, True):  # the moving average begins there, too
        now = qv.load(tmp_path / "second", ema=kind).state_dict()
        assert all(torch.allclose(now[name], tensor, rtol=0, atol=1e-9) for name, tensor in given.items())
    qv.pretrain(tiny(tmp_path / "third", steps=1, lr=1e-12, seed=7))
    assert not torch.allclose(
        qv.load(tmp_path / "third").state_dict()["cls_token"], given["cls_token"], atol=1e-3
    )
    for changes in ({"decoder_width": 64}, {"model": "mae_vit_32x3x2_patch4"}):
        with pytest.raises(UserError, match=r"The architecture of .* differs"):
            qv.pretrain(tiny(tmp_path / "fourth", **changes, init_from=str(tmp_path / "first")))


def test_a_resumed_run_does_not_need_init_from(tmp_path, monkeypatch):
    qv.pretrain(tiny(tmp_path / "first", steps=3))
    changes = {"steps": 6, "seed": 7, "init_from": str(tmp_path / "first")}
    qv.pretrain(tiny(tmp_path / "whole", **changes))
    stop_at(monkeypatch, {3})
    qv.pretrain(tiny(tmp_path / "parts", **changes))
    shutil.rmtree(tmp_path / "first")
    assert qv.pretrain(tiny(tmp_path / "parts", **changes)).status == "complete"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
