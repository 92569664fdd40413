"""The walk over a plan: what fails, what is skipped for it, what goes on, and what is tried again."""

import errno
import importlib
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import Events, session, suite, walk_of

from o2mkd_bench import Options, execute
from o2mkd_bench.core.errors import (
    CorruptArtifact,
    Diverged,
    NetworkUnavailable,
    PluginError,
    StageFailed,
    StoreError,
)
from o2mkd_bench.core.plan import Cell, Plan, Stage
from o2mkd_bench.core.plugins import Plugin
from o2mkd_bench.core.status import Survey
from o2mkd_bench.core.store import Store
from o2mkd_bench.execute import REPAIRS, Walk, classify
from o2mkd_bench.report.tables import markdown
from o2mkd_bench.results import document
from o2mkd_bench.runner import mended
from o2mkd_bench.stages.bench import Bench

LABELS = {"dataset": "d"}


class Made:
    """A plan ``a -> b -> c`` with ``d`` beside it, made of nothing but text; ``errors`` by label are raised."""

    def __init__(self, root, monkeypatch):
        self.plan = Plan()
        self.a = self._stage("a")
        self.b = self._stage("b", self.a)
        self.c = self._stage("c", self.b)
        self.d = self._stage("d")
        for end in (self.c, self.d):
            self.plan.cells.append(Cell(LABELS, "student", end.identity, samples=end.identity))
        self.store, self.errors, self.tries, self.events = Store(root), {}, [], Events()
        monkeypatch.setattr(execute, "maker", lambda kind: self.make)

    def _stage(self, label, *needs):
        stage = Stage.make("samples", label, {"label": label}, {"from": tuple(n.identity for n in needs)})
        self.plan.add(stage)
        return stage

    def make(self, stage, bench, draft):
        self.tries.append(stage.label)
        for name in stage.inputs():
            bench.store.read(name, "text")
        error = self.errors.get(stage.label)
        if callable(error):
            error = error(draft)
        if error is not None:
            raise error
        (draft.dir / "text").write_text(stage.label)

    def walk(self, fail_fast=False):
        self.events.clear()
        self.tries.clear()
        walk = Walk(self.plan, Bench(self.store, "cpu", self.events, SimpleNamespace()), fail_fast)
        walk.run()
        return walk

    def standings(self):
        return [(s.status, s.reason) for s in Survey(self.plan, self.store).standings()]

    def damage(self, stage):
        path = self.store.root / "artifacts" / stage.identity[:2] / stage.identity / "text"
        path.write_bytes(b"x")


@pytest.fixture
def made(tmp_path, monkeypatch):
    return Made(tmp_path / "store", monkeypatch)


def test_a_plan_is_made_in_order_and_once(made):
    walk = made.walk()
    assert made.tries == ["a", "b", "c", "d"]
    assert [made.plan.stages[name].label for name in walk.made] == made.tries
    assert made.events[0].data == {"stages": 4, "reused": 0}
    again = made.walk()
    assert made.tries == again.made == []
    assert made.events[0].data == {"stages": 0, "reused": 4}


@pytest.mark.parametrize(
    ("error", "reason", "category"),
    [
        (ValueError("no\n such  thing"), "ValueError: no such thing (test_execute.py:", "error"),
        (Diverged("the loss is nan at step 3"), "the loss is nan at step 3", "diverged"),
        (StageFailed("too small"), "too small", "failed"),
        (MemoryError(), "out of memory; lower the batch", "memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory (CUDA out of memory); lower", "memory"),
        (PluginError("plugin x is broken"), "plugin x is broken", "user"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_failure_stops_only_what_needs_it(made, error, reason, category):
    made.errors["b"] = error
    walk = made.walk()
    assert made.tries == ["a", "b", "d"]
    assert walk.failed[made.c.identity] == "needs b, which failed"
    record = made.store.failure(made.b.identity)
    assert record["reason"].startswith(reason)
    assert record["category"] == category
    (event,) = [e for e in made.events if e.kind == "failed"]
    assert (event.label, event.data["reason"]) == ("b", record["reason"])
    (first, why), second = made.standings()
    assert (first, why.startswith(f"b: {reason}")) == ("failed", True)
    assert second == ("done", "")
    assert not any((made.store.root / "tmp").iterdir()), "no draft stays"


def test_a_walk_can_make_a_part_first_and_goes_on_from_there(made):
    made.errors["d"] = ValueError("once")
    walk = Walk(made.plan, Bench(made.store, "cpu", made.events, SimpleNamespace()))
    walk.run([made.b.identity, made.d.identity])
    walk.run()
    # what has failed on a walk is not tried again on it
    assert made.tries == ["a", "b", "d", "c"]
    counts = [event.data for event in made.events if event.kind == "plan"]
    assert counts == [{"stages": 3, "reused": 0}, {"stages": 1, "reused": 0}]
    assert [status for status, _ in made.standings()] == ["done", "failed"]


def test_what_failed_is_tried_again_and_forgiven(made):
    made.errors["b"] = ValueError("once")
    made.walk()
    made.errors.clear()
    walk = made.walk()
    assert made.tries == ["b", "c"]
    assert not walk.failed
    assert made.store.failure(made.b.identity) is None
    assert made.standings() == [("done", ""), ("done", "")]


def test_fail_fast_stops_at_the_first_failure(made):
    made.errors["a"] = ValueError("first")
    walk = made.walk(fail_fast=True)
    assert made.tries == ["a"]
    assert list(walk.failed) == [made.a.identity]
    assert [status for status, _ in made.standings()] == ["failed", "missing"]


def test_fail_fast_goes_on_when_a_column_stays_empty(made):
    made.errors["b"] = NetworkUnavailable("no weights here")
    made.walk(fail_fast=True)
    assert made.tries == ["a", "b", "d"]
    assert classify(NetworkUnavailable("no weights here")) == ("no weights here", "unavailable")


def test_a_failure_inside_a_plugin_names_it(made, tmp_path, monkeypatch):
    (tmp_path / "acme_inside.py").write_text("def go(how):\n    how()\n")
    monkeypatch.syspath_prepend(tmp_path)
    inside = importlib.import_module("acme_inside")
    plugin = Plugin("samplers", "mine", "acme_inside:go", Options, "1", "", "", "acme", "1")
    monkeypatch.setattr("o2mkd_bench.core.sources.registry", lambda: SimpleNamespace(all=lambda: [plugin]))
    made.errors["b"] = lambda draft: inside.go(lambda: {}["k"])
    made.errors["d"] = lambda draft: inside.go(lambda: sys.exit(5))
    walk = made.walk()
    told = "plugin samplers:acme:mine failed: {} (acme_inside.py:2); correct the plugin"
    assert walk.failed[made.b.identity] == told.format("KeyError: 'k'")
    assert walk.failed[made.d.identity] == told.format("SystemExit: 5")


def test_an_interrupt_is_not_a_failure(made):
    made.errors["b"] = lambda draft: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        made.walk()
    assert made.store.failure(made.b.identity) is None
    assert not any((made.store.root / "tmp").iterdir())


@pytest.mark.parametrize(
    ("code", "told"), [(errno.ENOSPC, "is on a full disk; free space"), (errno.EROFS, "cannot be written")]
)
def test_a_store_that_cannot_be_written_is_one_sentence(made, code, told):
    made.errors["b"] = lambda draft: OSError(code, os.strerror(code), str(draft.dir / "text"))
    with pytest.raises(StoreError, match=told) as caught:
        made.walk()
    assert str(made.store.root) in str(caught.value)
    assert made.tries == ["a", "b"]
    assert made.store.has(made.a.identity)


def test_a_damaged_input_is_noticed_said_and_made_anew(made):
    made.walk()
    made.store.discard(made.c.identity, "test")
    made.damage(made.b)
    walk = made.walk()
    assert made.tries == ["c", "b", "c"]
    assert not walk.failed
    assert made.events.texts() == ["b is damaged (text is not what the manifest says); making it anew"]
    assert made.standings() == [("done", ""), ("done", "")]


def test_damage_below_damage_is_mended_too(made):
    made.walk()
    made.store.discard(made.c.identity, "test")
    made.damage(made.b)
    made.damage(made.a)
    made.walk()
    assert made.tries == ["c", "b", "a", "b", "c"]
    assert len(made.events.texts()) == 2


def test_an_input_that_is_gone_is_made_on_the_way(made):
    made.walk()
    for stage in (made.c, made.b, made.a):
        made.store.discard(stage.identity, "test")
    first = iter([True])

    def swept_away(draft):
        if not next(first, False):
            return None
        for stage in (made.a, made.b):
            made.store.discard(stage.identity, "test")
        return CorruptArtifact(made.b.identity, "its manifest cannot be read")

    made.errors["c"] = swept_away
    walk = made.walk()
    assert made.tries == ["a", "b", "c", "a", "b", "c"]
    assert not walk.failed


def test_a_damaged_input_that_cannot_be_made_again_fails_what_needs_it(made):
    made.walk()
    made.store.discard(made.c.identity, "test")
    made.damage(made.b)
    made.errors["b"] = ValueError("not again")
    walk = made.walk()
    assert walk.failed[made.c.identity] == "needs b, which failed"
    assert made.tries == ["c", "b"]


def test_a_disk_that_forgets_is_not_fed_for_ever(made):
    made.errors["b"] = lambda draft: made.damage(made.a) or CorruptArtifact(made.a.identity, "bits")
    with pytest.raises(StoreError, match=f"a is damaged .* made anew {REPAIRS} times; look at the disk"):
        made.walk()
    assert made.tries.count("a") == 1 + REPAIRS


def test_an_artifact_that_lacks_a_file_fails_its_reader_alone(made):
    made.errors["b"] = CorruptArtifact(made.a.identity, "it has no file raw.safetensors")
    walk = made.walk()
    assert "it has no file raw.safetensors" in walk.failed[made.b.identity]
    assert made.tries.count("a") == 1
    assert made.standings()[1] == ("done", "")


def test_what_another_process_makes_is_waited_for_last(made, monkeypatch):
    """The lock of ``a`` is held elsewhere at first; meanwhile all that does not need it is made."""
    store = made.store
    waits = []
    try_lock, lock = store.try_lock, store.lock

    def busy(name):
        return None if name == made.a.identity and not waits else try_lock(name)

    def wait(name, timeout=-1):
        waits.append(name)
        return lock(name, timeout)

    monkeypatch.setattr(store, "try_lock", busy)
    monkeypatch.setattr(store, "lock", wait)
    made.walk()
    assert made.tries == ["d", "a", "b", "c"]
    assert waits == [made.a.identity]


def test_what_another_process_has_made_is_reused(made, monkeypatch):
    store, lock = made.store, made.store.try_lock
    other = Store(store.root)

    def after_the_other(name):
        if name == made.a.identity and not other.has(name):
            with other.writing(name, "samples", "a", made.a.spec, made.a.needs) as draft:
                (draft.dir / "text").write_text("a")
        return lock(name)

    monkeypatch.setattr(store, "try_lock", after_the_other)
    made.walk()
    assert made.tries == ["b", "c", "d"]
    assert made.events.labels("reused") == ["a"]


def test_a_reader_of_results_has_damage_mended(made):
    walk = made.walk()
    made.damage(made.d)
    assert mended(walk, lambda: made.store.read(made.d.identity, "text").read_text()) == "d"
    made.damage(made.d)
    made.errors["d"] = ValueError("not again")

    def read():
        name = made.d.identity
        return made.store.read(name, "text").read_text() if made.store.has(name) else "absent"

    assert mended(walk, read) == "absent"
    assert made.standings()[1][0] == "failed"


# --- real stages that fail


def test_a_diverging_student_fails_alone_and_is_mended_by_a_better_rate(toy_run):
    mapping = suite(
        methods=["output", "none"], training={"batch": 32, "lr": 1e30, "clip": None, "group": 4, "optimizer": "sgd"}
    )
    mapping["teachers"] = [{**mapping["teachers"][0]}]
    mapping["teachers"][0]["train"] = {
        **mapping["teachers"][0]["train"],
        "training": {"lr": 1e-3, "clip": 1.0, "optimizer": "adamw"},
    }
    mapping["probe"] = mapping["speed"] = {"enabled": False}
    found = session(mapping, toy_run.store)
    events = Events()
    walk_of(found, events).run()
    failed = {e.label: e.data for e in events if e.kind == "failed"}
    assert set(failed) == {f"digits/half/{name}/single seed 0" for name in ("output", "none")}
    assert {data["category"] for data in failed.values()} == {"diverged"}
    standings = {s.cell.labels["method"]: s for s in Survey(found.plan, found.store).standings()}
    assert standings[""].status == "done"
    assert standings["none"].status == "failed"
    assert "lower the learning rate" in standings["none"].reason
    assert not any((found.store.root / "work").iterdir()), "nobody resumes from what diverged"


def without(toy_run, tmp_path, *kinds):
    """A session of the toy suite of which all is made but the stages of ``kinds``."""
    found = session(suite(), tmp_path / "store")
    shared = Store(toy_run.store)
    for name, stage in found.plan.stages.items():
        if stage.kind not in kinds:
            target = found.store._place(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(shared._place(name))
    return found


def test_missing_network_weights_leave_a_column_empty_and_the_cell_done(toy_run, tmp_path, monkeypatch):
    from o2mkd_plugins.metrics.fidelity import FrechetDistance

    def unavailable(self, layers):
        raise NetworkUnavailable("weights are neither here nor there")

    monkeypatch.setattr(FrechetDistance, "load", unavailable)
    found = without(toy_run, tmp_path, "reference", "score")
    events = Events()
    walk_of(found, events).run()
    assert events.labels("start") == ["reference digits embedded:digits"]
    for standing in Survey(found.plan, found.store).standings():
        assert standing.status == "done"
        assert standing.empty == ("weights are neither here nor there",)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({"fd_digits": 1.0, "other": 2.0}, "gives the column 'other', which is none of those it declares (fd_digits)"),
        ({}, "gives no score for the column 'fd_digits' that it declares"),
        ({"fd_digits": float("nan")}, "gives nan for the column 'fd_digits', which is no finite number"),
        ({"fd_digits": float("inf")}, "gives inf for the column 'fd_digits', which is no finite number"),
        ({"fd_digits": "3"}, "gives '3' for the column 'fd_digits', which is no finite number"),
        (None, "returned NoneType from compute(), which is no dict of scores"),
    ],
    ids=str,
)
def test_a_metric_that_breaks_its_contract_fails_its_scores_alone(toy_run, tmp_path, monkeypatch, scores, told):
    from o2mkd_plugins.metrics.fidelity import FrechetDistance

    found = without(toy_run, tmp_path, "score")
    compute = FrechetDistance.compute
    calls = []

    def broken(self, ours, theirs):
        calls.append(self)
        return scores if len(calls) == 1 else compute(self, ours, theirs)

    monkeypatch.setattr(FrechetDistance, "compute", broken)
    events = Events()
    walk_of(found, events).run()
    (failed,) = [event for event in events if event.kind == "failed"]
    assert failed.data["reason"] == f"plugin metrics:fid {told}; correct the plugin"
    assert len(events.labels("done")) == len(calls) - 1 > 1
    monkeypatch.undo()
    assert markdown(document(found))


def test_data_that_changed_since_the_plan_is_refused(tmp_path, monkeypatch):
    from o2mkd_plugins.datasets.digits import Digits

    found = session(suite(), tmp_path / "store")
    info = Digits.info
    monkeypatch.setattr(Digits, "info", lambda self: SimpleNamespace(**{**vars(info(self)), "fingerprint": "other"}))
    walk = walk_of(found, Events(), fail_fast=True)
    walk.run()
    assert "changed while the run was going on" in next(iter(walk.failed.values()))


def test_data_of_another_shape_than_declared_is_refused(tmp_path, monkeypatch):
    from o2mkd_plugins.datasets.digits import Digits

    found = session(suite(), tmp_path / "store")
    images = SimpleNamespace(train=np.zeros((5, 1, 9, 9), np.uint8), test=np.zeros((0, 1, 8, 8), np.uint8))
    monkeypatch.setattr(Digits, "load", lambda self: images)
    walk = walk_of(found, Events(), fail_fast=True)
    walk.run()
    assert "image 0 of train is uint8 (1, 9, 9), declared" in next(iter(walk.failed.values()))
