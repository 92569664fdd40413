"""One student: the plain job, or a control that differs from it in one thing."""

from __future__ import annotations

from dataclasses import replace

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.core.jobs import Job, Lift, Wrapper

from .intervals import resolve, shared_start
from .options import IntervalsOption, O2MKDOptions, SingleOptions

WARMUP: float = O2MKDOptions.model_fields["warmup"].default


class Single(Wrapper):
    """The job as it is, ``scale`` times as long, or a control beside experts (docs/semantics.md, Budget and fairness).

    With ``intervals`` t follows the joint law of equally treated experts; with ``normalise`` too it stays uniform, and
    each interval's loss counts relative to its running mean, as it does where an expert's Adam is blind to its scale.
    """

    options: SingleOptions

    def wrap(self, job: Job, lift: Lift) -> tuple[Job, ...]:
        steps = round(job.steps * self.options.scale)
        if steps < 1:
            raise UserError(
                f"{lift.where}.scale: {self.options.scale} of {job.steps} steps is no step; use a larger scale"
            )
        self._check(lift.where)
        longer = replace(job, steps=steps, horizon=steps)
        if self.options.intervals is None:
            return (longer,)
        intervals = self._intervals(self.options.intervals, job, lift)
        if self.options.normalise:
            return (replace(longer, normalise=tuple(interval.lo for interval in intervals[1:])),)
        return (replace(longer, law=Law.equal(intervals)),)

    def _intervals(self, option: IntervalsOption, job: Job, lift: Lift) -> tuple[Interval, ...]:
        """The experts' intervals; by ``auto`` those of O2MKD with its own warm-up at the budget of ``job``."""
        return resolve(option, self.options.students, lift, shared_start(job, WARMUP))

    def _check(self, where: str) -> None:
        """Raise UserError for options of a control that would be none, and no word of it."""
        o = self.options
        several = o.students > 1
        if several != (o.intervals is not None) or (o.normalise and not several):
            key = "normalise" if o.normalise else "students" if several else "intervals"
            raise UserError(
                f"{where}.{key}: it goes with the intervals of several students; give students of at least 2 and "
                "intervals, a rule by name or the inner edges"
            )
