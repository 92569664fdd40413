"""A teacher is what it says it is, or nothing is trained from it; and the steps that only teachers take."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from results_factory import make, row
from toy import Events, session, suite, walk_of

from o2mkd_bench import execute
from o2mkd_bench.core.errors import NetworkUnavailable, PluginError, UserError
from o2mkd_bench.core.plan import Cell, Expectation, Plan, Stage
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.status import Survey
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.suite import load
from o2mkd_bench.engine.philox import Philox
from o2mkd_bench.execute import Walk
from o2mkd_bench.report.lines import sections
from o2mkd_bench.report.notes import notes
from o2mkd_bench.report.teachers import beside, expected
from o2mkd_bench.results import document
from o2mkd_bench.stages.bench import Bench

TEXT = """\
name: small
datasets: [digits]
teachers:
  - name: t
    train: {model: unet2d, images: 1k}
    expect:
      column: fd_digits
      value: 10
      sampler: ddim
      steps: 50
students: [{name: s}]
methods: [output]
samplers:
  - {ddim: {steps: [10]}}
  - {progressive: {steps: [2]}, label: slow}
metrics: [{fid: {network: embedded}}]
budgets: [1k]
"""


def expecting(value=1.0, **changes):
    """The toy suite with a teacher that should score ``value``, and what else of ``expect`` and the suite changes."""
    expect = {"column": "fd_digits", "value": value, "sampler": "ddim", "steps": 2, "tolerance": 0.01}
    expect |= {key: changes.pop(key) for key in ("refuse", "steps", "tolerance") if key in changes}
    mapping = suite(**changes)
    return {**mapping, "teachers": [{**mapping["teachers"][0], "expect": expect}]}


def rows(found, role):
    return [(c.labels["sampler"], c.labels["steps"], c.labels["seed"]) for c in found.plan.cells if c.role == role]


# --- the suite


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "column: fd_digits",
            "column: fd_digit",
            "7: teachers.t.expect.column: no metric of this suite gives 'fd_digit'; did you mean 'fd_digits'? "
            "(known: fd_digits)",
        ),
        (
            "sampler: ddim",
            "sampler: ddmi",
            "9: teachers.t.expect.sampler: no sampler of this suite is called 'ddmi'; did you mean 'ddim'? "
            "(known: ddim, slow)",
        ),
        ("sampler: ddim", "sampler: slow", "9: teachers.t.expect.sampler: 'slow' trains students of its own; name a"),
        ("value: 10", "value: 0", "8: teachers.t.expect.value: expected more than 0, got 0"),
        ("value: 10", "valeu: 10", "8: teachers.t.expect.valeu: unknown key; did you mean 'value'?"),
        ("      steps: 50", "      steps: none", "10: teachers.t.expect.steps: expected a whole number above 0"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(tmp_path, old, new, told):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{told}")


@pytest.mark.parametrize("columns", [None, lambda options: ("a",), lambda options, dataset: 1 / 0])
def test_a_metric_that_does_not_say_its_columns_is_refused_with_the_plan(tmp_path, monkeypatch, columns):
    fid = registry().get("metrics", "fid")
    traits = {**fid.traits, "columns": columns} if columns else {k: v for k, v in fid.traits.items() if k != "columns"}
    monkeypatch.setitem(registry()._plugins, ("metrics", "fid"), [replace(fid, traits=traits)])
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    with pytest.raises(PluginError, match=r"metrics: (columns of )?plugin metrics:fid"):
        prepare(load(path), tmp_path / "store")


def test_its_steps_are_labels_that_rules_may_name(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT + "sampling: {teacher_steps: [4, 10]}\ninclude: [{steps: [50, 4]}]\n")
    found = load(path)
    assert found.teachers[0].expect.tolerance == 0.15
    assert found.labels()["steps"] == ("10", "2", "4", "50")
    path.write_text(TEXT + "include: [{steps: 51}]\n")
    with pytest.raises(UserError, match="'51' matches no steps"):
        load(path)


def test_one_step_of_the_ladder_twice_is_a_mistake(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT + "sampling:\n  teacher_steps: [4, 4]\n")
    with pytest.raises(UserError, match=r":19: sampling\.teacher_steps: 4 stands here twice"):
        load(path)


# --- the plan


def test_the_expected_row_is_planned_first_and_whatever_is_asked_for(tmp_path):
    plain = session(suite(seeds=[3, 4]), tmp_path, ["steps=2"])
    found = session(expecting(steps=5, seeds=[3, 4], exclude=[{"sampler": "d*", "steps": "5"}]), tmp_path, ["steps=2"])
    assert set(rows(found, "teacher")) == {("ddim", 5, 3), *rows(plain, "teacher")}
    assert rows(found, "student") == rows(plain, "student")
    kinds = [stage.kind for stage in found.plan.stages.values()]
    assert kinds[:5] == ["data", "reference", "teacher", "samples", "score"]
    (one,) = found.plan.expectations
    assert list(found.plan.stages)[4] == one.score
    fresh = found.plan.stages.keys() - plain.plan.stages.keys()
    assert sorted(found.plan.stages[name].kind for name in fresh) == ["loss", "samples", "score", "speed"]
    assert plain.plan.stages.keys() <= found.plan.stages.keys()


def test_a_row_that_is_asked_for_anyway_is_not_there_twice(tmp_path):
    found = session(expecting(), tmp_path)
    assert rows(found, "teacher") == [("ddim", 2, 0)]
    assert found.plan.expectations[0].score in found.plan.cells[0].scores


def test_nothing_is_measured_of_a_teacher_that_is_not_asked_for(tmp_path):
    mapping = expecting()
    other = {"name": "other", "train": mapping["teachers"][0]["train"]}
    found = session({**mapping, "teachers": [*mapping["teachers"], other]}, tmp_path, ["teacher=other"])
    assert not found.plan.expectations
    assert {cell.labels["teacher"] for cell in found.plan.cells} == {"other"}


def test_a_teacher_that_is_not_here_yet_shows_its_expected_row(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    mapping = expecting(steps=9)
    teacher = {"name": "far", "hub": "nobody/nothing-there", "expect": mapping["teachers"][0]["expect"]}
    found = session({**mapping, "teachers": [teacher]}, tmp_path)
    assert rows(found, "teacher") == [("ddim", 9, 0), ("ddim", 2, 0)]
    assert {s.status for s in Survey(found.plan, found.store).standings()} == {"unresolved"}


def test_the_ladder_is_the_teachers_alone(tmp_path):
    samplers = [{"ddim": {"steps": [2]}}, {"progressive": {"steps": [2], "start": 4}}]
    mapping = suite(samplers=samplers, sampling={"images": 640, "batch": 320, "teacher_steps": [4, 2, 5]})
    found = session(mapping, tmp_path)
    assert rows(found, "teacher") == [("ddim", 2, 0), ("ddim", 4, 0), ("ddim", 5, 0)]
    assert {steps for _, steps, _ in rows(found, "student")} == {2}
    assert rows(session(mapping, tmp_path, ["steps=5"]), "teacher") == [("ddim", 5, 0)]
    assert document(found)["teacher_steps"] == [4, 2, 5]


def test_planning_needs_no_torch(tmp_path):
    code = (
        "import json, sys; from pathlib import Path; from o2mkd_bench.core.session import prepare;"
        "from o2mkd_bench.core.status import Survey; from o2mkd_bench.core.suite import from_mapping;"
        "found = prepare(from_mapping(json.loads(sys.argv[1])), Path(sys.argv[2]));"
        "Survey(found.plan, found.store).standings(); assert found.plan.expectations;"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(expecting()), str(tmp_path)], check=False)
    assert done.returncode == 0


# --- a run


@pytest.fixture
def store(toy_run, tmp_path):
    """A store that holds the toy teacher and what it scores, and no student."""
    shutil.copytree(toy_run.store, tmp_path / "store", symlinks=True)
    found = session(suite(), tmp_path / "store")
    for name, stage in found.plan.stages.items():
        if stage.kind in ("student", "probe") or (stage.kind in ("samples", "score") and "half" in stage.label):
            found.store.discard(name, "test")
    return tmp_path / "store"


@pytest.fixture
def score(toy_run):
    """What the toy teacher scores."""
    return next(r for r in toy_run.results.document["rows"] if r["role"] == "teacher")["scores"]["fd_digits"]


def walked(mapping, store, **options):
    found, events = session(mapping, store), Events()
    walk_of(found, events, **options).run()
    statuses = {s.cell.role: (s.status, s.reason) for s in Survey(found.plan, found.store).standings()}
    return found, events, statuses


def test_a_teacher_as_expected_is_trained_from_and_its_loss_measured(store, score):
    found, events, statuses = walked(expecting(score * 1.005), store)
    assert set(statuses.values()) == {("done", "")}
    assert events.texts() == events.labels("failed") == []
    results = document(found)
    (entry,) = results["teachers"]
    assert (entry["found"], entry["as_expected"], entry["sampler"], entry["steps"]) == (score, True, "ddim", 2)
    assert entry["loss"]["t"] == [100, 300, 500, 700, 900]
    assert entry["loss"]["error"] == pytest.approx(_losses(found), rel=1e-5)
    said = notes(results, sections(results))
    assert f"teacher tiny: fd_digits of ddim 2 (seed 0) is {score:.4g}, expected {score * 1.005:.4g} within 1%" in said
    assert any(note.startswith("epsilon loss of teacher tiny at t = 100, 300, 500, 700, 900: ") for note in said)


def _losses(found):
    """From the pipeline's own formula, one image at a time."""
    (one,) = found.plan.expectations
    bench = Bench(found.store, "cpu", Events(), found.registry)
    network = bench.denoiser(one.stage, "ema")
    data = next(name for name, stage in found.plan.stages.items() if stage.kind == "data")
    images = bench.images(data, "test")[:8] / 127.5 - 1
    noise = Philox.for_purpose(0, "probe").normal(torch.arange(8), (1, 8, 8))
    kept = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    losses = []
    for t in (100, 300, 500, 700, 900):
        x_t = (kept[t].sqrt() * images + (1 - kept[t]).sqrt() * noise).float()
        with torch.no_grad():
            guessed = torch.cat([network(x[None], torch.tensor([t])).sample for x in x_t])
        losses.append(float((guessed - noise).double().square().mean()))
    return losses


def test_a_teacher_far_from_it_is_refused_also_from_the_store(store, score):
    told = (
        f"teachers.tiny.expect: fd_digits of ddim 2 is {score:.4g}, expected 1 within 1%; name the right teacher, mend "
        "the value, or train from it anyway with expect.refuse: false"
    )
    for _ in range(2):
        found, events, statuses = walked(expecting(), store)
        assert statuses["teacher"] == ("done", "")
        assert statuses["student"] == ("failed", f"teacher tiny: {told}")
        (failure,) = [event for event in events if event.kind == "failed"]
        assert (failure.label, failure.data["reason"]) == ("teacher tiny", told)
        assert not any("half" in label for label in events.labels("start"))
    assert document(found)["teachers"][0]["as_expected"] is False
    assert "which it is not" in expected(document(found))[0]
    _, events, statuses = walked(expecting(refuse=False), store)
    assert set(statuses.values()) == {("done", "")}
    assert events.texts() == [f"{told.partition(';')[0]}; trained from all the same, as refuse is false"]
    _, events, statuses = walked(expecting(), store)
    assert set(statuses.values()) == {("done", "")}, "nothing is left to refuse"


def test_fail_fast_stops_at_a_teacher_that_is_refused(store):
    walk = walk_of(session(expecting(), store), Events(), fail_fast=True)
    walk.run()
    assert walk._stopped


def test_what_does_not_need_the_teacher_is_trained(store):
    found, events, _ = walked(expecting(methods=["none", "output"], probe={"enabled": False}), store)
    statuses = {s.cell.labels["method"]: s.status for s in Survey(found.plan, found.store).standings()}
    assert statuses == {"": "done", "none": "done", "output": "failed"}
    assert events.labels("failed") == ["teacher tiny"]


def test_a_score_that_cannot_be_had_refuses_nothing(store, monkeypatch):
    from o2mkd_plugins.metrics.fidelity import FrechetDistance

    def unavailable(self, layers):
        raise NetworkUnavailable("weights are neither here nor there")

    monkeypatch.setattr(FrechetDistance, "load", unavailable)
    found = session(expecting(), store)
    for name, stage in found.plan.stages.items():
        if stage.kind in ("reference", "score"):
            found.store.discard(name, "test")
    found, events, statuses = walked(expecting(), store)
    assert {status for status, _ in statuses.values()} == {"done"}
    (text,) = events.texts()
    assert text == (
        "teachers.tiny.expect: not checked, as what it scores is not known "
        "(needs reference digits embedded:digits, which failed)"
    )
    assert document(found)["teachers"][0]["as_expected"] is None
    assert "is not known, expected 1 within 1%" in expected(document(found))[0]


# --- a walk, made of nothing but text


class Made:
    """``teacher -> samples -> score``, and two students of the teacher, one of which learns nothing from it."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.plan, self.store, self.tries, self.events = Plan(), Store(root), [], Events()
        self.teacher = self.stage("teacher", "teacher")
        samples = self.stage("samples", "samples", self.teacher)
        self.score = self.stage("score", "score", samples)
        self.student = self.stage("student", "student", self.teacher)
        self.alone = self.stage("student", "alone")
        labels = {"dataset": "d"}
        self.plan.cells = [Cell(labels, "student", s.identity, samples=s.identity) for s in (self.score, self.student)]
        self.plan.cells.append(Cell(labels, "student", self.alone.identity, samples=self.alone.identity))
        self.plan.expectations.append(
            Expectation("x.yaml: teachers.t.expect", "d", "t", "ddim", 2, 0, "fd", 10.0, 0.1, True,
                        self.teacher.identity, self.score.identity, self.score.identity)
        )  # fmt: skip
        self.found = 10.5
        monkeypatch.setattr(execute, "maker", lambda kind: self.make)

    def stage(self, kind, label, *needs):
        made = Stage.make(kind, label, {"label": label}, {"from": tuple(n.identity for n in needs)}, {"cohort": 1})
        self.plan.add(made)
        return made

    def make(self, stage, bench, draft):
        self.tries.append(stage.label)
        content = {"scores": {"fd": self.found}} if stage is self.score else {}
        (draft.dir / "scores.json").write_text(json.dumps(content))

    def walk(self):
        walk = Walk(self.plan, Bench(self.store, "cpu", self.events, SimpleNamespace()))
        walk.run()
        return walk


@pytest.fixture
def made(tmp_path, monkeypatch):
    return Made(tmp_path / "store", monkeypatch)


def test_a_score_that_another_process_makes_is_waited_for(made, monkeypatch):
    waits, (try_lock, lock) = [], (made.store.try_lock, made.store.lock)
    score = made.score.identity
    monkeypatch.setattr(made.store, "try_lock", lambda n: None if n == score and not waits else try_lock(n))
    monkeypatch.setattr(made.store, "lock", lambda name, timeout=-1: waits.append(name) or lock(name, timeout))
    made.walk()
    assert made.tries == ["teacher", "samples", "alone", "score", "student"]
    assert waits == [score]


def test_a_student_without_a_teacher_takes_none_along_whose_teacher_is_in_doubt(made):
    walk = Walk(made.plan, Bench(made.store, "cpu", made.events, SimpleNamespace()))
    assert walk._doubted(made.student, {made.score.identity})
    assert not walk._doubted(made.alone, {made.score.identity})
    made.found = 12.0
    refused = made.walk()
    assert refused._doubted(made.student, {})
    assert made.tries[-1] == "alone"


@pytest.mark.parametrize(("found", "said"), [(12.0, "12"), (float("nan"), "nan")])
def test_a_damaged_score_is_made_anew_before_it_counts(made, found, said):
    made.walk()
    made.store.discard(made.student.identity, "test")
    path = made.store.root / "artifacts" / made.score.identity[:2] / made.score.identity / "scores.json"
    # of the same length, so that only who reads it notices
    path.write_bytes(b"X" * path.stat().st_size)
    made.tries.clear()
    made.found = found
    walk = made.walk()
    assert made.tries == ["score"]
    assert f"is {said}, expected 10 within 10%" in walk.failed[made.student.identity]


def test_a_metric_that_leaves_the_column_out_is_said(made):
    made.found = None
    made.walk()
    assert made.tries[-2:] == ["student", "alone"]
    assert made.events.texts() == [
        "x.yaml: teachers.t.expect: not checked, as what it scores is not known (it gives no fd)"
    ]


# --- the table


def test_the_teacher_at_the_speed_of_the_best_student_of_each_size():
    results = make(methods=("output",), seeds=(0,))
    parts = sections(results)
    assert beside(results, parts) == [], "only where the teacher was given steps of its own"
    results["teacher_steps"] = [4, 5, 8, 10, 15, 20, 50]
    first, second = beside(results, parts)
    best = min((li for li in parts[0].lines if li["student"] == "half"), key=lambda li: li.scores["fd_digits"].mean)
    assert f"digits: at the speed of half/output/{best['wrapper']} ddim 10 (fd_digits " in first
    # a step of the student costs 0.26 of one of the teacher's: no rung of the ladder is as fast as ten of them
    assert " img/s) teacher small has " in first
    assert "(ddim 4, " in first
    assert "quarter/output/" in second
    assert first in notes(results, parts)


def test_speed_decides_by_its_factor_and_the_column_by_its_direction():
    results = make(methods=("output",), seeds=(0,), students=("half",), steps=(10,))
    results["teacher_steps"] = [4]
    for found, speed in zip(results["rows"], (100, 10, 1, 1, 1, 1, 1), strict=False):
        found["speed"]["images_per_second"] = speed
    for found in results["rows"][7:]:
        found["speed"]["images_per_second"] = 40
    results["metrics"][0]["higher_is_better"] = True
    (note,) = beside(results, sections(results))
    assert "(ddim 4, 100 img/s)" in note, "2.5 times as fast is nearer than a quarter of it"
    worst = max((r for r in results["rows"] if r["student"]), key=lambda r: r["scores"]["fd_digits"])
    assert f"half/output/{worst['wrapper']} ddim 10" in note


def test_nothing_is_compared_without_speed_readings_or_teachers():
    results = {**make(methods=("output",), seeds=(0,)), "teacher_steps": [4]}
    results["rows"] = [{**found, "speed": None} for found in results["rows"]]
    assert beside(results, sections(results)) == []
    results["rows"] = [row("half", "output", "single", steps=5, seed=0)]
    assert beside(results, sections(results)) == []


def test_a_loss_that_is_not_finite_leaves_a_gap():
    entry = {
        "dataset": "digits", "teacher": "small", "column": "fd_digits", "expected": 3.0, "tolerance": 0.15,
        "found": 3.1, "as_expected": True, "sampler": "ddim", "steps": 50, "seed": 0,
        "loss": {"t": [10, 30], "error": [0.0213, None]},
    }  # fmt: skip
    assert expected({"teachers": [entry]}) == [
        "teacher small: fd_digits of ddim 50 (seed 0) is 3.1, expected 3 within 15%",
        "epsilon loss of teacher small at t = 10, 30: 0.0213, ?",
    ]
