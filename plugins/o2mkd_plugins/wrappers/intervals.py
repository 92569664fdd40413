"""Interval rules: where the edges between K students lie."""

from __future__ import annotations

import operator
from dataclasses import replace

import numpy as np

from o2mkd_bench.core.errors import PluginError, UserError
from o2mkd_bench.core.intervals import Interval, cover
from o2mkd_bench.core.jobs import Job, Lift
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import AUTO, IntervalsOption


def uniform(students: int, schedule: NoiseSchedule) -> list[int]:
    """Edges at equal distances on the axis of training timesteps."""
    timesteps = schedule.timesteps
    return [round(timesteps * k / students) for k in range(1, students)]


def snr(students: int, schedule: NoiseSchedule) -> list[int]:
    """Edges at equal distances in log-SNR: the first timestep at or below each level.

    For the linear schedule and T = 1000: 303 for two students, 31/303/722 for four.
    """
    log_snr = schedule.log_snr
    levels = np.linspace(log_snr[0], log_snr[-1], students + 1)[1:-1]
    return [int(np.argmax(log_snr <= level)) for level in levels]


def shared_start(job: Job, share: float) -> Job:
    """The first ``share`` of ``job``, which others continue; of 0 steps where that rounds to none."""
    return replace(job, role="warmup", serves=None, steps=min(round(job.steps * share), job.steps - 1))


def resolve(option: IntervalsOption, students: int, lift: Lift, start: Job) -> tuple[Interval, ...]:
    """The exact cover that an ``intervals`` option means; ``start`` makes the student whose error ``auto`` goes by.

    Raises:
        UserError: for a wrong number of edges, or edges that are no cover; K and the edges are named. For ``auto``
            where ``start`` has no step. PluginError for a rule that is not known, fails, or gives something else than
            whole numbers.
    """
    if option == AUTO:
        edges = _measured(students, lift, start)
    else:
        edges = _by_rule(option, students, lift) if isinstance(option, str) else list(option)
    if len(edges) != students - 1:
        raise UserError(
            f"{lift.where}.intervals: {students} students need {students - 1} inner edges, {edges} are {len(edges)}"
        )
    try:
        return cover(edges, lift.schedule.timesteps)
    except UserError as error:
        raise UserError(f"{lift.where}.intervals: {error}") from None


def _measured(students: int, lift: Lift, start: Job) -> list[int]:
    if students == 1:
        return []
    if start.steps < 1:
        raise UserError(
            f"{lift.where}.intervals: auto goes by the student of a shared warm-up, and there is none; use init: "
            "shared with a larger warmup or budget, or give a rule or the edges"
        )
    return list(lift.measured(students, start))


def _by_rule(name: str, students: int, lift: Lift) -> list[int]:
    where = f"{lift.where}.intervals"
    try:
        return [operator.index(edge) for edge in lift.interval_rule(name)(students, lift.schedule)]
    except UserError as error:
        raise PluginError(f"{where}: {error}") from None
    except Exception as error:
        raise PluginError(f"{where}: the rule {name!r} failed: {type(error).__name__}: {error}") from error
