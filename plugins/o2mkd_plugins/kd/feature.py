"""Intermediate features of the teacher as targets: hints and attention maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.engine.kd import KDMethod, StepContext

from .options import FeatureOptions
from .weighting import task_term


class FeatureMatching(KDMethod):
    """Hints (FitNets, arXiv 1412.6550) or attention transfer (arXiv 1612.03928), summed over ``layers``.

    ``hint``: the mean squared difference of the features, the student's through a 1x1 convolution where it has another
    number of channels. ``attention``: the mean over samples and positions of the squared difference of attention maps,
    ``sum_c F_c^2`` as a vector over positions divided by its L2 norm; this is the form of that paper's code, its text
    has the L2 norm of the difference.

    Both networks' features must be of one spatial size: interpolation would make a different method of it unseen.

    Terms: ``hint`` or ``attention``; ``task`` where the options give it weight.
    """

    options: FeatureOptions
    adapters: nn.ModuleDict

    def teacher_features(self) -> Sequence[str]:
        return self.options.layers

    def student_features(self) -> Sequence[str]:
        return self.options.layers

    def setup(
        self, teacher_shapes: Mapping[str, torch.Size], student_shapes: Mapping[str, torch.Size]
    ) -> nn.Module | None:
        """The adapters of the layers that need one, by position in ``layers``.

        Raises:
            UserError: for features that are no images, or of unequal spatial size.
        """
        self.adapters = nn.ModuleDict()
        for position, layer in enumerate(self.options.layers):
            teacher, student = teacher_shapes[layer], student_shapes[layer]
            if not len(teacher) == len(student) == 4 or teacher[2:] != student[2:]:
                raise UserError(
                    f"kd feature: layer {layer!r} is {tuple(teacher)} in the teacher and {tuple(student)} in "
                    "the student, not (batch, channels, height, width) with one height and width; choose another layer"
                )
            if self.options.kind == "hint" and teacher[1] != student[1]:
                self.adapters[str(position)] = nn.Conv2d(student[1], teacher[1], kernel_size=1)
        return self.adapters if self.adapters else None

    def weights(self) -> Mapping[str, float]:
        weights: dict[str, float] = {self.options.kind: self.options.weight}
        if self.options.task:
            weights["task"] = self.options.task
        return weights

    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        distances = [
            self._distance(position, ctx.student_features[layer], ctx.teacher_features[layer].detach())
            for position, layer in enumerate(self.options.layers)
        ]
        terms = {str(self.options.kind): torch.stack(distances).sum()}
        if self.options.task:
            terms["task"] = task_term(ctx, self.options)
        return terms

    def _distance(self, position: int, student: Tensor, teacher: Tensor) -> Tensor:
        if self.options.kind == "attention":
            return functional.mse_loss(attention_map(student), attention_map(teacher))
        key = str(position)
        if key in self.adapters:
            student = self.adapters[key](student)
        return functional.mse_loss(student, teacher)


def attention_map(feature: Tensor) -> Tensor:
    """Where a feature (B, C, H, W) is large: (B, H * W), each row of L2 norm 1."""
    return functional.normalize(feature.square().sum(1).flatten(1), dim=1)
