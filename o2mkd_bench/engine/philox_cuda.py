"""Normal numbers of :mod:`o2mkd_bench.engine.philox` in one kernel; imported only where Triton and CUDA are."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["blocks", "key_low", "key_high", "stream"])  # type: ignore[untyped-decorator]
def _normal(  # type: ignore[no-untyped-def]
    counters,
    out,
    blocks,
    key_low,
    key_high,
    stream,
    turn: tl.constexpr,
    size: tl.constexpr,
):
    place = tl.program_id(1) * size + tl.arange(0, size)
    inside = place < blocks
    counter = tl.load(counters + tl.program_id(0))
    zero = tl.zeros((size,), tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        place.to(tl.uint32),
        zero + stream.to(tl.uint32),
        zero + (counter & 0xFFFFFFFF).to(tl.uint32),
        zero + ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero + key_low.to(tl.uint32),
        zero + key_high.to(tl.uint32),
    )
    here = out + (tl.program_id(0).to(tl.int64) * blocks + place) * 4
    for pair in tl.static_range(2):
        radial = w0 if pair == 0 else w2
        angular = w1 if pair == 0 else w3
        # float64, as everywhere: what libraries disagree on is then far below what float32 shows
        radius = tl.sqrt(-2.0 * tl.log((radial.to(tl.float64) + 0.5) * 2.0**-32))
        angle = angular.to(tl.float64) * turn
        tl.store(here + 2 * pair, (radius * tl.cos(angle)).to(tl.float32), mask=inside)
        tl.store(here + 2 * pair + 1, (radius * tl.sin(angle)).to(tl.float32), mask=inside)


def normal(counters: Tensor, key: int, stream: int, blocks: int) -> Tensor:
    """Four normal numbers for each of ``blocks`` blocks of each counter: float32 (n, blocks, 4).

    ``counters``: int64 (n,), on the device. See :meth:`o2mkd_bench.engine.philox.Philox.normal`.
    """
    out = torch.empty(len(counters), blocks, 4, dtype=torch.float32, device=counters.device)
    if out.numel():
        grid = (len(counters), triton.cdiv(blocks, _BLOCK))
        low, high = key & 0xFFFFFFFF, key >> 32
        with torch.cuda.device_of(counters):  # type: ignore[no-untyped-call]
            _normal[grid](counters.contiguous(), out, blocks, low, high, stream, turn=2.0**-31 * math.pi, size=_BLOCK)
    return out
