"""Which order each line of a multistep solver has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from o2mkd_bench.core.grid import Final

# diffusers lowers the last orders of samplers with fewer steps than this
_FEW = 15


def multistep_orders(order: int, steps: int, lower_order_final: bool, final: Final) -> list[int]:
    """As many predictions as there are, at most ``order``; fewer at the end, where that is asked for or cannot be else.

    Those of ``DPMSolverMultistepScheduler`` and ``DEISMultistepScheduler`` of diffusers.
    """
    orders = [min(order, i + 1) for i in range(steps)]
    few = lower_order_final and steps < _FEW
    if few or final == "zero":
        orders[-1] = 1
    if few and steps > 1:
        orders[-2] = min(orders[-2], 2)
    return orders


def changes(grid: Sequence[int], edges: Sequence[int]) -> list[bool]:
    """For each entry of ``grid`` whether another expert answers than for the entry before."""
    owners = [bisect_right(edges, t) for t in grid]
    return [i > 0 and owners[i] != owners[i - 1] for i in range(len(grid))]


def within_experts(orders: Sequence[int], grid: Sequence[int], edges: Sequence[int]) -> list[int]:
    """``orders``, one an entry of ``grid``, cut so that no line looks back to an entry of another expert."""
    found: list[int] = []
    own = 0
    for order, changed in zip(orders, changes(grid, edges), strict=True):
        own = 1 if changed else own + 1
        found.append(min(order, own))
    return found
