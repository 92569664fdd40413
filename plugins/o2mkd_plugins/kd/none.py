"""Training without a teacher."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from o2mkd_bench.engine.kd import KDMethod, StepContext

from .options import TaskOptions
from .weighting import task_term


class NoTeacher(KDMethod):
    """The diffusion loss (Ho et al., arXiv 2006.11239). Term ``task``."""

    options: TaskOptions

    def weights(self) -> Mapping[str, float]:
        return {"task": 1.0}

    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        return {"task": task_term(ctx, self.options)}
