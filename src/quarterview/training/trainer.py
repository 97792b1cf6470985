"""The training loop. It trains any method, and knows nothing of what it trains.

Nothing inside a step is decided on the host: a step whose gradient is not finite is dropped by the
optimiser on the device, and loss, norm and flags are read only where a row of metrics is written.
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
from quarterview.training.distributed import Vote, World
from quarterview.training.logging import Meter, RunLogger
from quarterview.training.optim import Schedule, load_optimizer_tensors, optimizer_tensors
from quarterview.training.sharding import copy_whole, cut_like, is_sharded, put_into, whole
from quarterview.training.step import Step
from quarterview.training.writer import Writer

MAX_SKIPS = 3
"""So many bad steps in a row stop a run."""


Evaluator = Callable[[int], dict[str, float]]
"""Called with the step at every evaluation; returns columns for the metrics, and may draw a panel."""


class TrainedConfig(Protocol):
    """The parts of a composed configuration that the trainer reads."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def optim(self) -> OptimConfig: ...


class Place(Protocol):
    """Where a trainer writes and with whom it trains: an `OpenRun`."""

    @property
    def folder(self) -> Path: ...
    @property
    def world(self) -> World: ...
    @property
    def log(self) -> RunLogger: ...


class Trainer:
    """The training loop.

    Args:
        config: how often what is done (``run``), how long (``loop``), clipping and averaging (``optim``).
        place: the run's folder, ranks and log.
        method: what is trained; sharded already, or else wrapped for several ranks here.
        optimizer: over the method's parameters, with `names` in its groups.
        schedule: the learning rate of every update.
        loader: the batches.
        precision: of the forward pass.
        evaluators: called by the main rank at every evaluation, and at the end.
        watched: through which evaluators look: the method, or the main rank's whole copy of a sharded one.
        state: what else every checkpoint's ``state.json`` is to hold.
        metadata: for the header of ``model.safetensors``.

    Attributes:
        exchange: called by every rank where rows of metrics are written: what else the ranks exchange.
    """

    def __init__(
        self,
        config: TrainedConfig,
        place: Place,
        method: Method,
        optimizer: torch.optim.AdamW,
        schedule: Schedule,
        loader: Loader,
        precision: Precision,
        evaluators: Sequence[Evaluator] = (),
        watched: nn.Module | None = None,
        state: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        assert isinstance(method, nn.Module)
        self.method, self.module = method, method.train()
        self.optimizer, self.schedule, self.loader = optimizer, schedule, loader
        self.config, self.batch_size = config, config.loop.batch_size
        self.world, self.log, self.folder = place.world, place.log, place.folder
        self.evaluators, self.watched = evaluators, watched
        self.exchange: Callable[[], None] = lambda: None
        self.extra_state = state or {}
        self.watched_ema: dict[str, Tensor] = {}  # the whole of it, while evaluators run
        averaged = method.model.named_parameters() if config.optim.ema else ()
        self.ema = {name: parameter.detach().clone() for name, parameter in averaged}
        keep = (config.run.keep_checkpoints, config.run.keep_every)
        self.writer = Writer(self.folder / "checkpoints", *keep, metadata or {})
        self.precision, self.autocast = precision, precision_context(precision, self.world.device)
        self.update = Step(
            method, optimizer, self.world, self.autocast, config.loop.accum_iter, config.optim.clip_grad
        )

        self.step = 0  # updates done, skipped ones included
        self.skips, self.skips_in_a_row = 0, 0
        self._sums: dict[str, Tensor] = {}  # of loss, norm, other metrics and good steps since the last row
        self._pending: list[tuple[int, Tensor]] = []  # step, bad flag: not yet read
        self._saved_at, self._saved_time = -1, time.monotonic()

    # ------------------------------------------------------------------ the run

    def run(self) -> Literal["complete", "SIGTERM", "SIGINT"]:
        """Train from where the state is to the last step, or until asked to stop.

        Raises:
            RunError: if three steps in a row give gradients that are not finite.
        """
        total = self.schedule.total_steps
        eval_every = self.config.run.evaluation_every(total)
        parts = (self.world.share(self._positions(step)) for step in range(self.step, total))
        self.log.start_progress(total, self.step)
        meter, vote = Meter(), Vote(self.world)
        with stop_signals() as asked:
            for data in timed(self.loader.batches(parts), meter):
                self._update(data)
                meter.images += self.batch_size
                self.log.advance(self.step)
                last, evaluate = self.step == total, self.step % eval_every == 0
                if last or evaluate or self.step % self.config.run.log_every == 0:
                    self._write_row(meter, evaluate or last)
                stop, late, failed = vote(bool(asked), self._is_late(), self.writer.has_failed)
                if self.world.size > 1:  # the answer is to a question of before the last save
                    late = late and self.step > self._saved_at + 1
                if failed:
                    self._finish_writing()
                if last or stop or late or self._checkpoint_is_due():
                    began = meter.clock()
                    self.save(wait=last or stop)
                    meter.paused += meter.clock() - began
                if stop and not last:
                    vote.finish()
                    return asked[0] if asked else "SIGTERM"
        vote.finish()
        return "complete"

    def _positions(self, step: int) -> range:
        """Of the batch after so many updates, in the stream."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def _update(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.step) * group.get("lr_scale", 1.0)
        loss, metrics = self.update.gradients(batch, self.batch_size)
        norm, bad = self.update.apply(loss)
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
        """Bring the flags of the steps since the last reading to the host, and act on them."""
        if not self._pending:
            return
        flags = torch.stack([bad for _, bad in self._pending]).tolist()
        pending, self._pending = self._pending, []
        for (step, _), bad in zip(pending, flags, strict=True):
            self.skips_in_a_row = self.skips_in_a_row + 1 if bad else 0
            self.skips += bad
            if bad:
                positions = self._positions(step - 1)  # of every rank
                _, ids = self.loader.stream.at(torch.arange(positions.start, positions.stop))
                self.log.skipped(step, ids.tolist())
            if self.skips_in_a_row >= MAX_SKIPS:
                raise RunError(
                    f"steps {step - MAX_SKIPS + 1} to {step} all gave gradients that are not finite, so the "
                    "run stops; the weights are those before them. Likely causes, in this order: a learning "
                    "rate too high (--blr or --lr), no clipping (--clip-grad 1), pixels far out of range "
                    "(skipped_steps.jsonl names the samples), or bf16 (--precision fp32)."
                )

    def _write_row(self, meter: Meter, evaluate: bool) -> None:
        self._read_flags()
        self.exchange()
        sums = {name: float(value) for name, value in self._sums.items()}
        good = sums.pop("good", 0.0)
        means = {name: value / good if good else math.nan for name, value in sums.items()}
        self._sums = {}
        rate, waiting = meter.read()
        columns = self._evaluate(meter) if evaluate else {}
        samples = self.step * self.batch_size
        self.log.row(
            {
                "step": self.step,
                "samples": samples,
                "epoch": samples / self.loader.stream.trained,
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

    def _evaluate(self, meter: Meter) -> dict[str, float]:
        began = meter.clock()
        columns: dict[str, float] = {}
        self._finish_writing()  # evaluators may fork, which a process with threads had better not
        self.module.eval()  # looking at a run must not change it
        if is_sharded(self.module):
            copy_whole(self.module, self.watched if self.world.is_main else None)
        for name, value in self.ema.items():
            entire = whole(value)
            if self.world.is_main:
                self.watched_ema[name] = entire
        with torch.no_grad(), self.autocast():
            for evaluator in self.evaluators if self.world.is_main else ():
                columns |= evaluator(self.step)
        self.watched_ema = {}
        self.world.wait()
        self.module.train()
        meter.paused += meter.clock() - began
        return columns

    def _checkpoint_is_due(self) -> bool:
        every = (self.config.run.checkpoint_every, self.config.run.keep_every)
        return any(number is not None and self.step % number == 0 for number in every)

    def _is_late(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        if self.config.run.checkpoint_every is not None:
            return False
        return time.monotonic() - self._saved_time > 60 * self.config.run.checkpoint_minutes

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of the present step, unless that is done.

        Args:
            wait: until it is on the disk, and not only until it is copied.

        Raises:
            RunError: if it could not be written, or the one before.
        """
        if self._saved_at != self.step:
            self._read_flags()
            tensors = self._tensors()
            self.world.from_main(lambda: self.writer.save(self.step, tensors, self._state()) or "")
            self._saved_at, self._saved_time = self.step, time.monotonic()
        if wait:
            self._finish_writing()

    def _finish_writing(self) -> None:
        """Wait for the main rank's disk; all ranks stop if it fails."""
        self.world.from_main(lambda: self.writer.finish() or "")

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything to keep, whole, on the main rank; nothing on the others, which call it all the same.

        What was gathered is on the host: a GPU that holds a part may have no room for the whole.
        """
        others = {k: v for k, v in self.module.state_dict().items() if not k.startswith("model.")}
        tensors = {
            "model": self.method.model.state_dict(),
            "objective": others,  # the name of the file since version 0.1
            "optimizer": optimizer_tensors(self.optimizer),
            "ema": self.ema,
        }
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, named in tensors.items():
            for key, value in named.items():
                entire = whole(value)
                if self.world.is_main:
                    gathered.setdefault(name, {})[key] = entire if entire is value else entire.cpu()
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
        """Continue where a checkpoint was taken."""
        put_into(self.method.model, loaded.tensors["model"])
        put_into(self.module, loaded.tensors.get("objective", {}), strict=False)
        load_optimizer_tensors(self.optimizer, loaded.tensors.get("optimizer", {}))
        for name, tensor in self.ema.items():
            tensor.copy_(cut_like(loaded.tensors["ema"][name], tensor))
        state = loaded.state
        self.step, self.skips, self.skips_in_a_row = state["step"], state["skips"], state["skips_in_a_row"]
        self._sums = {name: torch.tensor(s, device=self.world.device) for name, s in state["sums"].items()}
        self._saved_at = self.step if loaded.path.parent == self.folder / "checkpoints" else -1


def precision_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What to run the forward pass in."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def usable_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision asked for, or fp32 where the device has no bf16 arithmetic."""
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


def timed(batches: Iterator[Batch], meter: Meter) -> Iterator[Batch]:
    """The same batches, with the time spent waiting for each on the meter."""
    while True:
        began = meter.clock()
        batch = next(batches, None)
        meter.waited += meter.clock() - began
        if batch is None:
            return
        yield batch


class _Asked(list[Literal["SIGTERM", "SIGINT"]]):
    """The signals that came, in their order, and what notes them."""

    def note(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and "SIGINT" in self:
            raise KeyboardInterrupt
        self.append("SIGINT" if number == signal.SIGINT else "SIGTERM")


@contextmanager
def stop_signals() -> Iterator[list[Literal["SIGTERM", "SIGINT"]]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C interrupts as usual. Where a
    process ignores Ctrl-C because its parent passes it on, it goes on to.

    One within another has the same list, so what comes while the inner is open, in the last step of
    a run of a study, say, is there for the outer to see.
    """
    around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    asked = around if isinstance(around, _Asked) else _Asked()
    try:
        heard = [signal.SIGTERM]
        if multiprocessing.parent_process() is None or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            heard.append(signal.SIGINT)
        before = {n: signal.signal(n, asked.note) for n in heard}
    except ValueError:  # not the main thread, which alone may set handlers
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
