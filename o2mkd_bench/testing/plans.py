"""The contracts of what only the plan calls: wrappers and interval rules."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import ClassVar

import pytest

from ..core.intervals import Interval, Law, cover
from ..core.jobs import Job, Lift, Wrapper, check_jobs, lineage, total_images
from ..core.plugins import registry
from ..core.schedule import NoiseSchedule
from .contract import Contract

SCHEDULES = [NoiseSchedule(), NoiseSchedule("squaredcos_cap_v2"), NoiseSchedule(timesteps=400)]
BATCH = 64

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.timesteps}")


_WRAPPED = """
from o2mkd_bench import Interval, Job, Law, Lift, NoiseSchedule
whole = Interval(0, 1000)
job = Job("student", whole, whole, Law.uniform(whole), 64, 500, 500)
target(parsed).wrap(job, Lift(NoiseSchedule(), lambda name: registry().get("intervals", name).load()))
"""

_RULED = """
from o2mkd_bench import NoiseSchedule
target(4, NoiseSchedule())
"""


class WrapperContract(Contract):
    """Subclass with ``name`` and ``options`` of a wrapper.

    Attributes:
        students: how many networks serve in the end.
        scale: images that all jobs see together, as a multiple of those of the job that came in.
        steps: of the job that comes in; enough for every expert to get some.
    """

    kind = "wrappers"
    base = Wrapper
    loaded_by_plan = True
    students: ClassVar[int] = 1
    scale: ClassVar[float] = 1.0
    steps: ClassVar[int] = 500

    def planned(self) -> str:
        return _WRAPPED

    def jobs(self, schedule: NoiseSchedule) -> tuple[Job, ...]:
        everything = Interval(0, schedule.timesteps)
        job = Job("student", everything, everything, Law.uniform(everything), BATCH, self.steps, self.steps)
        lift = Lift(schedule, lambda name: registry().get("intervals", name).load())
        made: tuple[Job, ...] = self.plugin.load()(self.parsed).wrap(job, lift)
        return made

    @each_schedule
    def test_intervals_cover_every_timestep_once(self, schedule: NoiseSchedule) -> None:
        jobs = self.jobs(schedule)
        check_jobs(jobs, schedule.timesteps, self.name)
        assert sum(job.serves is not None for job in jobs) == self.students

    @each_schedule
    def test_every_job_learns_what_it_serves(self, schedule: NoiseSchedule) -> None:
        for job in self.jobs(schedule):
            assert 0 <= job.trains.lo < job.trains.hi <= schedule.timesteps
            if job.serves is not None:
                assert job.trains.lo <= job.serves.lo
                assert job.serves.hi <= job.trains.hi

    @each_schedule
    def test_every_job_can_be_trained(self, schedule: NoiseSchedule) -> None:
        for job in self.jobs(schedule):
            assert job.steps >= 1
            assert job.images > 0
            assert job.pace() > 0

    @each_schedule
    def test_a_job_starts_from_one_before_it(self, schedule: NoiseSchedule) -> None:
        known: dict[str, Job] = {}
        for job in self.jobs(schedule):
            assert job.role not in known
            assert job.start in ("scratch", "teacher", *known)
            assert job.offset == (known[job.start].offset + known[job.start].steps if job.start in known else 0)
            known[job.role] = job

    @each_schedule
    def test_budget_is_accounted_for(self, schedule: NoiseSchedule) -> None:
        """Whole steps are all that rounding may cost: one batch a job."""
        jobs = self.jobs(schedule)
        assert abs(total_images(jobs) - Fraction(self.scale) * self.steps * BATCH) <= BATCH * len(jobs)
        for job in jobs:
            assert total_images(lineage(jobs, job)) <= total_images(jobs)

    @each_schedule
    def test_jobs_are_data_and_always_the_same(self, schedule: NoiseSchedule) -> None:
        jobs = self.jobs(schedule)
        assert jobs == self.jobs(schedule)
        for job in jobs:
            spec = json.loads(json.dumps(job.spec()))
            assert Law.from_spec(spec["law"]) == job.law

    def test_several_students_are_declared(self) -> None:
        """``lifts`` is what gives a cell its baselines."""
        if self.students > 1:
            assert self.plugin.load().lifts


class IntervalRuleContract(Contract):
    """Subclass with the ``name`` of an interval rule; ``students``: the K that are tried."""

    kind = "intervals"
    students: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    loaded_by_plan = True

    def planned(self) -> str:
        return _RULED

    @each_schedule
    def test_edges_cover_every_timestep_once(self, schedule: NoiseSchedule) -> None:
        for students in self.students:
            edges = self.plugin.load()(students, schedule)
            assert all(type(edge) is int for edge in edges)
            assert len(cover(edges, schedule.timesteps)) == students

    @each_schedule
    def test_edges_depend_on_the_arguments_alone(self, schedule: NoiseSchedule) -> None:
        rule = self.plugin.load()
        assert rule(4, schedule) == rule(4, schedule)
