"""The displays of a running suite, trackers, and what keeps one from harming the other."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from o2mkd_bench import hookimpl
from o2mkd_bench.cli.observers import Trackers, together
from o2mkd_bench.cli.progress import LiveProgress, PlainProgress, Progress, display, duration
from o2mkd_bench.core.errors import PluginError, UserError
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.plugins import Registry
from o2mkd_bench.core.quiet import quiet
from o2mkd_plugins.trackers.jsonl import JsonLines
from o2mkd_plugins.trackers.options import JsonLinesOptions


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def tell(show: Progress, clock: Clock) -> None:
    """A run of two stages, one of which fails."""
    show(Event("plan", data={"stages": 2, "reused": 3}))
    show(Event("start", "a", "student half"))
    for step in (10, 20, 30):
        clock.now += 6
        data = {"done": step, "total": 60, "images": step * 100, "loss": 1 / step, "seconds": clock.now}
        show(Event("progress", "a", "student half", data))
    clock.now += 6
    show(Event("done", "a", "student half"))
    show(Event("start", "b", "samples half"))
    show(Event("failed", "b", "samples half", {"reason": "out of [memory]", "category": "memory"}))
    show(Event("log", "b", "nobody looks at these"))


def test_plain_lines_say_start_end_failure_and_now_and_then_how_far(clock: Clock) -> None:
    stream = io.StringIO()
    with PlainProgress(stream, clock) as show:
        tell(show, clock)
    assert stream.getvalue().splitlines() == [
        "2 stages to make, 3 in the store",
        "[1/2] student half",
        "[1/2] student half: 33%, loss 0.05, 167 images/s, 24 s left",
        "[1/2] student half: done in 24 s",
        "[2/2] samples half",
        "[2/2] samples half: FAILED: out of [memory]",
    ]
    assert show.summary() == "made 1 stage in 24 s, 3 were in the store, 1 failed"


def test_a_run_that_plans_again_goes_on_counting(clock: Clock) -> None:
    stream = io.StringIO()
    show = PlainProgress(stream, clock)
    for stages, reused, label in ((1, 0, "edges"), (2, 3, "student")):
        show(Event("plan", data={"stages": stages, "reused": reused}))
        show(Event("start", label, label))
        show(Event("done", label, label))
    assert stream.getvalue().splitlines() == [
        "1 stage to make, 0 in the store",
        "[1/1] edges",
        "[1/1] edges: done in 0.0 s",
        "2 stages to make, 3 in the store",
        "[2/3] student",
        "[2/3] student: done in 0.0 s",
    ]
    assert show.summary() == "made 2 stages in 0.0 s, 3 were in the store"


def test_images_count_as_progress_where_nothing_is_trained(clock: Clock) -> None:
    show = PlainProgress(io.StringIO(), clock)
    show(Event("start", "a", "samples"))
    assert show.running[0].pace() == ""
    show(Event("progress", "a", "samples", {"done": 500, "total": 2000}))
    clock.now = 5
    show(Event("progress", "a", "samples", {"done": 1000, "total": 2000}))
    assert show.running[0].pace() == "100 images/s, 10 s left"


def test_a_stage_made_anew_within_another_keeps_both(clock: Clock) -> None:
    stream = io.StringIO()
    show = PlainProgress(stream, clock)
    show(Event("progress", "x", "x", {"done": 1, "total": 2}))
    show(Event("plan", data={"stages": 1, "reused": 0}))
    show(Event("start", "a", "samples"))
    show(Event("message", "b", "student", {"text": "student is damaged; making it anew"}))
    show(Event("start", "b", "student"))
    clock.now = 2
    show(Event("done", "b", "student"))
    assert [running.label for running in show.running] == ["samples"]
    clock.now = 3
    show(Event("done", "a", "samples"))
    show(Event("done", "a", "samples"))
    show(Event("reused", "c", "score"))
    assert "student is damaged; making it anew" in stream.getvalue()
    assert "[2/2] samples: done in 3.0 s" in stream.getvalue()
    assert (show.number, show.total, show.reused) == (3, 3, 1)


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_display_fits_its_terminal_and_leaves_only_failures(clock: Clock, width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)

    def drawn() -> list[str]:
        page = Console(file=io.StringIO(), width=width)
        page.print(show)
        assert isinstance(page.file, io.StringIO)
        return page.file.getvalue().rstrip("\n").split("\n")

    with LiveProgress(console, clock) as show:
        assert "reading the store" in drawn()[0]
        show(Event("plan", data={"stages": 24, "reused": 0}))
        show(Event("start", "a", "digits/half/output/o2mkd expert-0 seed 0 " + "long " * 40))
        clock.now = 2
        first, second = drawn()
        assert first.startswith("[ 1/24] digits/half")
        assert len(first) <= width
        assert second.strip() == "2.0 s"
        for step in (10, 30):
            clock.now += 2
            show(Event("progress", "a", "x", {"done": step, "total": 60, "images": step, "loss": 0.5}))
        first, second = drawn()
        assert first.rstrip().endswith("…")
        assert second.rstrip().endswith(" 50%  loss 0.5, 10 images/s, 3.0 s left")
        assert len(second) <= width
        show(Event("failed", "a", "digits", {"reason": "the loss is nan [nan]", "category": "diverged"}))
        assert "writing the tables" in drawn()[0]
    assert "digits: FAILED: the loss is nan [nan]" in stream.getvalue()


def test_the_display_fits_the_stream() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(display(io.StringIO()), PlainProgress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        assert isinstance(display(Terminal()), LiveProgress)
        patch.setenv("TERM", "dumb")
        assert isinstance(display(Terminal()), PlainProgress)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- trackers ------------------------------------------------------------------------------------------------------


class Recorder:
    """Fails where its class attribute says so."""

    fails_at = ""
    told: list[str]

    def __init__(self, options: Any, out: Path) -> None:
        if self.fails_at == "open":
            raise OSError("no network")
        type(self).told = []

    def __call__(self, event: Event) -> None:
        self.told.append(event.kind)
        if self.fails_at == event.kind:
            raise ValueError("lost it")

    def close(self) -> None:
        self.told.append("close")
        if self.fails_at == "close":
            raise ValueError("lost it")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[Recorder]]:
    def make(fails_at: str) -> type[Recorder]:
        module = ModuleType("fake_trackers")
        kind = type("Failing", (Recorder,), {"fails_at": fails_at})
        module.Failing = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_trackers", module)
        return kind

    return make


@pytest.fixture
def trackers() -> Registry:
    module = ModuleType("declaring")
    module.api = 1  # type: ignore[attr-defined]

    def declare(register: Any) -> None:
        register("recorder", "fake_trackers:Failing")

    module.register_trackers = hookimpl(declare, specname="register_trackers")  # type: ignore[attr-defined]
    found = Registry()
    found.add(module, "acme", "1", "declaring")
    return found


@pytest.mark.parametrize(
    ("fails_at", "told"),
    [
        ("", ["start", "done", "close"]),
        ("start", ["start"]),
        ("close", ["start", "done", "close"]),
    ],
)
def test_a_tracker_that_raises_is_said_once_and_stops_nothing(
    trackers: Registry, recording: Callable[[str], type[Recorder]], tmp_path: Path, fails_at: str, told: list[str]
) -> None:
    kind, said, seen = recording(fails_at), [], []
    with Trackers(["recorder", "recorder"], tmp_path, trackers, said.append) as observers:
        tell = together(observers, seen.append)
        tell(Event("start", "a", "a"))
        tell(Event("done", "a", "a"))
    assert kind.told == told
    assert [event.kind for event in seen] == ["start", "done"]
    expected = "warning: tracker recorder failed and is told nothing more: ValueError: lost it"
    assert said == ([expected] if fails_at else [])


def test_a_tracker_that_cannot_be_opened_is_left_out(
    trackers: Registry, recording: Callable[[str], type[Recorder]], tmp_path: Path
) -> None:
    recording("open")
    said: list[str] = []
    with Trackers(["recorder"], tmp_path, trackers, said.append) as observers:
        observers(Event("start"))
    assert said == ["warning: tracker recorder failed and is told nothing more: OSError: no network"]


def test_a_tracker_has_the_options_that_it_is_given(
    trackers: Registry, recording: Callable[[str], type[Recorder]], tmp_path: Path
) -> None:
    recording("")
    with Trackers(["{recorder: {}}"], tmp_path, trackers, print):
        pass
    for text, expected in (
        ("{recorder: {prefix: x}}", r"^--tracker recorder: prefix: it has no such option \(options: none\)"),
        ("[recorder]", r"^--tracker \[recorder\]: write NAME, or \{NAME: \{OPTION: VALUE\}\}"),
        ("{a: {}, b: {}}", "write NAME"),
        ("{recorder: 3}", "write NAME"),
        ("{", "write NAME"),
    ):
        with pytest.raises(UserError, match=expected):
            Trackers([text], tmp_path, trackers, print)


def test_a_tracker_that_is_none_stops_nothing(
    trackers: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ModuleType("fake_trackers")
    module.Failing = lambda options, out: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_trackers", module)
    said: list[str] = []
    with Trackers(["recorder"], tmp_path, trackers, said.append) as observers:
        observers(Event("start"))
    assert said == [
        "warning: tracker recorder failed and is told nothing more: TypeError: 'object' object is not callable"
    ]
    said.clear()
    with Trackers(["recorder"], tmp_path, trackers, said.append):
        pass
    assert said[0].startswith("warning: tracker recorder failed and is told nothing more: AttributeError")


def test_an_unknown_tracker_stops_the_run_before_it_starts(trackers: Registry, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="did you mean 'recorder'"):
        Trackers(["recoder"], tmp_path, trackers, print)


def test_jsonl_appends_a_line_an_event_at_once(tmp_path: Path) -> None:
    for kind in ("start", "done"):
        tracker = JsonLines(JsonLinesOptions(), tmp_path / "out")
        tracker(Event(kind, "a1", "student ½", {"loss": 0.5}))  # type: ignore[arg-type]
        before_close = (tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8")
        assert before_close.endswith("\n")
        tracker.close()
    lines = [json.loads(line) for line in before_close.splitlines()]
    assert [line["kind"] for line in lines] == ["start", "done"]
    assert lines[0].keys() == {"time", "kind", "stage", "label", "loss"}
    assert lines[0]["label"] == "student ½"


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_other_packages_warnings_are_silenced_and_those_of_plugins_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")
    level = logging.getLogger("diffusers").level
    with warnings.catch_warnings(record=True) as caught:
        quiet()
        warnings.warn_explicit("noise", UserWarning, "x.py", 1, module="torch.nn")
        warnings.warn_explicit("a word", UserWarning, "y.py", 1, module="o2mkd_plugins.samplers.progressive")
    assert [str(warning.message) for warning in caught] == ["a word"]
    logging.getLogger("diffusers").setLevel(level)


def test_who_asks_for_warnings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        warnings.warn_explicit("noise", UserWarning, "x.py", 1, module="torch.nn")
    assert len(caught) == 1
