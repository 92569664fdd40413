"""KD methods against independent computations, their zeros, and their gradients where distances vanish."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.intervals import Interval
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.engine.kd import StepContext, convert
from o2mkd_plugins.kd.feature import FeatureMatching
from o2mkd_plugins.kd.none import NoTeacher
from o2mkd_plugins.kd.options import FeatureOptions, OutputOptions, RelationOptions, TaskOptions
from o2mkd_plugins.kd.output import OutputMatching
from o2mkd_plugins.kd.relation import Relation, angle_term, distance_term, similarity_term

SCHEDULE = NoiseSchedule()
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(n=6, prediction="epsilon", **changes) -> StepContext:
    t = torch.linspace(20, 980, n).long()
    alpha, sigma = (torch.from_numpy(table)[t].float() for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    x0, noise = draw(n, 1, 2, 2, seed=1).clamp(-1, 1), draw(n, 1, 2, 2, seed=2)
    values = {
        "x_t": alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise,
        "t": t,
        "x0": x0,
        "noise": noise,
        "alpha": alpha,
        "sigma": sigma,
        "snr": alpha**2 / sigma**2,
        "teacher": draw(n, 1, 2, 2, seed=3),
        "student": draw(n, 1, 2, 2, seed=4).requires_grad_(),
        "prediction": prediction,
        "groups": torch.zeros(n, dtype=torch.int64),
        "interval": Interval(0, 1000),
        "step": 0,
        "total": 1,
    }
    return StepContext(**{**values, **changes})


def with_features(teacher, student, layer="mid", **changes) -> StepContext:
    return context(len(student), teacher_features={layer: teacher}, student_features={layer: student}, **changes)


# --- the diffusion loss and its weights over t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_plain_task_is_the_mse_of_the_own_type(prediction):
    ctx = context(prediction=prediction)
    truth = {"epsilon": ctx.noise, "sample": ctx.x0}.get(prediction)
    if truth is None:
        truth = torch.stack([a * n - s * x for a, s, n, x in zip(ctx.alpha, ctx.sigma, ctx.noise, ctx.x0, strict=True)])
    expected = np.mean((ctx.student.detach().numpy() - truth.numpy()) ** 2)
    method = NoTeacher(TaskOptions())
    assert method.weights() == {"task": 1.0}
    assert method.terms(ctx)["task"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("snr", lambda snr: snr),
        ("min_snr", lambda snr: np.minimum(snr, 2.5)),
        ("truncated_snr", lambda snr: np.maximum(snr, 1)),
    ],
)
def test_weights_multiply_the_squared_x0_error(prediction, weighting, weight):
    ctx = context(prediction=prediction)
    alpha, sigma, x_t = (v.double() for v in (ctx.alpha, ctx.sigma, ctx.x_t))
    a, s, out = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1), ctx.student.detach().double()
    x0 = {"epsilon": (x_t - s * out) / a, "v_prediction": a * x_t - s * out, "sample": out}[prediction]
    errors = ((x0 - ctx.x0.double()) ** 2).flatten(1).mean(1).numpy()
    expected = np.mean(weight((alpha / sigma).numpy() ** 2) * errors)
    found = NoTeacher(TaskOptions(weighting=weighting, gamma=2.5)).terms(ctx)["task"].item()
    assert found == pytest.approx(expected, rel=2e-4)


def test_snr_weight_of_an_epsilon_student_is_plain_mse_bit_for_bit():
    ctx = context()
    plain, snr = (NoTeacher(TaskOptions(weighting=w)).terms(ctx)["task"] for w in ("none", "snr"))
    assert torch.equal(plain, snr)


def test_all_types_agree_under_one_weighting():
    by_epsilon = context()
    options = TaskOptions(weighting="min_snr")
    expected = NoTeacher(options).terms(by_epsilon)["task"].item()
    for prediction in ("v_prediction", "sample"):
        student = by_epsilon.convert(by_epsilon.student.detach(), "epsilon", prediction)
        found = NoTeacher(options).terms(context(prediction=prediction, student=student))["task"].item()
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_conversion_of_the_truth_is_the_truth(source, target):
    ctx = context()
    truths = {p: context(prediction=p).target() for p in PREDICTIONS}
    found = convert(truths[source], source, target, ctx.x_t, ctx.alpha, ctx.sigma)
    torch.testing.assert_close(found, truths[target], rtol=1e-3, atol=1e-3)


# --- output


def test_output_matches_the_teacher():
    ctx = context()
    method = OutputMatching(OutputOptions(weight=2.0, task=0.5))
    assert method.weights() == {"output": 2.0, "task": 0.5}
    terms = method.terms(ctx)
    student = ctx.student.detach().numpy()
    assert terms["output"].item() == pytest.approx(np.mean((student - ctx.teacher.numpy()) ** 2), rel=1e-5)
    assert terms["task"].item() == pytest.approx(np.mean((student - ctx.noise.numpy()) ** 2), rel=1e-5)


def test_output_weighting_applies_to_the_teacher_s_target():
    ctx = context(n=2)
    found = OutputMatching(OutputOptions(weighting="truncated_snr")).terms(ctx)["output"].item()
    errors = ((ctx.student.detach() - ctx.teacher) ** 2).flatten(1).mean(1).tolist()
    snr = ctx.snr.tolist()
    assert found == pytest.approx(sum(max(r, 1) / r * e for r, e in zip(snr, errors, strict=True)) / 2, rel=1e-5)


def test_output_of_an_equal_student_is_zero():
    student = draw(6, 1, 2, 2).requires_grad_()
    method = OutputMatching(OutputOptions())
    assert method.weights() == {"output": 1.0}
    (term,) = method.terms(context(student=student, teacher=student.detach().clone())).values()
    term.backward()
    assert term.item() == 0
    assert student.grad.abs().max() == 0


# --- features


def test_hint_without_adapter():
    teacher, student = draw(5, 3, 2, 2, seed=5), draw(5, 3, 2, 2, seed=6)
    method = FeatureMatching(FeatureOptions(task=0.0, weight=3.0))
    assert method.teacher_features() == method.student_features() == ("mid",)
    assert method.setup({"mid": teacher.shape}, {"mid": student.shape}) is None
    assert method.weights() == {"hint": 3.0}
    terms = method.terms(with_features(teacher, student))
    assert set(terms) == {"hint"}
    assert terms["hint"].item() == pytest.approx(np.mean((teacher.numpy() - student.numpy()) ** 2), rel=1e-5)


def test_hint_with_adapters_sums_over_layers():
    torch.manual_seed(0)
    teacher = {"down.0": draw(2, 4, 3, 3, seed=5), "mid": draw(2, 3, 2, 2, seed=6)}
    student = {"down.0": draw(2, 2, 3, 3, seed=7).requires_grad_(), "mid": draw(2, 3, 2, 2, seed=8)}
    method = FeatureMatching(FeatureOptions(layers=("mid", "down.0")))
    adapters = method.setup({k: v.shape for k, v in teacher.items()}, {k: v.shape for k, v in student.items()})
    (weight, bias) = (p.detach().double().numpy() for p in adapters.parameters())
    assert weight.shape == (4, 2, 1, 1)
    terms = method.terms(context(2, teacher_features=teacher, student_features=student))
    assert set(terms) == set(method.weights()) == {"hint", "task"}
    wide = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], student["down.0"].detach().numpy()) + bias[:, None, None]
    expected = np.mean((wide - teacher["down.0"].numpy()) ** 2)
    expected += np.mean((student["mid"].numpy() - teacher["mid"].numpy()) ** 2)
    assert terms["hint"].item() == pytest.approx(expected, rel=1e-5)
    terms["hint"].backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.parameters())
    assert student["down.0"].grad.abs().sum() > 0


def test_attention_needs_no_adapter_for_other_widths():
    teacher, student = draw(4, 5, 2, 3, seed=5), draw(4, 2, 2, 3, seed=6)
    method = FeatureMatching(FeatureOptions(kind="attention", task=0.0))
    assert method.setup({"mid": teacher.shape}, {"mid": student.shape}) is None
    expected = 0.0
    for f, g in zip(teacher.double().numpy(), student.double().numpy(), strict=True):
        p, q = ((h**2).sum(0).reshape(-1) for h in (f, g))
        expected += ((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2).sum() / (4 * 6)
    assert method.terms(with_features(teacher, student))["attention"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["hint", "attention"])
def test_feature_terms_of_equal_networks_are_zero(kind):
    student = draw(4, 3, 2, 2)
    student[1] = 0  # a dead feature
    student.requires_grad_()
    method = FeatureMatching(FeatureOptions(kind=kind, task=0.0))
    method.setup({"mid": student.shape}, {"mid": student.shape})
    (term,) = method.terms(with_features(student.detach().clone(), student)).values()
    term.backward()
    assert term.item() == 0
    assert student.grad.abs().max() == 0


def test_attention_gradient_of_a_dead_student_feature_is_finite():
    student = torch.zeros(2, 3, 2, 2, requires_grad=True)
    method = FeatureMatching(FeatureOptions(kind="attention", task=0.0))
    method.terms(with_features(draw(2, 3, 2, 2), student))["attention"].backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("teacher", "student"), [((1, 3, 4, 4), (1, 3, 2, 2)), ((1, 16, 3), (1, 16, 3))])
def test_features_of_other_sizes_are_refused(teacher, student):
    method = FeatureMatching(FeatureOptions())
    with pytest.raises(UserError, match=r"layer 'mid' is .* in the teacher .* choose another layer"):
        method.setup({"mid": torch.Size(teacher)}, {"mid": torch.Size(student)})


# --- relations


def loop_distances(features):
    rows = [np.asarray(row, dtype=np.float64).ravel() for row in features]
    distances = {(i, j): np.linalg.norm(rows[i] - rows[j]) for i, j in itertools.combinations(range(len(rows)), 2)}
    mean = np.mean(list(distances.values()))
    return [d / mean if mean else 0.0 for d in distances.values()]


def loop_cosines(features):
    rows = [np.asarray(row, dtype=np.float64).ravel() for row in features]
    cosines = []
    for i, j, k in itertools.permutations(range(len(rows)), 3):
        u, v = rows[i] - rows[j], rows[k] - rows[j]
        sides = np.linalg.norm(u) * np.linalg.norm(v)
        cosines.append(u @ v / sides if sides else 0.0)
    return cosines


def huber(a, b):
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return np.mean([g * g / 2 if g < 1 else g - 0.5 for g in gaps])


def loop_similarity(student, teacher):
    total, n = 0.0, len(student)
    for i in range(n):
        s, t = ([float((f[i] * f[j]).sum()) for j in range(n)] for f in (student, teacher))
        s_norm, t_norm = np.linalg.norm(s) or 1, np.linalg.norm(t) or 1
        total += sum((a / s_norm - b / t_norm) ** 2 for a, b in zip(s, t, strict=True))
    return total / n**2


def expected_terms(student, teacher):
    return {
        "distance": huber(loop_distances(student), loop_distances(teacher)),
        "angle": huber(loop_cosines(student), loop_cosines(teacher)),
        "similarity": loop_similarity(student, teacher),
    }


def relation(**options) -> Relation:
    return Relation(RelationOptions(**{"task": 0.0, **options}))


@pytest.mark.parametrize("kind", ["rkd", "similarity"])
def test_relations_equal_explicit_loops(kind):
    teacher, student = draw(6, 3, 2, 2, seed=5) + 4, draw(6, 2, 2, 2, seed=6)
    method = relation(kind=kind)
    assert method.teacher_features() == method.student_features() == ("mid",)
    terms = method.terms(with_features(teacher, student))
    assert set(terms) == set(method.weights())
    expected = expected_terms(student.double().numpy(), teacher.double().numpy())
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.shape == ()
        assert term.item() == pytest.approx(expected[name], rel=1e-5), name


def test_relation_weights():
    assert relation(weight=0.5).weights() == {"distance": 0.5, "angle": 1.0}
    assert relation(angle=0.0, task=1.0).weights() == {"distance": 1.0, "task": 1.0}
    assert relation(kind="similarity", weight=4.0, task=1.0).weights() == {"similarity": 4.0, "task": 1.0}
    ctx = with_features(draw(4, 2, 1, 1), draw(4, 2, 1, 1, seed=9))
    assert set(relation(angle=0.0, task=1.0).terms(ctx)) == {"distance", "task"}


def test_relations_stay_within_groups():
    groups = torch.tensor([4, 4, 4, 0, 0, 0, 0, 2, 2, 4])
    teacher, student = draw(10, 3, 1, 1, seed=5), draw(10, 3, 1, 1, seed=6)
    terms = relation().terms(with_features(teacher, student, groups=groups))
    # group 2 has two samples only
    members = ([0, 1, 2, 9], [3, 4, 5, 6])
    parts = [expected_terms(student[m].numpy(), teacher[m].numpy()) for m in members]
    for name in ("distance", "angle"):
        assert terms[name].item() == pytest.approx(np.mean([p[name] for p in parts]), rel=1e-5)


def test_mixed_t_is_one_group():
    groups = torch.arange(6)
    teacher, student = draw(6, 3, 1, 1, seed=5), draw(6, 3, 1, 1, seed=6)
    found = relation(mixed_t=True).terms(with_features(teacher, student, groups=groups))
    whole = relation().terms(with_features(teacher, student))
    assert torch.equal(found["distance"], whole["distance"])
    assert torch.equal(found["angle"], whole["angle"])
    assert found["angle"] > 0


@pytest.mark.parametrize("kind", ["rkd", "similarity"])
def test_no_group_is_large_enough(kind):
    student = draw(4, 2, 1, 1).requires_grad_()
    ctx = with_features(draw(4, 2, 1, 1, seed=3), student, groups=torch.tensor([0, 0, 1, 1]))
    total = torch.stack(list(relation(kind=kind).terms(ctx).values())).sum()
    total.backward()
    assert total.item() == 0
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["rkd", "similarity"])
def test_relations_of_equal_networks_are_zero(kind):
    student = draw(8, 3, 2, 2)
    student[3] = student[5]
    student.requires_grad_()
    terms = relation(kind=kind).terms(with_features(student.detach().clone(), student))
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.item() == 0 for term in terms.values())
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("kind", ["rkd", "similarity"])
@pytest.mark.parametrize("alike", [2, 6])
@pytest.mark.parametrize("fill", [None, 0.0])
def test_gradients_with_coincident_samples_are_finite_and_terms_exact(kind, alike, fill):
    student = draw(6, 300, 1, 1, seed=6) + 30
    student[:alike] = student[0].clone() if fill is None else fill
    teacher = draw(6, 3, 1, 1, seed=5)
    student.requires_grad_()
    terms = relation(kind=kind).terms(with_features(teacher, student))
    torch.stack(list(terms.values())).sum().backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 10
    expected = expected_terms(student.detach().double().numpy(), teacher.double().numpy())
    assert all(term.item() == pytest.approx(expected[name], rel=1e-5) for name, term in terms.items())


@pytest.mark.parametrize("term", [distance_term, angle_term, similarity_term])
def test_gradients_are_those_of_the_terms(term):
    teacher = draw(4, 3, seed=5).double()
    student = draw(4, 2, seed=6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: term(s, teacher), student)


def test_the_teacher_gets_no_gradient():
    teacher, student = draw(4, 2, 2, 2, seed=5).requires_grad_(), draw(4, 2, 2, 2, seed=6).requires_grad_()
    prediction = draw(4, 1, 2, 2).requires_grad_()
    ctx = context(4, teacher=prediction, teacher_features={"mid": teacher}, student_features={"mid": student})
    feature = FeatureMatching(FeatureOptions())
    feature.setup({"mid": teacher.shape}, {"mid": student.shape})
    for method in (OutputMatching(OutputOptions()), feature, relation(), relation(kind="similarity")):
        torch.stack(list(method.terms(ctx).values())).sum().backward()
    assert teacher.grad is None
    assert prediction.grad is None
    assert student.grad is not None


# --- options


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (TaskOptions, {"weighting": "p2"}),
        (TaskOptions, {"gamma": 0}),
        (TaskOptions, {"weight": 1.0}),
        (OutputOptions, {"weight": 0}),
        (OutputOptions, {"task": float("inf")}),
        (FeatureOptions, {"layers": []}),
        (FeatureOptions, {"layers": ["mid", "mid"]}),
        (RelationOptions, {"distance": 0, "angle": 0}),
        (RelationOptions, {"angle": -1}),
    ],
)
def test_options_that_make_no_sense(options, values):
    with pytest.raises(ValidationError):
        options(**values)


def test_options_import_no_torch():
    code = "import sys, o2mkd_plugins.kd.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
