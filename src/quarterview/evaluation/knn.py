"""k-nearest-neighbour classification: an evaluation of features without training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.errors import UserError
from quarterview.evaluation.features import Features
from quarterview.evaluation.statistics import compute_accuracy_metrics

Vote = Literal["majority", "weighted"]
TEMPERATURE = 0.07
QUERY_CHUNK_SIZE, TRAIN_CHUNK_SIZE = 1024, 16384
"""Test and training features that are compared at a time: 64 MiB of similarities."""
_GROUP_SIZE = 32  # similarities per group of `_topk_by_groups`
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class KnnAccuracy:
    """The accuracy of one encoder with one k and one method of voting."""

    features: str
    """The name of the encoder."""
    k: int
    vote: Vote
    accuracy: float
    standard_error: float


@dataclass(frozen=True)
class Knn:
    """A k-nearest-neighbour classifier of features: a `FeatureEvaluator`."""

    k: int = 20
    """Number of neighbours that vote; all training features if there are fewer."""
    vote: Vote = "weighted"
    device: torch.device = _CPU
    """Device that computes the similarities."""

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """Return the class of each test feature by a vote of its nearest training features.

        Args:
            train: float [N, D].
            labels: int64 [N], on the CPU.
            test: float [M, D].

        Returns:
            int64 [M], on the CPU.
        """
        similarity, index = find_nearest_neighbors(train, test, min(self.k, len(train)), self.device)
        return vote(similarity, labels[index], self.vote)

    def __call__(self, features: Features) -> Iterator[tuple[str, float]]:
        predicted = self.predict(features.train, features.train_labels, features.test)
        return compute_accuracy_metrics(predicted == features.test_labels)


def check_num_neighbors(ks: Sequence[int], num_images: int) -> None:
    """Raise UserError if there are fewer training images than neighbours."""
    if max(ks) > num_images:
        raise UserError(
            f"--k {max(ks)} is more than the {num_images} labelled training images. Give at most "
            f"{num_images}."
        )


def compute_knn_accuracies(
    features: Mapping[str, Features], ks: Sequence[int], device: torch.device = _CPU
) -> list[KnnAccuracy]:
    """Compute the accuracy of each encoder for each k and both methods of voting, with a single search.

    Args:
        features: name of the encoder -> its features.
        ks: numbers of neighbours, each at most the number of training features.
        device: device that computes the similarities.
    """
    accuracies = []
    for name, (train, train_labels, test, test_labels) in features.items():
        similarity, index = find_nearest_neighbors(train, test, max(ks), device)
        labels = train_labels[index]  # [M, k]
        for k in ks:
            for method in get_args(Vote):
                correct = vote(similarity[:, :k], labels[:, :k], method) == test_labels
                accuracies.append(KnnAccuracy(name, k, method, **dict(compute_accuracy_metrics(correct))))
    return accuracies


def vote(similarity: Tensor, labels: Tensor, method: Vote) -> Tensor:
    """Return the class with the most votes of the neighbours of each test image; of ties, the lowest class.

    Each neighbour has the weight 1 (``majority``) or exp(cosine similarity / 0.07) (``weighted``, Wu et al.
    2018).

    Args:
        similarity: float [M, k], cosine similarities of the neighbours.
        labels: int64 [M, k], labels of the neighbours.

    Returns:
        int64 [M].
    """
    weights = (similarity.double() / TEMPERATURE).exp() if method == "weighted" else similarity.new_ones(())
    num_classes = int(labels.max()) + 1
    predicted = []
    for chunk, weight in zip(
        labels.split(QUERY_CHUNK_SIZE), weights.expand(labels.shape).split(QUERY_CHUNK_SIZE), strict=True
    ):
        votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, chunk, weight)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


@torch.no_grad()
def find_nearest_neighbors(
    train: Tensor,
    test: Tensor,
    k: int,
    device: torch.device = _CPU,
    query_chunk_size: int = QUERY_CHUNK_SIZE,
    train_chunk_size: int = TRAIN_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Find the `k` training features with the highest cosine similarity to each test feature, best first.

    The search is exact, in float32. Besides the features, it needs memory for `query_chunk_size` ×
    `train_chunk_size` similarities and the result. The order of equally similar features is not defined.

    Args:
        train: float [N, D], N at least k.
        test: float [M, D].
        device: device that computes; features on another device are copied to it chunk by chunk.

    Returns:
        Similarities float32 [M, k] and indices int64 [M, k], both on the CPU.
    """
    similarities, indices = torch.empty(len(test), k), torch.empty(len(test), k, dtype=torch.int64)
    for start in range(0, len(test), query_chunk_size):
        query = F.normalize(test[start : start + query_chunk_size].to(device).float(), dim=1)
        best = torch.empty(len(query), 0, device=device)
        best_index = torch.empty(len(query), 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), train_chunk_size):
            chunk = F.normalize(train[first : first + train_chunk_size].to(device).float(), dim=1)
            with torch.autocast(device.type, enabled=False):  # the caller may use autocast
                similarity = query @ chunk.T  # [Q, R]
            values, index = _topk_by_groups(similarity, k)
            values = torch.cat([best, values], dim=1)
            index = torch.cat([best_index, index + first], dim=1)
            best, position = values.topk(min(k, values.shape[1]), dim=1)
            best_index = index.gather(1, position)
        similarities[start : start + query_chunk_size] = best
        indices[start : start + query_chunk_size] = best_index
    return similarities, indices


def _topk_by_groups(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` highest values of each row, or the whole row if it is shorter, and their indices.

    The k highest values lie in the k groups with the highest maxima. Only these groups are searched, which
    takes a fraction of the time of `topk` over long rows.
    """
    num_groups = values.shape[1] // _GROUP_SIZE
    if num_groups * _GROUP_SIZE < values.shape[1] or num_groups <= 2 * k:
        return values.topk(min(k, values.shape[1]), dim=1)
    chosen = values.unflatten(1, (num_groups, _GROUP_SIZE)).amax(dim=2).topk(k, dim=1).indices  # [Q, k]
    members = chosen[:, :, None] * _GROUP_SIZE + torch.arange(_GROUP_SIZE, device=values.device)
    members = members.flatten(1)  # [Q, k * group size]
    top, position = values.gather(1, members).topk(k, dim=1)
    return top, members.gather(1, position)
