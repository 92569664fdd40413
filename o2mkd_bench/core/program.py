"""A sampler written as data: which timestep to evaluate, and with which coefficients to combine what is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .errors import PluginError
from .options import Options
from .schedule import NoiseSchedule

Clip = Literal["none", "x0", "x0+epsilon"]


@dataclass(frozen=True)
class Line:
    """One network evaluation and the state that follows from it.

    Line ``i`` evaluates the network on ``states[i]`` at training timestep ``t``, which makes ``epsilon[i]`` and
    ``x0[i]`` (after the program's clip) known, and then computes in float32
    ``states[i + 1] = sum states[j] * a_j + sum epsilon[j] * e_j + sum x0[j] * b_j + noise * fresh``.
    ``t`` is an int, or in all lines of a program a float, which may lie between two timesteps.
    Keys are line numbers ``<= i``; ``states[0]`` is the initial noise, times the program's ``start``.
    """

    t: float
    states: Mapping[int, float] = field(default_factory=dict)
    epsilon: Mapping[int, float] = field(default_factory=dict)
    x0: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.0


@dataclass(frozen=True)
class Program:
    """Lines in the order of evaluation; ``states[len(lines)]`` is the image in [-1, 1] (not yet clamped).

    ``clip``: ``none``; ``x0`` clamps x0 to [-1, 1] and keeps epsilon as predicted; ``x0+epsilon`` also re-derives
    epsilon from the clamped x0 (the two differ by up to 2 in value).

    ``start``: standard deviation of ``states[0]``.

    Raises:
        PluginError: when a line refers to what is not known yet, or a coefficient is not finite.
    """

    lines: tuple[Line, ...]
    clip: Clip = "x0"
    start: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.lines, tuple | list) or not all(isinstance(line, Line) for line in self.lines):
            raise PluginError("a sampler's program has other things than lines; give a tuple of Line")
        if strange := [
            line.t for line in self.lines if isinstance(line.t, bool) or not isinstance(line.t, int | float)
        ]:
            raise PluginError(f"a line of a sampler's program has t {strange[0]!r}; make it an int or a float")
        if not math.isfinite(self.start):
            raise PluginError(f"a sampler's program multiplies the initial noise by {self.start}")
        for i, line in enumerate(self.lines):
            for name, terms in (("states", line.states), ("epsilon", line.epsilon), ("x0", line.x0)):
                for j, coefficient in terms.items():
                    if not 0 <= j <= i:
                        raise PluginError(
                            f"line {i} of a sampler's program refers to {name}[{j}], which it cannot know"
                        )
                    if not math.isfinite(coefficient):
                        raise PluginError(f"line {i} of a sampler's program multiplies {name}[{j}] by {coefficient}")
            if not math.isfinite(line.noise):
                raise PluginError(f"line {i} of a sampler's program multiplies its noise by {line.noise}")

    @property
    def nfe(self) -> int:
        return len(self.lines)

    def calls(self, edges: Sequence[int]) -> list[int]:
        """How often each expert is called for one image; ``edges`` are the inner edges of the cover."""
        counts = [0] * (len(edges) + 1)
        for line in self.lines:
            counts[bisect_right(edges, line.t)] += 1
        return counts


def passes(guidance: float | None) -> int:
    """Evaluations of the network that a line costs: with guidance one with the text and one without."""
    return 1 if guidance in (None, 1) else 2


@dataclass(frozen=True)
class Round:
    """One stage of step distillation that must be trained before a sampler can run.

    Attributes:
        kind: ``halve`` learns two steps of the round before as one; ``convert`` re-learns the round before in another
            prediction type, and is left out by a planner whose student already has that type.
        grid: the student's trailing grid in descending order, from T-1; the last target is sigma 0.
        fine: the grid of the round before (``2 * len(grid)`` entries), empty for ``convert``.
        share: images that this round's students see in total, as a share of the cell's budget.
    """

    kind: Literal["convert", "halve"]
    grid: tuple[int, ...]
    fine: tuple[int, ...]
    prediction: Literal["epsilon", "v_prediction"]
    share: float

    def __post_init__(self) -> None:
        if self.kind not in ("convert", "halve") or self.prediction not in ("epsilon", "v_prediction"):
            raise PluginError(
                f"a round of kind {self.kind!r} that ends with students of {self.prediction!r} is none; its kind is "
                "convert or halve, and they predict epsilon or v_prediction"
            )
        if not all(type(t) is int for t in (*self.grid, *self.fine)):
            raise PluginError("the grids of a round hold other things than ints; give tuples of timesteps")
        if not isinstance(self.share, int | float) or not 0 < self.share < math.inf:
            raise PluginError(f"a round has the share {self.share!r} of the budget; make it a number above 0")

    def targets(self) -> tuple[tuple[int, int, int | None], ...]:
        """For each grid entry of a ``halve`` round ``(t, t_mid, t_end)``, None for sigma 0; empty for ``convert``.

        The student's one DDIM step from t to t_end must land where the round before lands by way of t_mid
        (Salimans & Ho, arXiv 2202.00512, algorithm 2).
        """
        ends = (*self.fine[2::2], None)
        return tuple(zip(self.fine[::2], self.fine[1::2], ends, strict=True)) if self.fine else ()


class Sampler(ABC):
    """A sampler plugin. Torch-free: everything it does happens at plan time, in float64.

    Subclasses declare ``Options`` through ``register(..., options=...)`` and get the validated instance.
    """

    needs_rounds: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options

    def nfe(self, steps: int) -> int:
        """Network evaluations per image, declared; the engine's counter must agree."""
        return steps

    def rounds(self, schedule: NoiseSchedule, steps: int) -> tuple[Round, ...]:
        """Training stages this sampler needs, in order; none for a training-free sampler."""
        return ()

    @abstractmethod
    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        """The program on ``grid`` (training timesteps, descending, one entry a step); ``edges`` where experts change.

        Raises:
            UserError: when the options and the grid do not fit together.
        """
