import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import quarterview as qv
from quarterview.errors import RunError, UserError
from quarterview.models.mae import MAEConfig, MaskedAutoencoder
from quarterview.training import checkpoint
from quarterview.weights.loading import load_into, make_metadata, read_config

CONFIG = MAEConfig(
    model="mae_vit_32x1x2_patch4", image_size=16, decoder_width=16, decoder_depth=1, decoder_heads=2
)


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    weights = torch.arange(12.0).reshape(3, 4) + step
    return {
        "model": {"a": weights, "b": weights.T},
        "optimizer": {"exp_avg/a": weights.bfloat16(), "step/a": torch.tensor(float(step))},
    }


def put(folder: Path, step: int) -> Path:
    return checkpoint.save(folder, step, tensors(step), {"step": step, "sums": [0.1, 2**53 + 1]}, {"k": "v"})


def check(path: Path, step: int) -> None:
    """Check that a folder has the complete checkpoint of a step."""
    loaded = checkpoint.load(path)
    assert loaded.state == {"step": step, "sums": [0.1, 2**53 + 1]}
    assert loaded.tensors.keys() == tensors(step).keys()
    for name, named in tensors(step).items():
        assert loaded.tensors[name].keys() == named.keys()
        for key, value in named.items():
            assert loaded.tensors[name][key].dtype == value.dtype
            assert torch.equal(loaded.tensors[name][key], value)


def in_child(work, kill_at: int, folder: Path) -> bool:
    """Call a function in a forked process that kills itself at its n-th operation on the folder.

    Returns whether it was killed before it finished.
    """
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def act(_event: object = None, *_rest: object) -> None:
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            events = {
                *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"),
                *("os.symlink", "os.scandir", "shutil.rmtree"),
            }
            sys.addaudithook(lambda event, arguments: act() if event in events else None)
            for module, name in ((os, "fsync"), (checkpoint, "save_file")):
                real = getattr(module, name)
                setattr(module, name, lambda *args, real=real: (act(), real(*args), act()))
            work(folder)
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


# ---------------------------------------------------------------------- what is written


def test_a_checkpoint_round_trip(tmp_path):
    path = put(tmp_path / "checkpoints", 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    check(path, 7)


def test_a_checkpoint_has_no_pickle(tmp_path):
    path = put(tmp_path, 7)
    assert {file.name for file in path.iterdir()} == {
        *("model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
    }
    json.loads((path / "state.json").read_text())
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert (handle.metadata() == {"k": "v"}) == (file.name == "model.safetensors")


def test_files_are_synced_before_the_checkpoint_is_renamed(tmp_path, monkeypatch):
    acts: list[tuple] = []
    real_fsync, real_rename, real_replace = os.fsync, Path.rename, Path.replace

    def fsync(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        acts.append(("sync", path.name, path.stat().st_size if path.is_file() else None))
        real_fsync(handle)

    def rename(self, target):
        acts.append(("rename", self.name, target.name))
        return real_rename(self, target)

    def replace(self, target):
        acts.append(("link", str(self.readlink()), target.name))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", replace)
    folder = tmp_path / "checkpoints"
    path = put(folder, 12)
    partial, final = ".partial-step-00000012", "step-00000012"
    files = {("sync", file.name, file.stat().st_size) for file in path.iterdir()}
    assert len(files) == 4
    assert acts[0] == ("sync", tmp_path.name, None)  # the run's folder, which has a new one in it
    assert set(acts[1:5]) == files
    assert acts[5:] == [
        ("sync", partial, None),
        ("rename", partial, final),
        ("sync", "checkpoints", None),
        ("link", final, "last"),
        ("sync", "checkpoints", None),
    ]


def test_last_is_a_relative_link_to_the_newest(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (5, 10):
        put(folder, step)
        assert (folder / "last").is_symlink()
        assert str((folder / "last").readlink()) == f"step-{step:08d}"
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    check(tmp_path / "elsewhere" / "checkpoints" / "last", 10)


def test_a_step_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, 5, tensors(1), {"step": 1}, {})
    check(put(tmp_path, 5), 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000005"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch):
    put(tmp_path, 5)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises((OSError, RunError), match="No space"):
        put(tmp_path, 10)
    monkeypatch.undo()
    assert checkpoint.find_newest(tmp_path) == tmp_path / "step-00000005"
    check(tmp_path / "last", 5)
    check(put(tmp_path, 10), 10)


# ---------------------------------------------------------------------- which there are


def test_newest_and_steps(tmp_path):
    assert checkpoint.find_newest(tmp_path / "nothing") is None
    assert checkpoint.find_newest(tmp_path) is None
    for step in (9, 100, 20):
        put(tmp_path, step)
    put(tmp_path, 123_456_789)
    for name in (".partial-step-00000500", "step-5", "step-00000500.bak", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.list_steps(tmp_path) == [9, 20, 100, 123_456_789]
    assert checkpoint.find_newest(tmp_path) == tmp_path / "step-123456789"


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_prune_keeps_the_newest(tmp_path, keep):
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    (tmp_path / ".partial-step-00000009").mkdir()
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3, 4][-keep:]
    assert not list(tmp_path.glob(".*"))
    check(tmp_path / "last", 4)


def test_remove_after(tmp_path):
    for step in (1, 2, 3, 4):
        put(tmp_path, step)
    checkpoint.remove_after(tmp_path, 2)
    assert checkpoint.list_steps(tmp_path) == [1, 2]
    check(tmp_path / "last", 2)


def test_a_folder_that_is_not_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"is not a checkpoint\. Give a folder such as"):
            checkpoint.load(path)


# ---------------------------------------------------------------------- killed


def save_and_prune(folder: Path) -> None:
    put(folder, 20)
    checkpoint.prune(folder, 1)


def go_back(folder: Path) -> None:
    checkpoint.remove_after(folder, 5)
    checkpoint.prune(folder, 1)


@pytest.mark.parametrize(("work", "newest"), [(save_and_prune, {10, 20}), (go_back, {5, 10})])
def test_the_newest_checkpoint_is_complete_wherever_a_process_is_killed(tmp_path, work, newest):
    seen: list[int] = []
    for kill_at in range(1, 1000):
        folder = tmp_path / str(kill_at)
        put(folder, 5)
        put(folder, 10)
        killed = in_child(work, kill_at, folder)
        found = checkpoint.find_newest(folder)
        assert found is not None
        seen.append(checkpoint.load(found).state["step"])
        for step in checkpoint.list_steps(folder)[-1:]:
            check(folder / f"step-{step:08d}", step)
        check(folder / "last", checkpoint.load(folder / "last").state["step"])  # never a broken link
        work(folder)  # and what was left behind is in nobody's way
        assert [path.name for path in sorted(folder.iterdir())] == [
            "last",
            f"step-{20 if work is save_and_prune else 5:08d}",
        ]
        if not killed:
            break
    assert set(seen) == newest
    assert len(seen) > 15  # so many acts there are


# ---------------------------------------------------------------------- opened as a model


def test_a_run_a_checkpoint_and_a_file_open_as_the_model(tmp_path):
    torch.manual_seed(0)
    config = MAEConfig(**{**CONFIG.__dict__, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)})
    model = MaskedAutoencoder(config)
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    checkpoint.save(tmp_path / "checkpoints", 1, {"model": average}, {}, make_metadata(config))
    path = checkpoint.save(
        *(tmp_path / "checkpoints", 2, {"model": model.state_dict(), "ema": average}, {}),
        metadata=make_metadata(config),
    )
    with safe_open(path / "model.safetensors", "pt") as handle:
        header = json.loads(handle.metadata()["quarterview"])
    assert header["config"]["model"] == "mae_vit_32x1x2_patch4"
    for given in (tmp_path, path, tmp_path / "checkpoints" / "last", path / "model.safetensors"):
        opened = qv.load(given)
        assert opened.config == config == read_config(given)
        assert not opened.training
        assert all(torch.equal(opened.state_dict()[name], t) for name, t in model.state_dict().items())
    average_opened = qv.load(tmp_path, ema=True)
    assert all(torch.equal(average_opened.state_dict()[name], t) for name, t in average.items())

    other = MaskedAutoencoder(CONFIG)
    load_into(other, tmp_path)
    assert all(torch.equal(other.state_dict()[name], t) for name, t in model.state_dict().items())
    wider = MaskedAutoencoder(MAEConfig(**{**CONFIG.__dict__, "decoder_width": 32}))
    with pytest.raises(UserError, match=r"The architecture of .* differs: decoder_width is 16, not 32"):
        load_into(wider, tmp_path)


def test_a_path_without_a_model_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    (tmp_path / "empty").mkdir()
    path = checkpoint.save(tmp_path, 1, {"model": {"a": torch.ones(1)}}, {}, {})
    cases = {
        tmp_path / "missing": "it does not exist",
        tmp_path / "empty": "it has no checkpoint",
        tmp_path / "bad.safetensors": "not a safetensors or PyTorch file",
        path: "has no config.json",
    }
    for given, reason in cases.items():
        with pytest.raises(
            UserError, match=rf"Cannot read .*: .*{reason}.*\. (Give|For a plain vision transformer, give) "
        ):
            qv.load(given)
    good = checkpoint.save(
        tmp_path, 2, {"model": MaskedAutoencoder(CONFIG).state_dict()}, {}, make_metadata(CONFIG)
    )
    with pytest.raises(
        UserError, match="has no moving average of the weights: its run was trained without --ema"
    ):
        qv.load(good, ema=True)
