"""What a suite may say about each sampler; the number of steps stands beside these, in the suite itself."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from o2mkd_bench.core.grid import Final
from o2mkd_bench.core.options import Options

_SCHEDULE = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "num_train_timesteps",
    "rescale_betas_zero_snr",
    "use_flow_sigmas",
)
# what a config may not say, and who says it
_DECIDED = {
    **dict.fromkeys(_SCHEDULE, "the teacher's noise schedule"),
    "prediction_type": "the network",
    "clip_sample": "clip of the sampler or the suite",
    "clip_sample_range": "clip of the sampler or the suite",
}


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


class SigmaOptions(Options):
    """Of the solvers that step in sigma, ``euler`` and ``heun``.

    ``start``: standard deviation of the first state: 1, as for every other sampler and as in diffusers on leading
    grids, or the sigma of the first timestep, as in diffusers on all other grids.
    """

    start: Literal["one", "sigma"] = "one"


class PNDMOptions(Options):
    """Names and defaults are those of Stable Diffusion's ``PNDMScheduler``, save ``offset``, which is 1 there.

    Attributes:
        warmup: how the first predictions are got: ``plms`` evaluates the second entry of the grid twice (one evaluation
            more than steps, ``skip_prk_steps`` in diffusers), ``prk`` takes three Runge-Kutta steps (9 more).
        offset: added to every entry of the grid, ``steps_offset`` in diffusers.
        final: the last target is the sigma of training timestep 0, or sigma 0 (``set_alpha_to_one`` in diffusers).
        history: at a change of expert ``keep`` uses the former expert's predictions, ``reset`` does not.
    """

    warmup: Literal["plms", "prk"] = "plms"
    offset: int = Field(0, ge=0)
    final: Final = "sigma_min"
    history: Literal["keep", "reset"] = "keep"


class DEISOptions(Options):
    """Names, meanings and defaults are those of ``DEISMultistepScheduler``, which knows ``final: sigma_min`` only.

    Attributes:
        order: degree of the polynomial in log(sigma / alpha), plus one, where enough history is known.
        final: the last target is the sigma of training timestep 0, or sigma 0, by order 1.
        lower_order_final: end with lower orders below 15 steps.
        history: at a change of expert ``keep`` uses the former expert's predictions, ``reset`` does not.
    """

    order: Literal[1, 2, 3] = 2
    final: Final = "sigma_min"
    lower_order_final: bool = True
    history: Literal["keep", "reset"] = "keep"


class UniPCOptions(Options):
    """Names, meanings and defaults are those of ``UniPCMultistepScheduler``; the last orders are always lowered.

    Attributes:
        order: of the predictor; that of the corrector is one more.
        solver_type: the function B(h) of the paper; ``bh1`` is for few steps without guidance.
        predict_x0: integrate x0, else epsilon.
        final: the last target is sigma 0, or the sigma of training timestep 0.
        history: at a change of expert ``keep`` uses the former expert's predictions, ``reset`` does not.
    """

    order: Literal[1, 2, 3] = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    predict_x0: bool = True
    final: Final = "zero"
    history: Literal["keep", "reset"] = "keep"


class DiffusersOptions(Options):
    """Any scheduler of diffusers that is a linear solver.

    Attributes:
        scheduler: name of its class, such as ``LMSDiscreteScheduler``.
        config: what else its class is made with, such as ``{use_karras_sigmas: true}``. The noise schedule is that of
            the teacher, clipping that of the suite, and spacing too unless ``timestep_spacing`` stands here.
    """

    scheduler: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9]*$")
    config: dict[str, Any] = Field(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _free(cls, config: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_DECIDED.keys() & config.keys())
        if taken:
            raise ValueError(f"{taken[0]} is decided by {_DECIDED[taken[0]]}; leave it out of config")
        return config


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
