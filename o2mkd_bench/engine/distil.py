"""The objective of plain training and of knowledge distillation: named terms of KD methods, weighted and summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import PluginError
from ..core.intervals import Interval
from ..core.schedule import Prediction
from .denoiser import Call, Tables
from .kd import KDMethod, StepContext, convert
from .loop import Objective
from .philox import Philox
from .stream import Stream, StreamBatch
from .taps import Taps, resolve, shapes

# On the CPU the teacher always sees the stream's batch in these pieces, whoever trains on it: the bits of a
# convolution depend on the batch it is part of.
CHUNK = 32


@dataclass(frozen=True)
class Setting:
    """What a student's training is about, whichever objective it has.

    Attributes:
        data: the training set, uint8 (N, C, H, W), on the device.
        prediction: the student's type.
        interval: the timesteps (for a round: the grid entries) it trains on.
        total: length of its lineage, steps.
    """

    stream: Stream
    data: Tensor
    tables: Tables
    prediction: Prediction
    interval: Interval
    total: int


class Methods:
    """Several KD methods as one: terms are prefixed with the method's name, weights are each method's own."""

    def __init__(self, methods: Mapping[str, KDMethod]) -> None:
        self.methods = dict(methods)
        self.weights = {f"{n}/{k}": w for n, m in self.methods.items() for k, w in m.weights().items()}

    def features(self, side: Literal["teacher", "student"]) -> list[str]:
        """Roles and paths that any method wants of this side, each once."""
        wanted = [f for m in self.methods.values() for f in getattr(m, f"{side}_features")()]
        return list(dict.fromkeys(wanted))

    def setup(self, teacher: Mapping[str, torch.Size], student: Mapping[str, torch.Size]) -> nn.ModuleDict:
        """Every method's adapters, from the shapes of the features."""
        made = {name: method.setup(teacher, student) for name, method in self.methods.items()}
        # a distribution's name may hold dots, which a module's must not
        return nn.ModuleDict({name.replace(".", "-"): m for name, m in made.items() if m is not None})

    def terms(self, ctx: StepContext) -> dict[str, Tensor]:
        """Weighted scalar terms.

        Raises:
            PluginError: for a method whose terms are not those it declares weights for, or are no scalars.
        """
        found: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            terms = method.terms(ctx)
            if set(terms) != set(method.weights()):
                raise PluginError(
                    f"KD method {name!r} gives the terms {sorted(terms)} but declares weights for "
                    f"{sorted(method.weights())}; make weights() and terms() agree"
                )
            for term, value in terms.items():
                if value.dim() != 0:
                    raise PluginError(
                        f"KD method {name!r} gives the term {term!r} of shape {tuple(value.shape)}; make it a scalar"
                    )
            found |= {f"{name}/{k}": self.weights[f"{name}/{k}"] * v for k, v in terms.items()}
        return found


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher."""

    call: Call
    prediction: Prediction


class Distil(Objective):
    """KD terms at the stream's (x_t, t); with method ``none`` and no teacher this is plain DDPM training.

    Hooks stand in the networks only while a loss is computed. Adapters start from the stream's seed.

    Raises:
        UserError: for a feature that a network has not.
    """

    def __init__(self, setting: Setting, student: Call, methods: Methods, teacher: Teacher | None) -> None:
        self.setting = setting
        self.student = student
        self.methods = methods
        self.teacher = teacher
        self.student_taps, student_shapes = self._tap(student, "student")
        self.teacher_taps: Taps | None = None
        teacher_shapes: dict[str, torch.Size] = {}
        if teacher is not None:
            self.teacher_taps, teacher_shapes = self._tap(teacher.call, "teacher")
        # adapters start from the seed, whatever was drawn before; setup may draw on the CPU
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Philox.torch_seed(setting.stream.seed, "adapters"))
            self._adapters = methods.setup(teacher_shapes, student_shapes).to(setting.data.device)

    def _tap(self, call: Call, side: Literal["teacher", "student"]) -> tuple[Taps, dict[str, torch.Size]]:
        paths = resolve(call.network, self.methods.features(side), call.family.roles(call.network), side)
        return Taps(call.network, paths, side), shapes(call.network, paths, lambda: call(*self._example()), side)

    def _example(self) -> tuple[Tensor, Tensor]:
        device = self.setting.data.device
        x = torch.zeros(1, *self.setting.data.shape[1:], device=device)
        return x, torch.zeros(1, dtype=torch.int64, device=device)

    def adapters(self) -> nn.Module | None:
        return self._adapters

    def loss(self, batch: StreamBatch, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.setting
        seen, pick = (rows, None) if self.teacher is None or rows.device.type != "cpu" else _chunks(rows, len(batch.t))
        x0 = s.stream.images(batch, s.data, seen)
        noise = s.stream.noise(batch, x0.shape[1:], seen)
        t = batch.t[seen]
        alpha, sigma = s.tables.alpha[t], s.tables.sigma[t]
        x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
        teacher, teacher_features = self._ask_teacher(x_t, t, alpha, sigma, pick)
        if pick is not None:
            x0, noise, t, alpha, sigma, x_t = (v[pick] for v in (x0, noise, t, alpha, sigma, x_t))
        with self.student_taps as taps:
            student = self.student(x_t, t)
            student_features = taps.take()
        terms = self.methods.terms(
            StepContext(
                x_t=x_t,
                t=t,
                x0=x0,
                noise=noise,
                alpha=alpha,
                sigma=sigma,
                snr=s.tables.snr[t],
                teacher=teacher,
                student=student,
                prediction=s.prediction,
                groups=batch.groups[rows],
                interval=s.interval,
                step=step,
                total=s.total,
                teacher_features=teacher_features,
                student_features=student_features,
                generator=_generator(s.stream.seed, step, x_t.device),
            )
        )
        return torch.stack(list(terms.values())).sum(), terms

    def _ask_teacher(
        self, x_t: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, pick: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.teacher is None or self.teacher_taps is None:
            return None, {}
        size = len(t) if pick is None else CHUNK
        raws: list[Tensor] = []
        features: dict[str, list[Tensor]] = {}
        with torch.no_grad(), self.teacher_taps as taps:
            for x_part, t_part in zip(torch.split(x_t, size), torch.split(t, size), strict=True):
                raws.append(self.teacher.call(x_part, t_part))
                for name, value in taps.take().items():
                    features.setdefault(name, []).append(value)
            raw = convert(torch.cat(raws), self.teacher.prediction, self.setting.prediction, x_t, alpha, sigma)
        joined = {name: torch.cat(parts) for name, parts in features.items()}
        if pick is None:
            return raw, joined
        return raw[pick], {name: value[pick] for name, value in joined.items()}


def _chunks(rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """All rows of the chunks that ``rows`` touch, and where ``rows`` stand among them."""
    touched = torch.unique(rows // CHUNK)
    seen = (touched[:, None] * CHUNK + torch.arange(CHUNK)).flatten()
    seen = seen[seen < batch]
    return seen, torch.searchsorted(seen, rows)


def _generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(Philox.torch_seed(seed, f"method {step}"))
    return generator
