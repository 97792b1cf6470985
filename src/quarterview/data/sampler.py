"""Which sample comes when.

The stream is the concatenation of the epochs' permutations, without end. It is cut into batches
of exactly the batch size, so a batch may straddle two epochs, none is short and nothing is dropped.
The position of a run is therefore one integer, the samples consumed, and nothing else about the
order has to be stored to resume it anywhere.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quarterview import rng
from quarterview.errors import UserError

HOLDOUT_SHARE = 0.01
HOLDOUT_MOST = 512


def default_holdout(size: int) -> int:
    """How many images are kept out of training by default: the smaller of 1% and 512."""
    return min(int(size * HOLDOUT_SHARE), HOLDOUT_MOST)


class SampleStream:
    """The order of the samples of one set, for one seed.

    A keyed permutation of the whole set comes first: its first `holdout` samples are never
    trained on, and the epochs permute the rest. Both are computed, never stored.
    """

    def __init__(self, size: int, holdout: int, seed: int) -> None:
        if not 0 <= holdout < size:
            raise UserError(f"a holdout of {holdout} from {size} images; accepted: 0 to {size - 1}")
        self.size, self.holdout, self.seed = size, holdout, seed
        self.trained = size - holdout

    def _sample(self, places: Tensor) -> Tensor:
        return rng.permute(self.seed, "holdout", 0, places, self.size)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The epochs and the sample ids at positions of the stream: int64 [B] twice."""
        epochs, places = positions // self.trained, positions % self.trained
        order = rng.permute(self.seed, "order", epochs, places, self.trained)
        return epochs, self._sample(self.holdout + order)

    def held_out(self) -> Tensor:
        """The ids that are never trained on: int64 [holdout]."""
        return self._sample(torch.arange(self.holdout))

    def training_sample(self, count: int) -> Tensor:
        """The ids of `count` different training samples (all if there are fewer): int64 [≤ count]."""
        places = rng.permute(self.seed, "statistics", 0, torch.arange(min(count, self.trained)), self.trained)
        return self._sample(self.holdout + places)

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Which training sample stands in for a broken one: the same one whenever it is asked."""
        draw = rng.key(self.seed, "replacement", epoch, torch.tensor([sample]), attempt)
        return int(self._sample(self.holdout + draw.remainder(self.trained)))


class ShardedStream(SampleStream):
    """An order for sets that lie in shards: a few shards at a time, each read once an epoch.

    An epoch permutes the shards by key and takes them in windows of `mixed` shards; the training samples of
    a window are permuted by key. The held-out samples are those of `SampleStream`, drawn from the whole set,
    and so are replacements. A position is found from the sums of the shards' sizes: memory goes by the number
    of shards.

    Args:
        starts: int64 [shards + 1], the first sample of each shard, and the number of all.
        mixed: how many shards make a window.
    """

    def __init__(self, starts: Sequence[int] | np.ndarray, holdout: int, seed: int, mixed: int) -> None:
        self.starts = torch.as_tensor(np.asarray(starts, np.int64))
        super().__init__(int(self.starts[-1]), holdout, seed)
        if mixed < 1:
            raise UserError(f"{mixed} shards mixed; accepted: 1 or more")
        self.mixed = mixed
        held = super().held_out().sort().values
        # How many training samples come before each held-out one; so the k-th of them can be found.
        self._before_held = held - torch.arange(holdout)
        self._begins = self.starts - torch.searchsorted(held, self.starts)  # [shards + 1], likewise
        self._windows = -(-(len(self.starts) - 1) // mixed)
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        epochs, places = positions // self.trained, positions % self.trained
        ranks = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            asked = epochs == epoch
            ranks[asked] = self._ranks(epoch, places[asked])
        return epochs, ranks + torch.searchsorted(self._before_held, ranks, right=True)

    def _ranks(self, epoch: int, places: Tensor) -> Tensor:
        """Which of the training samples, by id, are at places of an epoch: int64 [B]."""
        order, ends = self._epoch(epoch)
        within = torch.searchsorted(ends, places, right=True)  # places among the permuted shards
        windows = within // self.mixed
        mixed = torch.empty_like(places)
        for window in windows.unique().tolist():
            asked = windows == window
            first, last = window * self.mixed, min((window + 1) * self.mixed, len(order)) - 1
            begin = int(ends[first - 1]) if first else 0
            key = epoch * self._windows + window
            size = int(ends[last]) - begin
            mixed[asked] = begin + rng.permute(self.seed, "window", key, places[asked] - begin, size)
        shard = torch.searchsorted(ends, mixed, right=True)
        before = torch.where(shard > 0, ends[shard - 1], 0)
        return self._begins[order[shard]] + mixed - before

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The shards in the order of an epoch, and where the training samples of each end: [shards] twice."""
        if epoch not in self._epochs:
            count = len(self.starts) - 1
            order = rng.permute(self.seed, "shards", epoch, torch.arange(count), count)
            ends = (self._begins[1:] - self._begins[:-1])[order].cumsum(0)
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: (order, ends)}  # two are held
        return self._epochs[epoch]
