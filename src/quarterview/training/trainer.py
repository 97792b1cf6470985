"""The training loop, for any method.

Nothing in a step synchronizes with the host: the optimizer skips a step with a gradient that is not finite on
the device, and loss, norm and flags are read only when a row of metrics is written.
"""

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from quarterview.data.loader import Batch, Loader
from quarterview.errors import RunError
from quarterview.methods.base import Method
from quarterview.training import checkpoint
from quarterview.training.config import LoopConfig, OptimConfig, Precision, RunConfig
from quarterview.training.distributed import RankVote, World
from quarterview.training.logging import RunLogger, ThroughputMeter
from quarterview.training.optim import Schedule, get_optimizer_tensors, load_optimizer_tensors
from quarterview.training.sharding import (
    copy_full_weights,
    gather_full,
    is_sharded,
    load_full_tensors,
    shard_like,
)
from quarterview.training.step import TrainStep
from quarterview.training.writer import CheckpointWriter

MAX_SKIPS_IN_A_ROW = 3
"""This many skipped steps in a row stop a run."""

Evaluator = Callable[[int], dict[str, float]]
"""A function of the step, called at every evaluation, that returns metrics by name and may draw a panel."""


class TrainerConfig(Protocol):
    """The parts of a composed configuration that `Trainer` reads."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


class RunContext(Protocol):
    """The run folder, ranks and log of a `Trainer`; an `OpenRun` is one."""

    @property
    def folder(self) -> Path: ...
    @property
    def world(self) -> World: ...
    @property
    def log(self) -> RunLogger: ...


class Trainer:
    """The training loop.

    Args:
        config: intervals (``run``), length (``loop``), gradient clipping and EMA (``optim``).
        context: the run's folder, ranks and log.
        method: the method to train. If it is not sharded, it is wrapped in DDP when there are several ranks.
        optimizer: over the method's parameters, with `names` in its groups.
        schedule: the learning rate of every update.
        loader: the batches.
        precision: precision of the forward pass.
        evaluators: called by the main rank at every evaluation, and at the end.
        eval_module: the module that evaluators use: the method, or the main rank's full copy of a sharded
            one.
        state: further contents of every checkpoint's ``state.json``.
        metadata: header of ``model.safetensors``.

    Attributes:
        sync_hook: called by every rank before a row of metrics is written, for further communication.
    """

    def __init__(
        self,
        config: TrainerConfig,
        context: RunContext,
        method: Method,
        optimizer: torch.optim.AdamW,
        schedule: Schedule,
        loader: Loader,
        precision: Precision,
        evaluators: Sequence[Evaluator] = (),
        eval_module: nn.Module | None = None,
        state: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        assert isinstance(method, nn.Module)
        self.method, self.module = method, method.train()
        self.optimizer, self.schedule, self.loader = optimizer, schedule, loader
        self.config, self.batch_size = config, config.loop.batch_size
        self.world, self.log, self.folder = context.world, context.log, context.folder
        self.evaluators, self.eval_module = evaluators, eval_module
        self.sync_hook: Callable[[], None] = lambda: None
        self.extra_state = state or {}
        self.eval_ema: dict[str, Tensor] = {}  # unsharded, on the main rank, while evaluators run
        averaged = method.model.named_parameters() if config.optim.ema else ()
        self.ema = {name: parameter.detach().clone() for name, parameter in averaged}
        keep = (config.run.keep_checkpoints, config.run.keep_every)
        self.writer = CheckpointWriter(self.folder / "checkpoints", *keep, metadata or {})
        self.precision, self.autocast = precision, get_autocast_context(precision, self.world.device)
        self.train_step = TrainStep(
            method, optimizer, self.world, self.autocast, config.loop.accum_iter, config.optim.clip_grad
        )

        self.step = 0  # number of updates, including skipped ones
        self.skips, self.skips_in_a_row = 0, 0
        self._sums: dict[str, Tensor] = {}  # sums of the metrics and number of good steps, since the last row
        self._pending: list[tuple[int, Tensor]] = []  # step and flag of a skipped step, on the device
        self._saved_at, self._saved_time = -1, time.monotonic()

    # ------------------------------------------------------------------ the run

    def run(self) -> Literal["complete", "SIGTERM", "SIGINT"]:
        """Train from the current step to the last, or until a stop signal.

        Returns:
            How training ended.

        Raises:
            RunError: if the gradients of `MAX_SKIPS_IN_A_ROW` steps in a row are not finite.
        """
        total = self.schedule.total_steps
        eval_interval = self.config.run.eval_interval(total)
        parts = (self.world.shard_positions(self._batch_positions(step)) for step in range(self.step, total))
        self.log.start_progress(total, self.step)
        meter, vote = ThroughputMeter(), RankVote(self.world)
        with collect_stop_signals() as received:
            for data in time_batches(self.loader.iter_batches(parts), meter):
                self._run_update(data)
                meter.num_images += self.batch_size
                self.log.advance(self.step)
                last, evaluate = self.step == total, self.step % eval_interval == 0
                if last or evaluate or self.step % self.config.run.log_every == 0:
                    self._write_row(meter, evaluate or last)
                flags = (bool(received), self._is_checkpoint_overdue(), self.writer.has_failed)
                stop, overdue, failed = vote(*flags)
                if self.world.size > 1:  # the vote is of the previous step, which may be before the last save
                    overdue = overdue and self.step > self._saved_at + 1
                if failed:
                    self._finish_writing()
                if last or stop or overdue or self._is_checkpoint_step():
                    began = meter.clock()
                    self.save(wait=last or stop)
                    meter.pause_seconds += meter.clock() - began
                if stop and not last:
                    vote.finish()
                    return received[0] if received else "SIGTERM"
        vote.finish()
        return "complete"

    def _batch_positions(self, step: int) -> range:
        """Return the sample stream's positions of the batch of update `step`, counted from 0."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def _run_update(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.step) * group.get("lr_scale", 1.0)
        loss, metrics = self.train_step.accumulate_gradients(batch, self.batch_size)
        norm, bad = self.train_step.update_weights(loss)
        if self.config.optim.ema is not None:
            average = get_ema_multi_avg_fn(self.config.optim.ema)
            average(list(self.ema.values()), list(self.method.model.parameters()), 0)
        self.step += 1
        for name, value in {
            "loss": loss,
            "grad_norm": norm,
            **metrics,
            "good": torch.ones_like(loss),
        }.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(bad, 0.0, value)
        self._pending.append((self.step, bad))

    # ------------------------------------------------------------------ reading and writing

    def _read_flags(self) -> None:
        """Read from the device which steps were skipped, and record them. Too many in a row stop the run."""
        if not self._pending:
            return
        flags = torch.stack([bad for _, bad in self._pending]).tolist()
        pending, self._pending = self._pending, []
        for (step, _), bad in zip(pending, flags, strict=True):
            self.skips_in_a_row = self.skips_in_a_row + 1 if bad else 0
            self.skips += bad
            if bad:
                positions = self._batch_positions(step - 1)  # of all ranks
                _, ids = self.loader.stream.get_samples(torch.arange(positions.start, positions.stop))
                self.log.log_skipped_step(step, ids.tolist())
            if self.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
                raise RunError(
                    f"The gradients of steps {step - MAX_SKIPS_IN_A_ROW + 1} to {step} are not finite, so "
                    "the run stops; the weights are those before these steps. Likely causes, most likely "
                    "first: the learning rate is too high (--blr or --lr), gradients are not clipped "
                    "(--clip-grad 1), pixels are far out of range (skipped_steps.jsonl names the samples), "
                    "bf16 (--precision fp32)."
                )

    def _write_row(self, meter: ThroughputMeter, evaluate: bool) -> None:
        self._read_flags()
        self.sync_hook()
        sums = {name: float(value) for name, value in self._sums.items()}
        good = sums.pop("good", 0.0)
        means = {name: value / good if good else math.nan for name, value in sums.items()}
        self._sums = {}
        rate, waiting = meter.read_and_reset()
        columns = self._evaluate(meter) if evaluate else {}
        samples = self.step * self.batch_size
        self.log.log_metrics(
            {
                "step": self.step,
                "samples": samples,
                "epoch": samples / self.loader.stream.num_train,
                "loss": means.pop("loss", math.nan),
                "val_loss": None,
                "lr": self.schedule.lr(self.step - 1),
                "grad_norm": means.pop("grad_norm", math.nan),
                "images_per_s": rate,
                "data_wait": waiting,
                "skipped": self.skips,
                **means,
                **columns,
            }
        )

    def _evaluate(self, meter: ThroughputMeter) -> dict[str, float]:
        began = meter.clock()
        columns: dict[str, float] = {}
        self._finish_writing()  # evaluators may fork, which is unsafe while a thread writes
        self.module.eval()
        if is_sharded(self.module):
            copy_full_weights(self.module, self.eval_module if self.world.is_main else None)
        for name, value in self.ema.items():
            full = gather_full(value)
            if self.world.is_main:
                self.eval_ema[name] = full
        with torch.no_grad(), self.autocast():
            for evaluator in self.evaluators if self.world.is_main else ():
                columns |= evaluator(self.step)
        self.eval_ema = {}
        self.world.barrier()
        self.module.train()
        meter.pause_seconds += meter.clock() - began
        return columns

    def _is_checkpoint_step(self) -> bool:
        """Return whether --checkpoint-every or --keep-every asks for a checkpoint of this step."""
        every = (self.config.run.checkpoint_every, self.config.run.keep_every)
        return any(number is not None and self.step % number == 0 for number in every)

    def _is_checkpoint_overdue(self) -> bool:
        """Return whether more than --checkpoint-minutes have passed since the last checkpoint."""
        if self.config.run.checkpoint_every is not None:
            return False
        return time.monotonic() - self._saved_time > 60 * self.config.run.checkpoint_minutes

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the current step, unless it is written already.

        Args:
            wait: wait until the checkpoint is on the disk; otherwise only until the tensors are copied.

        Raises:
            RunError: if this or the previous checkpoint could not be written.
        """
        if self._saved_at != self.step:
            self._read_flags()
            tensors = self._tensors()
            self.world.run_on_main(lambda: self.writer.save(self.step, tensors, self._state()) or "")
            self._saved_at, self._saved_time = self.step, time.monotonic()
        if wait:
            self._finish_writing()

    def _finish_writing(self) -> None:
        """Wait until the main rank has written the checkpoint; all ranks stop if it fails."""
        self.world.run_on_main(lambda: self.writer.finish() or "")

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the unsharded tensors of a checkpoint on the main rank; all ranks must call this.

        Gathered tensors are moved to the host, because a GPU with one shard may not have memory for all.
        """
        others = {k: v for k, v in self.module.state_dict().items() if not k.startswith("model.")}
        tensors = {
            "model": self.method.model.state_dict(),
            "objective": others,  # the name of the file since version 0.1
            "optimizer": get_optimizer_tensors(self.optimizer),
            "ema": self.ema,
        }
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, named in tensors.items():
            for key, value in named.items():
                full = gather_full(value)
                if self.world.is_main:
                    gathered.setdefault(name, {})[key] = full if full is value else full.cpu()
        return gathered

    def _state(self) -> dict[str, Any]:
        return {
            **self.extra_state,
            "step": self.step,
            "samples": self.step * self.batch_size,
            "skips": self.skips,
            "skips_in_a_row": self.skips_in_a_row,
            "sums": {name: float(value) for name, value in self._sums.items()},
        }

    def restore(self, loaded: checkpoint.Checkpoint) -> None:
        """Load the state of a checkpoint."""
        load_full_tensors(self.method.model, loaded.tensors["model"])
        load_full_tensors(self.module, loaded.tensors.get("objective", {}), strict=False)
        load_optimizer_tensors(self.optimizer, loaded.tensors.get("optimizer", {}))
        for name, tensor in self.ema.items():
            tensor.copy_(shard_like(loaded.tensors["ema"][name], tensor))
        state = loaded.state
        self.step, self.skips, self.skips_in_a_row = state["step"], state["skips"], state["skips_in_a_row"]
        self._sums = {name: torch.tensor(s, device=self.world.device) for name, s in state["sums"].items()}
        self._saved_at = self.step if loaded.path.parent == self.folder / "checkpoints" else -1


def get_autocast_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that makes the context manager of the forward pass."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def get_supported_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the requested precision, or fp32 if the device has no bf16 arithmetic."""
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "fp32"
    if precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        return "fp32"
    return precision


def _cpu_has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def time_batches(batches: Iterator[Batch], meter: ThroughputMeter) -> Iterator[Batch]:
    """Yield the batches, and add the time spent waiting for each to the meter."""
    while True:
        began = meter.clock()
        batch = next(batches, None)
        meter.wait_seconds += meter.clock() - began
        if batch is None:
            return
        yield batch


class _ReceivedSignals(list[Literal["SIGTERM", "SIGINT"]]):
    """The received signals, in order, and the handler that appends them."""

    def note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and "SIGINT" in self:
            raise KeyboardInterrupt
        self.append("SIGINT" if number == signal.SIGINT else "SIGTERM")


@contextmanager
def collect_stop_signals() -> Iterator[list[Literal["SIGTERM", "SIGINT"]]]:
    """Collect SIGTERM and Ctrl-C in a list instead of ending the process; a second Ctrl-C interrupts as
    usual.

    A child process that ignores Ctrl-C, because its parent passes the signal on, goes on ignoring it. Nested
    contexts share one list, so that the outer one also sees signals that arrive in the inner one, for example
    in the last step of one run of a study.
    """
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    received = outer if isinstance(outer, _ReceivedSignals) else _ReceivedSignals()
    try:
        handled = [signal.SIGTERM]
        if multiprocessing.parent_process() is None or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            handled.append(signal.SIGINT)
        before = {number: signal.signal(number, received.note) for number in handled}
    except ValueError:  # only the main thread may set handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
