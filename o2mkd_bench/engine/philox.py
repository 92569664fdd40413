"""Counter-based random numbers: value n is a pure function of key, counter and n, on every device.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in int64 tensor arithmetic.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Blocks computed at once: on the CPU the words then stay in the cache, on a device the launches are what costs.
_CPU_BLOCKS = 1 << 14
_DEVICE_BLOCKS = 1 << 22

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: int) -> Words:
    """The four output words of each counter.

    Args:
        counter: four int64 tensors with values in [0, 2^32) that broadcast together, least significant word first.
        key: 64 bits, the low word first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, key >> 32
    for _ in range(_ROUNDS):
        # The products are wanted modulo 2^64, which is how int64 wraps; only words that are multiplied need masking.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ c1 ^ k0) & MASK
        c2 = ((p0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    return c0, c1 & MASK, c2, c3 & MASK


class Philox:
    """A family of random sequences, one for each 64-bit counter.

    The 128-bit Philox counter is, from its low end: block of four numbers within the sequence (32 bits), ``stream``
    (32 bits), the counter (64 bits). So the numbers of a counter depend neither on the other counters asked for with
    it nor on how many numbers are asked for.
    """

    def __init__(self, key: int) -> None:
        if not 0 <= key < 1 << 64:
            raise ValueError(f"a Philox key has 64 bits, got {key}")
        self.key = key

    @classmethod
    def for_purpose(cls, seed: int, purpose: str) -> Philox:
        """The generator of one purpose (``"noise"``, ``"sample"`` …): its key is a SHA-256 of seed and purpose."""
        digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
        return cls(int.from_bytes(digest[:8], "little"))

    @classmethod
    def torch_seed(cls, seed: int, purpose: str) -> int:
        """A seed of one purpose for torch's own generators, which take 63 bits."""
        return cls.for_purpose(seed, purpose).key & (2**63 - 1)

    def uint32(self, counters: Tensor, elements: int, stream: int = 0) -> Tensor:
        """Integers in [0, 2^32), int64 (n, elements), for ``counters`` int64 (n,), on their device."""
        out = torch.empty(len(counters), _blocks(elements), 4, dtype=torch.int64, device=counters.device)
        for rows, words in self._words(counters, elements, stream):
            for i, word in enumerate(words):
                out[rows, :, i] = word
        return out.flatten(1)[:, :elements]

    def uniform(self, counters: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
        """Uniform numbers in [0, 1) with 24 random bits, float32 (n, *shape), for ``counters`` int64 (n,)."""
        words = self.uint32(counters, math.prod(shape), stream)
        return ((words >> 8).float() * 2.0**-24).view(-1, *shape)

    def normal(self, counters: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
        """Standard normal numbers, float32 (n, *shape), for ``counters`` int64 (n,), by Box and Muller (1958)."""
        elements = math.prod(shape)
        if counters.is_cuda and _has_triton():
            from . import philox_cuda

            out = philox_cuda.normal(counters, self.key, _checked(stream), _blocks(elements))
            return out.flatten(1)[:, :elements].reshape(-1, *shape)
        out = torch.empty(len(counters), _blocks(elements), 4, dtype=torch.float32, device=counters.device)
        for rows, (w0, w1, w2, w3) in self._words(counters, elements, stream):
            for i, (radial, angular) in enumerate(((w0, w1), (w2, w3))):
                # In float64 libraries disagree far below what float32 can show: devices, and a vectorised loop and
                # its scalar tail, then round to the same numbers.
                radius = radial.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
                angle = angular.double().mul_(2.0**-31 * math.pi)
                out[rows, :, 2 * i] = radius * angle.cos()
                out[rows, :, 2 * i + 1] = radius.mul_(angle.sin_())
        return out.flatten(1)[:, :elements].reshape(-1, *shape)

    def _words(self, counters: Tensor, elements: int, stream: int) -> Iterator[tuple[slice, Words]]:
        """Slices of rows and their words, each int64 (rows, blocks), so that temporaries stay small."""
        blocks = _blocks(elements)
        block = torch.arange(blocks, device=counters.device)
        limit = _CPU_BLOCKS if counters.device.type == "cpu" else _DEVICE_BLOCKS
        chunk = max(1, limit // max(1, blocks))
        for start in range(0, len(counters), chunk):
            some = counters[start : start + chunk, None]
            words = (block, torch.full_like(block[:1], _checked(stream)), some & MASK, (some >> 32) & MASK)
            yield slice(start, start + chunk), philox4x32(words, self.key)


def _blocks(elements: int) -> int:
    return -(-elements // 4)


def _checked(stream: int) -> int:
    if not 0 <= stream <= MASK:
        raise ValueError(f"a Philox stream has 32 bits, got {stream}")
    return stream


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
