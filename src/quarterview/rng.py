"""Keyed randomness: every draw is a pure function of (seed, epoch, sample id, purpose).

Nothing here has state. A draw does not depend on the batch it is made in, on the device, on the
number of workers or ranks, or on what was drawn before, so a run can be stopped anywhere and
resumed, and "what did sample 4711 look like at epoch 3" always has the same answer.

The hash is the finaliser of SplitMix64 (Steele et al. 2014) on two's-complement int64 tensors:
integer arithmetic alone, hence the same bits on CPU and GPU.
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


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical: torch's >> copies the sign


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


@functools.cache
def _word(purpose: str) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little"))


def key(seed: int, purpose: str, *parts: int | Tensor) -> Tensor:
    """One 64-bit key for each element of the broadcast `parts`: int64, on the device of `parts`."""
    device = next((part.device for part in parts if isinstance(part, Tensor)), None)
    state = _mix(torch.tensor(_signed(seed), device=device) + _word(purpose))
    for part in parts:
        state = _mix((state + _GOLDEN) ^ part)
    return state


def uniform(seed: int, purpose: str, epoch: int | Tensor, ids: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each sample.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, such as ``"crop"`` or ``"mask"``; another purpose gives
            independent numbers.
        epoch: int, or int64 [B] where a batch straddles two epochs.
        ids: int64 [B], the samples.
        count: how many numbers a sample needs.

    Returns:
        float32 [B, count] on the device of `ids`, multiples of 2**-24.
    """
    counter = torch.arange(1, count + 1, device=ids.device) * _GOLDEN
    bits = _mix(key(seed, purpose, epoch, ids)[:, None] + counter)  # [B, count]
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def permute(seed: int, purpose: str, epoch: int | Tensor, positions: Tensor, size: int) -> Tensor:
    """Where a keyed permutation of ``range(size)`` sends each position, in constant memory.

    A Feistel network on the smallest even number of bits that holds `size`, walked along its
    cycles until it lands inside the range (Black and Rogaway 2002), so no shuffle is stored.

    Args:
        positions: int64 [B], each in ``range(size)``.
        epoch: int, or int64 [B]: each position may ask another epoch's permutation.

    Returns:
        int64 [B]; for a fixed epoch, distinct positions give distinct results.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    numbered = torch.arange(_FEISTEL_ROUNDS, device=positions.device)[:, None]
    rounds = key(seed, purpose, size, epoch, numbered).unbind(0)  # each [1] or [B]

    def encrypt(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for round_key in rounds:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        return (left << half) | right

    result = encrypt(positions)
    while (outside := result >= size).any():
        result = torch.where(outside, encrypt(result), result)
    return result


@contextlib.contextmanager
def seeded(seed: int, purpose: str, *parts: int) -> Iterator[None]:
    """Run code that draws from the global generators of torch, numpy and random as a keyed draw.

    The generators are seeded from (seed, purpose, parts) and put back as they were afterwards.
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
