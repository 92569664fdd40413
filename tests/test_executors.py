"""Executors: workers make what one process makes, share out what trains together, and leave nothing behind."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy import Events, run, session, suite, table

from o2mkd_bench.core.errors import PluginError, StoreError, UserError
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.executor import Executor, Outcome, Report, Site, Task
from o2mkd_bench.core.runlog import Follower, runs
from o2mkd_bench.core.store import Store
from o2mkd_bench.executors.choose import Placement, choose
from o2mkd_bench.executors.dispatch import Dispatch
from o2mkd_bench.executors.held import Held
from o2mkd_bench.executors.local import Local, LocalOptions
from o2mkd_bench.executors.queue import Queue
from o2mkd_bench.report.frame import write_csv
from o2mkd_bench.runner import Results, run_session
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.testing import ExecutorContract
from o2mkd_bench.testing.executors import Laboratory


class TestLocal(ExecutorContract):
    name = "local"
    options = {"workers": 2}  # noqa: RUF012 - a contract's attributes are never changed
    patience = 40.0


GRID = suite(wrappers=["single", {"o2mkd": {"students": 2}}])


def placed(mapping: dict[str, Any], folder: Path, events: Events, workers: int) -> Results:
    """A run through worker processes."""
    return placed_on(mapping, folder, events, Placement(options={"workers": workers}))


def placed_on(mapping: dict[str, Any], folder: Path, events: Events, placement: Placement) -> Results:
    """A run through an executor."""
    return run_session(session(mapping, folder / "store"), folder / "out", events, placement=placement)


def artifacts(store: Path) -> dict[str, str]:
    """The hash of every file, less what a clock decides."""
    found = {}
    for manifest in Store(store).ls():
        if manifest.kind != "speed":
            found |= {f"{manifest.identity}/{name}": file.sha256 for name, file in manifest.files.items()}
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the grid."""
    folder = tmp_path_factory.mktemp("plain")
    run(GRID, folder / "store", folder / "out", Events())
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all of the training."""
    monkeypatch.setattr("o2mkd_bench.report.write.write", lambda found, out, pictures: write_csv_in(found, out))


def write_csv_in(found: Any, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_csv(found, out / "results.csv")


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_those_of_one_process(plain: Path, tmp_path: Path, workers: int) -> None:
    events = Events()
    results = placed(GRID, tmp_path, events, workers)
    assert results.failed == 0
    assert table(tmp_path / "out") == table(plain / "out")
    assert artifacts(tmp_path / "store") == artifacts(plain / "store")
    began = Counter(event.stage for event in events if event.kind == "start")
    assert set(began.values()) == {1}
    assert sum(began.values()) == events[0].data["stages"]
    # a speed is read when nothing else runs
    running: set[str] = set()
    for event in events:
        if event.kind == "start":
            assert not running or not any(label.startswith("speed") for label in (*running, event.label))
            running.add(event.label)
        elif event.kind == "done":
            running.remove(event.label)


def test_a_worker_killed_in_training_goes_on_from_its_checkpoint(plain: Path, tmp_path: Path) -> None:
    """Its company is trained apart after, and ends with the same bits."""
    long = {**GRID, "checkpoint_every": 1e-9, "budgets": [256]}
    events = Events()
    pids: list[int] = []

    def kill(event: Event) -> None:
        # told after the first step's checkpoint
        if event.kind == "progress" and "single seed 0" in event.label and event.data["done"] == 2 and not pids:
            (pid,) = [pid for pid in workers_of(os.getpid()) if has_lock(pid, event.stage)]
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)

    events.until = kill
    results = placed(long, tmp_path, events, 2)
    assert pids
    assert results.failed == 0
    assert any("was ended by SIGKILL" in text and "trying once more" in text for text in events.texts())
    assert any("going on at step" in text for text in events.texts())
    assert artifacts(tmp_path / "store") == artifacts(plain / "store")


def workers_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def has_lock(pid: int, stage: str) -> bool:
    found = []
    # it, or a file of it, may be gone meanwhile
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            found.append(os.readlink(link))
    return any(link.endswith(f"{stage}.lock") for link in found)


def test_an_interrupted_run_keeps_checkpoints_and_goes_on(plain: Path, tmp_path: Path) -> None:
    """No checkpoint is due before the interrupt: the one that is gone on from is the interrupt's own."""
    slow = {**GRID, "checkpoint_every": 3600.0}
    events = Events()

    def stop(event: Event) -> None:
        if event.kind == "progress" and "single seed 0" in event.label and event.data["done"] >= 3:
            raise KeyboardInterrupt

    events.until = stop
    with pytest.raises(KeyboardInterrupt):
        placed(slow, tmp_path, events, 2)
    assert not workers_of(os.getpid())
    again = Events()
    assert placed(slow, tmp_path, again, 2).failed == 0
    assert artifacts(tmp_path / "store") == artifacts(plain / "store")


def test_a_store_that_cannot_be_written_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(StoreError, match="is not a folder"):
        placed(GRID, tmp_path, Events(), 2)


def local(site: Site) -> Local:
    return Local(LocalOptions(workers=2), site)


def test_stages_another_process_is_at_are_waited_for(tmp_path: Path) -> None:
    """The lock is let go when all the rest is made, and the worker has come back empty-handed."""
    laboratory = Laboratory(tmp_path)
    first, other = laboratory.stage(0), laboratory.stage(1)
    held = laboratory.store.try_lock(first.identity)
    assert held is not None

    def let_go(event: Event) -> None:
        if event.kind == "done" and event.stage == other.identity:
            threading.Timer(2.0, held.__exit__, (None, None, None)).start()

    laboratory.until = let_go
    walk = laboratory.run(local)
    assert walk.made == [other.identity, first.identity]


def test_a_worker_says_what_plugins_warn_of_and_nothing_of_other_packages(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    laboratory = Laboratory(tmp_path)
    laboratory.stage(1, "warn")
    laboratory.run(local)
    told = capfd.readouterr().err
    assert "UserWarning: a word" in told
    assert "noise" not in told


def test_a_mistake_of_ours_in_a_worker_loses_its_task_in_words(tmp_path: Path) -> None:
    with closing(local(Site(tmp_path / "store", "cpu", path=tuple(sys.path)))) as executor:
        assert executor.place(Task(7, ("nobody",), ()))
        reports: list[Report] = []
        while not reports:
            reports += executor.wait(1.0)
        assert reports == [Report(7, lost="met KeyError: 'nobody'")]
        # and the worker goes on
        assert executor.place(Task(8, (), ()))
        while len(reports) == 1:
            reports += executor.wait(1.0)
        assert reports[1] == Report(8, outcome=Outcome())


# ---- which students go where ---------------------------------------------------------------------------------------


class Recorder(Executor):
    """Has slots and runs nothing; each task is made, in word alone, when it is waited for."""

    def __init__(self, slots: int) -> None:
        self.tasks: list[Task] = []
        self._open: list[Task] = []
        self._slots = slots

    @property
    def slots(self) -> int:
        return self._slots

    def place(self, task: Task) -> bool:
        if len(self._open) == self._slots or (task.alone and self._open):
            return False
        self.tasks.append(task)
        self._open.append(task)
        return True

    def wait(self, seconds: float) -> list[Report]:
        found = []
        for task in self._open:
            found += [Report(task.number, event=Event("done", name)) for name in task.names]
            found.append(Report(task.number, outcome=Outcome()))
        self._open.clear()
        return found

    def end(self, number: int) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def trained_together(mapping: dict[str, Any], store: Path, slots: int) -> list[list[str]]:
    found = session(mapping, store)
    executor = Recorder(slots)
    walk_ = Dispatch(found.plan, Bench(found.store, "cpu", Events(), found.registry), executor=executor)
    walk_.run()
    labels = {name: stage.label.removeprefix("digits/half/output/") for name, stage in found.plan.stages.items()}
    kinds = {name: stage.kind for name, stage in found.plan.stages.items()}
    return [
        [labels[name] for name in task.names] for task in executor.tasks if kinds[task.names[0]] in ("student", "state")
    ]


ONE_SEED = suite(wrappers=["single", {"o2mkd": {"students": 4}}], training={"batch": 32, "lr": 1e-3, "group": 4})


def test_one_slot_trains_all_of_a_stream_on_one_pass(tmp_path: Path) -> None:
    crews = trained_together(ONE_SEED, tmp_path, 1)
    assert [len(crew) for crew in crews] == [6]


def test_experts_are_spread_over_the_slots(tmp_path: Path) -> None:
    crews = trained_together(ONE_SEED, tmp_path, 4)
    experts = [crew for crew in crews if "expert" in crew[0]]
    assert [len(crew) for crew in experts] == [1, 1, 1, 1]
    crews = trained_together(ONE_SEED, tmp_path, 2)
    assert [len(crew) for crew in crews if "expert" in crew[0]] == [2, 2]


def test_streams_that_fill_the_slots_stay_whole(tmp_path: Path) -> None:
    crews = trained_together({**ONE_SEED, "seeds": [0, 1]}, tmp_path, 2)
    assert [len(crew) for crew in crews] == [6, 6]
    assert all(len({label[-1] for label in crew}) == 1 for crew in crews)


def test_rows_are_finished_before_more_is_trained(tmp_path: Path) -> None:
    """So that a run that is cut leaves rows."""
    plan = session(suite(wrappers=[{"o2mkd": {"students": 4}}, "single"]), tmp_path).plan
    queue = Queue(list(plan.stages.values()), lambda stage: ())
    for stage in plan.stages.values():
        if stage.kind in ("data", "teacher", "state") or stage.label.endswith("single seed 0"):
            queue.settle(stage.identity)
    kinds = [stage.kind for stage in queue.ready()]
    assert kinds == ["reference", "samples", "samples", *["student"] * 4, *["speed"] * 3]


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("place", lambda self, task: None, r"place\(\) of executor Bad gives None; make it True or False"),
        ("place", lambda self, task: 1 / 0, r"place\(\) of executor Bad failed: ZeroDivisionError"),
        ("wait", lambda self, seconds: None, r"wait\(\) of executor Bad gives None; make it a list of Report"),
        ("wait", lambda self, seconds: [(0, 1)], r"wait\(\) of executor Bad gives \[\(0, 1\)\]"),
        (
            "wait",
            lambda self, seconds: [Report(0, outcome={})],
            r"gives \[Report.*; make it a list of Report, with an Ou",
        ),
        ("slots", lambda self: 2, "slots of executor Bad gives .*; make it a property that is an int above 0"),
        ("slots", property(lambda self: 0), "slots of executor Bad gives 0"),
    ],
)
def test_an_executor_is_held_to_its_contract(tmp_path: Path, method: str, given: Any, told: str) -> None:
    bad = type("Bad", (Recorder,), {method: given})(1)
    found = session(ONE_SEED, tmp_path)
    walk_ = Dispatch(found.plan, Bench(found.store, "cpu", Events(), found.registry), executor=Held(bad))
    with pytest.raises(PluginError, match=told):
        walk_.run()


@pytest.mark.parametrize("kind", ["mute", "confused"])
def test_an_executor_that_tells_too_little_stops_nobody_for_ever(tmp_path: Path, kind: str) -> None:
    class Mute(Recorder):
        def wait(self, seconds: float) -> list[Report]:
            return [report for report in super().wait(seconds) if report.event is None]

    class Confused(Recorder):
        def wait(self, seconds: float) -> list[Report]:
            return [replace(report, task=report.task + 100) for report in super().wait(seconds)]

    found = session(ONE_SEED, tmp_path)
    executor = {"mute": Mute, "confused": Confused}[kind](1)
    walk_ = Dispatch(found.plan, Bench(found.store, "cpu", Events(), found.registry), executor=executor)
    if kind == "confused":
        with pytest.raises(PluginError, match="the executor reports of task 100, which it was never given"):
            walk_.run()
        return
    walk_.run()
    assert "its executor never said how it ended; correct the plugin" in walk_.failed.values()
    assert walk_.failed.keys() == found.plan.stages.keys()


class Moody(Recorder):
    """Hangs with all that train together, and dies the first time that one of these is tried alone."""

    def __init__(self) -> None:
        super().__init__(1)
        self.now = 0.0
        self._ended: set[int] = set()
        self._together: set[str] = set()
        self._died: set[str] = set()

    def wait(self, seconds: float) -> list[Report]:
        self.now += 1.0
        (task,) = self._open
        if len(task.names) > 1:
            self._together.update(task.names)
            if task.number not in self._ended:
                return [Report(task.number, event=Event("start", task.names[0]))]
        elif task.names[0] not in self._together - self._died:
            return super().wait(seconds)
        self._died.update(task.names if len(task.names) == 1 else ())
        self._open.clear()
        return [Report(task.number, lost="was ended by SIGKILL")]

    def end(self, number: int) -> None:
        self._ended.add(number)


def test_who_was_ended_with_others_may_still_die_once(tmp_path: Path) -> None:
    found, executor = session(ONE_SEED, tmp_path), Moody()
    bench = Bench(found.store, "cpu", Events(), found.registry)
    walk = Dispatch(found.plan, bench, executor=executor, limit=3.0, clock=lambda: executor.now)
    walk.run()
    assert len(executor._died) == 6
    assert not walk.failed


# ---- which executor a run has --------------------------------------------------------------------------------------


def test_one_device_and_no_wish_is_this_process(tmp_path: Path) -> None:
    assert choose(session(GRID, tmp_path), Placement(), False) is None


@pytest.mark.parametrize(
    ("mapping", "placement", "slots"),
    [
        (GRID, Placement(options={"workers": 3}), 3),
        ({**GRID, "time_limit": 5.0}, Placement(), 1),
    ],
)
def test_a_wish_is_worker_processes(tmp_path: Path, mapping: dict[str, Any], placement: Placement, slots: int) -> None:
    executor = choose(session(mapping, tmp_path), placement, False)
    assert isinstance(executor, Held)
    assert isinstance(executor.executor, Local)
    assert executor.slots == slots


def test_several_gpus_are_a_worker_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("o2mkd_bench.executors.choose.gpus_like", lambda device: ("GPU-a", "GPU-b"))
    found = session(GRID, tmp_path)
    executor = choose(found, Placement(), False)
    assert executor is not None
    assert executor.slots == 2
    shared = choose(found, Placement(options={"workers": 5}), False)
    assert isinstance(shared, Held)
    assert isinstance(shared.executor, Local)
    assert [slot.gpu[-1] for slot in shared.executor._slots] == ["a", "b", "a", "b", "a"]


def test_workers_that_crowd_the_cores_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("o2mkd_bench.executors.local.cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    site = Site(tmp_path, "cpu")
    said = Local(LocalOptions(workers=2), site).hint
    assert said.startswith("2 workers of 4 threads share 4 cores; OMP_NUM_THREADS=2 would")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not Local(LocalOptions(workers=2), site).hint
    assert not Local(LocalOptions(workers=9), Site(tmp_path, "cuda:0", ("GPU-a",))).hint


@pytest.mark.parametrize(("asked", "given"), [(None, "4"), ("2", "2")])
def test_workers_that_share_gpus_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, given: str
) -> None:
    monkeypatch.setattr("o2mkd_bench.executors.local.cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    seen: list[dict[str, str]] = []
    start = subprocess.Popen

    def started(*args: Any, env: dict[str, str], **more: Any) -> Any:
        seen.append(env)
        return start([sys.executable, "-c", ""], **more)

    monkeypatch.setattr("o2mkd_bench.executors.local.subprocess.Popen", started)
    with closing(Local(LocalOptions(workers=4), Site(tmp_path, "cuda:0", ("GPU-a", "GPU-b")))) as local:
        assert local.place(Task(0, (), (), alone=False))
    assert [(env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]) for env in seen] == [("GPU-a", given)]


def test_an_option_the_executor_lacks_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"local: wrkers: it has no such option; did .*\? \(options: workers\)"):
        choose(session(GRID, tmp_path), Placement(options={"wrkers": 2}), False)
    with pytest.raises(UserError, match=r"local: workers: expected a whole number, got 'two' \(options: workers\)"):
        choose(session(GRID, tmp_path), Placement(options={"workers": "two"}), False)


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "from o2mkd_bench.cli import main; main()"]


@contextmanager
def started(words: list[str], folder: Path, *more: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a process that is gone after, also where a test fails."""
    path = os.pathsep.join([*map(str, more), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with subprocess.Popen([*COMMAND, *words], cwd=folder, env=environment, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    told = []
    for said in process.stderr:
        told.append(said)
        if text in said:
            return
    raise AssertionError(f"it ended before it said {text!r}: {told}")


def wait_for(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def trained(folder: Path) -> bool:
    """Whether the one student of a run has made a step."""
    store = Store(folder / ".o2mkd" / "store")
    told = [event for log in runs(store, "toy") for _, event in Follower(log).news()]
    return any(event.kind == "progress" and "single seed 0" in event.label for event in told)


def write_long(folder: Path) -> list[str]:
    """The words of a run that goes on for hours and keeps no checkpoint unless it is interrupted."""
    long = {**GRID, "budgets": [10_000_000], "checkpoint_every": 3600.0}
    (folder / "long.yaml").write_text(yaml.safe_dump(long), encoding="utf-8")
    return ["run", "long.yaml", "--only", "wrapper=single"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(tmp_path: Path, workers: list[str], number: int) -> None:
    with started([*write_long(tmp_path), *workers], tmp_path) as process:
        until(process, "single seed 0")
        wait_for(lambda: trained(tmp_path))
        children = workers_of(process.pid)
        if number == signal.SIGTERM:
            # as a scheduler does, which tells every process of a job
            for child in children:
                os.kill(child, number)
            time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (out, err.splitlines()[-1]) == ("", "interrupted; the same command goes on where it stopped")
    assert bool(children) == bool(workers)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert list((tmp_path / ".o2mkd" / "store" / "work").glob("*/checkpoint.safetensors"))
    assert not list((tmp_path / ".o2mkd" / "store" / "tmp").iterdir())


def test_a_closed_terminal_costs_no_checkpoint(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    terminal: dict[str, Any] = {
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        "start_new_session": True,
        "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    }
    with started(write_long(tmp_path), tmp_path, **terminal) as process:
        os.close(theirs)
        told = b""
        while b"single seed 0" not in told:
            told += os.read(ours, 1 << 16)
        wait_for(lambda: bool(os.read(ours, 1 << 16)) and trained(tmp_path))
        os.close(ours)
        # the shell tells it too
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP
    assert list((tmp_path / ".o2mkd" / "store" / "work").glob("*/checkpoint.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: int) -> None:
    laboratory = Laboratory(tmp_path)
    other = {
        "datasets": [{"laboratory": {"number": 0, "deed": "deaf"}}],
        "metrics": [{"fid": {"network": "inception"}}],
    }
    mapping = {**GRID, **other}
    (tmp_path / "deaf.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    with started(["run", "deaf.yaml", "--workers", "1"], tmp_path, laboratory.site) as process:
        until(process, "data laboratory")
        wait_for((tmp_path / "tried-0").exists)
        # it is deaf a moment after
        time.sleep(0.5)
        (child,) = workers_of(process.pid)
        process.send_signal(number)
        time.sleep(2.0)
        assert process.poll() is None, "the first one lets workers keep what they have"
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    wait_for(lambda: not Path(f"/proc/{child}").exists())
