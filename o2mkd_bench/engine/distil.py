"""The objective of plain training and of knowledge distillation: named terms of KD methods, weighted and summed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..core.errors import PluginError, SharedChanged
from ..core.intervals import Interval
from ..core.schedule import Prediction
from .denoiser import Call, Tables
from .kd import KDMethod, StepContext, convert
from .philox import Philox
from .shared import Objective, Source, Teacher, View, optional
from .stream import Stream
from .taps import resolve, shapes

if TYPE_CHECKING:
    from .images import Images


@dataclass(frozen=True)
class Setting:
    """What a student's training is about, whichever objective it has.

    Attributes:
        data: the training set, uint8 or latents (N, C, H, W), on the device, or where it lives.
        prediction: the student's type.
        interval: the timesteps (for a round: the grid entries) it trains on.
        total: length of its lineage, steps.
        conditions: what the networks follow at each of the training set, where they follow something.
    """

    stream: Stream
    data: Tensor | Images
    tables: Tables
    prediction: Prediction
    interval: Interval
    total: int
    conditions: Tensor | Images | None = None

    def source(self, grid: Tensor | None = None) -> Source:
        """What it learns from; ``grid`` as :class:`~o2mkd_bench.engine.shared.Source` has it."""
        return Source(self.stream, self.data, self.tables, grid, self.conditions)


class Methods:
    """Several KD methods as one: terms are prefixed with the method's name, weights are each method's own."""

    def __init__(self, methods: Mapping[str, KDMethod]) -> None:
        self.methods = dict(methods)
        self._watched: set[str] = set()
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
            PluginError: for a method whose terms are not those it declares weights for, or are no scalar tensors, and
                for one that leaves gradients or the default dtype in another mode.
            SharedChanged: for one that writes into what it is shown.
        """
        found: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            # what goes past torch's counters is seen in the first pass
            with _looking_only(name, ctx, thorough=name not in self._watched):
                try:
                    terms = method.terms(ctx)
                except SystemExit as error:
                    raise PluginError(
                        f"KD method {name!r} ends the program ({error}); raise an error instead"
                    ) from error
            self._watched.add(name)
            if not isinstance(terms, Mapping):
                raise PluginError(
                    f"KD method {name!r} gives a {type(terms).__name__} as its terms; make it a dict of scalar tensors"
                )
            if set(terms) != set(method.weights()):
                raise PluginError(
                    f"KD method {name!r} gives the terms {sorted(terms)} but declares weights for "
                    f"{sorted(method.weights())}; make weights() and terms() agree"
                )
            for term, value in terms.items():
                if not isinstance(value, Tensor):
                    raise PluginError(
                        f"KD method {name!r} gives a {type(value).__name__} for the term {term!r}; "
                        "make it a scalar tensor"
                    )
                if value.dim() != 0:
                    raise PluginError(
                        f"KD method {name!r} gives the term {term!r} of shape {tuple(value.shape)}; make it a scalar"
                    )
            found |= {f"{name}/{k}": self.weights[f"{name}/{k}"] * v for k, v in terms.items()}
        return found


@contextmanager
def _looking_only(name: str, ctx: StepContext, thorough: bool) -> Iterator[None]:
    """Hold a method to leaving as it is what all others work with: the tensors of the pass, and torch's own modes.

    ``thorough``: their values are compared too, as ``.data`` and numpy write without being counted.
    """
    # what is of the student is its own
    shown = {key: value for key, value in ctx.tensors().items() if not key.startswith("student")}
    versions = {key: value._version for key, value in shown.items() if not value.is_inference()}
    values = {key: value.detach().clone() for key, value in shown.items()} if thorough else {}
    modes = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        left = torch.is_grad_enabled(), torch.get_default_dtype()
        torch.set_grad_enabled(modes[0])
        torch.set_default_dtype(modes[1])
        changed = [key for key, version in versions.items() if shown[key]._version != version]
        changed += [
            key for key, value in values.items() if not torch.equal(value.nan_to_num(), shown[key].nan_to_num())
        ]
        if changed:
            raise SharedChanged(
                f"KD method {name!r} writes into ctx.{changed[0]}, from which other students learn too; leave it as it "
                "is, with clamp for clamp_ or on a clone"
            )
    if left != modes:
        raise PluginError(
            f"KD method {name!r} leaves torch's gradients or default dtype in another mode for all others; use them in "
            "a with block, as torch.no_grad()"
        )


class Distil(Objective):
    """KD terms at the stream's (x_t, t); with method ``none`` and no teacher this is plain DDPM training.

    Hooks stand in the networks only while a loss is computed. Adapters start from the stream's seed.

    Raises:
        UserError: for a feature that a network has not.
    """

    def __init__(self, setting: Setting, student: Call, methods: Methods, teacher: Teacher | None) -> None:
        self.setting = setting
        self.methods = methods
        self.teacher = teacher
        paths, student_shapes = self._inspect(student, "student")
        self.student = student.tapped(paths, "student")
        teacher_shapes: dict[str, torch.Size] = {}
        if teacher is not None:
            self.wanted, teacher_shapes = self._inspect(teacher.call, "teacher")
        # adapters start from the seed, whatever was drawn before; setup may draw on the CPU
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Philox.torch_seed(setting.stream.seed, "adapters"))
            self._adapters = methods.setup(teacher_shapes, student_shapes).to(setting.data.device)

    def _inspect(self, call: Call, side: Literal["teacher", "student"]) -> tuple[dict[str, str], dict[str, torch.Size]]:
        """Where the features of one side are, and their shapes; a compiled call is not compiled for this."""
        paths = resolve(call.network, self.methods.features(side), call.family.roles(call.network), side)
        return paths, shapes(call.network, paths, lambda: call.eager(*self._example(call)), side)

    def _example(self, call: Call) -> tuple[Tensor, ...]:
        device = self.setting.data.device
        x = torch.zeros(1, *self.setting.data.shape[1:], device=device)
        followed = call.family.condition_shape(call.network)
        condition = () if followed is None else (torch.zeros(1, *followed, device=device),)
        return x, torch.zeros(1, dtype=torch.int64, device=device), *condition

    def adapters(self) -> nn.Module | None:
        return self._adapters

    def loss(self, view: View, rows: Tensor, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        s, seen = self.setting, view.take(rows, taught=self.teacher is not None)
        student, student_features = self.student(seen.x_t, seen.t, *optional(seen.condition))
        told, answer = None, seen.answer
        if self.teacher is not None and answer is not None:
            told = convert(answer.raw, self.teacher.prediction, s.prediction, seen.x_t, seen.alpha, seen.sigma)
        terms = self.methods.terms(
            StepContext(
                x_t=seen.x_t,
                t=seen.t,
                x0=seen.x0,
                noise=seen.noise,
                alpha=seen.alpha,
                sigma=seen.sigma,
                snr=s.tables.snr[seen.t],
                teacher=told,
                student=student,
                prediction=s.prediction,
                groups=seen.groups,
                interval=s.interval,
                step=step,
                total=s.total,
                condition=seen.condition,
                teacher_features={} if answer is None else {name: answer.features[name] for name in self.wanted},
                student_features=student_features,
                generator=_generator(s.stream.seed, step, part, seen.x_t.device),
            )
        )
        loss = torch.stack(list(terms.values())).sum()
        if torch.is_grad_enabled() and not loss.requires_grad:
            names = " and ".join(map(repr, self.methods.methods))
            raise PluginError(f"KD method {names}: no term depends on the student; make the loss of ctx.student")
        return loss, terms


def _generator(seed: int, step: int, part: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(Philox.torch_seed(seed, f"method {step}" + (f" part {part}" if part else "")))
    return generator
