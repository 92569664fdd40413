"""PNDM (Liu et al., arXiv 2202.09778): linear multistep of order 4 in epsilon, by the transfer of DDIM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import PNDMOptions
from .orders import changes, within_experts

Level = tuple[float, float]
"""alpha and sigma."""

# Adams-Bashforth, newest prediction first
_ADAMS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_RUNGE_KUTTA_STEPS = 3


class PNDM(Sampler):
    """``PNDMScheduler`` of diffusers, each step aimed at the next entry of the grid.

    diffusers aims at ``t - T // n``, which is that entry on leading grids, and on trailing ones where n divides T. Its
    Runge-Kutta steps are the same where the distance of two entries is even. It reads epsilon only, so ``clip: x0``
    does not touch it and ``x0+epsilon`` does. With ``sigma_min`` and a grid that ends at t = 0 the last line copies its
    state. ``history: reset`` is about multistep: a Runge-Kutta step that crosses an edge mixes two experts.
    """

    options: PNDMOptions

    def nfe(self, steps: int) -> int:
        if self.options.warmup == "prk":
            return steps + 3 * _RUNGE_KUTTA_STEPS
        return steps + (steps > 1)

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        """Raises UserError for ``prk`` with fewer than 4 steps, and where ``offset`` leads beyond T."""
        grid = [t + self.options.offset for t in grid]
        alpha, sigma = noise_levels(schedule, grid, self.options.final)
        levels = [(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]
        orders = [min(k + 1, len(_ADAMS)) for k in range(len(grid))]
        if self.options.history == "reset":
            orders = within_experts(orders, grid, edges)
        prk = self.options.warmup == "prk"
        lines = self._runge_kutta(schedule, grid, levels) if prk else self._twice(grid, edges, levels)
        # number of the line that evaluates each entry for the multistep
        numbers = [4 * k for k in range(_RUNGE_KUTTA_STEPS)] if prk else [0]
        for k in range(len(numbers), len(grid)):
            numbers.append(len(lines))
            weights = dict(zip(reversed(numbers), _ADAMS[orders[k]], strict=False))
            lines.append(_transfer(grid[k], len(lines), levels[k], levels[k + 1], weights))
        return Program(tuple(lines), clip)

    def _twice(self, grid: Sequence[int], edges: Sequence[int], levels: Sequence[Level]) -> list[Line]:
        """To the second entry, and once more with the mean of the predictions at both ends."""
        start, end = levels[0], levels[1]
        lines = [_transfer(grid[0], 0, start, end, {0: 1.0})]
        if len(grid) > 1:
            alone = self.options.history == "reset" and changes(grid, edges)[1]
            lines.append(_transfer(grid[1], 0, start, end, {0: 1.0} if alone else {0: 0.5, 1: 0.5}))
        return lines

    def _runge_kutta(self, schedule: NoiseSchedule, grid: Sequence[int], levels: Sequence[Level]) -> list[Line]:
        """Three steps of four evaluations: at the entry, twice half way, at the next entry."""
        if len(grid) <= _RUNGE_KUTTA_STEPS:
            raise UserError(
                f"pndm with warmup: prk needs more than {_RUNGE_KUTTA_STEPS} steps and has {len(grid)}; "
                "take more steps or set warmup: plms"
            )
        lines: list[Line] = []
        for k in range(_RUNGE_KUTTA_STEPS):
            i, start, end = 4 * k, levels[k], levels[k + 1]
            half = grid[k + 1] + (grid[k] - grid[k + 1]) // 2
            middle = (float(schedule.alpha[half]), float(schedule.sigma[half]))
            mean = {i + j: weight for j, weight in enumerate(_RUNGE_KUTTA)}
            lines += [
                _transfer(grid[k], i, start, middle, {i: 1.0}),
                _transfer(half, i, start, middle, {i + 1: 1.0}),
                _transfer(half, i, start, end, {i + 2: 1.0}),
                _transfer(grid[k + 1], i, start, end, mean),
            ]
        return lines


def _transfer(t: int, base: int, start: Level, end: Level, weights: Mapping[int, float]) -> Line:
    """The line that evaluates ``t`` and takes state ``base`` from ``start`` to ``end`` along weighted epsilons.

    Equation 11 of the paper, which is a step of DDIM.
    """
    kept = end[0] / start[0]
    gain = end[1] - kept * start[1]
    return Line(t, {base: kept}, {j: weight * gain for j, weight in weights.items()})
