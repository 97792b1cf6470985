"""k nearest neighbours: how good the features are without any training on them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.errors import UserError
from quarterview.evaluation.features import ProbeConfig, ProbeData, probe_data, record_probe
from quarterview.evaluation.report import show_rows, standard_error
from quarterview.training.distributed import choose_device
from quarterview.training.logging import Journal

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


def knn(
    config: ProbeConfig, k: int | Sequence[int], journal: Journal, argv: Sequence[str] = ()
) -> list[KnnAccuracy]:
    """Classify the test images by their nearest training images, show a table and record the result.

    Args:
        k: how many neighbours vote; several numbers give a row each.
        argv: the command line, for the record.

    Returns:
        The accuracy of each encoder, for each k and both ways of voting.

    Raises:
        UserError: if there are not so many training images.
    """
    ks = (k,) if isinstance(k, int) else tuple(dict.fromkeys(k))
    data = probe_data(config)
    check_neighbours(ks, len(data.train_labels))
    found = knn_accuracies(data, ks, choose_device(config.device))
    kind = config.features or "mean"
    _show(f"nearest neighbours, cosine, {kind} features", found, data, journal)
    record_probe(
        "knn",
        config,
        argv,
        {"features": kind, "k": ks, "metric": "cosine", "temperature": TEMPERATURE},
        {**data.described, "unreadable": data.unreadable},
        {"classes": data.classes, "accuracies": [asdict(row) for row in found]},
    )
    return found


def check_neighbours(ks: Sequence[int], images: int) -> None:
    """Raises UserError unless each k is one that so many training images can give."""
    if not ks:
        raise UserError("no number of neighbours; accepted: one or more whole numbers")
    for k in ks:
        if not 1 <= k <= images:
            raise UserError(f"{k} neighbours of {images} images; accepted: 1 to that many")


def knn_accuracies(data: ProbeData, ks: Sequence[int], device: torch.device = _CPU) -> list[KnnAccuracy]:
    """The accuracy of each encoder, for each k and both ways of voting."""
    found = []
    for name, train in data.train.items():
        similarity, index = nearest(train, data.test[name], max(ks), device)
        labels = data.train_labels[index]  # [M, k]
        for k in ks:
            for kind in get_args(Vote):
                right = vote(similarity[:, :k], labels[:, :k], kind) == data.test_labels
                accuracy = float(right.double().mean())
                found.append(KnnAccuracy(name, k, kind, accuracy, standard_error(accuracy, len(right))))
    return found


def _show(title: str, found: Sequence[KnnAccuracy], data: ProbeData, journal: Journal) -> None:
    cells: dict[tuple[str, int], dict[Vote, KnnAccuracy]] = {}
    for row in found:
        cells.setdefault((row.features, row.k), {})[row.vote] = row
    rows = [
        (name, str(k), *(f"{votes[kind].accuracy:.1%}" for kind in get_args(Vote)), f"± {most:.1%}")
        for (name, k), votes in cells.items()
        for most in (max(row.standard_error for row in votes.values()),)
    ]
    show_rows(title, ["features", "k", *get_args(Vote), "standard error"], rows, data, journal)


def knn_predict(train: Tensor, labels: Tensor, test: Tensor, k: int, kind: Vote = "weighted") -> Tensor:
    """The class of each test feature, by a vote of its `k` nearest training features.

    Args:
        train: float [N, D].
        labels: int64 [N].
        test: float [M, D].

    Returns:
        int64 [M], on the device of `labels`.
    """
    similarity, index = nearest(train, test, k, train.device)
    return vote(similarity, labels.cpu()[index], kind).to(labels.device)


def vote(similarity: Tensor, labels: Tensor, kind: Vote) -> Tensor:
    """What the neighbours of each test image say it is; of classes with equally many votes, the lowest.

    Each neighbour counts alike, or as exp(cosine similarity / 0.07) (Wu et al. 2018).

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
