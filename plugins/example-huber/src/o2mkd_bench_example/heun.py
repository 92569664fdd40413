"""Heun's method as a table of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from o2mkd_bench import Line, NoiseSchedule, Program, Sampler
from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip


class Heun(Sampler):
    """The sampler of Karras et al. (arXiv 2206.00364, algorithm 1) on the timesteps a network was trained with.

    With ``y = x / alpha`` and ``r = sigma / alpha`` the probability-flow ODE is ``dy/dr = epsilon``. A step from r to s
    goes there with the epsilon at r, evaluates again, and goes from r to s with the mean of both. The last step, to
    sigma 0, is Euler's, so that n steps cost 2n - 1 evaluations.

    Clipping touches the last step alone with ``clip: x0``; ``x0+epsilon`` touches every step.
    """

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        alpha, sigma = (level.tolist() for level in noise_levels(schedule, grid))
        lines: list[Line] = []
        for i, t in enumerate(grid[:-1]):
            now = len(lines)
            keep = alpha[i + 1] / alpha[i]
            width = alpha[i + 1] * (sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i])
            lines.append(Line(t, states={now: keep}, epsilon={now: width}))
            lines.append(Line(grid[i + 1], states={now: keep}, epsilon={now: width / 2, now + 1: width / 2}))
        lines.append(Line(grid[-1], x0={len(lines): 1.0}))
        return Program(tuple(lines), clip)
