"""Half-open ranges of training timesteps, exact covers of [0, T), and laws of t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from .errors import UserError


@dataclass(frozen=True, order=True)
class Interval:
    """``[lo, hi)`` on the axis of training timesteps; interval 0 of a cover is the least noisy."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        if not (isinstance(self.lo, int) and isinstance(self.hi, int)):
            raise UserError(f"the interval [{self.lo}, {self.hi}) has an edge that is no whole number; use // for /")
        if not 0 <= self.lo < self.hi:
            raise UserError(f"the interval [{self.lo}, {self.hi}) is empty; its edges must rise from 0")

    def __contains__(self, t: float) -> bool:
        return self.lo <= t < self.hi

    def __str__(self) -> str:
        return f"[{self.lo}, {self.hi})"

    @property
    def width(self) -> int:
        return self.hi - self.lo

    def widened(self, overlap: float, timesteps: int) -> Interval:
        """``[lo - o*w, hi + o*w)`` cut to ``[0, T)``, w the width, rounded to whole timesteps."""
        more = round(overlap * self.width)
        return Interval(max(0, self.lo - more), min(timesteps, self.hi + more))


def cover(edges: Sequence[int], timesteps: int) -> tuple[Interval, ...]:
    """Intervals between inner ``edges``, which together cover ``[0, timesteps)`` exactly once.

    Raises:
        UserError: when an edge is outside (0, T) or not above the one before it; K and the edges are named.
    """
    ends = [0, *edges, timesteps]
    if any(b <= a for a, b in pairwise(ends)):
        raise UserError(
            f"{len(edges) + 1} intervals with inner edges {list(edges)} do not cover [0, {timesteps}) exactly once: "
            f"the edges must rise strictly between 0 and {timesteps}"
        )
    return tuple(Interval(a, b) for a, b in pairwise(ends))


@dataclass(frozen=True)
class Law:
    """A law of t with piecewise constant density: ``masses[i]`` of it lies evenly on ``[ends[i], ends[i+1])``.

    Masses are exact fractions, so that budgets derived from them are exact.
    """

    ends: tuple[int, ...]
    masses: tuple[Fraction, ...]

    @classmethod
    def uniform(cls, interval: Interval) -> Law:
        return cls((interval.lo, interval.hi), (Fraction(1),))

    @classmethod
    def equal(cls, intervals: Sequence[Interval]) -> Law:
        """Each interval of a cover with the same mass; uniform when they are equally wide."""
        share = Fraction(1, len(intervals))
        if len({i.width for i in intervals}) == 1:
            return cls.uniform(Interval(intervals[0].lo, intervals[-1].hi))
        return cls((intervals[0].lo, *(i.hi for i in intervals)), (share,) * len(intervals))

    def mass(self, interval: Interval) -> Fraction:
        """The probability that t lies in ``interval``."""
        total = Fraction(0)
        for lo, hi, mass in zip(self.ends, self.ends[1:], self.masses, strict=False):
            common = min(hi, interval.hi) - max(lo, interval.lo)
            if common > 0:
                total += mass * Fraction(common, hi - lo)
        return total

    def spec(self) -> dict[str, list[int] | list[str]]:
        """JSON data from which ``from_spec`` makes the same law."""
        return {"ends": list(self.ends), "masses": [str(m) for m in self.masses]}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Law:
        return cls(tuple(spec["ends"]), tuple(Fraction(m) for m in spec["masses"]))
