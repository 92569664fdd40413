"""Time grids and the noise levels on them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDIMScheduler

from o2mkd_bench import NoiseSchedule, UserError
from o2mkd_bench.core.grid import noise_levels, time_grid


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_every_number_of_steps_gives_that_many_descending_entries(spacing):
    for steps in range(1, 1001):
        grid = time_grid(spacing, steps)
        assert len(grid) == steps
        assert grid[-1] >= 0
        assert grid[0] <= 999
        assert all(a > b for a, b in pairwise(grid))


# diffusers' linspace begins at t = 0 for one step, ours at T-1
@pytest.mark.parametrize(("spacing", "least"), [("leading", 1), ("trailing", 1), ("linspace", 2)])
def test_grid_is_that_of_ddim_in_diffusers(spacing, least):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    # of 48 and 96 trailing steps some lie halfway between two timesteps, which diffusers' running float sum misses;
    # for some other numbers that sum overshoots to one entry more, t = -1
    for steps in set(range(least, 101)) - {48, 96}:
        scheduler.set_timesteps(steps)
        assert time_grid(spacing, steps) == tuple(scheduler.timesteps.tolist())[:steps]


def test_quadratic_grid_is_that_of_the_ddim_code():
    assert time_grid("quadratic", 5) == (800, 450, 200, 50, 0)
    assert time_grid("quadratic", 10)[0] <= 800


def test_quadratic_grid_moves_up_what_the_ddim_code_visits_twice():
    code = [int(t) for t in np.linspace(0, np.sqrt(800), 50) ** 2]
    assert len(set(code)) < 50
    grid = time_grid("quadratic", 50)[::-1]
    assert grid[:5] == (0, 1, 2, 3, 5)
    assert grid[8:] == tuple(code[8:])


def test_ends_of_the_spacings():
    assert time_grid("leading", 4) == (750, 500, 250, 0)
    assert time_grid("trailing", 4) == (999, 749, 499, 249)
    assert time_grid("linspace", 4) == (999, 666, 333, 0)
    assert time_grid("linspace", 1) == (999,)


def test_trailing_grids_nest_exactly_when_the_steps_halve():
    for steps in (1, 3, 4, 7, 50):
        assert time_grid("trailing", 2 * steps)[::2] == time_grid("trailing", steps)


@pytest.mark.parametrize(
    ("spacing", "steps", "message"),
    [
        ("karras", 10, "use one of leading"),
        ("leading", 0, "use 1 to 1000"),
        ("trailing", 1001, "use 1 to 1000"),
    ],
)
def test_grids_that_cannot_be_are_refused(spacing, steps, message):
    with pytest.raises(UserError, match=message):
        time_grid(spacing, steps)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_noise_levels_end_at_the_last_target(final):
    schedule = NoiseSchedule()
    alpha, sigma = noise_levels(schedule, (999, 500, 3), final)
    np.testing.assert_array_equal(alpha[:3], schedule.alpha[[999, 500, 3]])
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)
    assert sigma[3] == (0 if final == "zero" else schedule.sigma[0])


@pytest.mark.parametrize("grid", [(), (1000, 1), (10, -1), (3, 5), (5, 5)])
def test_noise_levels_refuse_what_is_no_grid(grid):
    with pytest.raises(UserError, match="descend strictly"):
        noise_levels(NoiseSchedule(), grid)
