"""UniPC (Zhao et al., arXiv 2302.04867), multistep: a predictor, and a corrector that costs no evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.grid import noise_levels
from o2mkd_bench.core.program import Clip, Line, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import UniPCOptions
from .orders import changes, within_experts

Terms = dict[int, float]
"""Factors of predictions, by line."""


class UniPC(Sampler):
    """``UniPCMultistepScheduler`` of diffusers.

    The state of a line is the predicted one, at which the network is evaluated. Predictor and corrector share their
    linear part, so the corrected state is the predicted one plus predictions, and no corrected state need be kept.

    ``history: reset``: the first line of another expert has order 1, and its state, which the former expert led to, is
    not corrected. With ``predict_x0: false`` epsilon alone is read, so ``clip: x0`` does not touch it.
    """

    options: UniPCOptions

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        options = self.options
        alpha, sigma = noise_levels(schedule, grid, options.final)
        held, towards = (sigma, alpha) if options.predict_x0 else (alpha, sigma)
        # a change of expert at an entry, and a step that is the last, leave no corrected state
        broken = changes(grid, edges) if options.history == "reset" else [False] * len(grid)
        lines = []
        correction: Terms = {}
        for i, (t, order) in enumerate(zip(grid, self._orders(grid, edges), strict=True)):
            kept = float(held[i + 1] / held[i])
            last = i + 1 == len(grid)
            predictor, corrector = ({}, {}) if last else self._slopes(alpha, sigma, i, order)
            terms = {i: float(towards[i + 1]) - kept * float(towards[i])}
            _add(terms, predictor, float(towards[i + 1]))
            _add(terms, correction, kept)
            lines.append(Line(t, {i: kept}, x0=terms) if options.predict_x0 else Line(t, {i: kept}, terms))
            correction = {}
            if not last and not broken[i + 1]:
                _add(correction, corrector, float(towards[i + 1]))
                _add(correction, predictor, -float(towards[i + 1]))
        return Program(tuple(lines), clip)

    def _orders(self, grid: Sequence[int], edges: Sequence[int]) -> list[int]:
        n = len(grid)
        orders = [min(self.options.order, i + 1, n - i) for i in range(n)]
        return within_experts(orders, grid, edges) if self.options.history == "reset" else orders

    def _slopes(
        self, alpha: NDArray[np.float64], sigma: NDArray[np.float64], i: int, order: int
    ) -> tuple[Terms, Terms]:
        """What predictor and corrector of the step from entry ``i`` add to its first order, over ``towards``."""
        logs = np.log(alpha[i - order + 1 : i + 2] / sigma[i - order + 1 : i + 2])[::-1]
        width = float(logs[0] - logs[1])
        z = -width if self.options.predict_x0 else width
        scale = z if self.options.solver_type == "bh1" else math.expm1(z)
        # where the other predictions lie, in steps from entry i: those before it, then the coming one
        nodes = np.array([*((logs[2:] - logs[1]) / width), 1.0])
        powers = np.vander(nodes, increasing=True).T
        moments = np.array(_moments(z, order)) / scale
        # the authors' code takes 1/2 where there is but one weight
        behind = np.array([0.5]) if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
        around = np.array([0.5]) if order == 1 else np.linalg.solve(powers, moments)
        lines = [*range(i - 1, i - order, -1), i + 1]
        by = -scale / nodes
        return _differences(behind * by[: len(behind)], lines, i), _differences(around * by[: len(around)], lines, i)


def _moments(z: float, order: int) -> list[float]:
    """``k! * phi_(k+1)(z) * z`` for k = 1 … order; phi as in exponential integrators."""
    found = []
    phi = math.expm1(z) / z - 1
    for k in range(1, order + 1):
        found.append(phi * math.factorial(k))
        phi = phi / z - 1 / math.factorial(k + 1)
    return found


def _differences(weights: NDArray[np.float64], lines: Sequence[int], base: int) -> Terms:
    """Factors of predictions in the weighted sum of their differences from that of line ``base``."""
    found = {j: float(weight) for j, weight in zip(lines, weights, strict=False)}
    found[base] = -float(weights.sum())
    return found


def _add(terms: Terms, others: Mapping[int, float], factor: float) -> None:
    for j, value in others.items():
        terms[j] = terms.get(j, 0.0) + factor * value
