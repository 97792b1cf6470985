"""Stateless random numbers: each is a pure function of (seed, purpose, epoch, sample id).

They do not depend on the batch, the device, the number of workers or ranks, or earlier random numbers. So a
run can be resumed from any step, and the augmentation of a sample in an epoch can always be reproduced.

The hash is the finalizer of SplitMix64 (Steele et al. 2014) on int64 tensors. It is integer arithmetic only,
so CPU and GPU give the same bits.
"""

import contextlib
import functools
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_FEISTEL_ROUNDS = 6


def _to_int64(value: int) -> int:
    """Return the int64 whose bits are those of `value` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _to_int64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _to_int64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _to_int64(0x94D049BB133111EB)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's >> is an arithmetic shift, which copies the sign


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64."""
    x = (x ^ _logical_shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _logical_shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _logical_shift_right(x, 31)


@functools.cache
def _hash_purpose(purpose: str) -> int:
    return _to_int64(int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little"))


def key(seed: int, purpose: str, *parts: int | Tensor) -> Tensor:
    """Return a 64-bit key for each element of the broadcast `parts`: int64, on the device of `parts`."""
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    state = _mix(torch.tensor(_to_int64(seed), device=device) + _hash_purpose(purpose))
    for part in parts:
        state = _mix((state + _GOLDEN) ^ part)
    return state


def uniform(seed: int, purpose: str, epoch: int | Tensor, ids: Tensor, count: int) -> Tensor:
    """Draw `count` uniform random numbers in [0, 1) for each sample.

    Args:
        seed: the seed of the run.
        purpose: name of the use, such as ``"crop"`` or ``"mask"``. Different names give independent numbers.
        epoch: int, or int64 [B] if a batch spans two epochs.
        ids: int64 [B], the sample ids.
        count: how many numbers are drawn for each sample.

    Returns:
        float32 [B, count] on the device of `ids`, multiples of 2**-24.
    """
    counter = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    bits = _mix(key(seed, purpose, epoch, ids)[:, None] + counter)  # [B, count]
    return _logical_shift_right(bits, 40).to(torch.float32) * 2.0**-24


def permute(seed: int, purpose: str, epoch: int | Tensor, positions: Tensor, size: int) -> Tensor:
    """Map positions by a random permutation of ``range(size)``, in constant memory.

    The permutation is a Feistel network on the smallest even number of bits that can represent `size`, with
    cycle walking until the value is in the range (Black and Rogaway 2002).

    Args:
        positions: int64 [B], each in ``range(size)``.
        epoch: int, or int64 [B] to use the permutation of a different epoch for each position.

    Returns:
        int64 [B]; for a fixed epoch, distinct positions give distinct results.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    round_indices = torch.arange(_FEISTEL_ROUNDS, device=positions.device)[:, None]
    round_keys = key(seed, purpose, size, epoch, round_indices).unbind(0)  # each [1] or [B]

    def encrypt(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        return (left << half) | right

    result = encrypt(positions)
    while (outside := result >= size).any():
        result = torch.where(outside, encrypt(result), result)
    return result


@contextlib.contextmanager
def seeded(seed: int, purpose: str, *parts: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and random within a context.

    They are seeded from (seed, purpose, parts); their previous states are restored at the end.
    """
    value = int(key(seed, purpose, *parts)) & 0xFFFFFFFF
    torch_state, numpy_state, random_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(value)
        np.random.seed(value)
        random.seed(value)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(random_state)
