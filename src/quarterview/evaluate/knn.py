"""k nearest neighbours: how good the features are without any training on them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quarterview.errors import UserError
from quarterview.evaluate.features import ProbeConfig, probe_data
from quarterview.evaluate.report import show_accuracies
from quarterview.train.journal import Journal

TEMPERATURE = 0.07
_QUERIES = 1024


def knn(config: ProbeConfig, k: int, journal: Journal) -> dict[str, float]:
    """Classify the test images by their `k` nearest training images, and show a table.

    Returns:
        The accuracy of each encoder, by its name.
    """
    data = probe_data(config)
    if not 1 <= k <= len(data.train_labels):
        raise UserError(f"{k} neighbours of {len(data.train_labels)} images; accepted: 1 to that many")
    accuracies = {}
    for name, train in data.train.items():
        predicted = knn_predict(train, data.train_labels, data.test[name], k)
        accuracies[name] = float((predicted == data.test_labels).float().mean())
    show_accuracies(f"{k}-nearest neighbours, cosine, {config.features} features", accuracies, data, journal)
    return accuracies


def knn_predict(train: Tensor, labels: Tensor, test: Tensor, k: int) -> Tensor:
    """The class of each test feature, by a vote of its `k` nearest training features.

    Each neighbour votes with exp(cosine similarity / 0.07) (Wu et al. 2018).

    Args:
        train: float [N, D].
        labels: int64 [N].
        test: float [M, D].

    Returns:
        int64 [M].
    """
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    classes = int(labels.max()) + 1
    predicted = []
    for queries in test.split(_QUERIES):
        similarity, neighbours = (queries @ train.T).topk(k, dim=1)  # [Q, k]
        votes = torch.zeros(len(queries), classes)
        votes.scatter_add_(1, labels[neighbours], (similarity / TEMPERATURE).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)
