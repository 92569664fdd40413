"""Options of the built-in KD methods; torch-free, so that plans and schemas are instant."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from o2mkd_bench.core.options import Options

Weighting = Literal["none", "snr", "min_snr", "truncated_snr"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TaskOptions(Options):
    """How errors of the prediction are weighted over t.

    ``weighting`` multiplies the squared x0 error by SNR(t) (``snr``, the plain MSE of epsilon), ``min(SNR, gamma)``
    (``min_snr``, arXiv 2303.09556) or ``max(SNR, 1)`` (``truncated_snr``, arXiv 2202.00512); ``none`` is the plain
    MSE in the student's own prediction type. ``gamma`` is used by ``min_snr`` only.
    """

    weighting: Weighting = "none"
    gamma: PositiveWeight = 5.0


class OutputOptions(TaskOptions):
    """``weight`` of the teacher's prediction as target, ``task`` of the true target."""

    weight: PositiveWeight = 1.0
    task: Weight = 0.0


class FeatureOptions(TaskOptions):
    """``weight`` of the feature term, ``task`` of the true target, to which alone ``weighting`` applies.

    ``layers``: roles (``down.0`` … ``mid`` … ``up.3``) or module paths that both networks have.
    """

    kind: Literal["hint", "attention"] = "hint"
    weight: PositiveWeight = 1.0
    task: Weight = 1.0
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("mid",)

    @model_validator(mode="after")
    def _distinct(self) -> FeatureOptions:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers names one layer twice: {', '.join(self.layers)}")
        return self


class RelationOptions(TaskOptions):
    """``weight`` of the relational terms, ``task`` of the true target, to which alone ``weighting`` applies.

    ``distance`` and ``angle`` are the parts of ``rkd`` within ``weight``; ``similarity`` does not use them.
    ``mixed_t`` takes all of the student's samples of a batch as one group; ``rkd`` then costs memory in the cube of
    their number.
    """

    kind: Literal["rkd", "similarity"] = "rkd"
    weight: PositiveWeight = 1.0
    task: Weight = 1.0
    layer: str = "mid"
    distance: Weight = 1.0
    angle: Weight = 2.0
    mixed_t: bool = False

    @model_validator(mode="after")
    def _some_term(self) -> RelationOptions:
        if self.kind == "rkd" and self.distance == self.angle == 0:
            raise ValueError("distance and angle are both 0, which leaves rkd without a term; raise one of them")
        return self
