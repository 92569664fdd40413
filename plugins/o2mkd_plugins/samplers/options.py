"""What a suite may say about each sampler; the number of steps stands beside these, in the suite itself."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from o2mkd_bench.core.grid import Final
from o2mkd_bench.core.options import Options


class DDPMOptions(Options):
    """``variance``: of the noise a step adds: the posterior's (``fixed_small``) or beta itself (``fixed_large``)."""

    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"


class DDIMOptions(Options):
    """``eta``: 0 is deterministic, 1 adds the noise of DDPM with ``fixed_small``."""

    eta: float = Field(0.0, ge=0.0, le=1.0)


class DPMSolverOptions(Options):
    """Names and meanings are those of diffusers, where diffusers has them.

    Attributes:
        order: of the solver, where enough history is known.
        kind: ``multistep`` reuses the predictions of the lines before; ``singlestep`` groups ``order`` lines into one
            step, whose inner nodes are entries of the grid, so that the number of evaluations is the number of entries.
        algorithm: ``dpmsolver++`` integrates x0, ``dpmsolver`` epsilon.
        solver_type: the formula of order 2, and of singlestep order 3.
        final: the last target is sigma 0, or the sigma of training timestep 0.
        lower_order_final: end with lower orders; ``multistep`` does so only below 15 steps.
        history: at a change of expert ``keep`` uses the former expert's predictions, ``reset`` does not.
    """

    order: Literal[1, 2, 3] = 2
    kind: Literal["multistep", "singlestep"] = "multistep"
    algorithm: Literal["dpmsolver++", "dpmsolver"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    final: Final = "zero"
    lower_order_final: bool = True
    history: Literal["keep", "reset"] = "keep"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.algorithm == "dpmsolver" and self.final == "zero":
            raise ValueError("algorithm dpmsolver has no step to sigma 0; set final: sigma_min, or use dpmsolver++")
        if self.kind == "singlestep" and self.order > 1 and self.final == "zero" and not self.lower_order_final:
            raise ValueError("a singlestep solver reaches sigma 0 only by order 1; set lower_order_final: true")
        return self


class ProgressiveOptions(Options):
    """Salimans & Ho, arXiv 2202.00512.

    Attributes:
        start: steps of the sampler that the first round halves; ``steps * 2**r`` for every entry of ``steps``, r >= 1.
        prediction: what the rounds' students predict; ``v`` puts one stage before them that re-learns the student as v.
        share: images each stage sees, as a share of the cell's budget.
    """

    start: int = Field(16, ge=2)
    prediction: Literal["v", "epsilon"] = "v"
    share: float = Field(0.25, gt=0.0)
