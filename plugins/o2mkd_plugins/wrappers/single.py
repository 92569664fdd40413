"""One student: the plain job, or a control that differs from it in one thing."""

from __future__ import annotations

from dataclasses import replace

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.intervals import Law
from o2mkd_bench.core.jobs import Job, Lift, Wrapper

from .intervals import resolve
from .options import SingleOptions


class Single(Wrapper):
    """The job as it is, ``scale`` times as long, on the uniform law of t or on that of equally treated experts."""

    options: SingleOptions

    def wrap(self, job: Job, lift: Lift) -> tuple[Job, ...]:
        steps = round(job.steps * self.options.scale)
        if steps < 1:
            raise UserError(
                f"{lift.where}.scale: {self.options.scale} of {job.steps} steps is no step; use a larger scale"
            )
        law = job.law
        if self.options.intervals is not None:
            law = Law.equal(resolve(self.options.intervals, self.options.students, lift))
        return (replace(job, steps=steps, horizon=steps, law=law),)
