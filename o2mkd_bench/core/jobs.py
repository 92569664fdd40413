"""Jobs, and wrappers: functions from a job to jobs. Pure data, no torch, so they compose with every KD method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar

from .errors import UserError
from .intervals import Interval, Law
from .options import Options
from .schedule import NoiseSchedule


@dataclass(frozen=True)
class Job:
    """A student to be trained.

    Attributes:
        role: its name within the cell, ``student``, ``warmup``, ``expert-0`` …
        trains: the timesteps it learns; its samples are those of the stream that fall in here.
        serves: the timesteps it is asked for when sampling; None for a job that is only a start for others.
        law: the law of t of the stream it reads.
        batch: B, images a step of that stream; the job sees ``batch * law.mass(trains)`` of them on average.
        steps: optimiser steps of this job.
        start: ``scratch``, ``teacher``, or the role of the job it continues.
        offset: steps of the lineage before this job: its first position in the stream.
        horizon: steps over which learning rate and EMA horizon are laid out, the same along a lineage.
        student: the student spec, which a wrapper may replace.
        normalise: inner edges of intervals whose losses are each divided by their running mean; () for the plain loss.
        stream: 0 for the stream that all jobs of a seed read; another number for one of other images, t and noise.
        restart: steps over which the learning rate rises once more, the optimiser's moments begun anew; 0 for a job
            that goes on with those of what it continues.
    """

    role: str
    trains: Interval
    serves: Interval | None
    law: Law
    batch: int
    steps: int
    horizon: int
    start: str = "scratch"
    offset: int = 0
    student: Mapping[str, Any] = field(default_factory=dict)
    normalise: tuple[int, ...] = ()
    stream: int = 0
    restart: int = 0

    @property
    def images(self) -> Fraction:
        """Images this job sees: an expectation where interval edges cut through the stream's quantile slices."""
        return self.steps * self.batch * self.law.mass(self.trains)

    def spec(self) -> dict[str, Any]:
        """What of a job decides its result; where it serves does not.

        ``normalise``, ``stream`` and ``restart`` are in it where they are set.
        """
        spec: dict[str, Any] = {
            "trains": [self.trains.lo, self.trains.hi],
            "law": self.law.spec(),
            "batch": self.batch,
            "steps": self.steps,
            "offset": self.offset,
            "horizon": self.horizon,
            "pace": str(self.pace()),
        }
        if self.normalise:
            spec["normalise"] = list(self.normalise)
        if self.stream:
            spec["stream"] = self.stream
        if self.restart:
            spec["restart"] = self.restart
        return spec

    def pace(self) -> Fraction:
        """Schedule positions per step: above 1 when an expert must run through what is left in fewer steps.

        A job that only others start from goes at 1, as it ends where they begin.
        """
        return Fraction(1) if self.serves is None else Fraction(self.horizon - self.offset, self.steps)


def _unmeasured(students: int, warmup: Job) -> Sequence[int]:
    raise UserError("there are no measured edges here; give intervals by a rule or as literal edges")


@dataclass(frozen=True)
class Lift:
    """What a wrapper may know at plan time beside the job.

    Attributes:
        schedule: the teacher's.
        interval_rule: the rule of a name, ``(students, schedule) -> inner edges``; PluginError if unknown.
        where: file and key of the wrapper, for the start of its errors.
        measured: ``(students, warmup) -> inner edges`` by the error over t of the student that the job ``warmup`` makes
            from scratch. While it is not measured this raises what the wrapper must let pass: its cells are planned
            again when it is.
    """

    schedule: NoiseSchedule
    interval_rule: Callable[[str], Callable[[int, NoiseSchedule], list[int]]]
    where: str = "wrappers"
    measured: Callable[[int, Job], Sequence[int]] = _unmeasured


class Wrapper(ABC):
    """A wrapper plugin: one job on [0, T) in, jobs out whose ``serves`` cover [0, T) exactly once.

    Attributes:
        lifts: True for a wrapper that makes several students: it is given single-student baselines, and does not nest.
    """

    lifts: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    @abstractmethod
    def wrap(self, job: Job, lift: Lift) -> tuple[Job, ...]:
        """Jobs in an order in which each one's ``start`` comes before it.

        Raises:
            UserError: beginning with ``lift.where``, when the options and the job do not fit together.
        """


def total_images(jobs: tuple[Job, ...]) -> Fraction:
    """Images all jobs together see; what several experts start from is counted once."""
    return sum((job.images for job in jobs), Fraction(0))


def lineage(jobs: tuple[Job, ...], job: Job) -> tuple[Job, ...]:
    """``job`` and the jobs it continues, oldest first."""
    by_role = {j.role: j for j in jobs}
    line = [job]
    while line[0].start in by_role:
        line.insert(0, by_role[line[0].start])
    return tuple(line)


def check_jobs(jobs: tuple[Job, ...], timesteps: int, where: str) -> None:
    """Hold what a wrapper gave to its contract.

    Raises:
        UserError: naming ``where``, unless roles differ, every job is of ints and has a step, samples of its law, and
            all that it serves to learn, starts from scratch, the teacher or a job before it that serves nothing and has
            the same ``normalise``, and the jobs' ``serves`` cover ``[0, timesteps)`` exactly once.
    """
    known = {"scratch", "teacher"}
    for job in jobs:
        if wrong := _malformed(job, timesteps):
            raise UserError(f"{where}: {wrong}")
    normalised = {job.role: job.normalise for job in jobs}
    serving: set[str] = set()
    for job in jobs:
        if job.start not in known:
            raise UserError(f"{where}: {job.role} starts from {job.start!r}, which is no job before it")
        if job.role in known:
            raise UserError(f"{where}: two jobs have the role {job.role!r}, or one of the words scratch and teacher")
        if normalised.get(job.start, job.normalise) != job.normalise:
            raise UserError(
                f"{where}: {job.role} continues {job.start}, whose running means are those of other intervals; give "
                "both the same normalise"
            )
        if job.restart and job.start in ("scratch", "teacher"):
            raise UserError(f"{where}: {job.role} starts from {job.start} and has no moments to begin anew")
        if job.start in serving:
            raise UserError(f"{where}: {job.role} starts from {job.start}, which serves; start from one that does not")
        known.add(job.role)
        if job.serves is not None:
            serving.add(job.role)
    served = sorted(job.serves for job in jobs if job.serves is not None)
    ends = [0, *(i.hi for i in served)]
    if [i.lo for i in served] != ends[:-1] or ends[-1] != timesteps:
        found = ", ".join(map(str, served)) or "none"
        raise UserError(f"{where}: the {len(served)} intervals {found} do not cover [0, {timesteps}) exactly once")


def _malformed(job: Any, timesteps: int) -> str:
    """What is wrong with a job by itself, in words; empty where nothing is."""
    if not isinstance(job, Job):
        return f"a {type(job).__name__} is among the jobs, which is no o2mkd_bench.Job"
    if not isinstance(job.role, str) or not isinstance(job.start, str):
        return f"a job has role {job.role!r} and start {job.start!r}; make both texts"
    for name in ("batch", "steps", "horizon", "offset", "stream", "restart"):
        value = getattr(job, name)
        if type(value) is not int:
            return f"{job.role} has {name} {value!r}; make it an int"
    if job.steps < 1:
        return f"{job.role} would train {job.steps} steps; raise the budget"
    if job.batch < 1 or min(job.offset, job.stream, job.restart) < 0:
        return f"{job.role} has a batch below 1, or an offset, stream or restart below 0"
    if not isinstance(job.student, Mapping) or not all(isinstance(key, str) for key in job.student):
        return f"{job.role} has the student {job.student!r}; make it a mapping of keys to values"
    if reason := _unlawful(job.law, timesteps):
        return f"{job.role} has a law of t {reason}"
    if not isinstance(job.trains, Interval) or job.trains.hi > timesteps or not job.images:
        return f"{job.role} trains {job.trains}, of which its law has nothing in [0, {timesteps}); give it some"
    if job.serves is not None and not isinstance(job.serves, Interval):
        return f"{job.role} serves {job.serves!r}; make it an Interval, or None"
    if job.serves is not None and not job.trains.lo <= job.serves.lo < job.serves.hi <= job.trains.hi:
        return f"{job.role} serves {job.serves} and trains {job.trains}; let it train all that it serves"
    if job.serves is not None and job.horizon <= job.offset:
        return f"{job.role} begins at {job.offset} of a horizon of {job.horizon}; lay it out over more steps"
    if not isinstance(job.normalise, tuple) or not _rising((0, *job.normalise, timesteps)):
        return f"{job.role} has normalise {job.normalise!r}; make it a tuple of ints that rise in (0, {timesteps})"
    return ""


def _unlawful(law: Any, timesteps: int) -> str:
    if not isinstance(law, Law):
        return f"that is a {type(law).__name__}; make it a Law"
    if not _rising(law.ends) or not 0 <= law.ends[0] < law.ends[-1] <= timesteps:
        return f"with ends {law.ends}; make them ints that rise between 0 and {timesteps}"
    if len(law.masses) != len(law.ends) - 1:
        return f"with {len(law.masses)} masses between {len(law.ends)} ends; give one to each pair"
    if not all(isinstance(mass, Fraction | int) and mass >= 0 for mass in law.masses) or sum(law.masses) != 1:
        return f"with masses {', '.join(map(str, law.masses))}; make them fractions from 0 on that add up to 1"
    return ""


def _rising(ends: Sequence[Any]) -> bool:
    return all(type(end) is int for end in ends) and all(a < b for a, b in pairwise(ends))


def baseline_batch(jobs: tuple[Job, ...], rule: str, batch: int) -> int:
    """Images a step of one student beside ``jobs``: ``batch``; by ``equal_batch`` what their experts see on average."""
    if rule != "equal_batch":
        return batch
    experts = tuple(job for job in jobs if job.serves is not None)
    return max(1, round(total_images(experts) / sum(job.steps for job in experts)))


def baseline_steps(jobs: tuple[Job, ...], rule: str, batch: int) -> int:
    """Steps of one student that sees as many images as all jobs together, or as the longest lineage among them."""
    if rule == "per_student":
        return max(1, round(max(total_images(lineage(jobs, j)) for j in jobs if j.serves is not None) / batch))
    return max(1, round(total_images(jobs) / batch))
