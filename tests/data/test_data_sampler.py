import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quarterview.data.sampler import SampleStream, ShardedStream, compute_default_holdout
from quarterview.errors import UserError


@st.composite
def streams(draw) -> SampleStream:
    size = draw(st.integers(1, 70))
    return SampleStream(size, draw(st.integers(0, size - 1)), draw(st.integers(-(2**63), 2**63 - 1)))


@st.composite
def sharded(draw) -> ShardedStream:
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    holdout = draw(st.integers(0, starts[-1] - 1))
    return ShardedStream(starts, holdout, draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(1, 10)))


BOTH = st.one_of(streams(), sharded())


def recreate(stream: SampleStream) -> SampleStream:
    """Create an equal stream."""
    if isinstance(stream, ShardedStream):
        return ShardedStream(stream.shard_starts, stream.holdout, stream.seed, stream.shards_per_window)
    return SampleStream(stream.size, stream.holdout, stream.seed)


@settings(deadline=None, max_examples=60)
@given(stream=BOTH)
def test_every_epoch_is_a_permutation_of_the_training_images(stream):
    training = sorted(set(range(stream.size)) - set(stream.get_held_out_ids().tolist()))
    assert len(training) == stream.num_train == stream.size - stream.holdout
    epochs, ids = stream.get_samples(torch.arange(3 * stream.num_train))
    for epoch in range(3):
        assert sorted(ids[epochs == epoch].tolist()) == training
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in training]


@settings(deadline=None, max_examples=60)
@given(stream=BOTH, data=st.data())
def test_the_stream_does_not_depend_on_the_batches(stream, data):
    total = 3 * stream.num_train + 5
    epochs, ids = stream.get_samples(torch.arange(total))
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=6)))
    parts = [
        stream.get_samples(torch.arange(start, stop))
        for start, stop in zip([0, *cuts], [*cuts, total], strict=True)
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), epochs)
    assert torch.equal(torch.cat([part[1] for part in parts]), ids)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stream.get_samples(shuffled)[1], ids[shuffled])


@settings(deadline=None, max_examples=30)
@given(stream=BOTH, position=st.integers(0, 10**12))
def test_any_position_can_be_looked_up_alone(stream, position):
    again = recreate(stream)
    epochs, ids = again.get_samples(torch.tensor([position]))
    around = torch.arange(max(0, position - 3), position + 4)
    at = position - around[0]
    assert stream.get_samples(around)[0][at] == epochs[0] == position // stream.num_train
    assert stream.get_samples(around)[1][at] == ids[0]


def test_epochs_and_seeds_have_different_orders():
    epochs, ids = SampleStream(500, 0, 0).get_samples(torch.arange(1000))
    first, second = ids[epochs == 0], ids[epochs == 1]
    other = SampleStream(500, 0, 1).get_samples(torch.arange(500))[1]
    for one, two in ((first, second), (first, other), (first, torch.arange(500))):
        assert (one == two).sum() < 15  # about one in common is expected, and 14 of 500 are not
    assert set(SampleStream(500, 50, 0).get_held_out_ids().tolist()) != set(
        SampleStream(500, 50, 1).get_held_out_ids().tolist()
    )


@pytest.mark.parametrize(
    ("size", "holdout"), [(1, 0), (99, 0), (100, 1), (51_199, 511), (51_200, 512), (10**9, 512)]
)
def test_default_holdout(size, holdout):
    assert compute_default_holdout(size) == holdout


@pytest.mark.parametrize(("size", "holdout"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_a_holdout_of_all_images_is_rejected(size, holdout):
    with pytest.raises(UserError, match=f"--holdout is {holdout}, of {size} images"):
        SampleStream(size, holdout, 0)


@settings(deadline=None, max_examples=60)
@given(stream=BOTH, epoch=st.integers(0, 5), sample=st.integers(0, 69))
def test_replacements_are_training_images_and_always_the_same(stream, epoch, sample):
    held_out = set(stream.get_held_out_ids().tolist())
    again = recreate(stream)
    for attempt in range(4):
        chosen = stream.get_replacement(epoch, sample, attempt)
        assert 0 <= chosen < stream.size
        assert chosen not in held_out
        assert chosen == again.get_replacement(epoch, sample, attempt)


def test_replacements_differ_by_sample_epoch_and_attempt():
    stream = SampleStream(10**6, 0, 0)
    arguments = [(e, s, a) for e in range(5) for s in range(5) for a in range(5)]
    assert len({stream.get_replacement(*one) for one in arguments}) == len(arguments)


def test_the_statistics_sample_is_of_different_training_images():
    stream = SampleStream(300, 30, 4)
    assert set(stream.select_train_ids(10**6).tolist()) == set(range(300)) - set(
        stream.get_held_out_ids().tolist()
    )
    few = stream.select_train_ids(20).tolist()
    assert len(set(few)) == 20
    assert set(few).isdisjoint(stream.get_held_out_ids().tolist())


def test_huge_datasets_are_fast():
    began = time.process_time()
    stream = SampleStream(10**12, 512, 0)
    _, ids = stream.get_samples(torch.arange(10**11, 10**11 + 1000))
    assert len(set(ids.tolist())) == 1000
    assert 0 <= ids.min() < 10**11 < ids.max() < 10**12
    assert set(stream.get_held_out_ids().tolist()).isdisjoint(ids.tolist())
    assert time.process_time() - began < 5.0


# ---------------------------------------------------------------------- by shards


@settings(deadline=None, max_examples=60)
@given(stream=sharded())
def test_the_held_out_images_do_not_depend_on_the_order(stream):
    plain = SampleStream(stream.size, stream.holdout, stream.seed)
    assert torch.equal(stream.get_held_out_ids(), plain.get_held_out_ids())
    assert torch.equal(stream.select_train_ids(5), plain.select_train_ids(5))


@settings(deadline=None, max_examples=60)
@given(stream=sharded(), epoch=st.integers(0, 10**6))
def test_an_epoch_shuffles_a_few_shards_at_a_time_and_reads_each_once(stream, epoch):
    _, ids = stream.get_samples(epoch * stream.num_train + torch.arange(stream.num_train))
    shards = torch.searchsorted(torch.as_tensor(stream.shard_starts), ids, right=True).tolist()
    last = {shard: position for position, shard in enumerate(shards)}
    begun: list[int] = []
    for position, shard in enumerate(shards):
        if shard not in begun:
            begun.append(shard)
        assert sum(last[other] >= position for other in begun) <= stream.shards_per_window


def test_the_order_of_shards_never_changes():
    """Later versions must be able to continue a run."""
    stream = ShardedStream([0, 5, 5, 20, 21, 40], 7, 3, 2)
    epochs, ids = stream.get_samples(torch.arange(28, 40))
    assert epochs.tolist() == [0] * 5 + [1] * 7
    assert ids.tolist() == [37, 34, 32, 28, 26, 2, 16, 12, 17, 6, 0, 5]
    assert stream.get_held_out_ids().tolist() == SampleStream(40, 7, 3).get_held_out_ids().tolist()


def test_shards_windows_and_samples_are_shuffled():
    starts = list(range(0, 4001, 100))
    stream = ShardedStream(starts, 0, 0, 4)
    _, first = stream.get_samples(torch.arange(4000))
    _, second = stream.get_samples(4000 + torch.arange(4000))
    assert (first == second).sum() < 15  # one in common is expected
    window = set((first[:400] // 100).tolist())
    assert len(window) == 4
    assert window != set((second[:400] // 100).tolist())
    counts = torch.bincount(first[:100] // 100)[sorted(window)]
    assert counts.min() > 10  # 25 of each are expected
    assert (first[:399] + 1 == first[1:400]).sum() < 10


def test_ten_thousand_shards_are_fast():
    began = time.process_time()
    stream = ShardedStream(range(0, 10**8 + 1, 10**4), 512, 0, 16)
    for start in range(0, 10**9, 10**8 + 12345):
        _, ids = stream.get_samples(torch.arange(start, start + 4096))
        assert len(set(ids.tolist())) == 4096
    assert time.process_time() - began < 5.0


def test_zero_shards_per_window_is_rejected():
    with pytest.raises(UserError, match=r"--shuffle-shards is 0\. Give 1 or more"):
        ShardedStream([0, 4], 0, 0, 0)
