"""Tests of killed workers and of images that change during a run."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import quarterview as qv
from quarterview import cli
from quarterview.data.sources.arrays import ArraySource
from quarterview.data.sources.base import BadSampleError
from quarterview.data.sources.folder import FolderSource, ListSource
from quarterview.data.sources.parquet import ParquetSource
from quarterview.errors import RunError
from quarterview.training import checkpoint
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.trainer import Trainer

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["quarterview.commands.pretrain", "torch.utils.tensorboard"])

STEPS, IMAGES = 120, 256
FLAGS = (
    "--model mae_vit_64x2x2_patch4 --image-size 16 --decoder-width 32 --decoder-depth 1 --decoder-heads 2 "
    f"--precision fp32 --lr 1e-3 --batch-size 16 --steps {STEPS} --holdout 5 --cache none --workers 2 "
    "--log-every 4 --eval-every 1000 --checkpoint-every 10 --mean 0.5 0.5 0.5 --std 0.3 0.3 0.3"
)


@pytest.fixture
def photos(tmp_path):
    """256 small images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 20, 24, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def hold(out: Path) -> None:
    """Wait in step 25 for the file ``out.go``, while the workers continue."""
    real = Trainer._run_update

    def update(self, batch):
        if self.step == 25:
            out.with_suffix(".held").touch()
            while not out.with_suffix(".go").exists():
                time.sleep(0.01)
        real(self, batch)

    Trainer._run_update = update


def life(data: Path, out: Path, said: Path, held: bool) -> None:
    """Run the command in a process that leads a process group."""
    os.setpgid(0, 0)
    if held:
        hold(out)
    multiprocessing.set_start_method("fork", force=True)  # of its workers: as usual, not as this test's
    torch.set_num_threads(1)
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(cli.run(["pretrain", "--data", str(data), "--out", str(out), *FLAGS.split()]))


def begin(data: Path, out: Path, held: bool = False) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=life, args=(data, out, out.with_suffix(".said"), held))
    process.start()
    return process


def wait_for(condition, process) -> None:
    until = time.monotonic() + 300
    while not condition() and process.is_alive():
        assert time.monotonic() < until
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def group(leader: int) -> list[int]:
    """Return the running processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(member) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def assert_same(one: Path, two: Path) -> None:
    """Check that weights, optimizer state and losses of two runs are equal."""
    first, second = (checkpoint.load(checkpoint.find_newest(run / "checkpoints")) for run in (one, two))
    assert first.state["step"] == second.state["step"] == STEPS
    for kind, named in first.tensors.items():
        assert all(torch.equal(named[name], second.tensors[kind][name]) for name in named)
    assert [row["loss"] for row in metrics(one)] == [row["loss"] for row in metrics(two)]


def test_a_killed_worker_ends_the_run_which_resumes_exactly(tmp_path, photos):
    out = tmp_path / "run"
    process = begin(photos, out, held=True)
    wait_for(out.with_suffix(".held").exists, process)
    wait_for((out / "checkpoints" / "step-00000020").exists, process)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out.with_suffix(".go").touch()
    killed = time.monotonic()
    process.join(60)
    assert time.monotonic() - killed < 30
    assert process.exitcode == 1
    assert group(process.pid) == []
    said = " ".join(out.with_suffix(".said").read_text().split())
    assert "A process that decodes images died (" in said  # and then what was noticed first
    assert "Repeat the command to continue from what was saved." in said
    assert "Traceback" not in said
    assert checkpoint.list_steps(out / "checkpoints")[-1] < STEPS

    for folder in (out, tmp_path / "whole"):
        process = begin(photos, folder)
        process.join(200)
        assert process.exitcode == 0
    assert_same(out, tmp_path / "whole")


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path, photos):
    process = begin(photos, tmp_path / "run", held=True)
    wait_for((tmp_path / "run.held").exists, process)
    assert len(group(process.pid)) == 3
    process.kill()
    process.join(60)
    until = time.monotonic() + 120
    while group(process.pid):
        assert time.monotonic() < until
        time.sleep(0.1)


# ---------------------------------------------------------------------- images that change


def harm(how: str, path: Path) -> None:
    """Replace an image by another of the same size, truncate it, or remove it."""
    if how == "replaced":
        other = path.with_name("other")
        other.write_bytes(path.read_bytes()[:-1] + b"x")
        os.utime(other, ns=(1, 1))
        other.replace(path)
    elif how == "shortened":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["replaced", "shortened", "removed"])
@pytest.mark.parametrize("kind", ["folder", "list"])
def test_an_image_changed_during_a_run_is_a_bad_sample(tmp_path, photos, how, kind):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"photos/{path.name}\n" for path in sorted(photos.iterdir())))
    source = FolderSource(photos, 3) if kind == "folder" else ListSource(listed, 3)
    source.fingerprint()
    assert source.image(7).pixels.shape == (3, 20, 24)
    harm(how, photos / "007.png")
    for read in (source.image, source.croppable):
        with pytest.raises(BadSampleError, match="No such file" if how == "removed" else "was changed after"):
            read(7)
    assert source.image(8).pixels.shape == (3, 20, 24)


def test_a_folder_removed_during_a_run_ends_it_with_an_error(tmp_path, photos):
    out = tmp_path / "run"
    process = begin(photos, out)
    wait_for((out / "checkpoints" / "step-00000010").exists, process)
    shutil.rmtree(photos)
    process.join(60)
    assert process.exitcode == 1
    assert group(process.pid) == []
    said = " ".join(out.with_suffix(".said").read_text().split())
    assert "nor any of 32 replacements" in said or "images are broken, which is more" in said
    assert "No such file" in said


def table(path: Path, level: int) -> None:
    """Write a Parquet file of images of one gray value."""
    import io

    file = io.BytesIO()
    Image.new("L", (8, 8), level).save(file, "PNG")
    pq.write_table(pa.table({"image": [file.getvalue()] * 20}), path)


@pytest.mark.parametrize("how", ["rewritten", "shortened", "removed"])
def test_a_table_changed_before_it_is_read_stops_the_run(tmp_path, how):
    path = tmp_path / "x.parquet"
    table(path, 10)
    source = ParquetSource(path, 3)
    if how == "rewritten":
        table(path, 200)
    else:
        harm(how, path)
    with pytest.raises(RunError, match=r"x\.parquet was changed, replaced or removed during the run"):
        source.image(0)


def test_a_table_that_was_read_stays_in_memory(tmp_path):
    table(tmp_path / "x.parquet", 10)
    source = ParquetSource(tmp_path / "x.parquet", 1)
    assert source.image(0).pixels.max() == 10
    table(tmp_path / "x.parquet", 200)
    assert source.image(1).pixels.max() == 10


@pytest.mark.parametrize("how", ["replaced", "shortened", "removed"])
def test_a_mapped_array_that_changes_stops_the_run_and_does_not_crash_it(tmp_path, how):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((4000, 8, 8), np.uint8))
    source = ArraySource(path, 1)
    assert source.image(3999).pixels.max() == 0
    if how == "shortened":
        os.truncate(path, 1000)  # what is mapped behind it would end the process
    else:
        harm(how, path)
    with pytest.raises(RunError, match=r"x\.npy was changed, replaced or removed during the run"):
        source.image(3999)


def test_changed_images_are_refused_on_resume(tmp_path, photos):
    values = {
        **{"model": "mae_vit_32x1x1_patch4", "image_size": 16, "decoder_width": 32, "decoder_depth": 1},
        **{"decoder_heads": 1, "batch_size": 16, "holdout": 0, "workers": 0, "precision": "fp32"},
        **{"data": (str(photos),), "out": str(tmp_path / "run"), "lr": 1e-3},
    }
    qv.pretrain(qv.PretrainConfig.from_flags(**values, steps=1))
    (photos / "003.png").rename(photos / "another.png")
    with pytest.raises(qv.UserError if hasattr(qv, "UserError") else ValueError, match="the images differ"):
        qv.pretrain(qv.PretrainConfig.from_flags(**values, steps=1))
