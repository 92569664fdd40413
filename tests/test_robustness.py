"""Kills, flipped bits, two runs at once, full disks: the table is the same, and nothing is made twice."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from toy import Events, run, session, spawn, suite, table, walk_of

from o2mkd_bench.core.errors import StoreError
from o2mkd_bench.core.store import Store
from o2mkd_bench.engine.learner import Learner

OFTEN = {"checkpoint_every": 1e-6}


def events_of(process):
    out, _ = process.communicate(timeout=120)
    return [json.loads(line) for line in out.splitlines()]


def labels(events, kind):
    return [label for k, label, _ in events if k == kind]


@pytest.fixture
def copied(toy_run, tmp_path) -> Path:
    """A store of one's own with everything in it."""
    return Path(shutil.copytree(toy_run.store, tmp_path / "store"))


def place(store: Path, identity: str) -> Path:
    return store / "artifacts" / identity[:2] / identity


def forget(store: Path, stages, identity: str) -> list[str]:
    """Remove an artifact and all that was made from it; what that was, by label."""
    gone = [identity]
    for name, stage in stages.items():
        if not set(gone).isdisjoint(stage.inputs()):
            gone.append(name)
    for name in gone:
        shutil.rmtree(place(store, name))
    return [stages[name].label for name in gone]


def test_killed_again_and_again_a_run_ends_with_the_same_table(toy_run, tmp_path):
    """Killed in the teacher's training, then after an expert, then in an expert's training."""
    mapping, store = {**toy_run.suite, **OFTEN}, tmp_path / "store"
    made: list[str] = []
    for kill_at, interrupted in (
        ("progress teacher 9", "teacher tiny"),
        ("progress expert-1 5", "digits/half/output/o2mkd expert-1 seed 0"),
    ):
        process = spawn(mapping, store, tmp_path / "out", kill_at)
        events = events_of(process)
        assert process.returncode == -signal.SIGKILL
        assert events[-1][:2] == ["progress", interrupted]
        assert made == [] or labels(events, "message"), "the training that was interrupted goes on"
        assert not set(made) & set(labels(events, "start")), "what is done is not done again"
        made += labels(events, "done")
    events = Events()
    run(mapping, store, tmp_path / "out", events)
    # experts and the single student train together, each from where it was saved
    assert sorted(text for text in events.texts() if "going on" in text) == [
        "digits/half/output/o2mkd expert-0 seed 0: going on at step 5 of 6",
        "digits/half/output/o2mkd expert-1 seed 0: going on at step 4 of 6",
        "digits/half/output/single seed 0: going on at step 7 of 8",
    ]
    made += events.labels("done")
    assert sorted(made) == sorted(stage.label for stage in toy_run.session.plan.stages.values())
    assert table(tmp_path / "out") == table(toy_run.out)
    same_bits(toy_run, store)


def same_bits(toy_run, store):
    """Every artifact is what the run without a break left, apart from what a clock decides."""
    for name, stage in toy_run.session.plan.stages.items():
        if stage.kind != "speed":
            found = [Store(root).manifest(name).files for root in (store, toy_run.store)]
            assert found[0] == found[1], stage.label


def test_two_runs_at_once_share_the_work(tmp_path):
    mapping = suite(wrappers=[{"o2mkd": {"students": 2}}], checkpoint_every=1e-6)
    processes = [spawn(mapping, tmp_path / "store", tmp_path / f"out{i}") for i in (0, 1)]
    events = [events_of(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    plan = session(mapping, tmp_path / "store").plan
    made = labels(events[0], "done") + labels(events[1], "done")
    assert sorted(made) == sorted(stage.label for stage in plan.stages.values())
    assert table(tmp_path / "out0") == table(tmp_path / "out1")
    assert "failed" not in {kind for kind, *_ in events[0] + events[1]}


# the kind that is damaged, and one that must be made again, so that the damaged one is read
READERS = {
    "data": "probe",
    "reference": "score",
    "teacher": "probe",
    "state": "student",
    "student": "samples",
    "round": "samples",
    "samples": "score",
    "score": None,
    "speed": None,
    "probe": None,
}
FILES = {
    "data": "test.npy",
    "reference": "features.safetensors",
    "teacher": "ema.safetensors",
    "state": "state.safetensors",
    "student": "ema.safetensors",
    "round": "ema.safetensors",
    "samples": "images.npy",
    "score": "scores.json",
    "speed": "speed.json",
    "probe": "probe.json",
}


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_is_noticed_said_and_mended(toy_run, copied, tmp_path, kind):
    stages = toy_run.session.plan.stages
    reader = next((s for s in stages.values() if s.kind == READERS[kind] and reads(stages, s, kind)), None)
    damaged = next(n for n in reader.inputs() if stages[n].kind == kind) if reader else first(stages, kind)
    flip(place(copied, damaged) / FILES[kind])
    gone = forget(copied, stages, reader.identity) if reader else []
    events = Events()
    run(toy_run.suite, copied, tmp_path / "out", events)
    (text,) = events.texts()
    assert text == f"{stages[damaged].label} is damaged ({FILES[kind]} is not what the manifest says); making it anew"
    assert sorted(events.labels("done")) == sorted([stages[damaged].label, *gone])
    assert table(tmp_path / "out") == table(toy_run.out)
    same_bits(toy_run, copied)
    assert any((copied / "corrupt").iterdir()), "the damaged artifact is kept for whoever wants to know"


def reads(stages, stage, kind):
    return any(stages[name].kind == kind for name in stage.inputs())


def first(stages, kind):
    return next(name for name, stage in stages.items() if stage.kind == kind)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_manifest_is_an_artifact_that_is_missing(toy_run, copied, tmp_path):
    probe = first(toy_run.session.plan.stages, "probe")
    (place(copied, probe) / "manifest.json").write_text("{")
    events = Events()
    run(toy_run.suite, copied, tmp_path / "out", events)
    assert events.labels("done") == [toy_run.session.plan.stages[probe].label]
    assert table(tmp_path / "out") == table(toy_run.out)


def test_a_disk_that_is_full_at_a_checkpoint_is_one_sentence_and_costs_no_progress(
    toy_run, copied, tmp_path, monkeypatch
):
    mapping = {**toy_run.suite, **OFTEN}
    state = first(toy_run.session.plan.stages, "state")
    forget(copied, toy_run.session.plan.stages, state)
    save, count = Learner.save, iter(range(100))

    def full(self, path, extra):
        if next(count) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path, extra)

    monkeypatch.setattr(Learner, "save", full)
    found = session(mapping, copied)
    with pytest.raises(StoreError, match=r"is on a full disk; free space there or choose another with --store DIR$"):
        walk_of(found, Events()).run()
    assert found.store.failure(state) is None, "the stage is not at fault"
    events = Events()
    run(mapping, copied, tmp_path / "out", events)
    assert events.texts()[0].endswith("warmup seed 0: going on at step 1 of 2")
    assert table(tmp_path / "out") == table(toy_run.out)
    same_bits(toy_run, copied)


def test_an_unreadable_checkpoint_costs_time_but_no_bits(toy_run, copied, tmp_path):
    stages = toy_run.session.plan.stages
    expert = next(s for s in stages.values() if s.kind == "student" and "start" in s.needs)
    forget(copied, stages, expert.identity)
    (copied / "work" / expert.identity).mkdir(parents=True)
    (copied / "work" / expert.identity / "checkpoint.safetensors").write_bytes(b"\0" * 100)
    events = Events()
    run(toy_run.suite, copied, tmp_path / "out", events)
    assert any(expert.label in text and "the checkpoint is damaged" in text for text in events.texts())
    same_bits(toy_run, copied)
