"""Progressive distillation at plan time: its rounds, their grids and targets, and the program that they end in."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest

from o2mkd_bench import NoiseSchedule, UserError
from o2mkd_bench.core.grid import time_grid
from o2mkd_plugins.samplers.ddim import DDIM
from o2mkd_plugins.samplers.options import DDIMOptions, ProgressiveOptions
from o2mkd_plugins.samplers.progressive import Progressive

SCHEDULE = NoiseSchedule()


def test_each_round_keeps_every_second_entry_from_the_top():
    rounds = Progressive(ProgressiveOptions(start=48, share=0.5)).rounds(SCHEDULE, 6)
    assert [r.kind for r in rounds] == ["convert", "halve", "halve", "halve"]
    assert {(r.prediction, r.share) for r in rounds} == {("v_prediction", 0.5)}
    assert rounds[0].grid == time_grid("trailing", 48)
    assert (rounds[0].fine, rounds[0].targets()) == ((), ())
    for before, after in pairwise(rounds):
        assert after.fine == before.grid
        assert after.grid == before.grid[::2] == time_grid("trailing", len(before.grid) // 2)
        assert after.grid[0] == 999


def test_targets_are_two_steps_of_the_round_before():
    rounds = Progressive(ProgressiveOptions(start=4)).rounds(SCHEDULE, 1)
    assert rounds[1].targets() == ((999, 749, 499), (499, 249, None))
    assert rounds[2].targets() == ((999, 499, None),)


def test_epsilon_needs_no_conversion_and_warns():
    sampler = Progressive(ProgressiveOptions(prediction="epsilon"))
    with pytest.warns(UserWarning, match="prefer prediction: v"):
        rounds = sampler.rounds(SCHEDULE, 8)
    assert [(r.kind, r.prediction) for r in rounds] == [("halve", "epsilon")]


def test_v_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Progressive(ProgressiveOptions()).rounds(SCHEDULE, 4)) == 3


@pytest.mark.parametrize("steps", [3, 5, 12, 16, 32])
def test_steps_that_halving_does_not_reach_are_refused(steps):
    with pytest.raises(UserError, match=f"down to {steps} steps"):
        Progressive(ProgressiveOptions(start=16)).rounds(SCHEDULE, steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_program_is_ddim_on_its_own_trailing_grid(spacing):
    sampler = Progressive(ProgressiveOptions(start=16))
    program = sampler.program(SCHEDULE, time_grid(spacing, 4), clip="none")
    assert program == DDIM(DDIMOptions()).program(SCHEDULE, sampler.rounds(SCHEDULE, 4)[-1].grid, clip="none")
    assert sampler.nfe(4) == program.nfe == 4
    assert Progressive.needs_rounds
