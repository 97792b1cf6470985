"""What the rows of ``metrics.jsonl`` say about how a run went."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SPIKE = 1.5
"""A row's loss is a spike if it is so many times the median of the rows just before."""
_BEFORE = 5


class History(NamedTuple):
    """The course of a run."""

    rows: int
    step: int
    """Of the last row."""
    epoch: float
    loss: float | None
    """Mean of the last tenth of the rows, three at least; None if there are no rows after the warm-up."""
    lowest: float | None
    """The lowest such mean at any time after the warm-up."""
    falling: float
    """By what share the loss fell over the last third of the run."""
    spikes: tuple[tuple[int, float], ...]
    """Steps after the warm-up whose loss was `SPIKE` times what came before, or more; and how many times."""
    skipped: int
    """Updates whose gradient was not finite."""
    gradient_growth: float | None
    """Median gradient norm of the last third over that of the first third after the warm-up."""
    waiting: float | None
    """Median share of the time spent waiting for data."""
    val_first: float | None
    val_lowest: float | None
    val_lowest_step: int
    val_last: float | None


def read_history(rows: Sequence[Mapping[str, Any]], warmup: int) -> History:
    """Sum up a run's rows.

    Args:
        rows: of ``metrics.jsonl``, in order.
        warmup: updates of warm-up, whose rows are left out where the loss is judged.
    """
    trained = [row for row in rows if row["step"] > warmup and row.get("loss") is not None]
    losses = [row["loss"] for row in trained]
    window = max(3, len(losses) // 10)
    means = [statistics.fmean(losses[i : i + window]) for i in range(max(0, len(losses) - window + 1))]
    norms = [row["grad_norm"] for row in trained if row.get("grad_norm") is not None]
    third = len(norms) // 3
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    lowest = min(held_out, key=lambda pair: pair[1], default=(0, None))
    waits = [row["data_wait"] for row in rows[1:] if row.get("data_wait") is not None]
    return History(
        rows=len(rows),
        step=rows[-1]["step"] if rows else 0,
        epoch=rows[-1]["epoch"] if rows else 0.0,
        loss=means[-1] if means else None,
        lowest=min(means) if means else None,
        falling=fall(losses[-(len(losses) // 3) :]) if len(losses) >= 6 else 0.0,
        spikes=tuple(find_spikes([(row["step"], row["loss"]) for row in trained])),
        skipped=max((row.get("skipped") or 0 for row in rows), default=0),
        gradient_growth=statistics.median(norms[-third:]) / max(1e-12, statistics.median(norms[:third]))
        if third >= 2
        else None,
        waiting=statistics.median(waits) if waits else None,
        val_first=held_out[0][1] if held_out else None,
        val_lowest=lowest[1],
        val_lowest_step=lowest[0],
        val_last=held_out[-1][1] if held_out else None,
    )


def find_spikes(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Steps and how many times the median of the five rows before them their loss is."""
    found = []
    for i in range(3, len(losses)):
        before = statistics.median(loss for _, loss in losses[max(0, i - _BEFORE) : i])
        step, loss = losses[i]
        if before > 0 and loss > SPIKE * before:
            found.append((step, loss / before))
    return found


def fall(losses: Sequence[float]) -> float:
    """By what share the second half of the losses lies below the first."""
    half = len(losses) // 2
    first, second = statistics.fmean(losses[:half]), statistics.fmean(losses[-half:])
    return 1 - second / first if first > 0 else 0.0
