"""The generator against the published vectors, and what it promises about order, subsets and purposes."""

import math
import os
import subprocess
import sys

import pytest
import torch

from o2mkd_bench.engine.philox import MASK, Philox, philox4x32

# Random123 1.14, kat_vectors, philox4x32 10: counter, key, result; words from least to most significant
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference(counter: list[int], key: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c, k = list(counter), [key % 2**32, key // 2**32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == result


def test_counter_layout():
    generator = Philox.for_purpose(7, "layout")
    counter = (5 << 32) + 9
    found = generator.uint32(torch.tensor([3, counter]), 11, stream=2)
    assert found.shape == (2, 11)
    expected = [word for block in range(3) for word in reference([block, 2, 9, 5], generator.key)]
    assert found[1].tolist() == expected[:11]


def test_negative_counters_are_two_s_complement():
    generator = Philox(0)
    assert generator.uint32(torch.tensor([-1]), 4)[0].tolist() == reference([0, 0, MASK, MASK], 0)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_values_depend_on_nothing_else_asked_for(draw):
    sample = getattr(Philox.for_purpose(0, "purity"), draw)
    counters = torch.tensor([4, 2**40, 0, 17, 3])
    whole = sample(counters, (3, 5, 7))
    assert whole.shape == (5, 3, 5, 7)
    assert whole.dtype == torch.float32
    for row, counter in enumerate(counters):
        assert torch.equal(sample(counter[None], (3, 5, 7))[0], whole[row])
        assert torch.equal(sample(counter[None], (13,))[0], whole[row].flatten()[:13])
    assert torch.equal(sample(counters.flip(0), (3, 5, 7)), whole.flip(0))


def test_chunks_leave_no_trace(monkeypatch):
    generator, counters = Philox.for_purpose(1, "chunks"), torch.arange(7)
    whole = generator.normal(counters, (10,))
    for blocks in (1, 3, 8):
        monkeypatch.setattr("o2mkd_bench.engine.philox._CPU_BLOCKS", blocks)
        assert torch.equal(generator.normal(counters, (10,)), whole)


def test_normal_is_box_muller_of_the_words():
    generator, counters = Philox.for_purpose(3, "normal"), torch.tensor([12])
    words = generator.uint32(counters, 8)[0].tolist()
    expected = []
    for a, b in zip(words[::2], words[1::2], strict=True):
        radius, angle = math.sqrt(-2 * math.log((a + 0.5) / 2**32)), 2 * math.pi * b / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert generator.normal(counters, (8,))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_moments():
    generator, counters = Philox.for_purpose(0, "moments"), torch.arange(64)
    x = generator.normal(counters, (1024,)).double()
    # five standard errors of each moment of 2^16 numbers
    error = 5 / math.sqrt(x.numel())
    assert abs(x.mean()) < error
    assert abs(x.square().mean() - 1) < error * math.sqrt(2)
    assert abs(x.pow(4).mean() - 3) < error * math.sqrt(96)
    assert abs((x[:, 0::2] * x[:, 1::2]).mean()) < error * math.sqrt(2)
    u = generator.uniform(counters, (1024,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < error * math.sqrt(1 / 12)


def test_purposes_seeds_and_streams_differ():
    counters = torch.arange(2)
    draws = [
        Philox.for_purpose(0, "noise").uint32(counters, 8),
        Philox.for_purpose(0, "batch").uint32(counters, 8),
        Philox.for_purpose(1, "noise").uint32(counters, 8),
        Philox.for_purpose(0, "noise").uint32(counters, 8, stream=1),
    ]
    assert len({value for draw in draws for value in draw.flatten().tolist()}) == 4 * 16
    assert torch.equal(draws[0], Philox.for_purpose(0, "noise").uint32(counters, 8))


def test_nothing_asked_for():
    generator = Philox(1)
    assert generator.normal(torch.empty(0, dtype=torch.int64), (3, 4)).shape == (0, 3, 4)
    assert generator.uint32(torch.arange(3), 0).shape == (3, 0)


def test_out_of_range():
    with pytest.raises(ValueError, match="64 bits"):
        Philox(1 << 64)
    with pytest.raises(ValueError, match="32 bits"):
        Philox(0).uniform(torch.arange(1), (4,), stream=1 << 32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    generator, counters = Philox.for_purpose(0, "device"), torch.arange(32)
    assert torch.equal(generator.uint32(counters.cuda(), 99).cpu(), generator.uint32(counters, 99))
    here, there = generator.normal(counters, (3, 32, 32)), generator.normal(counters.cuda(), (3, 32, 32)).cpu()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-7)


KERNEL = """
import torch
from o2mkd_bench.engine import philox_cuda
from o2mkd_bench.engine.philox import Philox

counters = torch.tensor([0, 1, 77, (5 << 32) + 3, (1 << 62) - 1])
for key, stream, elements in ((1, 0, 8), (2**64 - 1, 1, 4), (0xDEADBEEF12345678, 2**32 - 1, 4100)):
    ours = philox_cuda.normal(counters, key, stream, -(-elements // 4)).flatten(1)[:, :elements]
    assert torch.equal(ours, Philox(key).normal(counters, (elements,), stream)), (key, stream, elements)
assert philox_cuda.normal(counters[:0], 1, 0, 3).shape == (0, 3, 4)
"""


def test_the_kernel_for_devices_draws_the_same():
    pytest.importorskip("triton", reason="the kernel is Triton's")
    # Triton's interpreter, which must be asked for before Triton is imported
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
