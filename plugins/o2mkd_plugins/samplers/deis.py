"""DEIS (Zhang & Chen, arXiv 2204.13902), the multistep variant with polynomials in log rho."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import DEISOptions
from .orders import multistep_orders, within_experts


class DEIS(Sampler):
    """``DEISMultistepScheduler`` of diffusers: epsilon, interpolated in log(sigma / alpha), is integrated exactly.

    It reads epsilon only, so ``clip: x0`` does not touch it and ``x0+epsilon`` does. With ``sigma_min`` and a grid that
    ends at t = 0 the last line copies its state.
    """

    options: DEISOptions

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        options = self.options
        alpha, sigma = noise_levels(schedule, grid, options.final)
        orders = multistep_orders(options.order, len(grid), options.lower_order_final, options.final)
        if options.history == "reset":
            orders = within_experts(orders, grid, edges)
        rho = sigma / alpha
        lines = []
        for i, t in enumerate(grid):
            scale = float(alpha[i + 1])
            weights = _integrals(rho, i, orders[i])
            epsilon = {i - k: scale * float(weight) for k, weight in enumerate(weights)}
            lines.append(Line(t, {i: scale / float(alpha[i])}, epsilon))
        return Program(tuple(lines), clip)


def _integrals(rho: NDArray[np.float64], i: int, order: int) -> NDArray[np.float64]:
    """Integrals from ``rho[i]`` to ``rho[i + 1]`` of the Lagrange polynomials in log rho through entries i, i-1, …

    They are the weights that integrate every power of ``z = log(rho / rho[i])`` below ``order`` exactly.
    """
    start, ratio = float(rho[i]), float(rho[i + 1] / rho[i])
    moments = [start * (ratio - 1)]
    for k in range(1, order):
        moments.append(start * math.log(ratio) ** k * ratio - k * moments[-1])
    nodes = np.log(rho[i - order + 1 : i + 1][::-1] / start)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
