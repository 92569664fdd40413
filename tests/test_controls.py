"""The controls beside O2MKD: one student with normalised losses, and K students that do not specialise."""

import itertools
import json

import pytest
import torch
from safetensors import safe_open
from test_cohorts import Grid
from tiny_networks import Denoiser, call, setting
from torch import nn
from toy import Events, walk_of

from o2mkd_bench.core.blocks import Training
from o2mkd_bench.engine.distil import Distil, Methods
from o2mkd_bench.engine.kd import KDMethod
from o2mkd_bench.engine.learner import Course, Learner
from o2mkd_bench.engine.loop import Member, train
from o2mkd_bench.engine.normalised import FLOOR, HORIZON, Normalised, RunningMeans
from o2mkd_bench.engine.shared import Objective
from o2mkd_bench.results import training_facts
from o2mkd_bench.stages import train as stage_train

EDGES = (200, 500)
CPU = torch.device("cpu")


# --- the loss


class Given(Objective):
    """The mean of ``values(step)[interval]`` over samples, times a weight to be learned; remembers its parts."""

    def __init__(self, values):
        self.values, self.weight, self.parts = values, nn.Parameter(torch.ones(())), []

    def loss(self, view, rows, step, part=0):
        self.parts.append(part)
        interval = torch.bucketize(view.take(rows).t, torch.tensor(EDGES), right=True)
        loss = torch.tensor(self.values(step))[interval].mean() * self.weight
        return loss, {"whole": loss, "half": loss / 2}


def normalised(inner, edges=EDGES, batch=80):
    return Normalised(inner, setting(batch).source(), edges)


def ask(objective, step, pieces=1):
    """Loss and terms of a step, whose samples come in ``pieces``; weighted as the loop weights them."""
    source = objective.source
    batch = source.stream.batch_at(step)
    rows = source.rows(batch, setting().interval)
    view = source.at(batch, [(objective, rows)])
    found = []
    for part, some in enumerate(torch.tensor_split(rows, pieces)):
        loss, terms = objective.loss(view, some, step, part)
        found.append(torch.stack([loss, *terms.values()]) * len(some) / len(rows))
    return torch.stack(found).sum(0)


def test_each_interval_counts_by_its_samples_whatever_its_scale():
    # 16, 24 and 40 of 80 samples lie in the intervals
    inner = Given(lambda step: [3.0, 5e6, 7e-6])
    told = ask(normalised(inner), 0)
    assert told.tolist() == pytest.approx([1, 1, 0.5])
    assert torch.autograd.grad(told[0], inner.weight)[0].item() == pytest.approx(1)
    doubled = Given(lambda step: [[3.0, 5e6, 7e-6], [3.0, 5e6, 14e-6]][step])
    objective = normalised(doubled)
    assert [ask(objective, step).tolist()[0] for step in (0, 1)] == pytest.approx([1, (16 + 24 + 2 * 40) / 80])


def test_the_running_mean_is_exponential_without_the_bias_of_its_start():
    values = [4.0, 1.0, 9.0, 2.0, 2.5]
    objective = normalised(Given(lambda step: [values[step], 1.0, 1.0]))
    for step, value in enumerate(values):
        old = values[:step] or [value]
        decay = 1 - 1 / HORIZON
        weights = [decay ** (len(old) - 1 - i) for i in range(len(old))]
        mean = sum(w * v for w, v in zip(weights, old, strict=True)) / sum(weights)
        assert ask(objective, step).tolist()[0] == pytest.approx((16 * value / mean + 64) / 80)


@pytest.mark.parametrize("pieces", [2, 5])
def test_in_parts_a_step_counts_once_and_weighs_the_same(pieces):
    def values(step):
        return [2.0 + step, 3.0, 5.0 / (1 + step)]

    whole, parts = Given(values), Given(values)
    one, other = normalised(whole), normalised(parts)
    for step in range(4):
        torch.testing.assert_close(ask(one, step), ask(other, step, pieces))
    torch.testing.assert_close(one.means.state_dict(), other.means.state_dict())
    assert len(set(parts.parts)) == len(parts.parts) / 4, "a method draws anew in each part of each interval"
    assert whole.parts[:3] == [0, 1, 2]


def test_an_interval_without_samples_keeps_its_mean():
    means = RunningMeans(2, CPU)
    for step in range(3):
        means.begin(step)
        means.scale(1, torch.tensor(4.0), 2)
    means.begin(3)
    assert means.mean[0] == means.weight[0] == 0
    assert float(means.mean[1] / means.weight[1]) == pytest.approx(4)


def test_a_step_that_is_taken_again_counts_once():
    means, again = RunningMeans(1, CPU), RunningMeans(1, CPU)
    for step in (0, 1):
        means.begin(step)
        means.scale(0, torch.tensor(2.0 + step), 3)
        again.begin(step)
        again.scale(0, torch.tensor(50.0), 1)
        again.begin(step)
        again.scale(0, torch.tensor(2.0 + step), 3)
    torch.testing.assert_close(means.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_what_overflows_does_not_stay():
    means = RunningMeans(1, CPU)
    for step, value in enumerate([1.0, float("inf"), 3.0]):
        means.begin(step)
        scale = means.scale(0, torch.tensor(value), 1)
    assert float(scale) == 1


def test_losses_of_nothing_and_of_any_sign_are_divided_by_something_above_it():
    means = RunningMeans(1, CPU)
    means.begin(0)
    assert float(means.scale(0, torch.tensor(0.0), 1)) == pytest.approx(FLOOR)
    objective = normalised(Given(lambda step: [0.0, -2.0, 1.0]))
    assert ask(objective, 0).tolist()[0] == pytest.approx((-24 + 40) / 80)


class Adapted(KDMethod):
    """The diffusion loss after a trained map."""

    def setup(self, teacher_shapes, student_shapes):
        self.map = nn.Conv2d(1, 1, 1)
        return self.map

    def weights(self):
        return {"task": 1.0}

    def terms(self, ctx):
        return {"task": (self.map(ctx.student) - ctx.target()).square().mean()}


def test_the_means_are_carried_with_the_adapters_and_not_optimised(tmp_path):
    def learner():
        about, student = setting(), call(Denoiser())
        objective = Normalised(Distil(about, student, Methods({"a": Adapted(None)}), None), about.source(), EDGES)
        made = Learner(student.network, Training().model_dump(), Course(4, 0, 4), adapters=objective.adapters())
        return Member(made, objective, about.interval)

    one = learner()
    train(one.objective.source, one)
    assert {name for name, _ in one.learner.adapters.named_parameters()} == {"inner.a.weight", "inner.a.bias"}
    assert len(one.learner.parameters) == 4 + 2
    assert (one.objective.means.weight > 0).all()
    one.learner.save(tmp_path / "s.safetensors", {})
    two = learner()
    two.learner.load(tmp_path / "s.safetensors", resume=False)
    torch.testing.assert_close(
        two.objective.means.state_dict(), one.objective.means.state_dict(), rtol=0, atol=0, check_device=True
    )


def test_an_objective_without_adapters_has_the_means_alone():
    objective = normalised(Given(lambda step: [1.0, 1.0, 1.0]))
    assert list(objective.adapters().parameters()) == []
    assert set(objective.adapters().state_dict()) == {
        f"means.{name}" for name in ("mean", "weight", "total", "count", "step")
    }
    assert objective.teacher is None


# --- the full path

WRAPPERS = [
    "single",
    {"single": {"students": 2, "intervals": [300], "normalise": True}, "label": "normalised"},
    {"o2mkd": {"students": 2}, "label": "experts"},
    {"o2mkd": {"students": 2, "specialise": False}, "label": "generalists"},
]


@pytest.fixture(scope="module")
def no_counting(toy_run):
    """Counting operations takes longer than these trainings, and is in no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_train, "cost", lambda bench, about: {})
        yield


@pytest.fixture(scope="module")
def alone(toy_run, no_counting, tmp_path_factory):
    return Grid(toy_run, tmp_path_factory.mktemp("alone"), wrappers=WRAPPERS, methods=["feature"], cohort=1).run()


@pytest.fixture
def grid(toy_run, no_counting, tmp_path):
    return lambda **changes: Grid(
        toy_run, tmp_path / "store", **{"wrappers": WRAPPERS, "methods": ["feature"]} | changes
    )


def log(found, part):
    return found.store.read_json(found.stage(part).identity, "log.json")


def weights(found, part, file="raw.safetensors"):
    with safe_open(found.store.read(found.stage(part).identity, file), framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def test_controls_end_alone_as_they_do_together(alone, grid):
    found = grid(methods=["feature", "output"]).run()
    assert not found.walk.failed
    assert alone.files().items() <= found.files().items()
    shared = found.shared()
    # both methods: singles, normalised, and what starts the experts; then the generalists of one stream
    assert shared[found.stage("feature/normalised").label] >= 5
    assert {shared[s.label] for s in found.stages if "generalists expert" in s.label} == {1}


def test_the_normalised_student_sees_what_the_plain_one_sees(alone):
    plain, control = (log(alone, name) for name in ("/single", "/normalised"))
    assert control["images"] == plain["images"] == 128
    assert control["curve"][0]["loss"] == pytest.approx(1, rel=1e-5)
    assert plain["curve"][0]["loss"] != pytest.approx(1, rel=1e-2)
    one, other = weights(alone, "/single"), weights(alone, "/normalised")
    assert any(not torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_a_killed_normalised_student_ends_as_one_that_was_not(alone, grid, kill):
    count = itertools.count(1)

    def until(event):
        if event.kind == "progress" and "normalised" in event.label and next(count) == kill:
            raise KeyboardInterrupt

    found = grid(wrappers=WRAPPERS[1:2], checkpoint_every=1e-6)
    with pytest.raises(KeyboardInterrupt):
        found.run(until)
    (stage,) = found.stages
    saved = found.store.work(stage.identity) / "checkpoint.safetensors"
    if kill > 1:
        with safe_open(saved, framework="pt") as opened:
            assert opened.get_tensor("adapters/means.step") == kill - 2
            assert opened.get_tensor("adapters/means.count").sum() == 32
    found.run()
    assert (kill > 1) == any("going on at step" in text for text in found.events.texts())
    assert found.files() == {stage.label: alone.files()[stage.label]}


def test_without_memory_a_normalised_student_takes_the_step_again(alone, grid, monkeypatch):
    loss, hit = Normalised.loss, []

    def broken(self, view, rows, step, part=0):
        found = loss(self, view, rows, step, part)
        if step == 2 and not hit:
            hit.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(Normalised, "loss", broken)
    found = grid(wrappers=WRAPPERS[:2]).run()
    assert hit == [2]
    assert any("going on at step 2 of" in text for text in found.events.texts())
    assert found.files().items() <= alone.files().items()


def test_a_normalised_student_may_train_in_parts(alone, grid):
    found = grid(wrappers=WRAPPERS[1:2], training={"batch": 32, "lr": 1e-3, "group": 4, "micro_batch": 12}).run()
    parts, whole = log(found, "normalised"), log(alone, "normalised")
    assert parts["images"] == whole["images"]
    assert [e["step"] for e in parts["curve"]] == [e["step"] for e in whole["curve"]]
    assert [e["loss"] for e in parts["curve"]] == pytest.approx([e["loss"] for e in whole["curve"]], rel=0.2)


def test_generalists_start_alike_and_see_as_much_as_the_experts(alone):
    for k in (0, 1):
        logs = [log(alone, f"{kind} expert-{k}") for kind in ("experts", "generalists")]
        assert logs[0]["images"] == logs[1]["images"] == 3 * 16
    starts = {s.identity for s in alone.stages if s.kind == "state"}
    assert len(starts) == 1
    assert {s.needs["start"] for s in alone.stages if "expert-" in s.label} == {tuple(starts)}
    one, other = (weights(alone, f"generalists expert-{k}") for k in (0, 1))
    assert any(not torch.equal(value, other[key]) for key, value in one.items()), "each has a stream of its own"


def test_from_scratch_generalists_differ_in_what_they_see_alone(grid):
    wrapper = {"o2mkd": {"students": 2, "specialise": False, "init": "scratch"}}
    found = grid(wrappers=[wrapper])
    bench = walk_of(found.found, Events()).bench
    members = []
    for stage in found.stages:
        source = stage_train.source_of(stage, bench)
        network = stage_train.begin(stage, bench)
        members.append(
            (source, stage_train.enlist(stage, bench, source, network, stage_train.teacher_of(stage, bench)))
        )
    (a, one), (b, two) = members
    assert one.learner.adapters.state_dict()
    for name in ("network", "adapters"):
        first, second = (getattr(m.learner, name).state_dict() for m in (one, two))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert a.stream.seed != b.stream.seed
    assert a.stream != b.stream
    assert not torch.equal(a.stream.batch_at(0).index, b.stream.batch_at(0).index)


def test_rows_tell_the_budget_of_the_controls(alone):
    cells = {c.labels["wrapper"]: c.trained for c in alone.found.plan.cells if c.trained and c.labels["wrapper"]}
    facts = {name: training_facts(trained) for name, trained in cells.items()}
    same = ("students", "edges", "batch_per_student", "steps_per_student", "images_per_student", "images_total")
    assert {k: facts["generalists"][k] for k in same} == {k: facts["experts"][k] for k in same}
    assert facts["generalists"]["images_total"] == facts["single"]["images_total"] == 128
    assert facts["normalised"] == facts["single"]
    json.dumps(facts)
