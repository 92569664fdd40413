"""The log of a run: what it holds, who may read it while it grows, and that it can never stop the run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import Events, run, session, suite

from o2mkd_bench.cli.watch import follow
from o2mkd_bench.core import runlog
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.runlog import Follower, RunLog, alive, runs
from o2mkd_bench.core.store import Store
from o2mkd_bench.runner import run_session

PLAN = Event("plan", data={"stages": 2, "reused": 0})
START, DONE = Event("start", "a", "häßlich"), Event("done", "a", "häßlich")
END = Event("end", data={"failed": 0, "made": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_event_is_a_line_and_everybody_is_told(store: Store) -> None:
    told = Events()
    with RunLog(store, "toy", told) as log:
        for event in (PLAN, START, DONE, END):
            log(event)
    assert told == [PLAN, START, DONE, END]
    (path,) = runs(store, "toy")
    head, *rest = lines(path)
    assert (head["kind"], head["suite"]) == ("run", "toy")
    assert [one["kind"] for one in rest] == ["plan", "start", "done", "end"]
    assert rest[1]["label"] == "häßlich"
    assert rest[0]["stages"] == 2
    assert runs(store, "other") == []


def test_progress_is_sparse(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with RunLog(store, "toy", Events()) as log:
        log(START)
        for number in range(10):
            now[0] = number / 2
            log(Event("progress", "a", "a", {"done": number, "total": 10}))
    found = lines(runs(store, "toy")[0])
    assert [one["done"] for one in found if one["kind"] == "progress"] == [0, 4, 8]


def test_a_run_without_work_leaves_nothing(store: Store) -> None:
    with RunLog(store, "toy", Events()) as log:
        log(PLAN)
        log(END)
    assert not store.root.exists()


def test_it_is_alive_while_it_is_open(store: Store) -> None:
    with RunLog(store, "toy", Events()) as log:
        log(START)
        (path,) = runs(store, "toy")
        assert alive(store, path)
        assert not store.gc(keep=set()).bytes
    assert not alive(store, path)
    size = path.stat().st_size
    assert store.gc(keep=set(), dry_run=True).bytes == size
    assert store.gc(keep=set()).bytes == size
    assert runs(store, "toy") == []
    assert not alive(store, path)


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(store: Store) -> None:
    store.root.mkdir()
    (store.root / "runs").write_text("in the way")
    told = Events()
    with RunLog(store, "toy", told) as log:
        log(START)
        log(DONE)
    assert [event.kind for event in told] == ["message", "start", "done"]
    assert "the log of this run cannot be written" in told.texts()[0]


def test_a_reader_sees_whole_lines_only(store: Store) -> None:
    with RunLog(store, "toy", Events()) as log:
        log(START)
        (path,) = runs(store, "toy")
        follower = Follower(path)
        before = time.time()
        assert [event.kind for _, event in follower.news()] == ["run", "start"]
        whole = json.dumps({"time": "2030-01-01T00:00:00+00:00", "kind": "done", "stage": "a", "label": "b", "x": 1})
        with path.open("a", encoding="utf-8") as file:
            file.write(whole[:20])
            file.flush()
            assert not list(follower.news())
            file.write(whole[20:] + "\n")
        ((moment, event),) = follower.news()
    assert moment > before
    assert event == Event("done", "a", "b", {"x": 1})


def test_a_run_keeps_one(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("o2mkd_bench.report.write.write", lambda *_: None)
    mapping = suite(probe={"enabled": False}, speed={"enabled": False}, metrics=[{"fid": {"network": "embedded"}}])
    run_session(session(mapping, tmp_path / "store"), tmp_path / "out", Events())
    (path,) = runs(Store(tmp_path / "store"), "toy")
    found = lines(path)
    assert {one["kind"] for one in found} >= {"run", "plan", "start", "progress", "done", "end"}
    assert sum(one["kind"] == "done" for one in found) == found[1]["stages"]
    # and one that has nothing to do, none
    run(mapping, tmp_path / "store", tmp_path / "out", Events())
    assert len(runs(Store(tmp_path / "store"), "toy")) == 1


# ---- watching ------------------------------------------------------------------------------------------------------


def watched(store: Store) -> Any:
    return SimpleNamespace(store=store, suite=SimpleNamespace(name="toy"))


def test_watching_shows_a_live_run_to_its_end(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(store, "toy", Events()) as log:
        log(PLAN)
        log(START)

        def finish() -> None:
            log(DONE)
            log(END)

        timer = threading.Timer(0.3, finish)
        timer.start()
        follow(watched(store))
        timer.join()
    text = capsys.readouterr().err
    assert "[1/2] häßlich\n" in text
    assert "[1/2] häßlich: done in" in text
    assert "made 1 stage in" in text


def test_watching_says_when_the_run_is_killed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(store, "toy", Events())
    log(START)
    timer = threading.Timer(0.3, log.__exit__, (None, None, None))
    timer.start()
    follow(watched(store))
    timer.join()
    assert "stopped before its end" in capsys.readouterr().err


def test_watching_nobody_is_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    follow(watched(store))
    assert "no run is at work on toy" in capsys.readouterr().err


def test_leaving_does_not_harm_the_run(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("o2mkd_bench.cli.watch.time.sleep", leave)
    with RunLog(store, "toy", Events()) as log:
        log(START)
        follow(watched(store))
        assert alive(store, runs(store, "toy")[0])
    assert "the run goes on" in capsys.readouterr().err
