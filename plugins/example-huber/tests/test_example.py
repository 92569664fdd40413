"""The contracts of o2mkd-bench, and what they cannot know."""

# ruff: noqa: RUF012 - a contract's attributes are never changed

import math
from dataclasses import replace

import pytest
import torch
from o2mkd_bench_example.heun import Heun

from o2mkd_bench import NoiseSchedule, Options, Program
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.testing import KDMethodContract, SamplerContract
from o2mkd_bench.testing.samplers import STD, propagated


class TestHuber(KDMethodContract):
    name = "huber"
    options = {"delta": 0.05}

    @pytest.mark.parametrize(("distance", "expected"), [(1e-3, 1e-6), (10.0, 2 * 0.05 * (10 - 0.05))])
    def test_square_near_zero_and_size_far_away(self, distance, expected):
        method = self.method()
        ctx = self.context(method)
        student = torch.full_like(ctx.teacher, distance)
        apart = replace(ctx, student=student, teacher=torch.zeros_like(student))
        assert method.terms(apart)["huber"].item() == pytest.approx(expected, rel=0.02)


class TestHeun(SamplerContract):
    # the harness has a heun too
    name = "o2mkd-bench-example:heun"
    accuracy = 0.01

    def test_converges_with_order_two(self):
        """Up to the last step, which is Euler's."""
        schedule, errors = NoiseSchedule(), []
        start, end = (float(schedule.alpha[t] ** 2 * STD**2 + schedule.sigma[t] ** 2) for t in (900, 100))
        for stride in (40, 20, 10):
            program = Heun(Options()).program(schedule, range(900, 99, -stride), clip="none")
            found = propagated(Program(program.lines[:-1]), schedule)[1]
            errors.append(abs(found - math.sqrt(end / start)))
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)

    def test_one_step_is_the_prediction_itself(self):
        (line,) = Heun(Options()).program(NoiseSchedule(), time_grid("trailing", 1)).lines
        assert (line.t, dict(line.x0), dict(line.epsilon)) == (999, {0: 1.0}, {})
