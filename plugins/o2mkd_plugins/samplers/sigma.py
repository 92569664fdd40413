"""Euler's and Heun's method in sigma / alpha (Karras et al., arXiv 2206.00364, algorithm 1 without churn)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import SigmaOptions


class Euler(Sampler):
    """``EulerDiscreteScheduler`` of diffusers, down to sigma 0.

    States are those of the training, ``alpha * x0 + sigma * noise``: what diffusers' ``scale_model_input`` makes of its
    own. The slope is that to the clipped x0, so that ``clip: x0`` and ``x0+epsilon`` are one.
    """

    options: SigmaOptions

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        alpha, sigma = noise_levels(schedule, grid)
        lines = tuple(_euler(t, k, k, alpha, sigma) for k, t in enumerate(grid))
        return Program(lines, clip, self._start(sigma))

    def _start(self, sigma: NDArray[np.float64]) -> float:
        return 1.0 if self.options.start == "one" else float(sigma[0])


class Heun(Euler):
    """``HeunDiscreteScheduler`` of diffusers: two evaluations a step, the second at the entry the step leads to.

    The last step, to sigma 0, is Euler's, where no network can be asked: n steps are 2 n - 1 evaluations. A step that
    crosses an edge averages the slopes of two experts.
    """

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        alpha, sigma = noise_levels(schedule, grid)
        ratio = sigma / alpha
        lines = []
        for k, t in enumerate(grid):
            i = 2 * k
            lines.append(_euler(t, i, k, alpha, sigma))
            if k + 1 == len(grid):
                break
            half, scale = float(ratio[k + 1] - ratio[k]) / 2, float(alpha[k + 1])
            here, there = half / float(ratio[k]), half / float(ratio[k + 1])
            states = {i: scale / float(alpha[k]) * (1 + here), i + 1: there}
            lines.append(Line(grid[k + 1], states, x0={i: -scale * here, i + 1: -scale * there}))
        return Program(tuple(lines), clip, self._start(sigma))


def _euler(t: int, i: int, k: int, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> Line:
    """Line ``i``, from grid entry ``k`` straight to the next."""
    kept = float(sigma[k + 1] / sigma[k])
    return Line(t, {i: kept}, x0={i: float(alpha[k + 1]) - kept * float(alpha[k])})
