"""KD terms as the loop computes them: against a hand computation, alone and together, and nothing left behind."""

import sys

import pytest
import torch
from tiny_networks import ALL, SCHEDULE, TABLES, Denoiser, Family, call, learn, noised, setting, wide
from torch import nn

from o2mkd_bench.core.blocks import Training
from o2mkd_bench.core.errors import PluginError, SharedChanged, UserError
from o2mkd_bench.core.intervals import Interval
from o2mkd_bench.core.options import Options
from o2mkd_bench.engine.denoiser import Experts
from o2mkd_bench.engine.distil import Distil, Methods
from o2mkd_bench.engine.kd import KDMethod
from o2mkd_bench.engine.learner import Course, Learner
from o2mkd_bench.engine.loop import Member, train
from o2mkd_bench.engine.shared import CHUNK, Teacher


class Hint(KDMethod):
    """Output and feature differences, the feature's through an adapter; remembers what it saw."""

    def __init__(self, names=("gap", "hint"), scalar=True):
        super().__init__(Options())
        self.names, self.scalar, self.seen = names, scalar, []

    def teacher_features(self):
        return ("mid",)

    student_features = teacher_features

    def setup(self, teacher_shapes, student_shapes):
        self.shapes = teacher_shapes["mid"], student_shapes["mid"]
        self.adapter = nn.Conv2d(student_shapes["mid"][1], teacher_shapes["mid"][1], 1)
        return self.adapter

    def weights(self):
        return {"gap": 2.0, "hint": 0.5}

    def terms(self, ctx):
        self.seen.append(ctx)
        gap = (ctx.student - ctx.teacher).square()
        hint = (self.adapter(ctx.student_features["mid"]) - ctx.teacher_features["mid"]).square()
        found = {"gap": gap.mean() if self.scalar else gap.mean(1), "hint": hint.mean()}
        return {name: found.get(name, gap.mean()) for name in self.names}


class Numeric(Hint):
    """One that takes its term for a number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def terms(self, ctx):
        return {**super().terms(ctx), "gap": self.value}


class Bare(Hint):
    """One that gives its loss and no dict of terms."""

    def terms(self, ctx):
        return ctx.student.square().mean()


class Blind(Hint):
    """One that looks at the teacher alone."""

    def terms(self, ctx):
        return dict.fromkeys(self.weights(), ctx.teacher.square().mean())


class Careless(Hint):
    """One that does something beside its terms."""

    def __init__(self, deed):
        super().__init__()
        self.deed = deed

    def terms(self, ctx):
        self.deed(ctx)
        return super().terms(ctx)


def broken(ctx):
    ctx.noise.zero_()
    raise ValueError("and then it fails")


class Plain(KDMethod):
    """The diffusion loss, with a draw of its own."""

    def weights(self):
        return {"task": 1.0, "draw": 1.0}

    def terms(self, ctx):
        draw = torch.rand((), generator=ctx.generator)
        return {"task": (ctx.student - ctx.target()).square().mean(), "draw": draw}


def make(s=None, method=None, teacher_type="v_prediction", teacher_seed=2):
    s = s or setting()
    method = method or Hint()
    student = Denoiser(2, seed=1)
    teacher = Denoiser(4, seed=teacher_seed).eval().requires_grad_(False)
    return Distil(s, call(student), Methods({"hint": method}), Teacher(call(teacher), teacher_type)), student, teacher


ROWS = torch.tensor([1, 5, 33, 34, 79])


def test_terms_are_what_a_hand_computation_gives():
    s, method = setting(), Hint()
    objective, student, teacher = make(s, method)
    loss, terms = learn(objective, 7, ROWS)
    x0, noise, t, alpha, sigma, x_t = noised(s, 7, ROWS)
    v = teacher(x_t, t)
    expected = wide(sigma) * x_t + wide(alpha) * v
    gap = (student(x_t, t) - expected).square().mean()
    hint = (method.adapter(student.mid(x_t)) - teacher.mid(x_t)).square().mean()
    torch.testing.assert_close(terms["hint/gap"], 2 * gap, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["hint/hint"], hint / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, 2 * gap + hint / 2, rtol=1e-4, atol=1e-6)
    (ctx,) = method.seen
    for name, value in {"x0": x0, "noise": noise, "t": t, "alpha": alpha, "sigma": sigma, "x_t": x_t}.items():
        assert torch.equal(getattr(ctx, name), value), name
    torch.testing.assert_close(ctx.snr, torch.exp(torch.from_numpy(SCHEDULE.log_snr)[t]).float(), rtol=1e-4, atol=0)
    assert torch.equal(ctx.groups, ROWS // 4)
    assert (ctx.step, ctx.total, ctx.interval, ctx.prediction) == (7, 100, ALL, "epsilon")
    assert method.shapes == (torch.Size([1, 4, 8, 8]), torch.Size([1, 2, 8, 8]))


def test_the_teacher_gets_no_gradient_and_the_adapter_does():
    s, method = setting(), Hint()
    objective, student, _ = make(s, method)
    learn(objective, 0, ROWS)[0].backward()
    assert all(p.grad is not None for p in student.parameters())
    assert method.adapter.weight.grad is not None
    assert not any(ctx.teacher.requires_grad for ctx in method.seen)


def test_alone_and_together_the_teacher_says_the_same_bits():
    s, together, alone = setting(), Hint(), Hint()
    batch = s.stream.batch_at(3)
    learn(make(s, together)[0], 3, torch.arange(80))
    for interval in (Interval(0, 300), Interval(300, 1000)):
        rows = s.stream.rows_in(batch, interval)
        objective, student, _ = make(s, alone)
        loss, _ = learn(objective, 3, rows)
        loss.backward()
        ctx = alone.seen[-1]
        assert all(t in interval for t in ctx.t.tolist())
        assert torch.equal(ctx.teacher, together.seen[0].teacher[rows])
        assert torch.equal(ctx.teacher_features["mid"], together.seen[0].teacher_features["mid"][rows])

        # the same gradient from a teacher pass that fed every student of the grid
        other = Denoiser(2, seed=1)
        features = {}
        other.mid.register_forward_hook(lambda m, i, out, into=features: into.update(mid=out))
        gap = (other(ctx.x_t, ctx.t) - together.seen[0].teacher[rows]).square().mean()
        hint = (alone.adapter(features["mid"]) - together.seen[0].teacher_features["mid"][rows]).square().mean()
        expected = torch.stack([2 * gap, 0.5 * hint]).sum()
        expected.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(student.mid.weight.grad, other.mid.weight.grad)


def test_the_teacher_sees_fixed_chunks_whoever_asks():
    s, sizes = setting(), []
    objective, _, teacher = make(s)
    teacher.register_forward_hook(lambda module, inputs, out: sizes.append(len(inputs[0])))
    learn(objective, 0, torch.tensor([3]))
    assert sizes == [CHUNK]
    learn(objective, 0, torch.tensor([0, 70]))
    assert sizes == [CHUNK, CHUNK, 80 - 2 * CHUNK]


def test_images_of_other_intervals_do_not_matter():
    s = setting()
    batch = s.stream.batch_at(3)
    rows = s.stream.rows_in(batch, Interval(0, 200))
    used = set(batch.index[rows].tolist())
    pixels = s.data.clone()
    pixels[[i for i in range(50) if i not in used]] = 0
    assert not torch.equal(pixels, s.data)
    losses = [learn(make(one)[0], 3, rows)[0] for one in (s, setting(data=pixels))]
    assert torch.equal(*losses)


def test_without_a_teacher_only_the_rows_are_computed():
    s, student = setting(prediction="v_prediction"), Denoiser(2, seed=1)
    objective = Distil(s, call(student), Methods({"plain": Plain(Options())}), None)
    _, terms = learn(objective, 2, ROWS)
    x0, noise, t, alpha, sigma, x_t = noised(s, 2, ROWS)
    expected = (student(x_t, t) - (wide(alpha) * noise - wide(sigma) * x0)).square().mean()
    torch.testing.assert_close(terms["plain/task"], expected)
    again = learn(objective, 2, ROWS)[1]["plain/draw"]
    other = learn(objective, 3, ROWS)[1]["plain/draw"]
    assert terms["plain/draw"] == again != other


def test_losses_are_float32_in_every_precision():
    s, method = setting(), Hint()
    student, teacher = Denoiser(2, seed=1), Denoiser(4, seed=2).requires_grad_(False)
    objective = Distil(s, call(student, "bf16"), Methods({"hint": method}), Teacher(call(teacher, "bf16"), "epsilon"))
    loss, terms = learn(objective, 0, ROWS)
    ctx = method.seen[0]
    for value in (loss, *terms.values(), ctx.student, ctx.teacher, *ctx.student_features.values()):
        assert value.dtype == torch.float32
    assert not torch.equal(ctx.student, student(ctx.x_t, ctx.t)), "the network itself ran in bfloat16"


def test_adapters_start_from_the_seed_are_trained_and_are_no_part_of_the_student():
    starts = []
    for disturb in (5, 6):
        torch.manual_seed(disturb)
        method = Hint()
        objective, student, _ = make(setting(), method)
        starts.append(method.adapter.weight.detach().clone())
    assert torch.equal(*starts)
    learner = Learner(student, Training().model_dump(), Course(3, horizon=3), adapters=objective.adapters())
    train(objective.setting.source(), Member(learner, objective, ALL))
    assert not torch.equal(method.adapter.weight, starts[0])
    assert set(learner.network.state_dict()) == set(learner.ema.module.state_dict()) == set(Denoiser().state_dict())
    assert not torch.equal(make(setting(seed=1), method)[0].adapters()["hint"].weight, starts[0])


def test_no_hook_stays_in_any_network():
    objective, student, teacher = make()
    learn(objective, 0, ROWS)
    average = Learner(student, Training().model_dump(), Course(1, horizon=1)).ema.module
    for network in (student, teacher, average):
        assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Hint(names=("gap",)), r"gives the terms \['gap'\] but declares weights for \['gap', 'hint'\]"),
        (Hint(names=("gap", "hint", "more")), "make weights\\(\\) and terms\\(\\) agree"),
        (Hint(scalar=False), "gives the term 'gap' of shape"),
        (Numeric(0.5), "KD method 'hint' gives a float for the term 'gap'; make it a scalar tensor"),
        (Bare(), "KD method 'hint' gives a Tensor as its terms; make it a dict of scalar tensors"),
        (Blind(), "KD method 'hint': no term depends on the student; make the loss of ctx.student"),
        (Numeric(None), "KD method 'hint' gives a NoneType for the term 'gap'; make it a scalar tensor"),
    ],
)
def test_a_method_that_breaks_its_contract_is_told_so(method, told):
    objective, _, _ = make(method=method)
    with pytest.raises(PluginError, match=told):
        learn(objective, 0, ROWS)


@pytest.mark.parametrize(
    ("deed", "what"),
    [
        (lambda ctx: ctx.teacher.clamp_(-0.1, 0.1), "teacher"),
        (lambda ctx: ctx.t.zero_(), "t"),
        (lambda ctx: ctx.teacher_features["mid"].mul_(2), r"teacher_features\['mid'\]"),
        (broken, "noise"),
        # what torch does not count
        (lambda ctx: ctx.teacher.data.mul_(0), "teacher"),
        (lambda ctx: ctx.x0.numpy().fill(0), "x0"),
    ],
)
def test_a_method_that_writes_into_what_all_see_is_stopped(deed, what):
    objective, _, _ = make(method=Careless(deed))
    with pytest.raises(SharedChanged, match=rf"'hint' writes into ctx\.{what}, .*clamp for clamp_"):
        learn(objective, 0, ROWS)


def test_a_method_that_ends_the_program_is_told_so():
    objective, _, _ = make(method=Careless(lambda ctx: sys.exit(3)))
    with pytest.raises(PluginError, match=r"'hint' ends the program \(3\); raise an error instead"):
        learn(objective, 0, ROWS)


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        (lambda x: x.mul_(0.5), "writes into what it is given, from which others go on; work on a copy"),
        (lambda x: x.mean((1, 2, 3), keepdim=True), r"gives \(2, 1, 1, 1\) for x of \(2, 1, 8, 8\); give the raw"),
        (lambda x: x[:1], r"gives \(1, 1, 8, 8\) for x of \(2, 1, 8, 8\)"),
        (lambda x: None, "gives NoneType for x of"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_a_family_is_held_to_its_forward(monkeypatch, deed, told, grad):
    monkeypatch.setattr(Family, "forward", lambda self, network, x, t, condition=None: deed(x))
    with pytest.raises(PluginError, match=rf"forward\(\) of Family {told}"), torch.set_grad_enabled(grad):
        call(Denoiser(2))(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("left", [torch.set_grad_enabled, torch.set_default_dtype])
def test_modes_of_torch_are_left_as_they_were(left):
    value = {torch.set_grad_enabled: False, torch.set_default_dtype: torch.float64}[left]
    objective, _, _ = make(method=Careless(lambda ctx: left(value)))
    with pytest.raises(PluginError, match="'hint' leaves torch's gradients or default dtype in another mode"):
        learn(objective, 0, ROWS)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_a_missing_feature_is_an_error_before_the_first_step():
    method = Hint()
    method.student_features = lambda: ("down.0",)
    with pytest.raises(UserError, match=r"the student has no feature 'down\.0'"):
        make(method=method)


def test_experts_answer_each_sample_by_its_own_network_and_type():
    networks = [Denoiser(2, seed=k).requires_grad_(False) for k in range(3)]
    types = ["v_prediction", "epsilon", "sample"]
    experts = Experts([call(n) for n in networks], [300, 500], types, TABLES)
    x, t = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 0, 299, 300, 500, 1])
    found = experts.predict(x, t, "epsilon")
    for i, k in enumerate([2, 0, 0, 1, 2, 0]):
        raw = networks[k](x[i : i + 1], t[i : i + 1])[0]
        alpha, sigma = float(SCHEDULE.alpha[t[i]]), float(SCHEDULE.sigma[t[i]])
        expected = {
            "v_prediction": sigma * x[i] + alpha * raw,
            "epsilon": raw,
            "sample": (x[i] - alpha * raw) / sigma,
        }[types[k]]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
