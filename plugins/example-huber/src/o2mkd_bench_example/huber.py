"""Distillation under a loss that large errors do not dominate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from o2mkd_bench import KDMethod, StepContext

from .options import HuberOptions


class Huber(KDMethod):
    """The pseudo-Huber loss (Charbonnier; alpha = 1 of Barron, arXiv 1701.03077) of student against teacher.

    ``2 * delta^2 * (sqrt(1 + (d / delta)^2) - 1)``, which is ``d^2`` for small ``d`` and so comparable with ``output``.

    Term: ``huber``.
    """

    options: HuberOptions

    def weights(self) -> Mapping[str, float]:
        return {"huber": self.options.weight}

    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        delta = self.options.delta
        scaled = (ctx.student - ctx.teacher) / delta
        return {"huber": 2 * delta**2 * ((1 + scaled.square()).sqrt() - 1).mean()}
