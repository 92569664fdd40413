"""Interval rules: where the edges between K students lie."""

from __future__ import annotations

import operator

import numpy as np

from o2mkd_bench.core.errors import PluginError, UserError
from o2mkd_bench.core.intervals import Interval, cover
from o2mkd_bench.core.jobs import Lift
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import IntervalsOption


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


def resolve(option: IntervalsOption, students: int, lift: Lift) -> tuple[Interval, ...]:
    """The exact cover that an ``intervals`` option means.

    Raises:
        UserError: for a wrong number of edges, or edges that are no cover; K and the edges are named. PluginError for
            a rule that is not known, fails, or gives something else than whole numbers.
    """
    edges = _by_rule(option, students, lift) if isinstance(option, str) else list(option)
    if len(edges) != students - 1:
        raise UserError(
            f"{lift.where}.intervals: {students} students need {students - 1} inner edges, {edges} are {len(edges)}"
        )
    try:
        return cover(edges, lift.schedule.timesteps)
    except UserError as error:
        raise UserError(f"{lift.where}.intervals: {error}") from None


def _by_rule(name: str, students: int, lift: Lift) -> list[int]:
    where = f"{lift.where}.intervals"
    try:
        return [operator.index(edge) for edge in lift.interval_rule(name)(students, lift.schedule)]
    except UserError as error:
        raise PluginError(f"{where}: {error}") from None
    except Exception as error:
        raise PluginError(f"{where}: the rule {name!r} failed: {type(error).__name__}: {error}") from error
