"""Students that train together: who, that each ends as it would alone, and what becomes of those that fail."""

import itertools
import math

import pytest
import torch
from toy import Events, session, suite, walk_of

from o2mkd_bench.core.cohorts import gather, stream_of
from o2mkd_bench.core.errors import CorruptArtifact, StageFailed, UserError
from o2mkd_bench.core.plan import Cell, Plan, Stage
from o2mkd_bench.core.store import Store
from o2mkd_bench.engine.distil import Distil
from o2mkd_bench.engine.loop import Member
from o2mkd_bench.stages import cohort, train

GRID = {
    "methods": ["output", "none"],
    "wrappers": ["single", {"o2mkd": {"students": 2}}],
    "budgets": [128],
}
STEPS = 4
WIDTHS = [{"name": "half", "width": 0.5}, {"name": "full", "width": 1.0}]
KINDS = ("state", "student")


def trainings(found):
    return [stage for stage in found.plan.stages.values() if stage.kind in KINDS]


class Grid:
    """A suite of which only the trainings are made, from a teacher that is there."""

    def __init__(self, toy_run, folder, **changes):
        self.found = session(suite(**{**GRID, **changes}), folder)
        self.store, self.stages = self.found.store, trainings(self.found)
        for stage in self.found.plan.stages.values():
            if stage.kind in ("data", "teacher"):
                place = self.store._place(stage.identity)
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    place.symlink_to(Store(toy_run.store)._place(stage.identity))

    def run(self, until=lambda event: None, fail_fast=False):
        self.events = Events(until)
        self.walk = walk_of(self.found, self.events, fail_fast)
        students = [stage.identity for stage in self.stages if stage.kind == "student"]
        cells = [Cell({"dataset": "digits"}, "student", name, samples=name) for name in students]
        self.walk.plan = Plan(self.found.plan.stages, cells)
        self.walk.run()
        return self

    def files(self):
        """What every training left, without what a clock decides."""
        return {s.label: self.store.manifest(s.identity).files for s in self.stages if self.store.has(s.identity)}

    def shared(self):
        return {s.label: self.store.manifest(s.identity).meta["shared_with"] for s in self.stages}

    def stage(self, part):
        (found,) = [stage for stage in self.stages if part in stage.label]
        return found


@pytest.fixture(scope="module", autouse=True)
def no_counting():
    """Counting operations takes longer than these trainings, and is in no file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "cost", lambda bench, about: {})
        yield


@pytest.fixture(scope="module")
def alone(toy_run, tmp_path_factory):
    return Grid(toy_run, tmp_path_factory.mktemp("alone"), cohort=1).run()


@pytest.fixture
def grid(toy_run, tmp_path):
    return lambda **changes: Grid(toy_run, tmp_path / "store", **changes)


def told(label):
    return f"digits/{label} seed 0"


# --- who


def test_students_of_one_stream_fuse_and_experts_join(grid):
    found = grid()
    first, *others = found.stages
    assert len(found.stages) == 8
    assert gather(first, [first, *others], lambda name: name not in {s.identity for s in found.stages}) == others


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 5), ("flip", True), ("precision", "bf16"), ("training", {"group": 8})],
)
def test_what_differs_in_the_stream_trains_apart(grid, key, value):
    one = grid().stages[0]
    other = Stage.make(one.kind, "other", {**one.spec, key: value}, one.needs)
    assert stream_of(other) != stream_of(one)
    assert gather(one, [other], lambda name: True) == []
    free = Stage.make(one.kind, "other", {**one.spec, "training": {**one.spec["training"], "lr": 9}}, one.needs)
    assert gather(one, [free], lambda name: True) == [free]


def test_a_job_with_a_stream_of_its_own_trains_apart():
    def stage(**job):
        spec = {"seed": 0, "flip": False, "precision": "fp32", "training": {}, "network": {"schedule": {}}}
        job = {"batch": 8, "law": {}, **job}
        return Stage.make("student", str(job), {**spec, "job": job}, {"data": ("data",)})

    plain, normalised, first, second = stage(), stage(normalise=[5]), stage(stream=1), stage(stream=2)
    twin = stage(stream=1, steps=3)
    queue = [plain, normalised, first, second, twin]
    assert gather(plain, queue, lambda name: True) == [normalised]
    assert gather(first, queue, lambda name: True) == [twin]


def test_two_teachers_do_not_fuse_and_a_student_without_one_joins_either(grid):
    found = grid(wrappers=["single"])
    taught, free = found.stages
    assert "teacher" not in free.needs
    other = Stage.make("student", "other", taught.spec, {**taught.needs, "teacher": ("other",)})
    assert gather(taught, [other, free], lambda name: True) == [free]
    assert gather(free, [other, taught], lambda name: True) == [other]


def test_what_an_input_is_missing_for_is_left_out(grid):
    found = grid()
    warm, expert = found.stage("half/output/o2mkd warmup"), found.stage("half/output/o2mkd expert-0")
    missing = {expert.needs["start"][0]}
    single = found.stages[0]
    assert gather(single, [expert], lambda name: name not in missing) == []
    assert gather(single, [warm, expert], lambda name: name not in missing) == [warm, expert]
    assert gather(warm, [expert], lambda name: name not in missing) == [expert]
    teacher = next(s for s in found.found.plan.stages.values() if s.kind == "teacher")
    assert gather(teacher, [warm], lambda name: True) == []


# --- alone and together


def test_alone_nothing_is_shared(alone):
    assert set(alone.shared().values()) == {0}
    assert alone.events.labels("start") == alone.events.labels("done") == [stage.label for stage in alone.stages]


def test_together_every_student_is_byte_for_byte_what_it_is_alone(toy_run, tmp_path, grid):
    apart = Grid(toy_run, tmp_path / "apart", students=WIDTHS, cohort=1).run()
    together = grid(students=WIDTHS).run()
    assert len(together.stages) == 16
    assert together.files() == apart.files()
    assert set(together.files()[told("half/output/single")]) == {
        "ema.safetensors", "raw.safetensors", "log.json", "network.json"
    }  # fmt: skip
    shared = together.shared()
    assert {shared[s.label] for s in together.stages if s.kind == "student"} == {11}, "four singles, eight experts"
    assert {shared[s.label] for s in together.stages if s.kind == "state"} == {7}
    assert sorted(together.events.labels("done")) == sorted(apart.events.labels("done"))
    assert together.events.labels("start")[:8] == [
        stage.label for stage in together.stages if "expert" not in stage.label
    ]
    assert not together.walk.failed


def test_one_pass_of_the_teacher_a_step_feeds_the_whole_grid(grid, monkeypatch):
    seen, teacher_of = [], train.teacher_of

    def counted(stage, bench):
        teacher = teacher_of(stage, bench)
        teacher.call.network.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
        return teacher

    monkeypatch.setattr(cohort, "teacher_of", counted)
    grid(methods=["output", "relation"]).run()
    assert [size for size in seen if size > 1] == [32] * STEPS, "all but the dry runs that ask for shapes"


@pytest.mark.parametrize("kill", [("warmup", 1), ("expert-1", 2), ("expert-0", 5)])
def test_a_cohort_that_is_killed_ends_as_one_that_was_not(alone, grid, kill):
    part, number = kill
    count = itertools.count(1)

    def until(event):
        if event.kind == "progress" and part in event.label and next(count) == number:
            raise KeyboardInterrupt

    found = grid(checkpoint_every=1e-6)
    with pytest.raises(KeyboardInterrupt):
        found.run(until)
    assert len(found.files()) < len(found.stages)
    found.run()
    assert any("going on at step" in text for text in found.events.texts())
    assert found.files() == alone.files()
    work = found.store.root / "work"
    assert not any(work.iterdir())


@pytest.mark.parametrize("most", [2, 3])
def test_no_more_train_at_once_than_the_suite_says(alone, grid, most):
    found = grid(cohort=most).run()
    assert max(found.shared().values()) == most - 1
    assert found.files() == alone.files()


def test_memory_decides_how_many_train_at_once(alone, grid, monkeypatch):
    sizes = {s.label: _parameters(alone, s) for s in alone.stages}
    room = 2 * cohort.BYTES_PER_PARAMETER * max(sizes.values())
    monkeypatch.setattr(cohort, "free_memory", lambda device: room / cohort.SHARE)
    found = grid().run()
    assert max(found.shared().values()) == 1
    assert found.files() == alone.files()


def _parameters(found, stage):
    path = found.store.read(stage.identity, "state.safetensors" if stage.kind == "state" else "raw.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = [key for key in file.keys() if stage.kind == "student" or key.startswith("net/")]  # noqa: SIM118
        return sum(file.get_tensor(key).numel() for key in names)


def test_free_memory_is_said_in_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert cohort.free_memory("cuda:0") == 7
    monkeypatch.setattr(cohort, "MEMINFO", tmp_path / "meminfo")
    assert cohort.free_memory("cpu") == math.inf
    cohort.MEMINFO.write_text("MemTotal:  30 kB\nMemAvailable:      20 kB\n", encoding="ascii")
    assert cohort.free_memory("cpu") == 20 * 1024
    cohort.MEMINFO.write_text("nothing here\n", encoding="ascii")
    assert cohort.free_memory("cpu") == math.inf


@pytest.mark.parametrize(
    "error", [RuntimeError("No CUDA GPUs are available"), AssertionError("Torch not compiled with CUDA enabled")]
)
def test_a_gpu_that_torch_cannot_use_is_one_clear_sentence(error, monkeypatch):
    def refuse(device):
        raise error

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    with pytest.raises(UserError, match=rf"device 'cuda:1' .* cannot use it \(.*{error}\); .* --device cpu"):
        cohort.free_memory("cuda:1")


# --- those that leave


def failing(monkeypatch, error, at):
    """``Distil.loss`` raises once, at its call number ``at``; gives back whose call it was."""
    calls, loss, hit = itertools.count(), Distil.loss, []

    def broken(self, view, rows, step, part=0):
        if next(calls) == at:
            hit.append(self)
            raise error
        return loss(self, view, rows, step, part)

    monkeypatch.setattr(Distil, "loss", broken)
    return hit


def test_a_student_that_fails_leaves_the_others_as_they_are(alone, grid, monkeypatch):
    failing(monkeypatch, RuntimeError("a method's mistake"), 1)
    found = grid().run()
    warm = found.stage("half/output/o2mkd warmup")
    assert found.walk.failed[warm.identity].startswith("RuntimeError: a method's mistake (test_cohorts.py:")
    assert found.store.failure(warm.identity)["category"] == "error"
    lost = {warm.label, told("half/output/o2mkd expert-0"), told("half/output/o2mkd expert-1")}
    assert found.files() == {label: files for label, files in alone.files().items() if label not in lost}
    expert = found.stage("half/output/o2mkd expert-0")
    assert found.walk.failed[expert.identity] == f"needs {warm.label}, which failed"
    again = found.run()
    assert again.files() == alone.files()


def test_fail_fast_stops_the_others_where_they_are(grid, monkeypatch):
    failing(monkeypatch, RuntimeError("a method's mistake"), 3)
    found = grid().run(fail_fast=True)
    assert len(found.walk.failed) == 1
    assert found.files() == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_without_memory_a_student_makes_room_and_comes_later(alone, grid, monkeypatch, error):
    hit = failing(monkeypatch, error, 4 + 1)
    found = grid().run()
    assert len(hit) == 1
    (text,) = [text for text in found.events.texts() if "memory" in text]
    label = text.partition(":")[0]
    assert f"{label}: going on at step 1 of" in "\n".join(found.events.texts())
    assert found.events.labels("start").count(label) == 1
    assert found.files() == alone.files()
    assert not found.walk.failed


def test_alone_without_memory_is_a_failure(grid, monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 2)
    found = grid(cohort=1, methods=["output"], wrappers=["single"]).run()
    (name,) = found.walk.failed
    assert found.store.failure(name)["category"] == "memory"


def test_a_student_that_cannot_be_set_up_fails_alone(alone, grid, monkeypatch):
    enlist = cohort.enlist

    def broken(stage, *rest):
        if stage.label == told("half/none/single"):
            raise StageFailed("no such layer")
        return enlist(stage, *rest)

    monkeypatch.setattr(cohort, "enlist", broken)
    found = grid().run()
    stage = found.stage("half/none/single")
    assert found.walk.failed == {stage.identity: "no such layer"}
    assert stage.label in found.events.labels("start")
    assert found.files() == {k: v for k, v in alone.files().items() if k != stage.label}


def test_a_student_that_does_not_fit_beside_others_is_set_up_later(alone, grid, monkeypatch):
    enlist, errors = cohort.enlist, iter([None, torch.OutOfMemoryError("full")])

    def full(*arguments):
        error = next(errors, None)
        if error is not None:
            raise error
        return enlist(*arguments)

    monkeypatch.setattr(cohort, "enlist", full)
    found = grid().run()
    assert not found.walk.failed
    assert found.files() == alone.files()
    monkeypatch.setattr(cohort, "enlist", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    empty = cohort.Cohort(found.walk.bench, 2)
    with pytest.raises(torch.OutOfMemoryError):
        empty.admit(found.stages[0])
    assert list(empty.train()) == []


@pytest.mark.parametrize("file", ["state.safetensors", "ema.safetensors", "train.npy"])
def test_damage_met_in_a_cohort_is_mended_where_one_lock_is_held(alone, grid, monkeypatch, file):
    read, damage = Store.read, iter([True])
    mended = []

    def damaged(self, name, what):
        if what == file and next(damage, False):
            raise CorruptArtifact(name, "its bits")
        return read(self, name, what)

    monkeypatch.setattr(Store, "read", damaged)
    found = grid()
    repair = type(walk_of(found.found, Events())).repair
    monkeypatch.setattr("o2mkd_bench.execute.Walk.repair", lambda self, e: mended.append(e) or repair(self, e))
    found.run()
    assert not found.walk.failed
    assert found.files() == alone.files()
    assert len(mended) <= 1


def test_students_that_another_process_is_at_are_left_out(alone, grid, monkeypatch):
    found = grid()
    busy = found.stage("half/none/single")
    try_lock, tries = found.store.try_lock, []

    def locked(name):
        if name == busy.identity and len(tries) < 2:
            tries.append(name)
            return None
        return try_lock(name)

    monkeypatch.setattr(found.store, "try_lock", locked)
    found.run()
    assert found.events.labels("done")[-1] == busy.label
    assert found.shared()[busy.label] == 0
    assert found.files() == alone.files()


def test_students_that_another_process_has_made_are_reused(alone, grid, monkeypatch):
    found = grid()
    made = found.stage("half/none/single")
    try_lock = found.store.try_lock

    def after_the_other(name):
        place = found.store._place(name)
        if name == made.identity and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(alone.store._place(name))
        return try_lock(name)

    monkeypatch.setattr(found.store, "try_lock", after_the_other)
    found.run()
    assert found.events.labels("reused") == [made.label]
    assert made.label not in found.events.labels("start")


def test_a_lock_is_free_as_soon_as_its_student_is_stored(grid):
    found = grid()
    free = []

    def until(event):
        if event.kind == "progress" and "expert-0" in event.label:
            for done in (e.stage for e in found.events if e.kind == "done"):
                with Store(found.store.root).lock(done, timeout=0):
                    free.append(done)

    found.run(until)
    assert not found.walk.failed
    assert free


def test_an_artifact_that_cannot_be_written_fails_its_student_alone(alone, grid, monkeypatch):
    write = train.write

    def broken(stage, bench, draft, member):
        if stage.label == told("half/none/single"):
            raise ValueError("no such dtype")
        write(stage, bench, draft, member)

    monkeypatch.setattr(train, "write", broken)
    found = grid().run()
    assert [found.found.plan.stages[name].label for name in found.walk.failed] == [told("half/none/single")]
    assert len(found.files()) == len(found.stages) - 1


def test_what_breaks_the_loop_fails_those_in_it(grid, monkeypatch):
    monkeypatch.setattr(Member, "tell", lambda *_: 1 / 0)
    found = grid(wrappers=["single"]).run()
    assert len(found.walk.failed) == 2
    assert all("division by zero" in reason for reason in found.walk.failed.values())


def test_in_parts_a_student_sees_the_same_images(alone, grid):
    small = {"methods": ["relation"], "wrappers": ["single"]}
    training = {"batch": 32, "lr": 1e-3, "group": 4}
    logs = []
    for extra in ({}, {"micro_batch": 10}, {"micro_batch": 32}):
        found = grid(**small, training={**training, **extra}).run()
        (stage,) = found.stages
        logs.append((stage.identity, found.store.read_json(stage.identity, "log.json")))
    assert len({name for name, _ in logs}) == 3, "it bears on the result"
    whole, parts, same = (log for _, log in logs)
    assert whole == same
    assert parts["images"] == whole["images"]
    assert [e["step"] for e in parts["curve"]] == [e["step"] for e in whole["curve"]]
    assert parts["curve"][0]["loss"] == pytest.approx(whole["curve"][0]["loss"], rel=1e-5)
    assert parts != whole
