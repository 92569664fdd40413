"""One function makes the time grid of every sampler, so that solvers are not confounded with grids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .schedule import NoiseSchedule

Spacing = Literal["leading", "trailing", "linspace", "quadratic"]
Final = Literal["zero", "sigma_min"]


def time_grid(spacing: Spacing, steps: int, timesteps: int = 1000) -> tuple[int, ...]:
    """Exactly ``steps`` distinct training timesteps in ``[0, timesteps)``, descending.

    ``leading``: ``i * (T // n)`` for i = n-1 … 0, as DDIM in diffusers with ``steps_offset=0``;
    ``trailing``: ``round(T - i*T/n) - 1``, from T-1 down; ``linspace``: n points from T-1 to 0, rounded;
    ``quadratic``: ``linspace(0, sqrt(0.8*T), n)**2``, truncated as in the DDIM code, which never visits t > 0.8 T;
    where that code visits a timestep twice (n > 28 for T = 1000), entries move up to the next free one.
    For one step ``leading`` and ``quadratic`` give t = 0, as the code they come from does.

    Raises:
        UserError: for an unknown spacing, or when n is outside 1 … T.
    """
    if spacing not in get_args(Spacing):
        raise UserError(f"spacing {spacing!r} is not known; use one of {', '.join(get_args(Spacing))}")
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps do not fit into {timesteps} training timesteps; use 1 to {timesteps}")
    grid: NDArray[Any]
    match spacing:
        case "leading":
            grid = (np.arange(steps) * (timesteps // steps))[::-1]
        case "trailing":
            grid = np.round(timesteps - np.arange(steps) * (timesteps / steps)) - 1
        case "linspace":
            grid = np.round(np.linspace(0, timesteps - 1, steps))[::-1] if steps > 1 else np.array([timesteps - 1])
        case "quadratic":
            places = np.arange(steps)
            squares = np.floor(np.linspace(0, np.sqrt(timesteps * 0.8), steps) ** 2)
            # each entry at least one above the one before it
            grid = (np.maximum.accumulate(squares - places) + places)[::-1]
    return tuple(int(t) for t in grid)


def noise_levels(
    schedule: NoiseSchedule, grid: Sequence[int], final: Final = "zero"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """alpha and sigma, each of shape (n + 1,): at the n entries of ``grid``, then at the target of the last step.

    ``final``: that target is the image itself (alpha 1, sigma 0), or the least noisy training timestep.

    Raises:
        UserError: unless the entries descend strictly and lie in ``[0, T)``.
    """
    ends = (schedule.timesteps, *grid, -1)
    if not grid or any(b >= a for a, b in pairwise(ends)):
        raise UserError(f"the time grid {list(grid)} must descend strictly within [0, {schedule.timesteps})")
    entries = np.asarray(grid)
    last = (1.0, 0.0) if final == "zero" else (schedule.alpha[0], schedule.sigma[0])
    return np.append(schedule.alpha[entries], last[0]), np.append(schedule.sigma[entries], last[1])
