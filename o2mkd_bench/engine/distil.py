"""The objective of plain training and of knowledge distillation: named terms of KD methods, weighted and summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import UserError
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
    """What a student's training is about, whichever objective it has."""

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

    def features(self, side: str) -> list[str]:
        wanted = [f for m in self.methods.values() for f in getattr(m, f"{side}_features")()]
        return list(dict.fromkeys(wanted))

    def setup(self, teacher: Mapping[str, torch.Size], student: Mapping[str, torch.Size]) -> nn.ModuleDict:
        made = {name: method.setup(teacher, student) for name, method in self.methods.items()}
        return nn.ModuleDict({name: module for name, module in made.items() if module is not None})

    def terms(self, ctx: StepContext) -> dict[str, Tensor]:
        """Weighted terms; a method that gives other terms than it declared weights for is the plugin's error."""
        found: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            terms = method.terms(ctx)
            if set(terms) != set(method.weights()):
                raise UserError(
                    f"KD method {name!r} gives the terms {sorted(terms)} but declares weights for "
                    f"{sorted(method.weights())}; make weights() and terms() agree"
                )
            found |= {f"{name}/{k}": self.weights[f"{name}/{k}"] * v for k, v in terms.items()}
        return found


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher."""

    call: Call
    prediction: Prediction


class Distil(Objective):
    """KD terms at the stream's (x_t, t); with method ``none`` and no teacher this is plain DDPM training."""

    def __init__(self, setting: Setting, student: Call, methods: Methods, teacher: Teacher | None) -> None:
        self.setting = setting
        self.student = student
        self.methods = methods
        self.teacher = teacher
        self._stack = ExitStack()
        self._shapes: dict[str, dict[str, torch.Size]] = {}
        self.student_taps = self._tap(student, methods.features("student"), "student")
        wanted = methods.features("teacher")
        self.teacher_taps = self._tap(teacher.call, wanted, "teacher") if teacher is not None else None
        self._adapters = methods.setup(self._shapes.get("teacher", {}), self._shapes["student"])

    def _tap(self, call: Call, names: Sequence[str], side: str) -> Taps:
        paths = resolve(call.network, names, call.family.roles(call.network), side)
        self._shapes[side] = shapes(call.network, paths, lambda: call(*self._example()), side)
        return self._stack.enter_context(Taps(call.network, paths, where=side))

    def _example(self) -> tuple[Tensor, Tensor]:
        device = self.setting.data.device
        x = torch.zeros(1, *self.setting.data.shape[1:], device=device)
        return x, torch.zeros(1, dtype=torch.int64, device=device)

    def close(self) -> None:
        """Remove every hook from both networks."""
        self._stack.close()

    def adapters(self) -> nn.Module | None:
        return self._adapters.to(self.setting.data.device)

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
        student = self.student(x_t, t)
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
                student_features=self.student_taps.take(),
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
        with torch.no_grad():
            for x_part, t_part in zip(x_t.split(size), t.split(size), strict=True):
                raws.append(self.teacher.call(x_part, t_part))
                for name, value in self.teacher_taps.take().items():
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
    generator.manual_seed(Philox.for_purpose(seed, f"method {step}").key & (2**63 - 1))
    return generator
