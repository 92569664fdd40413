"""Relations between the samples of a group as targets: distances, angles, similarities.

Features may be of unequal width, since only numbers about pairs and triplets are compared. They come from Gram matrices
in float64: the cancellation between near neighbours is harmless there, and no (n, n, features) tensor is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from o2mkd_bench.engine.kd import KDMethod, StepContext

from .options import RelationOptions
from .weighting import task_term

SMALLEST_GROUP = 3

# Squared distances below this share of the squared norms are rounding: the two samples coincide.
_COINCIDENT = 1e-12


class Relation(KDMethod):
    """Relational KD (``rkd``, arXiv 1904.05068) or similarity-preserving KD (``similarity``, arXiv 1907.09682).

    Each term is the mean over the groups of ``ctx.groups`` of which the student has at least three samples, and zero
    where there is none.

    Terms: ``distance`` and ``angle``, each where it has weight, or ``similarity``; ``task`` where it has weight.
    """

    options: RelationOptions

    def teacher_features(self) -> Sequence[str]:
        return (self.options.layer,)

    def student_features(self) -> Sequence[str]:
        return (self.options.layer,)

    def weights(self) -> Mapping[str, float]:
        parts = {"similarity": 1.0}
        if self.options.kind == "rkd":
            parts = {"distance": self.options.distance, "angle": self.options.angle}
        weights = {name: self.options.weight * part for name, part in parts.items() if part}
        if self.options.task:
            weights["task"] = self.options.task
        return weights

    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        student = ctx.student_features[self.options.layer].flatten(1)
        teacher = ctx.teacher_features[self.options.layer].flatten(1).detach()
        members = self._members(ctx.groups)
        terms: dict[str, Tensor] = {}
        for name in self.weights():
            if name == "task":
                terms[name] = task_term(ctx, self.options)
                continue
            values = [_TERMS[name](student[rows].double(), teacher[rows].double()) for rows in members]
            # an empty sum is a zero that still has the student in its graph
            terms[name] = torch.stack(values).mean().float() if values else student[:0].sum()
        return terms

    def _members(self, groups: Tensor) -> list[Tensor]:
        """Rows of each group that is large enough."""
        if self.options.mixed_t:
            groups = torch.zeros_like(groups)
        order = torch.argsort(groups, stable=True)
        sizes = torch.unique_consecutive(groups[order], return_counts=True)[1].tolist()
        return [rows for rows in torch.split(order, sizes) if len(rows) >= SMALLEST_GROUP]


def distance_term(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: mean smooth L1 over pairs of different samples, of distances divided by their mean.

    ``student``: (n, features); ``teacher``: (n, other features); float64.
    """
    return functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def angle_term(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: mean smooth L1 over triplets of different samples, of the cosines of the angles at the middle one.

    Arguments as in :func:`distance_term`. An angle with a side of length zero counts as a right one.
    """
    n = len(student)
    same = torch.eye(n, dtype=torch.bool, device=student.device)
    degenerate = same[:, :, None] | same[:, None, :] | same[None, :, :]
    losses = functional.smooth_l1_loss(_cosines(student), _cosines(teacher), reduction="none")
    # a masked sum, since selecting by a mask waits for the device
    return losses.masked_fill(degenerate, 0.0).sum() / (n * (n - 1) * (n - 2))


def similarity_term(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the Gram matrices, each row divided by its L2 norm. Arguments as in
    :func:`distance_term`."""
    return functional.mse_loss(_similarities(student), _similarities(teacher))


_TERMS = {"distance": distance_term, "angle": angle_term, "similarity": similarity_term}


def _pairs(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred Gram matrix, squared distances (1 where two samples coincide), and where they do; each (n, n)."""
    centred = features - features.mean(0)
    gram = centred @ centred.T
    norms = gram.diagonal()
    total = norms[:, None] + norms[None, :]
    squares = total - 2 * gram
    # The square root has no slope at zero: coincident samples are taken out before it, not after.
    coincident = squares <= _COINCIDENT * total
    return gram, squares.masked_fill(coincident, 1.0), coincident


def _relative_distances(features: Tensor) -> Tensor:
    """Distances of the pairs i < j over their mean, (n * (n - 1) / 2,); zero where all samples coincide."""
    _, squares, coincident = _pairs(features)
    i, j = torch.triu_indices(len(features), len(features), offset=1, device=features.device)
    distances = squares[i, j].sqrt().masked_fill(coincident[i, j], 0.0)
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1.0)


def _cosines(features: Tensor) -> Tensor:
    """[j, i, k]: the cosine of the angle at j between i and k, (n, n, n)."""
    gram, squares, coincident = _pairs(features)
    inverse = squares.rsqrt().masked_fill(coincident, 0.0)
    products = gram[None] - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]


def _similarities(features: Tensor) -> Tensor:
    """Rows of the Gram matrix over their L2 norm, (n, n); a row of zeros stays one."""
    gram = features @ features.T
    squares = gram.square().sum(1, keepdim=True)
    empty = squares == 0
    return gram * squares.masked_fill(empty, 1.0).rsqrt().masked_fill(empty, 0.0)
