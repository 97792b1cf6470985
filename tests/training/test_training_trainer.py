import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quarterview as qv
from quarterview.data.sampler import SampleStream
from quarterview.errors import RunError, UserError
from quarterview.models.create import create_mae
from quarterview.training import checkpoint
from quarterview.training.config import ComputeConfig, LoopConfig, RunConfig
from quarterview.training.console import format_duration
from quarterview.training.logging import RunLogger, ThroughputMeter
from quarterview.training.metric_writers import read_metrics as metrics
from quarterview.training.trainer import collect_stop_signals, get_supported_precision

COLUMNS = [
    *("step", "samples", "epoch", "loss", "val_loss", "lr", "grad_norm"),
    *("images_per_s", "data_wait", "skipped"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(out: Path, **changes) -> qv.PretrainConfig:
    """A run that takes a second."""
    values = {
        **{"model": "mae_vit_32x2x2_patch4", "image_size": 16, "precision": "fp32", "out": str(out)},
        **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "lr": 1e-3, "batch_size": 16},
        **{"data": ("shapes:200:size=16",), "workers": 0, "holdout": 0, "steps": 12, "log_every": 4},
    }
    return qv.PretrainConfig.from_flags(**{**values, **changes})


def digest(folder: Path) -> str:
    """Return a digest of all tensors of the newest checkpoint."""
    found = checkpoint.load(checkpoint.find_newest(folder / "checkpoints")).tensors
    content = hashlib.sha256()
    for kind, named in sorted(found.items()):
        for name, tensor in sorted(named.items()):
            content.update(f"{kind}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.numpy().tobytes())
    return content.hexdigest()


def model_at(folder: Path, step: int, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{kind}.safetensors")


def skipped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------- what a run is


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "bf16", "cache": "none", "clip_grad": 0.5, "ema": 0.9}]
)
def test_runs_with_equal_seeds_are_identical(tmp_path, changes):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        qv.pretrain(tiny(tmp_path / name, seed=seed, **changes))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_gives_the_same_result(tmp_path, precision):
    for again in (False, True):
        qv.pretrain(tiny(tmp_path / str(again), grad_checkpointing=again, precision=precision))
    assert digest(tmp_path / "False") == digest(tmp_path / "True")


def test_a_run_learns_and_writes_its_record(tmp_path):
    config = tiny(tmp_path, steps=None, epochs=14, holdout=8, log_every=20, eval_every=80, lr=3e-3)
    run = qv.pretrain(config)
    assert (run.status, run.step) == ("complete", 14 * 192 // 16)
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [20, 40, 60, 80, 100, 120, 140, 160, 168]
    assert all(list(row) == COLUMNS for row in rows)
    assert run.metrics == rows[-1]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [80, 160, 168]
    for row in rows:
        assert row["samples"] == 16 * row["step"]
        assert row["epoch"] == pytest.approx(16 * row["step"] / 192)
        assert row["images_per_s"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["skipped"] == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step-{step:08d}.png" for step in (80, 160, 168)
    ]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["data"]["images"] == 200
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_val_loss_is_that_of_the_held_out_images(tmp_path):
    from quarterview import rng
    from quarterview.data.sources.open import open_source
    from quarterview.data.transforms.crop import normalize

    run = qv.pretrain(tiny(tmp_path, holdout=20))
    model = qv.load(tmp_path)
    ids = SampleStream(200, 20, 0).get_held_out_ids()
    images = torch.stack([open_source("shapes:200:size=16", 3).image(int(i)).pixels for i in ids]) / 255
    noise = rng.uniform(0, "mask", 0, ids, model.num_mask_uniforms)
    with torch.no_grad():
        out = model(normalize(images, model.config.mean, model.config.std), noise=noise)
    assert run.metrics["val_loss"] == pytest.approx(float(out.loss), rel=1e-5)


def test_evaluation_does_not_change_a_run(tmp_path):
    often = {"eval_every": 3, "log_every": 1, "checkpoint_every": 2}
    qv.pretrain(tiny(tmp_path / "a", holdout=8))
    qv.pretrain(tiny(tmp_path / "b", holdout=8, **often))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    (whole,) = [row for row in metrics(tmp_path / "a") if row["step"] == 12]
    single = [row for row in metrics(tmp_path / "b") if row["step"] > 8]
    for column in ("loss", "grad_norm"):
        assert whole[column] == pytest.approx(sum(row[column] for row in single) / 4, rel=1e-6)
    assert [row["lr"] for row in single] == [
        pytest.approx(
            1e-3 * 0.5 * (1 + np.cos(np.pi * (s - 1) / 11)) if s else 0
        )  # 12 × 5% = 1 step of warm-up
        for s in (8, 9, 10, 11)
    ]


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        (1, 160, 16, 10),
        (1, 161, 16, 11),
        (2.5, 100, 16, 16),
        (0.01, 100, 16, 1),
        (800, 1_281_167, 4096, 250_228),
    ],
)
def test_the_number_of_updates_of_epochs(epochs, images, batch, steps):
    assert LoopConfig(epochs=epochs, batch_size=batch).total_steps(images) == steps
    assert LoopConfig(epochs=epochs, batch_size=batch, steps=3).total_steps(images) == 3


def test_a_run_of_epochs_ends_after_its_last_image(tmp_path):
    run = qv.pretrain(tiny(tmp_path, steps=None, epochs=1.5))
    assert run.step == 19  # 1.5 × 200 / 16 = 18.75
    assert run.metrics["samples"] == 304


@pytest.mark.parametrize(("changes", "saved"), [({"checkpoint_minutes": 1e-9}, [1, 2, 3]), ({}, [3])])
def test_checkpoints_by_the_clock(tmp_path, changes, saved):
    qv.pretrain(tiny(tmp_path, steps=3, keep_checkpoints=9, **changes))
    assert checkpoint.list_steps(tmp_path / "checkpoints") == saved


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((LoopConfig, name, 0) for name in ("batch_size", "steps", "epochs", "accum_iter")),
        *((LoopConfig, "epochs", value) for value in (float("nan"), float("inf"))),
        *(
            (RunConfig, name, 0)
            for name in ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every")
        ),
        *((RunConfig, "eval_every", -1), (RunConfig, "checkpoint_minutes", -1.0)),
    ],
)
def test_numbers_out_of_range_are_refused(kind, field, value):
    with pytest.raises(UserError, match=f"^--{field.replace('_', '-')} {value} is out of range. Give a "):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("parallel", "ddpp", "auto, ddp, fsdp"), ("precision", "fp16", "bf16, fp32")],
)
def test_unknown_choices_are_refused(field, value, accepted):
    with pytest.raises(
        UserError, match=f"^Unknown value of --{field}: '{value}'.*Give one of: {accepted}\\.$"
    ):
        ComputeConfig(**{field: value})


# ---------------------------------------------------------------------- gradients


def test_accumulation_changes_nothing(tmp_path):
    """AdamW does not depend on the scale of the gradient, so norm and loss are compared, too."""
    for parts in (1, 2, 8):
        qv.pretrain(tiny(tmp_path / str(parts), accum_iter=parts, log_every=1))
    for parts in ("2", "8"):
        one, many = model_at(tmp_path / "1", 12), model_at(tmp_path / parts, 12)
        for name in one:
            if name.endswith("qkv.bias"):  # softmax ignores a bias of the keys: their gradient is rounding
                one[name], many[name] = (x.view(3, -1)[[0, 2]] for x in (one[name], many[name]))
            torch.testing.assert_close(many[name], one[name], rtol=0, atol=1e-6)
        for row, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / parts), strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_clipping(tmp_path, clip):
    """After one step the first moment is a tenth of AdamW's gradient."""
    run = qv.pretrain(tiny(tmp_path, steps=1, clip_grad=clip))
    norm = run.metrics["grad_norm"]
    assert norm > 1
    moments = model_at(tmp_path, 1, "optimizer")
    given = torch.cat([m.flatten() for name, m in moments.items() if name.startswith("exp_avg/")]).norm() * 10
    assert float(given) == pytest.approx(0.1 if clip == 0.1 else norm, rel=1e-4)


def test_the_moving_average_equals_its_closed_form(tmp_path):
    config = tiny(tmp_path, ema=0.8, steps=8, checkpoint_every=1, keep_checkpoints=100, lr=1e-2)
    qv.pretrain(config)
    start = create_mae(config.autoencoder(), seed=0)
    expected = {name: 0.8**8 * parameter.detach() for name, parameter in start.named_parameters()}
    for step in range(1, 9):
        weights = model_at(tmp_path, step)
        expected = {name: value + 0.2 * 0.8 ** (8 - step) * weights[name] for name, value in expected.items()}
    average = model_at(tmp_path, 8, "ema")
    assert average.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-6)
    weights = model_at(tmp_path, 8)
    assert any(not torch.allclose(average[name], weights[name], atol=1e-4) for name in average)


# ---------------------------------------------------------------------- steps that are not finite


def broken_images(path: Path, ids: list[int]) -> dict:
    """64 images, of which some make the loss overflow, and the flags to read them."""
    images = np.random.default_rng(0).random((64, 16, 16, 3), np.float32)
    images[ids] *= 1e30
    np.save(path, images)
    return {"data": (str(path),), "mean": (0.5,) * 3, "std": (0.3,) * 3}


@pytest.mark.parametrize("changes", [{}, {"accum_iter": 4}, {"clip_grad": 0.5}, {"precision": "bf16"}])
def test_a_step_that_is_not_finite_is_skipped_and_recorded(tmp_path, changes):
    data = broken_images(tmp_path / "x.npy", [11])
    run = qv.pretrain(
        tiny(tmp_path / "run", **data, log_every=5, checkpoint_every=1, keep_checkpoints=99, **changes)
    )
    assert run.status == "complete"
    _, ids = SampleStream(64, 0, 0).get_samples(torch.arange(12 * 16))
    batches = ids.view(12, 16).tolist()
    bad = [step for step, batch in enumerate(batches, 1) if 11 in batch]
    assert len(bad) == 3  # one an epoch
    assert skipped(tmp_path / "run") == [{"step": step, "ids": batches[step - 1]} for step in bad]
    for step in range(2, 13):
        for kind in ("model", "optimizer"):
            same = equal(model_at(tmp_path / "run", step - 1, kind), model_at(tmp_path / "run", step, kind))
            assert same == (step in bad)
    for row in metrics(tmp_path / "run"):
        assert row["skipped"] == sum(step <= row["step"] for step in bad)
        assert np.isfinite([row["loss"], row["grad_norm"]]).all()
    assert all(tensor.isfinite().all() for tensor in model_at(tmp_path / "run", 12).values())


def test_a_row_with_only_skipped_steps_has_no_loss(tmp_path):
    qv.pretrain(tiny(tmp_path / "run", **broken_images(tmp_path / "x.npy", [11]), log_every=1))
    rows = metrics(tmp_path / "run")
    assert sum(row["loss"] is None and row["grad_norm"] is None for row in rows) == 3
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text  # which is no JSON


@pytest.mark.parametrize("log_every", [1, 10])
def test_three_skipped_steps_in_a_row_stop_the_run(tmp_path, log_every):
    data = broken_images(tmp_path / "x.npy", list(range(64)))
    config = tiny(tmp_path / "run", **data, log_every=log_every)
    with pytest.raises(RunError, match=r"steps 1 to 3 .*--blr or --lr.*--clip-grad 1.*skipped_steps\.jsonl"):
        qv.pretrain(config)
    assert [row["step"] for row in skipped(tmp_path / "run")] == [1, 2, 3]
    assert checkpoint.find_newest(tmp_path / "run" / "checkpoints") is None
    with pytest.raises(RunError, match="steps 1 to 3"):  # and the folder is not blocked
        qv.pretrain(config)


# ---------------------------------------------------------------------- precision


def test_precision_falls_back_to_fp32_without_bf16(tmp_path, monkeypatch, capsys):
    cpu = torch.device("cpu")
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has)
        assert get_supported_precision("bf16", cpu) == ("bf16" if has else "fp32")
        assert get_supported_precision("fp32", cpu) == "fp32"
    qv.pretrain(tiny(tmp_path / "a", steps=2, precision="bf16"))
    assert "does not support --precision bf16. fp32 is used" in capsys.readouterr().out
    state = checkpoint.load(checkpoint.find_newest(tmp_path / "a" / "checkpoints")).state
    assert state["resolved"]["precision"] == "fp32"
    qv.pretrain(tiny(tmp_path / "b", steps=2, precision="fp32"))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    qv.pretrain(tiny(tmp_path / "c", steps=2, precision="bf16"))
    assert digest(tmp_path / "c") != digest(tmp_path / "a")
    assert all(tensor.dtype == torch.float32 for tensor in model_at(tmp_path / "c", 2).values())


# ---------------------------------------------------------------------- the log


def test_the_meter_counts_images_waiting_and_no_pauses():
    now = 100.0
    meter = ThroughputMeter(lambda: now)
    meter.num_images, meter.wait_seconds, meter.pause_seconds = 600, 1.0, 2.0
    now = 106.0
    assert meter.read_and_reset() == (150.0, 0.25)  # 600 images in 6 - 2 seconds, one of them waiting
    now = 108.0
    meter.num_images += 10
    assert meter.read_and_reset() == (5.0, 0.0)  # afresh
    assert meter.read_and_reset() == (0.0, 0.0)  # no time has passed


def test_the_loop_updates_the_meter(tmp_path, monkeypatch):
    """A clock that advances only in mocked functions measures each part of a run."""
    from quarterview.data.loader import Loader
    from quarterview.training import trainer as loop

    now = 0.0

    def costs(seconds, function):
        def slow(*arguments, **options):
            nonlocal now
            now += seconds
            return function(*arguments, **options)

        return slow

    monkeypatch.setattr(loop, "ThroughputMeter", lambda: ThroughputMeter(lambda: now))
    monkeypatch.setattr(Loader, "_load_cached_batch", costs(1.0, Loader._load_cached_batch))
    monkeypatch.setattr(loop.Trainer, "_run_update", costs(3.0, loop.Trainer._run_update))
    monkeypatch.setattr(loop.checkpoint, "save", costs(50.0, loop.checkpoint.save))
    monkeypatch.setattr("quarterview.evaluation.online.draw_panel", costs(70.0, lambda *args: None))
    qv.pretrain(tiny(tmp_path, holdout=8, eval_every=4, checkpoint_every=2))
    for row in metrics(tmp_path):
        assert row["images_per_s"] == 4.0  # 16 images in 4 seconds, panels and checkpoints aside
        assert row["data_wait"] == 0.25


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (45.4, "45 s"), (89, "89 s"), (90, "2 min"), (720, "12 min"), (3_599, "1 h 00 min")),
        *((11_100, "3 h 05 min"), (172_799, "2 d 0 h"), (187_200, "2 d 4 h"), (8_640_000, "100 d 0 h")),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def tensorboard_rows(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_once(tmp_path):
    qv.pretrain(tiny(tmp_path, holdout=8, log_every=1, eval_every=6))
    rows, curves = metrics(tmp_path), tensorboard_rows(tmp_path)
    assert set(curves) == set(COLUMNS) - {"step"}
    for column, curve in curves.items():
        expected = [(row["step"], row[column]) for row in rows if row[column] is not None]
        assert [step for step, _ in curve] == [step for step, _ in expected]
        np.testing.assert_allclose([v for _, v in curve], [v for _, v in expected], rtol=1e-6)


def test_a_logger_opened_at_a_step_removes_later_rows(tmp_path):
    rows = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "lo')
    (tmp_path / "skipped_steps.jsonl").write_text('{"step": 2, "ids": [1]}\n{"step": 3, "ids": [2]}\n{"st')
    journal = RunLogger(tmp_path)
    journal.open(2)
    journal.close()
    assert metrics(tmp_path) == rows[:2]
    assert (tmp_path / "skipped_steps.jsonl").read_text() == '{"step": 2, "ids": [1]}\n'
    assert tensorboard_rows(tmp_path)["loss"] == [(1, 1.0), (2, 2.0)]


def test_a_quiet_logger_writes_and_prints_nothing(tmp_path, capsys):
    journal = RunLogger(tmp_path, quiet=True)
    journal.open(0)
    journal.start_progress(10, 0)
    journal.info("hello")
    journal.log_skipped_step(1, [1])
    journal.log_metrics(dict.fromkeys(COLUMNS, 1.0))
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------- signals


def test_signals_are_collected_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with collect_stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == ["SIGTERM", "SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


HANDLED = (signal.SIGTERM, signal.SIGINT)


def test_a_signal_in_a_nested_context_is_seen_by_the_outer_one():
    before = [signal.getsignal(number) for number in HANDLED]
    with collect_stop_signals() as outer:
        around = [signal.getsignal(number) for number in HANDLED]
        with collect_stop_signals() as inner:
            with collect_stop_signals():
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner == ["SIGINT", "SIGTERM"]
        assert [signal.getsignal(number) for number in HANDLED] == around
        assert outer == ["SIGINT", "SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer == ["SIGINT", "SIGTERM", "SIGTERM"]
        with collect_stop_signals() as later:  # asked before it began
            assert later == outer
    assert [signal.getsignal(number) for number in HANDLED] == before
    with collect_stop_signals() as anew:
        assert anew == []


def test_a_second_interrupt_in_a_nested_context_restores_all_handlers():
    before = [signal.getsignal(number) for number in HANDLED]

    def interrupt_twice() -> None:
        with collect_stop_signals() as outer, collect_stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert outer == ["SIGINT"]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_signal_in_the_last_step_of_a_run_is_seen_by_the_outer_context(tmp_path, monkeypatch):
    row = RunLogger.log_metrics

    def asked_meanwhile(self, columns):
        if columns["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        row(self, columns)

    monkeypatch.setattr(RunLogger, "log_metrics", asked_meanwhile)
    with collect_stop_signals() as asked:
        assert qv.pretrain(tiny(tmp_path, steps=4)).status == "complete"
        assert asked == ["SIGTERM"]
