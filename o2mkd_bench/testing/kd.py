"""The contract of KD methods: their terms in isolation, and two steps of training through O2MKD."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.intervals import Interval
from ..core.models import ModelFamily
from ..core.schedule import NoiseSchedule, Prediction
from ..engine.denoiser import Call
from ..engine.distil import Distil, Methods
from ..engine.kd import KDMethod, StepContext
from . import tiny
from .contract import Contract

SAMPLES = 6


class KDMethodContract(Contract):
    """Subclass with ``name`` and ``options`` of a KD method.

    Attributes:
        task_terms: terms that look at the true target, not at the teacher.
        zero_at_teacher: whether every other term is zero for a student equal to the teacher.
        shape: (C, H, W) of the features that the method is handed, in teacher and student alike.
    """

    kind = "kd_methods"
    base = KDMethod
    task_terms: ClassVar[frozenset[str]] = frozenset({"task"})
    zero_at_teacher: ClassVar[bool] = True
    shape: ClassVar[tuple[int, int, int]] = (4, 2, 2)

    def method(self, samples: int = SAMPLES) -> KDMethod:
        """A new instance, set up for ``shape``."""
        made: KDMethod = self.plugin.load()(self.parsed)
        size = torch.Size((samples, *self.shape))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made.setup(dict.fromkeys(made.teacher_features(), size), dict.fromkeys(made.student_features(), size))
        return made

    def context(self, method: KDMethod, samples: int = SAMPLES, prediction: Prediction = "epsilon") -> StepContext:
        """A step of random numbers, the student's with gradient."""
        draw = torch.Generator().manual_seed(7)
        schedule = NoiseSchedule()
        t = torch.linspace(5, schedule.timesteps - 5, samples).long()
        alpha, sigma = (torch.from_numpy(table)[t].float() for table in (schedule.alpha, schedule.sigma))
        x0, noise, teacher, student = torch.randn(4, samples, 1, 4, 4, generator=draw).unbind()
        seen, own = (
            {name: torch.randn(samples, *self.shape, generator=draw) for name in names}
            for names in (method.teacher_features(), method.student_features())
        )
        return StepContext(
            x_t=alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise,
            t=t,
            x0=x0,
            noise=noise,
            alpha=alpha,
            sigma=sigma,
            snr=(alpha / sigma) ** 2,
            teacher=teacher if self.plugin.traits.get("needs_teacher", True) else None,
            student=student.clone().requires_grad_(),
            prediction=prediction,
            groups=torch.zeros(samples, dtype=torch.int64),
            interval=Interval(0, schedule.timesteps),
            step=0,
            total=10,
            teacher_features=seen,
            student_features={name: value.requires_grad_() for name, value in own.items()},
            generator=torch.Generator().manual_seed(11),
        )

    def check_terms(self, method: KDMethod, ctx: StepContext) -> Mapping[str, Tensor]:
        """The terms of a step, once they are what the loop takes."""
        terms = method.terms(ctx)
        assert set(terms) == set(method.weights())
        for name, term in terms.items():
            assert term.shape == (), f"{name} has shape {tuple(term.shape)}; a term is a scalar"
            assert term.dtype == torch.float32, f"{name} is {term.dtype}"
            assert torch.isfinite(term), f"{name} is {term.item()}"
        return terms

    def check_gradients(self, method: KDMethod, ctx: StepContext) -> list[Tensor]:
        """Gradients of the weighted sum to what the student gave; all finite."""
        total = sum((w * self.check_terms(method, ctx)[name] for name, w in method.weights().items()), torch.zeros(()))
        leaves = [ctx.student, *ctx.student_features.values()]
        found = [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
        assert all(bool(torch.isfinite(g).all()) for g in found), "a gradient is not finite"
        return found

    def test_weights_are_finite_numbers(self) -> None:
        weights = self.method().weights()
        assert weights
        assert all(math.isfinite(float(weight)) for weight in weights.values())

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_terms_are_scalars_with_a_finite_gradient(self, prediction: Prediction) -> None:
        method = self.method()
        gradients = self.check_gradients(method, self.context(method, prediction=prediction))
        assert any(bool(g.abs().sum() > 0) for g in gradients), "nothing reaches the student"

    @pytest.mark.parametrize("samples", [1, 2])
    def test_few_samples_are_enough(self, samples: int) -> None:
        """An expert's part of a batch may be one image; a mean of none is NaN."""
        method = self.method(samples)
        self.check_gradients(method, self.context(method, samples))

    def test_coarse_numbers_are_enough(self) -> None:
        """In bf16 runs the networks' outputs, cast to float32, have 8 bits, and many differences are exactly zero."""
        method = self.method()
        ctx = self.context(method)
        changed: dict[str, Any] = {"student": _coarse(ctx.student)}
        changed["student_features"] = {name: _coarse(value) for name, value in ctx.student_features.items()}
        if ctx.teacher is not None:
            changed["teacher"] = changed["student"].detach().clone()
        self.check_gradients(method, replace(ctx, **changed))

    def test_student_equal_to_the_teacher_is_at_a_minimum(self) -> None:
        method = self.method()
        ctx = self.context(method)
        if ctx.teacher is not None:
            ctx = replace(ctx, student=ctx.teacher.clone().requires_grad_())
        same = {name: value.clone().requires_grad_() for name, value in ctx.teacher_features.items()}
        ctx = replace(ctx, student_features={**ctx.student_features, **same})
        self.check_gradients(method, ctx)
        if self.zero_at_teacher:
            terms = {name: term.item() for name, term in method.terms(ctx).items() if name not in self.task_terms}
            assert terms == pytest.approx(dict.fromkeys(terms, 0.0), abs=1e-6)

    def test_inputs_stay_as_they_are(self) -> None:
        method = self.method()
        ctx = self.context(method)
        before = {name: value.detach().clone() for name, value in ctx.tensors().items()}
        method.terms(ctx)
        changed = [name for name, value in ctx.tensors().items() if not torch.equal(value, before[name])]
        assert not changed

    def test_same_step_gives_the_same_terms(self) -> None:
        """Whatever a method draws comes from ``ctx.generator``; nothing it remembers may change its terms."""
        first = self.method()
        again = [m.terms(self.context(m)) for m in (first, first, self.method())]
        values = [{name: term.item() for name, term in terms.items()} for terms in again]
        assert values[0] == values[1] == values[2]

    def test_missing_feature_is_an_error_before_the_first_step(self) -> None:
        method: KDMethod = self.plugin.load()(self.parsed)
        if not (method.teacher_features() or method.student_features()):
            pytest.skip("asks for no features")
        bare = Call(_NoFeatures(), nn.Identity(), "fp32")
        with pytest.raises(UserError, match="has no feature"):
            Distil(tiny.setting(), bare, Methods({self.name: method}), tiny.teacher(bare))

    def test_o2mkd_lifts_it(self, tmp_path: Path) -> None:
        """Two experts of a narrower network, continued from a shared warm-up, both learn."""
        trained = tiny.train(self._fresh, tmp_path, students=2, width=0.5)
        assert set(trained) == {"warmup", "expert-0", "expert-1"}
        state, *experts = trained.values()
        for expert in experts:
            assert all(bool(torch.isfinite(value).all()) for value in expert.values())
            assert any(not torch.equal(value, state[name]) for name, value in expert.items())

    def test_lifted_to_one_student_it_is_itself(self, tmp_path: Path) -> None:
        """A warm-up and its one expert are the plain run, bit for bit: what a method learns is in its adapters, which
        travel along, and nowhere else."""
        (plain,) = tiny.train(self._fresh, tmp_path, students=None, width=0.5).values()
        *_, lifted = tiny.train(self._fresh, tmp_path, students=1, width=0.5).values()
        assert all(torch.equal(plain[name], lifted[name]) for name in plain)

    def _fresh(self) -> tuple[str, KDMethod, bool]:
        return self.name, self.plugin.load()(self.parsed), self.plugin.traits.get("needs_teacher", True)


class _NoFeatures(ModelFamily):
    """A network without parts."""

    def teacher_config(self, options: Any, channels: int, size: int) -> dict[str, Any]:
        return {}

    def student_config(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {}

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        return nn.Identity()

    def forward(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return x

    def roles(self, network: nn.Module) -> dict[str, str]:
        return {}


def _coarse(value: Tensor) -> Tensor:
    return value.detach().bfloat16().float().requires_grad_()
