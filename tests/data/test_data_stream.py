import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterview.data.stream import SampleStream, default_holdout
from quarterview.errors import UserError


@st.composite
def streams(draw) -> SampleStream:
    size = draw(st.integers(1, 70))
    return SampleStream(size, draw(st.integers(0, size - 1)), draw(st.integers(-(2**63), 2**63 - 1)))


@settings(deadline=None, max_examples=60)
@given(stream=streams())
def test_every_epoch_is_a_permutation_of_the_training_images(stream):
    training = sorted(set(range(stream.size)) - set(stream.held_out().tolist()))
    assert len(training) == stream.trained == stream.size - stream.holdout
    epochs, ids = stream.at(torch.arange(3 * stream.trained))
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == training
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in training]


@settings(deadline=None, max_examples=60)
@given(stream=streams(), data=st.data())
def test_the_stream_is_the_same_however_it_is_cut(stream, data):
    total = 3 * stream.trained + 5
    epochs, ids = stream.at(torch.arange(total))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    parts = [
        stream.at(torch.arange(start, stop)) for start, stop in zip([0, *cuts], [*cuts, total], strict=True)
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), epochs)
    assert torch.equal(torch.cat([part[1] for part in parts]), ids)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stream.at(shuffled)[1], ids[shuffled])


@settings(deadline=None, max_examples=30)
@given(stream=streams(), position=st.integers(0, 10**12))
def test_any_position_can_be_asked_for_by_itself(stream, position):
    fresh = SampleStream(stream.size, stream.holdout, stream.seed)
    epochs, ids = fresh.at(torch.tensor([position]))
    around = torch.arange(max(0, position - 3), position + 4)
    at = position - around[0]
    assert stream.at(around)[0][at] == epochs[0] == position // stream.trained
    assert stream.at(around)[1][at] == ids[0]


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs, ids = SampleStream(500, 0, 0).at(torch.arange(1000))
    first, second = ids[epochs == 0], ids[epochs == 1]
    other = SampleStream(500, 0, 1).at(torch.arange(500))[1]
    for one, two in ((first, second), (first, other), (first, torch.arange(500))):
        assert (one == two).sum() < 15  # about one in common is expected, and 14 of 500 are not
    assert set(SampleStream(500, 50, 0).held_out().tolist()) != set(
        SampleStream(500, 50, 1).held_out().tolist()
    )


@pytest.mark.parametrize(
    ("size", "holdout"), [(1, 0), (99, 0), (100, 1), (51_199, 511), (51_200, 512), (10**9, 512)]
)
def test_default_holdout(size, holdout):
    assert default_holdout(size) == holdout


@pytest.mark.parametrize(("size", "holdout"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_a_holdout_that_leaves_nothing_is_refused(size, holdout):
    with pytest.raises(UserError, match=f"holdout of {holdout} from {size} images"):
        SampleStream(size, holdout, 0)


@settings(deadline=None, max_examples=60)
@given(stream=streams(), epoch=st.integers(0, 5), sample=st.integers(0, 69))
def test_replacements_are_training_images_and_always_the_same(stream, epoch, sample):
    held_out = set(stream.held_out().tolist())
    again = SampleStream(stream.size, stream.holdout, stream.seed)
    for attempt in range(4):
        chosen = stream.replacement(epoch, sample, attempt)
        assert 0 <= chosen < stream.size
        assert chosen not in held_out
        assert chosen == again.replacement(epoch, sample, attempt)


def test_replacements_differ_by_sample_epoch_and_attempt():
    stream = SampleStream(10**6, 0, 0)
    asked = [(e, s, a) for e in range(5) for s in range(5) for a in range(5)]
    assert len({stream.replacement(*one) for one in asked}) == len(asked)


def test_the_statistics_sample_is_of_different_training_images():
    stream = SampleStream(300, 30, 4)
    assert set(stream.training_sample(10**6).tolist()) == set(range(300)) - set(stream.held_out().tolist())
    few = stream.training_sample(20).tolist()
    assert len(set(few)) == 20
    assert set(few).isdisjoint(stream.held_out().tolist())


def test_a_set_of_any_size_costs_nothing():
    began = time.process_time()
    stream = SampleStream(10**12, 512, 0)
    _, ids = stream.at(torch.arange(10**11, 10**11 + 1000))
    assert len(set(ids.tolist())) == 1000
    assert 0 <= ids.min() < 10**11 < ids.max() < 10**12
    assert set(stream.held_out().tolist()).isdisjoint(ids.tolist())
    assert time.process_time() - began < 5.0
