import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quarterview import rng


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# ---------------------------------------------------------------------- uniform


def test_uniform_numbers_are_in_the_unit_interval_and_evenly_distributed():
    u = rng.uniform(0, "crop", 3, torch.arange(20_000), 5)
    assert u.dtype == torch.float32
    assert u.shape == (20_000, 5)
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 / (12 * u.numel()) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 0.002
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_squared = float(((counts - u.numel() / 20) ** 2 / (u.numel() / 20)).sum())
    assert chi_squared < 45  # 19 degrees of freedom: 1 in 1000 beyond 43.8


def test_uniform_numbers_are_multiples_of_2_to_the_minus_24():
    u = rng.uniform(0, "crop", 0, torch.arange(1000), 3).double() * 2**24
    assert torch.equal(u, u.round())


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 10**9), st.lists(st.integers(0, 2**40), min_size=2))
def test_numbers_do_not_depend_on_the_batch(seed, epoch, ids):
    together = rng.uniform(seed, "mask", epoch, torch.tensor(ids), 7)
    alone = [rng.uniform(seed, "mask", epoch, torch.tensor([sample]), 7)[0] for sample in ids]
    assert torch.equal(together, torch.stack(alone))


def test_numbers_do_not_depend_on_their_count():
    ids = torch.arange(9)
    assert torch.equal(rng.uniform(1, "a", 2, ids, 50)[:, :4], rng.uniform(1, "a", 2, ids, 4))


def test_epochs_may_differ_within_a_batch():
    ids, epochs = torch.tensor([5, 5, 9]), torch.tensor([0, 1, 1])
    mixed = rng.uniform(0, "mask", epochs, ids, 6)
    apart = [rng.uniform(0, "mask", int(e), ids[i : i + 1], 6)[0] for i, e in enumerate(epochs)]
    assert torch.equal(mixed, torch.stack(apart))
    assert not torch.equal(mixed[0], mixed[1])


@pytest.mark.parametrize(
    "other",
    [
        {"purpose": "mask"},
        {"purpose": "crop "},
        {"epoch": 1},
        {"epoch": 2**20},
        {"seed": 1},
        {"seed": -1},
        {"ids": torch.arange(1, 20_001)},
    ],
    ids=str,
)
def test_numbers_of_different_names_are_independent(other):
    one = {"seed": 0, "purpose": "crop", "epoch": 0, "ids": torch.arange(20_000), "count": 2}
    a, b = rng.uniform(**one), rng.uniform(**{**one, **other})
    assert abs(correlation(a, b)) < 0.02
    assert float((a == b).float().mean()) < 1e-3


def test_neighbouring_samples_and_neighbouring_numbers_are_independent():
    u = rng.uniform(0, "crop", 0, torch.arange(20_000), 3)
    assert abs(correlation(u[1:], u[:-1])) < 0.02
    assert abs(correlation(u[:, 0], u[:, 1])) < 0.03


def test_the_seed_is_used_modulo_2_to_the_64():
    ids = torch.arange(4)
    assert torch.equal(rng.uniform(-1, "a", 0, ids, 2), rng.uniform(2**64 - 1, "a", 0, ids, 2))


def test_the_bits_never_change():
    """A change of these numbers breaks every run that is resumed."""
    u = rng.uniform(7, "mask", 3, torch.tensor([4711]), 3)[0]
    assert (u * 2**24).long().tolist() == [12377035, 12268607, 7749371]
    assert int(rng.key(0, "order", 1, 2)) == -318103549853904839
    assert rng.permute(0, "order", 0, torch.arange(10), 10).tolist() == [9, 6, 3, 5, 8, 2, 1, 7, 4, 0]


def splitmix(x: int) -> int:
    """Compute the finalizer of SplitMix64 on unsigned integers, as published."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**62), st.integers(0, 2**62))
def test_the_hash_is_splitmix64(seed, epoch, sample):
    golden = 0x9E3779B97F4A7C15
    word = int.from_bytes(hashlib.blake2b(b"mask", digest_size=8).digest(), "little")
    state = splitmix(seed + word)
    for part in (epoch, sample):
        state = splitmix((state + golden) ^ part)
    expected = [splitmix(state + i * golden) >> 40 for i in (1, 2, 3)]
    u = rng.uniform(seed, "mask", epoch, torch.tensor([sample]), 3)[0]
    assert (u * 2**24).long().tolist() == expected


# ---------------------------------------------------------------------- permute


@pytest.mark.parametrize("seed", [0, 1])
def test_permute_is_a_permutation_of_every_small_size(seed):
    for size in range(1, 201):
        places = rng.permute(seed, "order", 5, torch.arange(size), size)
        assert torch.equal(places.sort().values, torch.arange(size)), size


@given(st.integers(1, 50_000), st.integers(0, 2**63), st.integers(0, 10**6))
def test_permute_is_a_permutation(size, seed, epoch):
    places = rng.permute(seed, "order", epoch, torch.arange(size), size)
    assert torch.equal(places.sort().values, torch.arange(size))


def test_permute_of_a_large_size():
    size = 1_000_003
    places = rng.permute(0, "order", 0, torch.arange(size), size)
    assert torch.equal(places.sort().values, torch.arange(size))
    assert abs(correlation(places.double(), torch.arange(size).double())) < 0.01
    assert abs(correlation(places[1:].double(), places[:-1].double())) < 0.01


@given(st.integers(2, 1000), st.data())
def test_a_position_does_not_depend_on_the_other_positions(size, data):
    positions = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    whole = rng.permute(3, "order", 8, torch.arange(size), size)
    assert torch.equal(rng.permute(3, "order", 8, positions, size), whole[positions])


def test_positions_may_span_two_epochs():
    size = 37
    first, second = (rng.permute(0, "order", epoch, torch.arange(size), size) for epoch in (4, 5))
    epochs = torch.tensor([4] * 10 + [5] * 10)
    positions = torch.cat([torch.arange(27, 37), torch.arange(10)])
    assert torch.equal(rng.permute(0, "order", epochs, positions, size), torch.cat([first[27:], second[:10]]))
    assert not torch.equal(first, second)


def test_positions_are_permuted_uniformly():
    size, epochs = 12, 6000
    grid_epochs = torch.arange(epochs).repeat_interleave(size)
    places = rng.permute(0, "order", grid_epochs, torch.arange(size).repeat(epochs), size)
    counts = torch.zeros(size, size).index_put_(
        (torch.arange(size).repeat(epochs), places), torch.ones(size * epochs), accumulate=True
    )
    expected = epochs / size
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


def test_permutations_of_different_names_are_unrelated():
    size = 5000
    one = rng.permute(0, "order", 0, torch.arange(size), size)
    for other in (
        rng.permute(1, "order", 0, torch.arange(size), size),
        rng.permute(0, "holdout", 0, torch.arange(size), size),
        rng.permute(0, "order", 1, torch.arange(size), size),
    ):
        assert int((one == other).sum()) < 10
        assert abs(correlation(one.double(), other.double())) < 0.06


# ---------------------------------------------------------------------- seeded


def global_draws() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_seeded_gives_the_same_numbers_for_the_same_name_and_different_ones_for_others():
    def under(seed, purpose):
        with rng.seeded(seed, purpose):
            return global_draws()

    assert under(0, "init") == under(0, "init")
    for other in (under(1, "init"), under(0, "jitter")):
        assert all(mine != theirs for mine, theirs in zip(under(0, "init"), other, strict=True))


def test_seeded_restores_the_global_generators():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = global_draws()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with rng.seeded(0, "init"):
        global_draws()
    assert global_draws() == expected


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def fail() -> None:
        with rng.seeded(0, "init"):
            global_draws()
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
