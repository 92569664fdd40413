"""Edges that are measured before they are known: ``intervals: auto``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import StageFailed

POINTS = 64
"""Evenly spaced timesteps at which the error is measured: where it changes fastest, some 16 of 1000 lie between two."""

IMAGES = 128
"""Images it is measured on, one noise each: the mean of a few thousand pixels is known well, the spread between images
is averaged out to a few percent, and a root halves that again."""

WAITING = "the intervals are not known yet: the error they follow from is measured first; `run` does it and goes on"


class Undecided(Exception):
    """A wrapper asked for measured edges and cannot say its jobs: they are not measured yet, or do not suit it.

    Attributes:
        stages: identities of the ``edges`` stages that it asked for.
        refused: whether the edges are known and the wrapper refuses them, for the reason that is this one's text.
    """

    def __init__(self, stages: tuple[str, ...], reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.stages = stages
        self.refused = refused


def equal_shares(students: int, timesteps: int, t: Sequence[int], error: Sequence[float]) -> list[int]:
    """The K - 1 inner edges between which the root of ``error`` has equal integrals over [0, T).

    ``error`` is the mean squared difference of the student's and the teacher's epsilon at the timesteps ``t``, which
    begin at 0 and end at T - 1; its root is taken as linear between them. Equal shares, as each expert shall get the
    same amount of what there is to learn. Of the root, as a sampler's image moves by the error and not by its square,
    which is tens of times larger at the less noisy timesteps and would crowd the edges there, where few-step samplers
    hardly look: on the 8x8 digits four students meet at 96, 244, 560 by the root, at 45, 109, 240 by the square. Every
    interval is at least a hundredth of the axis wide, so that it has a place in a batch and is met by a sampler.

    Raises:
        StageFailed: when the error is zero everywhere, or not finite.
    """
    root = np.interp(np.arange(timesteps), t, np.sqrt(np.asarray(error, dtype=np.float64)))
    below = np.concatenate([[0.0], np.cumsum(root)])
    if not (np.isfinite(below[-1]) and below[-1] > 0):
        raise StageFailed(f"the error of the student over t adds up to {below[-1]:.3g}, which has no shares")
    levels = below[-1] * np.arange(1, students) / students
    edges = [round(place) for place in np.interp(levels, below, np.arange(timesteps + 1)).tolist()]
    return _apart(edges, timesteps, max(1, timesteps // 100))


def _apart(edges: list[int], timesteps: int, narrowest: int) -> list[int]:
    """``edges`` moved as little as need be for every interval to have ``narrowest`` timesteps, if there are so many."""
    room = min(narrowest, timesteps // (len(edges) + 1))
    low = 0
    for k, edge in enumerate(edges):
        edges[k] = low = max(edge, low + room)
    high = timesteps
    for k in reversed(range(len(edges))):
        edges[k] = high = min(edges[k], high - room)
    return edges
