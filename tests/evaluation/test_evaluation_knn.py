"""k-nearest-neighbour classification compared with scikit-learn, on random and on real features."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from quarterview.commands.config import KnnConfig
from quarterview.commands.knn import evaluate_knn
from quarterview.data.sources.open import open_source
from quarterview.errors import UserError
from quarterview.evaluation.features import Features, compute_pixel_features, extract_features
from quarterview.evaluation.knn import TEMPERATURE, Knn, compute_knn_accuracies, find_nearest_neighbors, vote
from quarterview.models.create import create_model
from quarterview.training import checkpoint
from quarterview.training.console import Console
from quarterview.weights.loading import make_metadata


def knn_predict(train, labels, test, k, vote="weighted"):
    return Knn(k, vote).predict(train, labels, test)


def sklearn_predict(train, labels, test, k, vote):
    weights = "uniform" if vote == "majority" else lambda distance: np.exp((1 - distance) / TEMPERATURE)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    return reference.fit(train.double().numpy(), labels.numpy()).predict(test.double().numpy())


def blobs(train, test, classes=7, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (train,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    features = centres[labels] + torch.randn(train, width, generator=generator)
    return features, labels, torch.randn(test, width, generator=generator)


@pytest.mark.parametrize("method", ["majority", "weighted"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_predictions_equal_those_of_scikit_learn(k, method):
    train, labels, test = blobs(300, 2100, seed=k)
    expected = sklearn_predict(train, labels, test, k, method)
    agreement = (knn_predict(train, labels, test, k, method).numpy() == expected).mean()
    assert agreement > 0.999  # float32 against float64 may break a tie otherwise


def test_predictions_equal_those_of_scikit_learn_on_digits():
    digits = load_digits()
    features, labels = torch.tensor(digits.data).float(), torch.tensor(digits.target)
    train, test = slice(0, 1000), slice(1000, None)
    for method in ("majority", "weighted"):
        expected = sklearn_predict(features[train], labels[train], features[test], 10, method)
        ours = knn_predict(features[train], labels[train], features[test], 10, method)
        assert (ours.numpy() == expected).mean() >= 0.998


@pytest.mark.slow
def test_predictions_equal_those_of_scikit_learn_on_5000_images(tiny):
    source = open_source("shapes:5500:size=32", 3)
    extracted, ids = extract_features(
        {"x": compute_pixel_features}, source, range(5500), tiny.config, torch.device("cpu")
    )
    features, labels = extracted["x"], torch.tensor([source.label(i) for i in ids])
    for method in ("majority", "weighted"):
        expected = sklearn_predict(features[:5000], labels[:5000], features[5000:], 20, method)
        ours = knn_predict(features[:5000], labels[:5000], features[5000:], 20, method)
        assert (ours.numpy() == expected).mean() >= 0.998  # float32 against float64


@given(
    count=st.integers(1, 400),
    k=st.integers(1, 40),
    train_chunk_size=st.sampled_from([30, 64, 256, 1000]),
    query_chunk_size=st.sampled_from([4, 7, 100]),
    seed=st.integers(0, 99),
)
def test_neighbours_do_not_depend_on_the_chunk_sizes(count, k, train_chunk_size, query_chunk_size, seed):
    k = min(k, count)
    generator = torch.Generator().manual_seed(seed)
    train, test = (torch.randn(n, 8, generator=generator) for n in (count, 9))
    similarity, index = find_nearest_neighbors(
        train, test, k, query_chunk_size=query_chunk_size, train_chunk_size=train_chunk_size
    )
    similarities = torch.nn.functional.cosine_similarity(test[:, None].double(), train[None].double(), dim=2)
    expected = similarities.sort(dim=1, descending=True)
    torch.testing.assert_close(similarity.double(), expected.values[:, :k], atol=1e-5, rtol=0)
    torch.testing.assert_close(similarity.double(), similarities.gather(1, index), atol=1e-5, rtol=0)
    assert all(len(set(row)) == k for row in index.tolist())  # no neighbour twice


def test_the_search_by_groups_is_exact():
    train, _, test = blobs(4096, 50, width=4)
    train[100:140] = train[100]  # more than k identical features
    similarity, index = find_nearest_neighbors(
        train, torch.cat([test, train[100:101]]), 20, train_chunk_size=2048
    )
    similarities = torch.nn.functional.normalize(torch.cat([test, train[100:101]]), dim=1) @ (
        torch.nn.functional.normalize(train, dim=1).T
    )
    torch.testing.assert_close(similarity, similarities.topk(20, dim=1).values, atol=1e-6, rtol=0)
    assert ((index[-1] >= 100) & (index[-1] < 140)).all()


def test_ties_go_to_the_lowest_class_as_in_scikit_learn():
    labels = torch.tensor([[3, 1, 1, 3], [2, 0, 4, 4], [5, 4, 3, 2]])
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.9, 0.5, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]])
    assert vote(similarity, labels, "majority").tolist() == [1, 4, 2]
    assert vote(similarity, labels, "weighted").tolist() == [3, 2, 2]
    angles = torch.tensor([0.01, 0.02, 0.03, 0.04, 3.0])  # four neighbours of (1, 0) and a distant point
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    train_labels = torch.tensor([3, 1, 1, 3, 0])
    reference = sklearn_predict(train, train_labels, torch.tensor([[1.0, 0.0]]), 4, "majority")
    assert knn_predict(train, train_labels, torch.tensor([[1.0, 0.0]]), 4, "majority").tolist() == [1]
    assert reference.tolist() == [1]


def test_similarities_are_float32_under_autocast_and_for_bfloat16_features():
    train, labels, test = blobs(300, 40)
    expected = find_nearest_neighbors(train, test, 5)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = find_nearest_neighbors(train, test, 5)
    assert torch.equal(under_autocast[0], expected[0])
    bfloat16 = find_nearest_neighbors(train.bfloat16(), test.bfloat16(), 5)
    assert torch.equal(
        bfloat16[0], find_nearest_neighbors(train.bfloat16().float(), test.bfloat16().float(), 5)[0]
    )
    assert knn_predict(train, labels, test, 5).dtype == torch.int64


def test_there_is_an_accuracy_for_each_encoder_k_and_vote():
    train, labels, test = blobs(200, 100)
    test_labels = torch.arange(100) % 7
    data = {"a": Features(train, labels, test, test_labels), "b": Features(-train, labels, test, test_labels)}
    accuracies = compute_knn_accuracies(data, (1, 5, 30))
    assert [(row.features, row.k, row.vote) for row in accuracies] == [
        (name, k, method) for name in ("a", "b") for k in (1, 5, 30) for method in ("majority", "weighted")
    ]
    for row in accuracies:
        predicted = knn_predict(data[row.features].train, labels, test, row.k, row.vote)
        assert row.accuracy == pytest.approx(float((predicted == test_labels).double().mean()))
        metrics = dict(Knn(row.k, row.vote)(data[row.features]))
        assert metrics == {"accuracy": row.accuracy, "standard_error": row.standard_error}
        assert row.standard_error == pytest.approx((row.accuracy * (1 - row.accuracy) / 100) ** 0.5)
    assert accuracies[0].accuracy == accuracies[1].accuracy  # a single neighbour decides


def test_all_training_images_vote_if_there_are_fewer_than_k():
    train, labels, test = blobs(12, 40)
    assert torch.equal(knn_predict(train, labels, test, 20), knn_predict(train, labels, test, 12))


# ---------------------------------------------------------------------- the command


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    small = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "image_size": 32}
    return create_model("mae_vit_32x2x2_patch8", **small).eval()


@pytest.fixture
def run(tiny, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, {"model": tiny.state_dict()}, {"step": 1}, make_metadata(tiny.config))
    return tmp_path / "run"


def test_the_command_shows_a_table_and_records_the_result(run, capsys):
    images = {"train": "shapes:120:seed=1", "test": "shapes:60:seed=2", "labels": 50}
    config = KnnConfig.from_flags(run=str(run), **images, features="cls", device="cpu", k=(1, 5, 5))
    accuracies = evaluate_knn(config, Console(), ["quarterview", "knn"])
    assert [(row.features, row.k) for row in accuracies[::2]] == [
        (name, k) for name in ("raw pixels", "random encoder", "this model") for k in (1, 5)
    ]
    output = capsys.readouterr().out
    assert "50 labelled, 60 test images" in " ".join(output.split())
    assert "majority" in output
    record = json.loads((run / "results" / "knn-cls-50.json").read_text())
    assert record["argv"] == ["quarterview", "knn"]
    assert record["settings"]["k"] == [1, 5]
    assert record["settings"]["features"] == "cls"
    assert record["settings"]["weights"] == "checkpoints/step-00000001/model.safetensors"
    train = open_source("shapes:120:seed=1", 3)
    assert record["data"]["train"]["fingerprint"] == train.fingerprint()
    assert record["data"]["train"]["labelled"] == 50
    assert record["data"]["train"]["specs"] == ["shapes:120:seed=1"]
    assert record["data"]["test"]["images"] == 60
    assert record["data"]["unreadable"] == 0
    assert [row["accuracy"] for row in record["results"]["accuracies"]] == [
        row.accuracy for row in accuracies
    ]


def test_weights_outside_a_run_leave_no_result_file(run, tmp_path):
    weights = tmp_path / "elsewhere" / "model.safetensors"
    weights.parent.mkdir()
    (run / "checkpoints" / "step-00000001" / "model.safetensors").rename(weights)
    images = {"train": "shapes:40", "test": "shapes:40:seed=2"}
    config = KnnConfig.from_flags(run=str(weights), **images, baselines=False, device="cpu", k=3)
    assert len(evaluate_knn(config, Console(quiet=True))) == 2
    assert sorted(path.name for path in weights.parent.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("k", [0, 21, (5, 21), ()])
def test_invalid_numbers_of_neighbours_are_refused(run, k):
    with pytest.raises(UserError, match=r"--k .*Give"):
        evaluate_knn(
            KnnConfig.from_flags(run=str(run), train="shapes:20", test="shapes:20", k=k), Console(quiet=True)
        )


def test_missing_arguments_are_named(run):
    for flags, message in (({}, "RUN is missing"), ({"run": str(run)}, "--train is missing")):
        with pytest.raises(UserError, match=message):
            evaluate_knn(KnnConfig.from_flags(**flags), Console(quiet=True))
