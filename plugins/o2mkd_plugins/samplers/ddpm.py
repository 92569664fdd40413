"""Ancestral sampling of DDPM (Ho et al., arXiv 2006.11239) on any time grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import DDPMOptions


class DDPM(Sampler):
    """Draws from q(x_s | x_t, x0) with the predicted x0; the last step goes to sigma 0 and adds no noise.

    Beta of a step that skips timesteps is that of the shortened chain, ``1 - (alpha_t / alpha_s)**2``.
    """

    options: DDPMOptions

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        alpha, sigma = noise_levels(schedule, grid)
        lines = []
        for i, t in enumerate(grid):
            ratio, inner = float(alpha[i] / alpha[i + 1]), float((sigma[i + 1] / sigma[i]) ** 2)
            beta = 1 - ratio**2
            last = i == len(grid) - 1
            variance = beta if self.options.variance == "fixed_large" else inner * beta
            lines.append(
                Line(
                    t,
                    states={i: ratio * inner},
                    x0={i: float(alpha[i + 1] / sigma[i] ** 2) * beta},
                    noise=0.0 if last else math.sqrt(variance),
                )
            )
        return Program(tuple(lines), clip)
