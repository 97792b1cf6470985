"""k nearest neighbours: how good the features are without any training on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.errors import UserError
from quarterview.evaluation.features import Features
from quarterview.evaluation.statistics import figures

Vote = Literal["majority", "weighted"]
TEMPERATURE = 0.07
QUERIES, ROWS = 1024, 16384
"""So many test features are compared with so many training features at a time: 64 MiB of similarities."""
_GROUP = 32
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class KnnAccuracy:
    """What one encoder reached with one way of voting."""

    features: str
    """The name of the encoder."""
    k: int
    vote: Vote
    accuracy: float
    standard_error: float


@dataclass(frozen=True)
class Knn:
    """Classifies by the nearest training features: an `Evaluator`."""

    k: int = 20
    """How many neighbours vote; all where there are fewer."""
    vote: Vote = "weighted"
    device: torch.device = _CPU
    """Where similarities are computed."""

    def predict(self, train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        """The class of each test feature, by a vote of its nearest training features.

        Args:
            train: float [N, D].
            labels: int64 [N], on the CPU.
            test: float [M, D].

        Returns:
            int64 [M], on the CPU.
        """
        similarity, index = nearest(train, test, min(self.k, len(train)), self.device)
        return vote(similarity, labels[index], self.vote)

    def __call__(self, features: Features) -> Iterator[tuple[str, float]]:
        predicted = self.predict(features.train, features.train_labels, features.test)
        return figures(predicted == features.test_labels)


def check_neighbours(ks: Sequence[int], images: int) -> None:
    """Raises UserError if there are fewer training images than neighbours that shall vote."""
    if max(ks) > images:
        raise UserError(
            f"--k {max(ks)} is more than the {images} labelled training images. Give at most {images}."
        )


def knn_accuracies(
    features: Mapping[str, Features], ks: Sequence[int], device: torch.device = _CPU
) -> list[KnnAccuracy]:
    """The accuracy of each encoder, for each k and both ways of voting; neighbours are searched once.

    Args:
        features: by the encoder's name.
        ks: how many neighbours vote, each at most the number of training features.
    """
    found = []
    for name, (train, train_labels, test, test_labels) in features.items():
        similarity, index = nearest(train, test, max(ks), device)
        labels = train_labels[index]  # [M, k]
        for k in ks:
            for kind in get_args(Vote):
                correct = vote(similarity[:, :k], labels[:, :k], kind) == test_labels
                found.append(KnnAccuracy(name, k, kind, **dict(figures(correct))))
    return found


def vote(similarity: Tensor, labels: Tensor, kind: Vote) -> Tensor:
    """What the neighbours of each test image say it is; of classes with equally many votes, the lowest.

    Each neighbour counts equally, or as exp(cosine similarity / 0.07) (Wu et al. 2018).

    Args:
        similarity: float [M, k].
        labels: int64 [M, k], of the neighbours.

    Returns:
        int64 [M].
    """
    weights = (similarity.double() / TEMPERATURE).exp() if kind == "weighted" else similarity.new_ones(())
    classes = int(labels.max()) + 1
    predicted = []
    for some, weight in zip(labels.split(QUERIES), weights.expand(labels.shape).split(QUERIES), strict=True):
        votes = weight.new_zeros(len(some), classes).scatter_add_(1, some, weight)
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


@torch.no_grad()
def nearest(
    train: Tensor,
    test: Tensor,
    k: int,
    device: torch.device = _CPU,
    queries: int = QUERIES,
    rows: int = ROWS,
) -> tuple[Tensor, Tensor]:
    """The `k` training features of the highest cosine similarity to each test feature, best first.

    Exact, in float32. Beside the features, memory holds `queries` × `rows` similarities and the
    result. Which of several equally similar features is the k-th is not defined.

    Args:
        train: float [N, D], N at least k.
        test: float [M, D].
        device: where to compute; features on another one come to it part by part.

    Returns:
        Similarities float32 [M, k] and indices int64 [M, k], both on the CPU.
    """
    similarities, indices = torch.empty(len(test), k), torch.empty(len(test), k, dtype=torch.int64)
    for start in range(0, len(test), queries):
        some = F.normalize(test[start : start + queries].to(device).float(), dim=1)
        best = torch.empty(len(some), 0, device=device)
        best_index = torch.empty(len(some), 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), rows):
            part = F.normalize(train[first : first + rows].to(device).float(), dim=1)
            with torch.autocast(device.type, enabled=False):  # whatever the caller computes in
                similarity = some @ part.T  # [Q, R]
            values, index = _top(similarity, k)
            values = torch.cat([best, values], dim=1)
            index = torch.cat([best_index, index + first], dim=1)
            best, place = values.topk(min(k, values.shape[1]), dim=1)
            best_index = index.gather(1, place)
        similarities[start : start + queries] = best
        indices[start : start + queries] = best_index
    return similarities, indices


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of each row, or all of it if it is shorter, and their places.

    They lie in the k groups of the highest maxima, and only these have to be searched, which takes
    a fraction of the time of `topk` over long rows.
    """
    groups = values.shape[1] // _GROUP
    if groups * _GROUP < values.shape[1] or groups <= 2 * k:
        return values.topk(min(k, values.shape[1]), dim=1)
    chosen = values.unflatten(1, (groups, _GROUP)).amax(dim=2).topk(k, dim=1).indices  # [Q, k]
    members = chosen[:, :, None] * _GROUP + torch.arange(_GROUP, device=values.device)
    members = members.flatten(1)  # [Q, k * group]
    top, place = values.gather(1, members).topk(k, dim=1)
    return top, members.gather(1, place)
