"""O2MKD: lift any KD method into K students, one an interval of timesteps (Zhang & Ma, arXiv 2410.04191)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.core.jobs import Job, Lift, Wrapper

from .intervals import resolve, shared_start
from .options import O2MKDOptions


class O2MKD(Wrapper):
    """A job on [0, T) becomes an optional shared warm-up and K experts that start from it.

    ``docs/semantics.md`` says what each option means for batch, steps and images; with one student the chain of
    warm-up and expert is, bit for bit on the CPU, the job that came in. Steps are rounded down, so that no job sees
    more images than its budget. Without ``specialise`` each student has the steps and images of the expert in whose
    place it stands, of all timesteps.
    """

    lifts = True
    options: O2MKDOptions

    def wrap(self, job: Job, lift: Lift) -> tuple[Job, ...]:
        o = self.options
        timesteps = lift.schedule.timesteps
        whole = Interval(0, timesteps)
        if (job.trains, job.serves, job.start) != (whole, whole, "scratch"):
            raise UserError(
                f"{lift.where}: O2MKD of O2MKD is not possible, as it lifts one student that learns all timesteps from "
                f"scratch and {job.role} is already lifted; remove one of the wrappers"
            )
        # at the horizon of the plain job: that of the lineage may depend on the edges
        first = shared_start(job, o.warmup if o.init == "shared" else 0)
        serves = resolve(o.intervals, o.students, lift, first)
        trains = [i.widened(o.overlap, timesteps) for i in serves]
        warm = first.steps
        laws, steps = self._layout(job, serves, trains, job.steps - warm)
        for k, (law, interval, n) in enumerate(zip(laws, trains, steps, strict=True)):
            if job.batch * law.mass(interval) < 1 or n < 1:
                raise UserError(
                    f"{lift.where}: expert {k} on {interval} would get less than one image a step or less than one "
                    "step; use expert_batch: full, fewer students, a larger batch or a larger budget"
                )
        horizon = warm + max(steps)
        start = ("warmup" if warm else "scratch") if o.init == "shared" else o.init
        # one student learns the warm-up's timesteps, and its moments are those of the warm-up
        anew = o.restart > 0 and start == "warmup" and len(serves) > 1
        experts = tuple(
            replace(
                job,
                role=f"expert-{k}",
                trains=t,
                serves=s,
                law=law,
                steps=n,
                start=start,
                offset=warm,
                horizon=horizon,
                restart=max(1, round(o.restart * n)) if anew else 0,
            )
            for k, (t, s, law, n) in enumerate(zip(trains, serves, laws, steps, strict=True))
        )
        if not o.specialise:
            experts = tuple(self._generalist(job, expert, k, serves, lift) for k, expert in enumerate(experts))
        if not warm:
            return experts
        return (replace(first, horizon=horizon), *experts)

    def _generalist(self, job: Job, expert: Job, k: int, serves: tuple[Interval, ...], lift: Lift) -> Job:
        """Expert ``k`` on the timesteps of ``job``, on a stream of its own whose whole batch is the expert's share.

        What all of them see together follows the law that the experts' samples follow.
        """
        share = expert.batch * expert.law.mass(expert.trains)
        if share.denominator != 1:
            raise UserError(
                f"{lift.where}.specialise: expert {k} on {expert.trains} gets {float(share):.6g} images a step, and a "
                "student on all timesteps only whole ones; use expert_batch: full, or a training.batch or intervals "
                "that make each share whole"
            )
        law = job.law if self.options.allocation == "width" else Law.equal(serves)
        return replace(expert, trains=job.trains, law=law, batch=int(share), stream=k + 1)

    def _layout(
        self, job: Job, serves: tuple[Interval, ...], trains: list[Interval], left: int
    ) -> tuple[list[Law], list[int]]:
        """Law of t and steps of each expert; ``left`` is what the warm-up leaves, in steps of the whole batch."""
        o = self.options
        if o.expert_batch == "share":
            joint = job.law if o.allocation == "width" else Law.equal(serves)
            masses = [joint.mass(i) for i in trains]
            each = masses if o.budget == "per_student" else [sum(masses, Fraction(0))] * len(masses)
            return [joint] * len(trains), [int(left / m) for m in each]
        laws = [Law.uniform(i) for i in trains]
        if o.budget == "per_student":
            return laws, [left] * len(trains)
        widths = [i.width if o.allocation == "width" else 1 for i in trains]
        return laws, [int(Fraction(left * w, sum(widths))) for w in widths]
