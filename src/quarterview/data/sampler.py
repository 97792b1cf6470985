"""The order of the samples in training.

A sample stream is the endless concatenation of one permutation of the training samples per epoch. It is
split into batches of exactly the batch size, so a batch may span two epochs and no sample is dropped. The
position of a run is one integer, the number of samples consumed; a resume needs nothing else.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quarterview import rng
from quarterview.errors import UserError, invalid

HOLDOUT_FRACTION = 0.01
MAX_HOLDOUT = 512


def compute_default_holdout(num_images: int) -> int:
    """Return the default number of held-out images: 1% of all, at most 512."""
    return min(int(num_images * HOLDOUT_FRACTION), MAX_HOLDOUT)


class SampleStream:
    """The order of the samples of a dataset, computed from the seed and never stored.

    The first `holdout` samples of a permutation of the whole dataset are held out. Each epoch permutes the
    others, the training samples.

    Args:
        size: number of images in the dataset.
        holdout: number of images never trained on.

    Raises:
        UserError: if no image is left for training.
    """

    def __init__(self, size: int, holdout: int, seed: int) -> None:
        if not 0 <= holdout < size:
            raise UserError(f"--holdout is {holdout}, of {size} images. Give 0 to {size - 1}.")
        self.size, self.holdout, self.seed = size, holdout, seed
        self.num_train = size - holdout

    def _permute_all(self, indices: Tensor) -> Tensor:
        """Return the ids at `indices` of the permutation of the whole dataset: int64 [B]."""
        return rng.permute(self.seed, "holdout", 0, indices, self.size)

    def get_samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the epochs and the sample ids at positions of the stream: int64 [B] each."""
        epochs, offsets = positions // self.num_train, positions % self.num_train
        order = rng.permute(self.seed, "order", epochs, offsets, self.num_train)
        return epochs, self._permute_all(self.holdout + order)

    def get_held_out_ids(self) -> Tensor:
        """Return the ids of the held-out samples: int64 [holdout]."""
        return self._permute_all(torch.arange(self.holdout))

    def select_train_ids(self, num_samples: int) -> Tensor:
        """Return the ids of `num_samples` different training samples, or of all if there are fewer."""
        indices = torch.arange(min(num_samples, self.num_train))
        indices = rng.permute(self.seed, "statistics", 0, indices, self.num_train)
        return self._permute_all(self.holdout + indices)

    def get_replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Return the id of a training sample that replaces a broken one. Equal arguments give equal ids.

        Args:
            epoch: epoch in which the broken sample occurs.
            sample: id of the broken sample.
            attempt: 0, or the number of replacements that turned out to be broken too.
        """
        draw = rng.key(self.seed, "replacement", epoch, torch.tensor([sample]), attempt)
        return int(self._permute_all(self.holdout + draw.remainder(self.num_train)))


class ShardedStream(SampleStream):
    """An order for sharded datasets that reads each shard once per epoch, a few shards at a time.

    Each epoch permutes the shards, splits them into windows of `shards_per_window`, and permutes the training
    samples within each window. The held-out samples and the replacements are those of `SampleStream`, from
    the whole dataset. Memory is proportional to the number of shards.

    Args:
        shard_starts: int64 [num_shards + 1], the id of the first sample of each shard, then the dataset size.
        shards_per_window: number of shards whose samples are shuffled together.
    """

    def __init__(
        self, shard_starts: Sequence[int] | np.ndarray, holdout: int, seed: int, shards_per_window: int
    ) -> None:
        self.shard_starts = torch.as_tensor(np.asarray(shard_starts, np.int64))
        super().__init__(int(self.shard_starts[-1]), holdout, seed)
        if shards_per_window < 1:
            raise invalid("--shuffle-shards", shards_per_window, "1 or more")
        self.shards_per_window = shards_per_window
        held_out = super().get_held_out_ids().sort().values
        # The number of training samples before each held-out one maps a training index to a sample id.
        self._num_train_before = held_out - torch.arange(holdout)
        self._train_starts = self.shard_starts - torch.searchsorted(
            held_out, self.shard_starts
        )  # [num_shards + 1]
        self._num_windows = -(-(len(self.shard_starts) - 1) // shards_per_window)
        self._order_cache: dict[int, tuple[Tensor, Tensor]] = {}

    def get_samples(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        epochs, offsets = positions // self.num_train, positions % self.num_train
        indices = torch.empty_like(offsets)
        for epoch in epochs.unique().tolist():
            in_epoch = epochs == epoch
            indices[in_epoch] = self._get_train_indices(epoch, offsets[in_epoch])
        return epochs, indices + torch.searchsorted(self._num_train_before, indices, right=True)

    def _get_train_indices(self, epoch: int, offsets: Tensor) -> Tensor:
        """Return indices into the training samples, sorted by id, at `offsets` of an epoch: int64 [B]."""
        order, ends = self._get_shard_order(epoch)
        ordinals = torch.searchsorted(ends, offsets, right=True)  # of the shards in the epoch's order
        windows = ordinals // self.shards_per_window
        shuffled = torch.empty_like(offsets)
        for window in windows.unique().tolist():
            in_window = windows == window
            first, last = (
                window * self.shards_per_window,
                min((window + 1) * self.shards_per_window, len(order)) - 1,
            )
            begin = int(ends[first - 1]) if first else 0
            key = epoch * self._num_windows + window
            size = int(ends[last]) - begin
            shuffled[in_window] = begin + rng.permute(
                self.seed, "window", key, offsets[in_window] - begin, size
            )
        shard = torch.searchsorted(ends, shuffled, right=True)
        before = torch.where(shard > 0, ends[shard - 1], 0)
        return self._train_starts[order[shard]] + shuffled - before

    def _get_shard_order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of the shards in an epoch, and the end of each in the epoch: [num_shards] each."""
        if epoch not in self._order_cache:
            num_shards = len(self.shard_starts) - 1
            order = rng.permute(self.seed, "shards", epoch, torch.arange(num_shards), num_shards)
            ends = (self._train_starts[1:] - self._train_starts[:-1])[order].cumsum(0)
            self._order_cache = {
                **dict(list(self._order_cache.items())[-1:]),
                epoch: (order, ends),
            }  # keeps 2
        return self._order_cache[epoch]
