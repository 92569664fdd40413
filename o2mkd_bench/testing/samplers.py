"""The contract of samplers: what their programs declare, and where they lead with an exact denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import UserError
from ..core.grid import Spacing, time_grid
from ..core.program import Clip, Program, Sampler
from ..core.schedule import NoiseSchedule
from ..engine.philox import Philox
from ..engine.sample import Denoise, run_program, sample_images
from .contract import Contract

# every pixel of the data is drawn from this Gaussian, whose denoiser is exact and linear
MEAN, STD = 0.2, 0.4
SCHEDULES = [NoiseSchedule(), NoiseSchedule("scaled_linear", 8.5e-4, 0.012), NoiseSchedule("squaredcos_cap_v2")]


_PLANNED = """
from o2mkd_bench import NoiseSchedule
from o2mkd_bench.core.grid import time_grid
sampler = target(parsed)
sampler.program(NoiseSchedule(), time_grid("trailing", 4))
if not sampler.needs_rounds:
    assert sampler.rounds(NoiseSchedule(), 4) == ()
"""


class SamplerContract(Contract):
    """Subclass with ``name`` and ``options`` of a sampler.

    Attributes:
        steps: what a suite may ask for with these options.
        coarse, fine: two numbers of steps on trailing grids; the error falls from the first to the second.
        accuracy: how far mean and standard deviation of ``fine`` steps may be from those of the data.
    """

    kind = "samplers"
    base = Sampler
    loaded_by_plan = True
    steps: ClassVar[tuple[int, ...]] = (1, 2, 3, 5, 10, 20)
    coarse: ClassVar[int] = 10
    fine: ClassVar[int] = 100
    accuracy: ClassVar[float] = 0.02

    def planned(self) -> str:
        return _PLANNED

    def program(
        self,
        steps: int,
        spacing: Spacing = "trailing",
        edges: Sequence[int] = (),
        clip: Clip = "none",
        schedule: NoiseSchedule = SCHEDULES[0],
    ) -> Program:
        sampler: Sampler = self.plugin.load()(self.parsed)
        return sampler.program(schedule, time_grid(spacing, steps, schedule.timesteps), edges, clip)

    @pytest.mark.parametrize("spacing", get_args(Spacing))
    def test_program_is_as_long_as_declared(self, spacing: Spacing) -> None:
        sampler: Sampler = self.plugin.load()(self.parsed)
        for steps in self.steps:
            assert self.program(steps, spacing).nfe == sampler.nfe(steps) >= 1

    @pytest.mark.parametrize("spacing", get_args(Spacing))
    def test_timesteps_descend_within_the_schedule(self, spacing: Spacing) -> None:
        for steps in self.steps:
            t = [line.t for line in self.program(steps, spacing).lines]
            assert len({type(entry) for entry in t} - {float}) <= 1
            assert SCHEDULES[0].timesteps > t[0]
            assert t[-1] >= 0
            assert all(after <= before for before, after in pairwise(t))

    def test_more_steps_than_timesteps_are_refused(self) -> None:
        with pytest.raises(UserError):
            self.program(SCHEDULES[0].timesteps + 1)

    @pytest.mark.parametrize("clip", get_args(Clip))
    def test_clip_is_the_one_asked_for(self, clip: Clip) -> None:
        assert self.program(self.steps[-1], clip=clip).clip == clip

    def test_last_line_adds_no_noise(self) -> None:
        assert [self.program(steps).lines[-1].noise for steps in self.steps] == [0.0] * len(self.steps)

    def test_program_depends_on_its_arguments_alone(self) -> None:
        assert self.program(self.steps[-1]) == self.program(self.steps[-1])

    def test_edges_change_neither_length_nor_timesteps(self) -> None:
        """Experts share the evaluations of one program out among themselves."""
        for steps in self.steps:
            plain, lifted = self.program(steps), self.program(steps, edges=(300, 700))
            assert [line.t for line in lifted.lines] == [line.t for line in plain.lines]
            assert sum(lifted.calls((300, 700))) == plain.nfe

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
    def test_every_schedule_is_sampled(self, schedule: NoiseSchedule) -> None:
        for steps in self.steps:
            law = propagated(self.program(steps, schedule=schedule), schedule)
            assert np.isfinite(law).all()

    def test_exact_denoiser_leads_to_the_data(self) -> None:
        """Mean and standard deviation of what is drawn, known without drawing, and nearer with more steps."""
        coarse, fine = (error(self.program(steps), SCHEDULES[0]) for steps in (self.coarse, self.fine))
        assert fine <= self.accuracy
        assert fine < coarse

    def test_loop_computes_what_the_program_says(self) -> None:
        """The engine's float32 against the float64 of this contract."""
        program, schedule = self.program(self.steps[-1]), SCHEDULES[0]
        draws = [torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(program.nfe + 1)]
        image = run_program(program, schedule, exact(schedule), draws[0], lambda line: draws[line + 1])
        law = propagated(program, schedule)
        expected = law[0] + sum(float(c) * draw for c, draw in zip(law[1:], draws, strict=True))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        program, schedule = self.program(self.steps[-1], clip="x0"), SCHEDULES[0]
        philox = Philox.for_purpose(0, "sampling")
        together, alone = (
            sample_images(
                program,
                schedule,
                exact(schedule),
                lambda indices, number: philox.normal(indices, (1, 4, 4), stream=number),
                torch.arange(5),
                batch,
            )
            for batch in (5, 1)
        )
        assert torch.equal(together, alone)


def exact(schedule: NoiseSchedule) -> Denoise:
    """E[noise | x_t] for the Gaussian data."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = schedule.levels(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)

    return denoise


def propagated(program: Program, schedule: NoiseSchedule) -> NDArray[np.float64]:
    """The last state as an affine function: its constant, then the factor of every independent normal draw.

    Shape (nfe + 2,): constant, initial noise, fresh noise of each line. All that a program without clip does is affine
    where the denoiser is.
    """
    unit = np.eye(program.nfe + 2)
    states: list[NDArray[np.float64]] = [program.start * unit[1]]
    epsilon: list[NDArray[np.float64]] = []
    x0: list[NDArray[np.float64]] = []
    for i, line in enumerate(program.lines):
        alpha, sigma = schedule.levels(line.t)
        epsilon.append(sigma * (states[-1] - alpha * MEAN * unit[0]) / (alpha**2 * STD**2 + sigma**2))
        x0.append((states[-1] - sigma * epsilon[-1]) / alpha)
        terms: list[tuple[list[NDArray[np.float64]], Mapping[int, float]]]
        terms = [(states, line.states), (epsilon, line.epsilon), (x0, line.x0)]
        known = [c * values[j] for values, factors in terms for j, c in factors.items()]
        states.append(sum(known, line.noise * unit[i + 2]))
    return states[-1]


def error(program: Program, schedule: NoiseSchedule) -> float:
    """How far mean and standard deviation of what ``program`` draws are from the data's, together."""
    law = propagated(program, schedule)
    return float(abs(law[0] - MEAN) + abs(np.linalg.norm(law[1:]) - STD))
