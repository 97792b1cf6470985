"""Which sample comes when.

The stream is the concatenation of the epochs' permutations, without end. It is cut into batches
of exactly the batch size, so a batch may straddle two epochs, none is short and nothing is dropped.
The position of a run is therefore one integer, the samples consumed, and nothing else about the
order has to be stored to resume it anywhere.
"""

import torch
from torch import Tensor

from quarterview import draws
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
        return draws.permute(self.seed, "holdout", 0, places, self.size)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The epochs and the sample ids at positions of the stream: int64 [B] twice."""
        epochs, places = positions // self.trained, positions % self.trained
        order = draws.permute(self.seed, "order", epochs, places, self.trained)
        return epochs, self._sample(self.holdout + order)

    def held_out(self) -> Tensor:
        """The ids that are never trained on: int64 [holdout]."""
        return self._sample(torch.arange(self.holdout))

    def training_sample(self, count: int) -> Tensor:
        """The ids of `count` different training samples (all if there are fewer): int64 [≤ count]."""
        places = draws.permute(
            self.seed, "statistics", 0, torch.arange(min(count, self.trained)), self.trained
        )
        return self._sample(self.holdout + places)

    def replacement(self, epoch: int, sample: int, attempt: int) -> int:
        """Which training sample stands in for a broken one: the same one whenever it is asked."""
        draw = draws.key(self.seed, "replacement", epoch, torch.tensor([sample]), attempt)
        return int(self._sample(self.holdout + draw.remainder(self.trained)))
