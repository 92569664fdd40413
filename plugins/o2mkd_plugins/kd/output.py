"""The teacher's prediction as target."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from o2mkd_bench.engine.kd import KDMethod, StepContext

from .options import OutputOptions
from .weighting import task_term, weighted_error


class OutputMatching(KDMethod):
    """The student predicts what the teacher predicts, at the same x_t and t.

    Terms: ``output``; ``task`` where the options give it weight.
    """

    options: OutputOptions

    def weights(self) -> Mapping[str, float]:
        weights = {"output": self.options.weight}
        if self.options.task:
            weights["task"] = self.options.task
        return weights

    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        assert ctx.teacher is not None, "registered as needing a teacher"
        terms = {"output": weighted_error(ctx, ctx.teacher, self.options)}
        if self.options.task:
            terms["task"] = task_term(ctx, self.options)
        return terms
