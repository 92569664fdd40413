"""Schedulers of diffusers as solver programs: made, set up on the suite's grid, and followed step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from o2mkd_bench.core.complaints import near
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.grid import Spacing, time_grid
from o2mkd_bench.core.program import Clip, Program, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .options import DiffusersOptions

_SPACINGS: tuple[Spacing, ...] = ("trailing", "leading", "linspace")
# what running them cannot show, as the library they draw from may be missing
_OWN_NOISE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")


class Scheduler(Sampler):
    """The program that a scheduler's own ``set_timesteps``, ``scale_model_input`` and ``step`` amount to.

    The timesteps are the scheduler's own: those of its ``timestep_spacing``, which is the suite's spacing unless
    ``config`` gives it. Its history is kept at a change of expert. With ``clip: x0`` a scheduler that has
    ``clip_sample`` clips where it does itself; the others read epsilon alone, which ``clip: x0`` does not touch.

    diffusers, and torch with it, are imported by the plan of a suite that names this sampler, and by no other.
    """

    options: DiffusersOptions

    def nfe(self, steps: int) -> int:
        # teachers may have more timesteps than most
        schedule = NoiseSchedule(timesteps=max(NoiseSchedule.timesteps, steps))
        grid = time_grid("trailing", steps, schedule.timesteps)
        return len(self._maker(schedule, grid, "none")().timesteps)

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        """Raises UserError for what cannot be made with this config, and for what no program can say."""
        from .trace import trace

        return trace(self._maker(schedule, grid, clip), schedule, clip)

    def _maker(self, schedule: NoiseSchedule, grid: Sequence[int], clip: Clip) -> Callable[[], Any]:
        """A function that gives the scheduler, set up anew."""
        kind = self._kind()
        name = kind.__name__
        known = inspect.signature(kind.__init__).parameters
        if "beta_schedule" not in known:
            raise UserError(f"{name} has no beta_schedule, so it cannot follow the teacher's; choose another scheduler")
        strange = sorted(self.options.config.keys() - known.keys())
        if strange:
            raise UserError(f"{name} has no {strange[0]!r} in its config; it knows {', '.join([*known][1:])}")
        config = {**schedule.scheduler_config(), "prediction_type": "epsilon", **self.options.config}
        if "clip_sample" in known:
            config |= {"clip_sample": clip == "x0", "clip_sample_range": 1.0}
        if "timestep_spacing" in known and "timestep_spacing" not in self.options.config:
            config["timestep_spacing"] = self._spacing(grid, schedule.timesteps)

        def make() -> Any:
            try:
                made = kind(**{key: value for key, value in config.items() if key in known})
                made.set_timesteps(len(grid))
            except Exception as error:
                raise UserError(f"{name} cannot be set up for {len(grid)} steps: {_line(error)}") from error
            return made

        return make

    def _kind(self) -> type:
        import diffusers

        name = self.options.scheduler
        if name in _OWN_NOISE:
            raise UserError(f"{name} draws its noise from a Brownian tree of its own, which no solver program can say")
        if name.endswith("Scheduler") and hasattr(diffusers, name):
            kind: type = getattr(diffusers, name)
            return kind
        known = [known for known in dir(diffusers) if known.endswith("Scheduler")]
        raise UserError(f"diffusers {diffusers.__version__} has no scheduler {name!r}{near(name, known)}")

    def _spacing(self, grid: Sequence[int], timesteps: int) -> Spacing:
        for spacing in _SPACINGS:
            if time_grid(spacing, len(grid), timesteps) == tuple(grid):
                return spacing
        raise UserError(
            f"{self.options.scheduler} spaces its timesteps itself, {', '.join(_SPACINGS)}; set spacing to one of "
            "these, or timestep_spacing in its config"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
