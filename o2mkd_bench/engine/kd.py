"""What a KD method sees, and what it must give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from ..core.intervals import Interval
from ..core.options import Options
from ..core.schedule import Prediction


def convert(value: Tensor, source: Prediction, target: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A prediction in another type, in float32.

    ``value``, ``x_t``: (B, C, H, W); ``alpha``, ``sigma``: (B,), the schedule at each sample's t.
    v is ``alpha * noise - sigma * x0`` (Salimans & Ho, arXiv 2202.00512).
    """
    if source == target:
        return value.float()
    value, x_t = value.float(), x_t.float()
    a, s = (c.float().view(-1, 1, 1, 1) for c in (alpha, sigma))
    match source:
        case "epsilon":
            x0, epsilon = (x_t - s * value) / a, value
        case "v_prediction":
            x0, epsilon = a * x_t - s * value, s * x_t + a * value
        case "sample":
            x0, epsilon = value, (x_t - a * value) / s
    match target:
        case "epsilon":
            return epsilon
        case "sample":
            return x0
        case "v_prediction":
            return a * epsilon - s * x0


@dataclass(frozen=True)
class StepContext:
    """One training step as a KD method sees it; attributes are only ever added, never renamed.

    B is the number of samples this student takes of the batch; all images are float32 (B, C, H, W) in [-1, 1].

    Attributes:
        x_t, x0, noise: the noised image, the clean one, and the noise between them.
        t: training timesteps, int64 (B,).
        condition: conditioning passed to both networks, or None.
        alpha, sigma, snr: the schedule at each t, float32 (B,).
        teacher: the teacher's prediction, converted in float32 to the student's type; None without a teacher.
        student: the student's prediction in its own type, with gradient.
        prediction: the student's type.
        teacher_features, student_features: what the method asked for, by role or module path, float32.
        groups: int64 (B,), the relational group of each sample, set by the stream.
        interval: the timesteps this student trains on.
        step, total: position in the student's lineage and its length.
        generator: for a method that draws; seeded by stream and step, on the device.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor
    noise: Tensor
    alpha: Tensor
    sigma: Tensor
    snr: Tensor
    teacher: Tensor | None
    student: Tensor
    prediction: Prediction
    groups: Tensor
    interval: Interval
    step: int
    total: int
    condition: Tensor | None = None
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by the names that a method writes."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        for side in ("teacher_features", "student_features"):
            found |= {f"{side}[{name!r}]": value for name, value in own[side].items()}
        return found

    def convert(self, value: Tensor, source: Prediction, target: Prediction) -> Tensor:
        """``value`` in another prediction type at this step's x_t and t."""
        return convert(value, source, target, self.x_t, self.alpha, self.sigma)

    def target(self) -> Tensor:
        """What the task loss asks of the student: the truth in the student's own type."""
        match self.prediction:
            case "epsilon":
                return self.noise
            case "sample":
                return self.x0
            case "v_prediction":
                # not through convert(): that divides by alpha, which is 0.006 at the last timestep
                return self.alpha.view(-1, 1, 1, 1) * self.noise - self.sigma.view(-1, 1, 1, 1) * self.x0


class KDMethod(ABC):
    """A KD method plugin: named scalar terms for a batch.

    The loop adds ``weights()[name] * terms(ctx)[name]``, logs each term, and takes the step. ``adapters`` made in
    ``setup`` are trained with the student and thrown away after.
    """

    def __init__(self, options: Options) -> None:
        self.options = options

    def teacher_features(self) -> Sequence[str]:
        """Roles or module paths of the teacher whose outputs ``terms`` wants."""
        return ()

    def student_features(self) -> Sequence[str]:
        """Roles or module paths of the student whose outputs ``terms`` wants."""
        return ()

    def setup(
        self, teacher_shapes: Mapping[str, torch.Size], student_shapes: Mapping[str, torch.Size]
    ) -> nn.Module | None:
        """Called once before the first step with the shapes of the features; may return adapters to be trained."""
        return None

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """The weight of each term, from the options."""

    @abstractmethod
    def terms(self, ctx: StepContext) -> Mapping[str, Tensor]:
        """Scalar terms by name, the same names as in ``weights``."""
