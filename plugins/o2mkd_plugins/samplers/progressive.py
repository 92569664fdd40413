"""Progressive distillation (Salimans & Ho, arXiv 2202.00512): students that halve the number of DDIM steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.program import Clip, Program, Round, Sampler
from o2mkd_bench.core.schedule import NoiseSchedule

from .ddim import ddim_program
from .options import ProgressiveOptions


class Progressive(Sampler):
    """From ``start`` steps down to ``steps``; every grid is trailing from T-1 and its last target is sigma 0.

    ``program`` takes only the number of steps from the grid it is handed: the students know no other grid than the
    one they were trained on.
    """

    needs_rounds = True
    options: ProgressiveOptions

    def rounds(self, schedule: NoiseSchedule, steps: int) -> tuple[Round, ...]:
        """One ``convert`` round on the starting grid when the students predict v, then the ``halve`` rounds.

        Raises:
            UserError: unless ``start`` is ``steps * 2**r`` with r >= 1.
        """
        options = self.options
        ratio, rest = divmod(options.start, steps)
        if rest or ratio < 2 or ratio & (ratio - 1):
            raise UserError(
                f"sampler progressive cannot halve start: {options.start} down to {steps} steps; "
                f"set start to {steps} times 2, 4, 8 …"
            )
        if options.prediction == "epsilon":
            warnings.warn(
                "progressive distillation of an epsilon student is unstable near T, where its x0 is divided by an "
                "alpha close to 0; prefer prediction: v",
                stacklevel=2,
            )
        prediction: Literal["epsilon", "v_prediction"] = "v_prediction" if options.prediction == "v" else "epsilon"
        fine = time_grid("trailing", options.start, schedule.timesteps)
        found = [Round("convert", fine, (), prediction, options.share)] if options.prediction == "v" else []
        while len(fine) > steps:
            found.append(Round("halve", fine[::2], fine, prediction, options.share))
            fine = fine[::2]
        return tuple(found)

    def program(
        self, schedule: NoiseSchedule, grid: Sequence[int], edges: Sequence[int] = (), clip: Clip = "x0"
    ) -> Program:
        """DDIM without noise on the last round's own trailing grid of ``len(grid)`` entries."""
        return ddim_program(schedule, time_grid("trailing", len(grid), schedule.timesteps), 0.0, clip)
