"""Runs on tar shards give the same weights from a disk and over HTTP, with workers, and when interrupted."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from tar_shards import served, shards

import quarterview as qv
from quarterview.data.sampler import ShardedStream
from quarterview.data.sources import shards as shard_files
from quarterview.data.sources.open import open_source
from quarterview.errors import UserError
from quarterview.training import checkpoint
from quarterview.training.trainer import Trainer

COUNTS = (9, 0, 17, 5, 12, 1, 20)
STEPS = 10


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "_RETRY_DELAYS", (0.0,))


def tiny(out: Path, data: str, **changes) -> qv.PretrainConfig:
    values = {
        **{"model": "mae_vit_32x1x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "lr": 1e-3, "batch_size": 16},
        **{"data": (data,), "workers": 0, "cache": "none", "holdout": 4, "steps": STEPS, "log_every": 5},
        **{"shuffle": "shards", "shuffle_shards": 2},
    }
    return qv.PretrainConfig.from_flags(**{**values, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load(checkpoint.find_newest(run / "checkpoints"))
    assert loaded.state["step"] == STEPS
    return loaded.tensors["model"]


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert [name for name in two if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def updates(monkeypatch) -> list[tuple[list[int], list[int]]]:
    """Record the epochs and the sample ids of every update of every run."""
    real, updates_seen = Trainer._run_update, []

    def update(self, batch):
        real(self, batch)
        updates_seen.append((batch.epochs.tolist(), batch.ids.tolist()))

    monkeypatch.setattr(Trainer, "_run_update", update)
    return updates_seen


def test_a_run_is_the_same_from_a_disk_from_a_server_with_workers_and_in_parts(
    tmp_path, monkeypatch, updates
):
    folder = shards(tmp_path / "s", COUNTS)
    assert qv.pretrain(tiny(tmp_path / "whole", f"{folder}/*.tar")).status == "complete"
    whole = list(updates)
    assert_samples_of(whole, folder)
    expected = weights(tmp_path / "whole")

    with served(tmp_path) as (url, server):
        spec = f"{url}/s/{{000..006}}.tar"
        remote = {"workers": 2, "shard_cache_gib": 0.001, "shard_cache_dir": str(tmp_path / "copies")}
        qv.pretrain(tiny(tmp_path / "remote", spec, **remote))
        assert list((tmp_path / "copies").rglob("*.shard"))
        assert_equal(weights(tmp_path / "remote"), expected)
        assert len(server.requests) > 7

        real, stops = Trainer._run_update, {3: f"{folder}/*.tar", 7: spec}
        updates.clear()

        def update(self, batch):
            real(self, batch)
            if stops.pop(self.step, None):
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Trainer, "_run_update", update)
        for data, changes in ((spec, remote), (f"{folder}/*.tar", {"workers": 2}), (spec, {})):
            qv.pretrain(tiny(tmp_path / "parts", data, **changes))
    assert updates == whole
    assert_equal(weights(tmp_path / "parts"), expected)


def assert_samples_of(updates_seen: list[tuple[list[int], list[int]]], folder: Path) -> None:
    """Check that the first epoch has each training image once, in the order of the stream."""
    source = open_source(str(folder), 3)
    stream = ShardedStream(source.shard_starts(), 4, 0, 2)
    epochs, ids = stream.get_samples(torch.arange(STEPS * 16))
    assert [one for row in updates_seen for one in row[0]] == epochs.tolist()
    assert [one for row in updates_seen for one in row[1]] == ids.tolist()
    held_out = set(stream.get_held_out_ids().tolist())
    assert Counter(ids[epochs == 0].tolist()) == Counter(set(range(len(source))) - held_out)


def test_the_order_is_fixed_at_the_first_start(tmp_path):
    folder = shards(tmp_path / "s", COUNTS)
    auto = {"shuffle": "auto", "steps": 2, "checkpoint_every": 2}
    qv.pretrain(tiny(tmp_path / "run", f"file://{folder}", **auto))
    state = checkpoint.load(checkpoint.find_newest(tmp_path / "run" / "checkpoints")).state
    assert state["resolved"]["shuffle"] == "shards"
    assert qv.pretrain(tiny(tmp_path / "run", str(folder), **auto)).status == "complete"  # it was copied here
    for other in ({"shuffle": "full"}, {"shuffle_shards": 3}):
        with pytest.raises(UserError, match=next(iter(other))):
            qv.pretrain(tiny(tmp_path / "run", str(folder), **{**auto, **other}))
    qv.pretrain(tiny(tmp_path / "local", str(folder), **auto))
    state = checkpoint.load(checkpoint.find_newest(tmp_path / "local" / "checkpoints")).state
    assert state["resolved"]["shuffle"] == "full"


def test_faults_are_printed_and_shards_can_be_packed(tmp_path, capsys):
    from quarterview.cli import run

    folder = shards(tmp_path / "s", (6, 6))
    cut = (folder / "001.tar").read_bytes()[:4640]
    (folder / "001.tar").write_bytes(cut)
    assert run(["pack", f"{folder}/*.tar", "--out", str(tmp_path / "store"), "--workers", "0"]) == 0
    output = capsys.readouterr().out
    assert "Indexing 2 of 2 tar shards" in output
    assert "1 in tar shards: cut off before its end (001.tar: 000002.png" in output
    store, source = open_source(str(tmp_path / "store"), 3), open_source(str(folder), 3)
    assert [store.name(i) for i in range(len(store))] == [source.name(i) for i in range(len(source))]
    assert [store.label(i) for i in range(len(store))] == [source.label(i) for i in range(len(source))]
    assert len(store) == 8
    assert store.image(7).pixels.equal(source.image(7).pixels)
    qv.pretrain(tiny(tmp_path / "run", str(folder), steps=1, batch_size=4, holdout=2))
    assert "cut off before its end" in capsys.readouterr().out
