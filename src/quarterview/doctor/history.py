"""Summary of the training history of a run, from ``metrics.jsonl``."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MIN_SPIKE_RATIO = 1.5
"""A loss is a spike if it is more than this many times the median of the preceding rows."""
_SPIKE_WINDOW = 5  # preceding rows


class TrainingHistory(NamedTuple):
    """Summary of the training history of a run."""

    num_rows: int
    """Number of rows of ``metrics.jsonl``."""
    step: int
    """Step of the last row."""
    epoch: float
    """Epoch of the last row."""
    loss: float | None
    """Mean training loss of the last 10% of the rows, at least 3; None without rows after the warm-up."""
    min_loss: float | None
    """Minimum of that mean over all windows of as many rows after the warm-up."""
    recent_decrease: float
    """Relative decrease of the training loss over the last third of the run."""
    spikes: tuple[tuple[int, float], ...]
    """Steps of loss spikes after the warm-up, and how many times the loss rose, see `find_spikes`."""
    num_skipped: int
    """Number of updates that were skipped because their gradient was not finite."""
    grad_norm_growth: float | None
    """Ratio of the median gradient norm in the last third to that in the first third after the warm-up."""
    data_wait: float | None
    """Median fraction of the time spent waiting for data."""
    first_val_loss: float | None
    min_val_loss: float | None
    min_val_loss_step: int
    """Step of the minimum validation loss; 0 if there was no validation."""
    last_val_loss: float | None


def summarize_history(rows: Sequence[Mapping[str, Any]], warmup_steps: int) -> TrainingHistory:
    """Summarize the metrics of a run.

    Args:
        rows: rows of ``metrics.jsonl``, in order.
        warmup_steps: number of warm-up steps, whose training losses are ignored.
    """
    after_warmup = [row for row in rows if row["step"] > warmup_steps and row.get("loss") is not None]
    losses = [row["loss"] for row in after_warmup]
    window = max(3, len(losses) // 10)
    means = [statistics.fmean(losses[i : i + window]) for i in range(max(0, len(losses) - window + 1))]
    norms = [row["grad_norm"] for row in after_warmup if row.get("grad_norm") is not None]
    third = len(norms) // 3
    val_losses = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    min_step, min_val_loss = min(val_losses, key=lambda pair: pair[1], default=(0, None))
    waits = [row["data_wait"] for row in rows[1:] if row.get("data_wait") is not None]
    return TrainingHistory(
        num_rows=len(rows),
        step=rows[-1]["step"] if rows else 0,
        epoch=rows[-1]["epoch"] if rows else 0.0,
        loss=means[-1] if means else None,
        min_loss=min(means) if means else None,
        recent_decrease=compute_relative_decrease(losses[-(len(losses) // 3) :]) if len(losses) >= 6 else 0.0,
        spikes=tuple(find_spikes([(row["step"], row["loss"]) for row in after_warmup])),
        num_skipped=max((row.get("skipped") or 0 for row in rows), default=0),
        grad_norm_growth=statistics.median(norms[-third:]) / max(1e-12, statistics.median(norms[:third]))
        if third >= 2
        else None,
        data_wait=statistics.median(waits) if waits else None,
        first_val_loss=val_losses[0][1] if val_losses else None,
        min_val_loss=min_val_loss,
        min_val_loss_step=min_step,
        last_val_loss=val_losses[-1][1] if val_losses else None,
    )


def find_spikes(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Find the steps whose loss is more than `MIN_SPIKE_RATIO` times the median of the five rows before.

    Args:
        losses: pairs of step and loss.

    Returns:
        Pairs of step and ratio to the median.
    """
    spikes = []
    for i in range(3, len(losses)):
        before = statistics.median(loss for _, loss in losses[max(0, i - _SPIKE_WINDOW) : i])
        step, loss = losses[i]
        if before > 0 and loss > MIN_SPIKE_RATIO * before:
            spikes.append((step, loss / before))
    return spikes


def compute_relative_decrease(losses: Sequence[float]) -> float:
    """Compute the relative decrease from the mean of the first half of the losses to that of the second."""
    half = len(losses) // 2
    first, second = statistics.fmean(losses[:half]), statistics.fmean(losses[-half:])
    return 1 - second / first if first > 0 else 0.0
