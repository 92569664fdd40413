"""A scheduler of diffusers followed with one unit vector for each thing it combines: what comes out is its program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.program import Clip, Line, Program
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.engine.sample import run_program

# share of a line's largest factor below which another is the rounding of float32, in which schedulers compute
_ROUNDING = 1e-7
# how far program and scheduler may be apart, as a share of the largest pixel, on images that try the scheduler
_TOLERANCE = 1e-3
_TRIED = 16
# of images; schedulers are free to clamp numbers of fewer dimensions
_DIMS = 4


def trace(make: Callable[[], Any], schedule: NoiseSchedule, clip: Clip) -> Program:
    """The program of the scheduler that ``make`` gives, set up for its steps, anew each time.

    States are scaled by ``scale_model_input``, so that each is what the network sees. Every step is followed in float64
    with state, prediction and noise as unit vectors of their own, and then the whole is tried on random numbers.

    Raises:
        UserError: for timesteps that do not lead from noise to an image, and for steps that are not linear combinations
            of states, predictions, x0 clipped to [-1, 1], and one fresh noise.
    """
    name = type(make()).__name__
    times = _timesteps(name, make().timesteps, schedule.timesteps)
    found = _Follower(name, make()).follow()
    scales = [*found.scales, 1.0]
    lines = [_line(name, t, i, found.rows[i], scales) for i, t in enumerate(times)]
    program = Program(tuple(lines), clip, found.start * scales[0])
    _try(name, make(), program, schedule)
    return program


def _timesteps(name: str, given: Tensor, total: int) -> Sequence[float]:
    times = [float(t) for t in given]
    if any(after > before for before, after in pairwise(times)) or not (total > times[0] and times[-1] >= 0):
        raise UserError(
            f"{name} leads from t = {times[0]:g} to t = {times[-1]:g}, and not from noise to an image within "
            f"{total} timesteps; choose another scheduler or timestep_spacing"
        )
    # one type for all, as what is compiled or captured for one is not for the other
    return [int(t) for t in times] if all(t.is_integer() for t in times) else times


@dataclass(frozen=True)
class _Found:
    """``rows[i]``: factors (4, n) of states, predictions, clipped x0 and noises in the state after step i."""

    start: float
    scales: list[float]
    rows: list[NDArray[np.float64]]


class _Watch(TorchFunctionMode):
    """Gives a scheduler its noise, and its clipped x0 where ``clamp`` is given."""

    def __init__(self, draw: Callable[[], Tensor], clamp: Callable[[float, float], Tensor] | None = None) -> None:
        super().__init__()
        self._draw = draw
        self._clamp = clamp

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            return self._draw()
        if self._clamp is not None and func in (torch.clamp, torch.Tensor.clamp) and args[0].dim() == _DIMS:
            return self._clamp(*args[1:])
        return func(*args, **(kwargs or {}))


class _Follower:
    """Runs a scheduler on unit vectors: float64 (1, 1, 1, 4 n + 1), the four blocks of :class:`_Found` and a zero."""

    def __init__(self, name: str, scheduler: Any) -> None:
        self._name = name
        self._scheduler = scheduler
        self._steps = len(scheduler.timesteps)
        self._step = 0
        self._drawn = -1

    def follow(self) -> _Found:
        scheduler, scales, rows = self._scheduler, [], []
        clamp = self._clipped if scheduler.config.get("clip_sample") else None
        with _Watch(self._noise, clamp):
            start = float(scheduler.init_noise_sigma)
            for i, t in enumerate(scheduler.timesteps):
                self._step = i
                state = self._unit(0)
                scales.append(float(scheduler.scale_model_input(state, t).flatten()[i]))
                result = _stepped(self._name, scheduler, self._unit(1), t, state).double().flatten().numpy()
                if not np.isfinite(result).all():
                    raise UserError(
                        f"{self._name} gives no finite number in its step from t = {float(t):g}; take another spacing"
                    )
                if result[-1]:
                    raise _not_linear(self._name)
                rows.append(result[:-1].reshape(4, self._steps))
        return _Found(start, scales, rows)

    def _unit(self, block: int) -> Tensor:
        unit = torch.zeros((*(1,) * (_DIMS - 1), 4 * self._steps + 1), dtype=torch.float64)
        unit[..., block * self._steps + self._step] = 1
        return unit

    def _clipped(self, low: float, high: float) -> Tensor:
        if (low, high) != (-1, 1):
            raise UserError(f"{self._name} clips to [{low:g}, {high:g}], and a solver program to [-1, 1] only")
        return self._unit(2)

    def _noise(self) -> Tensor:
        if self._drawn == self._step:
            raise UserError(f"{self._name} draws noise twice in a step, and a line of a solver program once only")
        self._drawn = self._step
        return self._unit(3)


def _not_linear(name: str) -> UserError:
    return UserError(
        f"{name} does not combine states, predictions and fresh noise linearly, so that no solver program can say what "
        "it does; switch thresholding and the like off in its config, or choose another scheduler"
    )


def _stepped(name: str, scheduler: Any, prediction: Tensor, t: Tensor, state: Tensor) -> Tensor:
    try:
        result: Tensor = scheduler.step(prediction, t, state, return_dict=False)[0]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot make its step at t = {float(t):g}: {' '.join(str(error).split())}") from error
    return result


def _line(name: str, t: float, i: int, row: NDArray[np.float64], scales: Sequence[float]) -> Line:
    """Line ``i`` in states as the network sees them."""
    row = np.where(np.abs(row) > _ROUNDING * np.abs(row).max(), row, 0.0) * scales[i + 1]
    states, epsilon, x0, noise = ({int(j): float(values[j]) for j in np.flatnonzero(values)} for values in row)
    if noise.keys() - {i}:
        raise UserError(f"{name} uses the noise of an earlier step again, and a solver program only fresh noise")
    return Line(t, {j: a / scales[j] for j, a in states.items()}, epsilon, x0, noise.get(i, 0.0))


def _try(name: str, scheduler: Any, program: Program, schedule: NoiseSchedule) -> None:
    """Compare ``program`` with the scheduler itself where predictions are large, and have nothing to do with states."""
    numbers = np.random.default_rng(0).standard_normal((3, program.nfe, 1, 1, 1, _TRIED))
    first, predictions, noises = torch.from_numpy(3 * numbers)
    step = 0
    with _Watch(lambda: noises[step]):
        x = first[0] * float(scheduler.init_noise_sigma)
        for step, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            x = _stepped(name, scheduler, predictions[step], t, x)
    # a scheduler never re-derives epsilon; its own clipping is tried with clip x0
    plain = replace(program, clip="none") if program.clip == "x0+epsilon" else program
    asked = iter(predictions)
    found = run_program(plain, schedule, lambda *_: next(asked), first[0], lambda i: noises[i].float())
    if not (found - x).abs().max() <= _TOLERANCE * x.abs().max():
        raise _not_linear(name)
