"""Squared errors of a prediction, weighted over t."""

from __future__ import annotations

import torch
from torch import Tensor

from o2mkd_bench.core.schedule import Prediction
from o2mkd_bench.engine.kd import StepContext

from .options import TaskOptions


def factor(snr: Tensor, prediction: Prediction, options: TaskOptions) -> Tensor:
    """What multiplies the squared error in type ``prediction`` so that the squared x0 error gets its weight.

    ``snr`` and the result: float32 (B,). For a variance-preserving schedule the squared error of epsilon is SNR times
    that of x0, and the one of v is 1 + SNR times it.
    """
    match options.weighting:
        case "none":
            return torch.ones_like(snr)
        case "snr":
            weight = snr
        case "min_snr":
            weight = snr.clamp(max=options.gamma)
        case "truncated_snr":
            weight = snr.clamp(min=1)
    match prediction:
        case "epsilon":
            return weight / snr
        case "v_prediction":
            return weight / (1 + snr)
        case "sample":
            return weight


def weighted_error(ctx: StepContext, target: Tensor, options: TaskOptions) -> Tensor:
    """The scalar mean over samples of weight times mean squared difference of ``ctx.student`` and ``target``.

    ``target``: (B, C, H, W) in the student's type; no gradient flows into it.
    """
    squares = (ctx.student.float() - target.detach().float()).square().flatten(1).mean(1)
    return (factor(ctx.snr, ctx.prediction, options) * squares).mean()


def task_term(ctx: StepContext, options: TaskOptions) -> Tensor:
    """The diffusion loss itself: the student against the truth."""
    return weighted_error(ctx, ctx.target(), options)
