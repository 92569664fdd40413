"""DPM-Solver (Lu et al., arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095), multistep and singlestep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import DPMSolverOptions
from .orders import multistep_orders, within_experts


class DPMSolver(Sampler):
    """The solvers of diffusers' ``DPMSolverMultistepScheduler`` and ``DPMSolverSinglestepScheduler`` as tables.

    ``history: reset``: a line whose timestep lies in another interval than that of the line before has order 1 and
    starts from its own state; the k-th line after it has at most order k + 1. So no line combines predictions of two
    experts. This holds for singlestep too: a step that an edge cuts ends there, and a shorter one begins.

    ``dpmsolver`` reads epsilon only, so ``clip: x0`` does not touch it and ``x0+epsilon`` does. With ``sigma_min`` and
    a grid that ends at t = 0 a last line that starts from that entry has no way to go and copies its state.
    """

    options: DPMSolverOptions

    def orders(self, grid: Sequence[int], edges: Sequence[int] = ()) -> tuple[int, ...]:
        """The order of each line.

        Raises:
            UserError: for ``singlestep`` without ``lower_order_final`` when the order does not divide the steps.
        """
        options = self.options
        if options.kind == "multistep":
            wanted = multistep_orders(options.order, len(grid), options.lower_order_final, options.final)
        else:
            wanted = self._singlestep_orders(len(grid))
        return tuple(wanted if options.history == "keep" else within_experts(wanted, grid, edges))

    def _singlestep_orders(self, steps: int) -> list[int]:
        order, lower = self.options.order, self.options.lower_order_final
        if not lower and steps % order:
            raise UserError(
                f"singlestep dpm_solver of order {order} cannot end on {steps} steps; use a multiple of {order} or set "
                "lower_order_final: true"
            )
        orders = [i % order + 1 for i in range(steps)]
        # the last line stands alone, so that a whole step before it is cut short by one
        if (lower and steps % order == 0) or self.options.final == "zero":
            orders[-1] = 1
        return orders

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        alpha, sigma = noise_levels(schedule, grid, self.options.final)
        orders = self.orders(grid, edges)
        return Program(tuple(self._line(t, i, orders[i], alpha, sigma) for i, t in enumerate(grid)), clip)

    def _line(self, t: int, i: int, order: int, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> Line:
        """Line ``i``: the exact linear part from its base node, and the integral of what is interpolated there."""
        plus, multistep = self.options.algorithm == "dpmsolver++", self.options.kind == "multistep"
        base = i if multistep else i - order + 1
        towards, held = (alpha, sigma) if plus else (sigma, alpha)
        width = _log_ratio(alpha, sigma, i + 1) - _log_ratio(alpha, sigma, base)
        others = [i - k for k in ((1, 2) if multistep else (0, 1))][: order - 1] if width else []
        nodes = [(_log_ratio(alpha, sigma, j) - _log_ratio(alpha, sigma, base)) / width for j in others]
        first, *differences = self._weights(-width if plus else width, nodes)
        predictions = {base: first}
        for j, node, weight in zip(others, nodes, differences, strict=True):
            predictions[j] = weight / node
            predictions[base] -= weight / node
        scaled = {j: float(towards[i + 1]) * value for j, value in predictions.items()}
        states = {base: float(held[i + 1] / held[base])}
        return Line(t, states, x0=scaled) if plus else Line(t, states, epsilon=scaled)

    def _weights(self, z: float, nodes: Sequence[float]) -> tuple[float, ...]:
        """Of the prediction at the base, and of the slope from there to each of ``nodes`` (in units of the step).

        ``z``: the signed width of the step in log(alpha / sigma).
        """
        constant = -math.expm1(z)
        if not nodes:
            return (constant,)
        multistep, midpoint = self.options.kind == "multistep", self.options.solver_type == "midpoint"
        if len(nodes) == 1 and midpoint:
            return (constant, 0.5 * constant)
        linear = 1 - math.expm1(z) / z
        if len(nodes) == 1:
            return (constant, linear)
        if midpoint and not multistep:
            return (constant, linear, 0.0)
        # the parabola's second derivative is twice the second difference; the authors' multistep code, and diffusers
        # after it, leave the two out, so that multistep order 3 converges with order 2
        square = (1.0 if multistep else 2.0) * (0.5 - (math.expm1(z) - z) / z**2)
        near, far = nodes
        gap = near - far
        return (constant, (square - linear * far) / gap, (linear * near - square) / gap)


def _log_ratio(alpha: NDArray[np.float64], sigma: NDArray[np.float64], i: int) -> float:
    return math.log(alpha[i] / sigma[i]) if sigma[i] else math.inf
