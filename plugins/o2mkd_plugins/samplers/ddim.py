"""DDIM (Song et al., arXiv 2010.02502), each step aimed at the next entry of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import DDIMOptions


def ddim_program(schedule: NoiseSchedule, grid: Sequence[int], eta: float, clip: Clip) -> Program:
    """Equation 12 on ``grid``; the last target is sigma 0 (``set_alpha_to_one=True`` in diffusers), without noise."""
    alpha, sigma = noise_levels(schedule, grid)
    lines = []
    for i, t in enumerate(grid):
        beta = 1 - (alpha[i] / alpha[i + 1]) ** 2
        noise = eta * float(sigma[i + 1] / sigma[i]) * math.sqrt(beta)
        # at eta 1 rounding may take the difference below zero
        direction = math.sqrt(max(0.0, float(sigma[i + 1]) ** 2 - noise**2))
        lines.append(Line(t, epsilon={i: direction}, x0={i: float(alpha[i + 1])}, noise=noise))
    return Program(tuple(lines), clip)


class DDIM(Sampler):
    """Deterministic at ``eta`` 0; with ``clip: x0`` epsilon stays as predicted, as in diffusers."""

    options: DDIMOptions

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        return ddim_program(schedule, grid, self.options.eta, clip)
