"""From a suite to its plan: which cells there are, which stages they share, and what an identity depends on."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import PurePath
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from pydantic import field_validator
from safetensors.numpy import save_file

import o2mkd_plugins
from o2mkd_bench import Interval, Line, Options, UserError, Wrapper, hookimpl
from o2mkd_bench.core.build import Machine, build
from o2mkd_bench.core.data import DatasetInfo, DatasetSource
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.intervals import cover
from o2mkd_bench.core.plan import Stage
from o2mkd_bench.core.plugins import BUILTIN, Registry
from o2mkd_bench.core.program import Round
from o2mkd_bench.core.session import selection
from o2mkd_bench.core.suite import from_mapping, load
from o2mkd_plugins.models.options import UNet2DOptions
from o2mkd_plugins.models.unet2d import UNet2D
from o2mkd_plugins.samplers.ddim import DDIM
from o2mkd_plugins.samplers.options import DDIMOptions
from o2mkd_plugins.samplers.progressive import Progressive

MACHINE = Machine("cpu", "some cpu", {"torch": "2"})
UNET = {"unet2d": {"block_out_channels": [8, 16], "norm_num_groups": 4}}
SUITE = {
    "name": "toy",
    "datasets": ["digits"],
    "teachers": [{"name": "t", "train": {"model": UNET, "images": 1024}}],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["output"],
    "wrappers": ["single"],
    "samplers": [{"ddim": {"steps": 4}}],
    "metrics": [{"fid": {"network": "embedded"}}],
    "budgets": [12800],
    "training": {"batch": 64},
    "sampling": {"images": 640},
    "baselines": [],
}
LIFTED = {"wrappers": ["single", "o2mkd"], "baselines": ["equal_total", "per_student"]}


class Wrong(DDIM):
    def nfe(self, steps):
        return steps + 1


class Crash(DDIM):
    def program(self, schedule, grid, edges=(), clip="x0"):
        raise ZeroDivisionError("oops")


class Empty(DDIM):
    def program(self, schedule, grid, edges=(), clip="x0"):
        return None


class Far(DDIM):
    def program(self, schedule, grid, edges=(), clip="x0"):
        found = super().program(schedule, grid, edges, clip)
        return replace(found, lines=(replace(found.lines[0], t=schedule.timesteps), *found.lines[1:]))


class Deaf(DDIM):
    def program(self, schedule, grid, edges=(), clip="x0"):
        return super().program(schedule, grid, edges)


class Slim(Wrapper):
    def wrap(self, job, lift):
        return (replace(job, student={"widht": 0.5}),)


class Bad(Wrapper):
    def wrap(self, job, lift):
        raise KeyError("oops")


class Twins(Wrapper):
    """An expert of another width than the job that it continues."""

    def wrap(self, job, lift):
        wide = replace(job, role="wide", serves=None, student={"width": 1.0, "blocks": None, "config": None})
        return wide, replace(job, role="expert-0", start="wide")


class Texts(DDIM):
    def program(self, schedule, grid, edges=(), clip="x0"):
        return replace(super().program(schedule, grid, edges, clip), lines=(Line("999"),))


class Unborn(DDIM):
    def __init__(self, options):
        raise SystemExit(1)


class Rounder(DDIM):
    needs_rounds = True

    def rounds(self, schedule, steps):
        return None


class Odd(DDIM):
    needs_rounds = True

    def rounds(self, schedule, steps):
        return ({"kind": "halve"},)


class Layered(Wrapper):
    def wrap(self, job, lift):
        return (replace(job, student={**job.student, "variant": "bk_tiny"}),)


class Serving(Wrapper):
    def wrap(self, job, lift):
        lift.measured(2, job)


class Edgy(Wrapper):
    def wrap(self, job, lift):
        cover([0], 1000)


class Parted(Wrapper):
    def wrap(self, job, lift):
        half = lift.schedule.timesteps / 2
        return tuple(replace(job, role=str(lo), serves=Interval(lo, lo + half)) for lo in (0, half))


class Stated(DatasetSource):
    said: ClassVar[object] = {}

    def info(self):
        return self.said

    def load(self):
        raise NotImplementedError


class Gone(Stated):
    def info(self):
        raise OSError("no disk")


INFO = DatasetInfo("ab", "made up", 1, 8, False)


class Dict(Stated):
    pass


class Flipped(Stated):
    said = replace(INFO, flip="no")


class Numpy(Stated):
    said = replace(INFO, size=np.int64(8))


class Nameless(Stated):
    said = replace(INFO, fingerprint=None)


class Small(UNet2D):
    changes: ClassVar[dict[str, object]] = {"sample_size": 4}

    def teacher_config(self, options, channels, size):
        return super().teacher_config(options, channels, size) | self.changes


class Arrays(Small):
    changes = {"dropout": np.int64(0)}  # noqa: RUF012 - never changed


class Nothing(UNet2D):
    def teacher_config(self, options, channels, size):
        return None


class Raising(UNet2D):
    def student_config(self, teacher, student, where):
        return {"x": teacher["wdith"]}


class Keyless(UNet2D):
    student_keys = None


class Vandal(UNet2D):
    """Writes into what it is given."""

    def student_config(self, teacher, student, where):
        found = super().student_config(teacher, student, where)
        teacher["block_out_channels"] = [4, 8]
        student["width"] = 0.1
        return found


class Holding(Options):
    path: object = PurePath("x")

    @field_validator("path")
    @classmethod
    def _given(cls, value):
        return PurePath("y")


def teacher(family):
    return {"name": "t", "train": {"model": {family: UNET["unet2d"]}, "images": 1024}}


def thirds(students, schedule):
    return [schedule.timesteps * k // 3 for k in (1, 2)]


def huber(register):
    register("huber", "x:y", options=Options)


def gap(options, dataset, base):
    return {"network": "gap"}


def acme():
    def declare(kind, *declared):
        def call(register):
            for name, target, traits in declared:
                register(name, f"{__name__}:{target}", **traits)

        return hookimpl(call, specname=f"register_{kind}")

    metric = {"columns": lambda *_: ("q",), "higher_is_better": True}
    others = ("empty", "far", "deaf", "texts", "unborn", "rounder", "odd")
    late = [(name, name.title(), {"options": DDIMOptions}) for name in others]
    stated = [(name, name.title(), {}) for name in ("gone", "dict", "flipped", "numpy", "nameless")]
    families = [
        (name, name.title(), {"options": UNet2DOptions}) for name in ("small", "arrays", "raising", "keyless", "vandal")
    ]
    families.append(("none", "Nothing", {"options": UNet2DOptions}))
    lifting = [(name, name.title(), {}) for name in ("bad", "twins", "slim", "layered", "serving", "edgy", "parted")]
    networks = {
        "objects": lambda *_: {"network": "x", "at": PurePath("y")},
        "nameless": lambda *_: None,
        "careless": lambda options, dataset: {},
    }
    measures = [(name, "Wrong", {**metric, "network_id": give}) for name, give in networks.items()]
    measures.append(("lettered", "Wrong", {**metric, "columns": lambda *_: "kid", "network_id": gap}))
    for name, column in {"status": "status", "fid2": "fid", "spaced": "a b"}.items():
        measures.append((name, "Wrong", {**metric, "columns": lambda *_, c=column: (c,), "network_id": gap}))
    measures.append(("unsure", "Wrong", {**metric, "higher_is_better": "no", "network_id": gap}))
    return SimpleNamespace(
        api=1,
        kd=declare("kd_methods", ("huber", "Wrong", {}), ("holding", "Wrong", {"options": Holding})),
        datasets=declare("datasets", *stated),
        models=declare("models", *families),
        samplers=declare("samplers", ("wrong", "Wrong", {"options": DDIMOptions}), ("crash", "Crash", {}), *late),
        wrappers=declare("wrappers", *lifting),
        intervals=declare("intervals", ("thirds", "thirds", {})),
        metrics=declare("metrics", ("half", "Wrong", metric), *measures),
    )


@pytest.fixture(scope="module")
def registry():
    found = Registry()
    found.add(o2mkd_plugins, BUILTIN, "1", "o2mkd_plugins")
    found.add(acme(), "acme", "1", "acme")
    found.add(SimpleNamespace(api=1, kd=hookimpl(huber, specname="register_kd_methods")), "other", "1", "other")
    assert not found.broken
    return found


@pytest.fixture
def plan(registry, tmp_path):
    def make(*only, machine=MACHINE, locate=lambda repo, revision: None, base=tmp_path, **changes):
        suite = from_mapping({**deepcopy(SUITE), **changes}, base, registry)
        return build(suite, machine, locate, [selection(text) for text in only], registry)

    return make


def stages(plan, *kinds):
    return {name for name, stage in plan.stages.items() if stage.kind in kinds}


def rows(plan, role="student"):
    return [cell for cell in plan.cells if cell.role == role]


TRAINED = ("data", "teacher", "state", "student", "round")


# what is shared


def test_a_plan_in_order_each_stage_once(plan):
    found = plan(seeds=[0, 1], samplers=[{"ddim": {"steps": [4, 8]}}, {"ddpm": {"steps": 4}}])
    kinds = [stage.kind for stage in found.stages.values()]
    counts = {kind: kinds.count(kind) for kind in kinds}
    # a speed reading serves both seeds; the teacher's rows are drawn too
    assert counts == {
        "data": 1,
        "teacher": 1,
        "student": 2,
        "reference": 1,
        "samples": 12,
        "score": 14,
        "speed": 6,
        "probe": 2,
    }
    seen = set()
    for name, stage in found.stages.items():
        assert set(stage.inputs()) <= seen
        seen.add(name)
    assert set(found.closure([found.cells[0].samples])) == {*stages(found, "data", "teacher"), found.cells[0].samples}


def test_rows_of_the_teacher_and_of_the_references(plan):
    found = plan(seeds=[0, 1], methods=["output", "feature"], samplers=[{"ddim": {"steps": [4, 8]}}])
    teachers = rows(found, "teacher")
    assert [(c.labels["steps"], c.labels["seed"]) for c in teachers] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert {(c.labels["student"], c.labels["method"], c.labels["budget"], c.probe) for c in teachers} == {("",) * 4}
    assert teachers[0].describe() == "digits / t / ddim / 4 / ema / 0"
    assert [(r["dataset"], r["what"]) for r in found.references] == [
        ("digits", "noise"),
        ("digits", "held-out real images"),
    ]


def test_the_loss_without_a_teacher_does_not_depend_on_it(plan):
    wider = {**UNET["unet2d"], "block_out_channels": [8, 16]}
    other = [{"name": "t", "train": {"model": {"unet2d": wider}, "images": 2048}}]
    for method, same in (("none", True), ("output", False)):
        one, two = plan(methods=[method]), plan(methods=[method], teachers=other)
        assert stages(one, "teacher") != stages(two, "teacher")
        assert (stages(one, "student") == stages(two, "student")) is same
    start = {"wrappers": [{"o2mkd": {"init": "teacher"}}], "students": [{"name": "same"}], "methods": ["none"]}
    assert stages(plan(**start), "student").isdisjoint(stages(plan(teachers=other, **start), "student"))


def test_cells_that_mean_the_same_are_one(plan):
    twins = [{"ddim": {"steps": 4}}, {"ddim": {"steps": 4, "eta": 0.0}, "label": "again"}]
    assert [c.labels["sampler"] for c in rows(plan(samplers=twins))] == ["ddim"]
    chain = [{"o2mkd": {"students": 1, "warmup": 0}}, "single"]
    assert len(rows(plan(wrappers=chain))) == 1


def test_experts_of_different_k_share_their_warm_up(plan):
    wrappers = [{"o2mkd": {"students": 2}}, {"o2mkd": {"students": 4}}]
    found = plan(wrappers=wrappers)
    assert len(stages(found, "state")) == 1
    assert len(stages(found, "student")) == 6


# what an identity depends on


@pytest.mark.parametrize(
    "change",
    [
        {"samplers": [{"dpm_solver": {"steps": [4, 8]}}]},
        {"sampling": {"images": 700, "spacing": "leading", "clip": "none"}},
        {"metrics": [{"kid": {"network": "embedded", "subset_size": 100}}]},
        {"speed": {"batch": 7}},
        {"probe": {"points": 3}},
        {"name": "other", "description": "words"},
        {"students": [{"name": "another name", "width": 0.5}]},
    ],
)
def test_what_follows_training_changes_no_training(plan, change):
    assert stages(plan(**change), *TRAINED) == stages(plan(), *TRAINED)


@pytest.mark.parametrize(
    "change",
    [
        {"budgets": [6400]},
        {"training": {"batch": 64, "lr": 1e-3}},
        {"training": {"batch": 32}},
        {"seeds": [1]},
        {"precision": "bf16"},
        {"store_dtype": "fp16"},
        {"students": [{"name": "half", "width": 0.5, "prediction": "sample"}]},
        {"students": [{"name": "half", "width": 0.5, "training": {"ema": 0.1}}]},
        {"students": [{"name": "half", "width": 0.5, "blocks": 2}]},
        {"methods": [{"output": {"weight": 2}}]},
        {"wrappers": [{"single": {"scale": 2}}]},
    ],
)
def test_what_decides_a_student_changes_it(plan, change):
    assert stages(plan(**change), "student").isdisjoint(stages(plan(), "student"))


def test_where_and_how_does_not_change_what(plan, tmp_path):
    changes = {
        "device": "cuda:3",
        "sampling": {"images": 640, "batch": 17},
        "checkpoint_every": 1,
        "training": {"batch": 64.0, "lr": 2e-4},
        "datasets": [{"digits": {}, "label": "digits"}],
    }
    other = plan(base=tmp_path / "elsewhere", **changes)
    assert other.stages.keys() == plan().stages.keys()
    assert {s.local["checkpoint_every"] for s in other.stages.values() if s.kind == "student"} == {1.0}


def test_a_new_version_of_a_plugin_makes_its_artifacts_anew(plan, registry, monkeypatch):
    before = plan()
    newer = replace(registry.get("kd_methods", "output"), version="9")
    monkeypatch.setitem(registry._plugins, ("kd_methods", "output"), [newer])
    after = plan()
    assert stages(after, "student").isdisjoint(stages(before, "student"))
    assert stages(after, "data", "teacher") == stages(before, "data", "teacher")


def test_speed_is_of_the_architecture_and_the_machine_not_of_the_weights(plan):
    found = plan(methods=["none", "output"], seeds=[0, 1], sampling={"images": 640, "weights": ["ema", "raw"]})
    assert len({c.speed for c in rows(found)}) == 1
    assert {c.speed for c in rows(found, "teacher")}.isdisjoint(c.speed for c in rows(found))
    other = plan(machine=Machine("cuda:0", "H200", {"torch": "2"}))
    assert stages(other, "speed").isdisjoint(stages(found, "speed"))
    assert stages(other, "samples") <= stages(found, "samples")
    assert stages(plan(students=[{"name": "s", "width": 1.5}]), "speed") != stages(plan(), "speed")


def test_a_speed_is_of_one_architecture_also_where_cells_mean_the_same(plan):
    twins = ["single", *({"single": {"scale": 1.0}, "label": label} for label in "abcd")]
    widths = [{"name": f"w{n}", "width": n / 2} for n in range(1, 7)]
    found = plan(students=widths, wrappers=twins, methods=["none", "output"], seeds=[0, 1])
    assert len({(c.speed, c.labels["student"]) for c in rows(found)}) == len({c.speed for c in rows(found)}) == 6


def test_speed_and_probe_can_be_left_out(plan):
    found = plan(speed={"enabled": False}, probe={"enabled": False})
    assert not stages(found, "speed", "probe")


def test_methods_of_one_name_from_two_distributions_are_two(plan):
    found = plan(methods=["acme:huber", "other:huber"])
    assert len(stages(found, "student")) == 2
    names = {s.spec["methods"][0]["name"] for s in found.stages.values() if s.kind == "student"}
    assert names == {"acme:huber", "other:huber"}


# baselines


def test_baselines_stand_beside_what_is_lifted_and_join_the_plain_student_where_they_are_it(plan):
    found = plan(**LIFTED)
    assert [(c.role, c.labels["wrapper"], c.baseline_of) for c in found.cells if c.role != "teacher"] == [
        ("student", "single", ("equal_total of o2mkd",)),
        ("student", "o2mkd", ()),
        ("baseline", "single (per student of o2mkd)", ("per_student of o2mkd",)),
    ]
    (_, lifted, each) = (c.trained for c in found.cells if c.role != "teacher")
    assert sum(j.images for j in lifted.jobs) == 12800
    assert [j.steps for j in each.jobs] == [60 + 70]


def test_the_plain_student_keeps_its_name_wherever_it_stands(plan):
    found = plan(wrappers=["o2mkd", "single"], baselines=["equal_total"])
    assert {(c.role, c.labels["wrapper"], c.baseline_of) for c in found.cells if c.role != "teacher"} == {
        ("student", "single", ("equal_total of o2mkd",)),
        ("student", "o2mkd", ()),
    }


def test_one_baseline_serves_several(plan):
    found = plan(wrappers=["o2mkd", {"o2mkd": {"students": 4}}], baselines=["equal_total"])
    (baseline,) = rows(found, "baseline")
    assert baseline.baseline_of == ("equal_total of o2mkd", "equal_total of o2mkd(students=4)")


def test_the_equal_total_baseline_sees_the_exact_total(plan):
    wrapper = {"o2mkd": {"students": 2, "budget": "per_student"}}
    found = plan(wrappers=[wrapper], baselines=["equal_total"])
    (lifted,), (baseline,) = rows(found), rows(found, "baseline")
    assert sum(j.images for j in lifted.trained.jobs) == sum(j.images for j in baseline.trained.jobs) == 340 * 64


def test_the_equal_batch_baseline_sees_the_total_in_the_batch_of_an_expert(plan):
    named = {"single": {}, "label": "small", "training": {"batch": 32}}
    found = plan(wrappers=["o2mkd", named, "single"], baselines=["equal_total", "equal_batch"])
    assert {(c.labels["wrapper"], c.baseline_of) for c in found.cells if c.role != "teacher"} == {
        ("o2mkd", ()),
        ("small", ("equal_batch of o2mkd",)),
        ("single", ("equal_total of o2mkd",)),
    }
    whole = {"o2mkd": {"students": 4, "expert_batch": "full"}, "training": {"batch": 128}, "label": "four"}
    quarter = {"o2mkd": {"students": 4}, "label": "quarter"}
    found = plan(wrappers=[whole, quarter], baselines=["equal_batch"])
    (full,) = (c for c in rows(found, "baseline") if c.baseline_of == ("equal_batch of four",))
    (small,) = (c for c in rows(found, "baseline") if c.labels["wrapper"] == "single (batch of quarter)")
    assert [(j.batch, j.steps) for c in (full, small) for j in c.trained.jobs] == [(128, 98), (16, 800)]


def test_a_wrapper_that_lifts_nothing_has_no_baselines(plan):
    assert not rows(plan(wrappers=[{"single": {"scale": 2}}], baselines=["equal_total"]), "baseline")


# include, exclude, only


def test_baselines_go_where_their_parent_goes(plan):
    wrappers = [
        "single",
        {"o2mkd": {"students": 2}},
        {"o2mkd": {"students": 4, "budget": "per_student"}, "label": "four"},
    ]
    found = plan(wrappers=wrappers, baselines=["per_student"], include=[{"wrapper": "o2mkd"}])
    assert [c.labels["wrapper"] for c in found.cells if c.role != "teacher"] == [
        "o2mkd",
        "single (per student of o2mkd)",
    ]
    only = plan("wrapper=four", wrappers=wrappers, baselines=["equal_total"])
    assert [c.labels["wrapper"] for c in only.cells if c.role != "teacher"] == ["four", "single (total of four)"]


def test_exclude_and_only_leave_cells_and_their_stages_out(plan):
    both = {"samplers": [{"ddim": {"steps": [4, 8]}}, {"ddpm": {"steps": 4}}], "methods": ["output", "none"]}
    found = plan("sampler=ddim", **both, exclude=[{"steps": 8, "method": "output"}])
    assert [(c.labels["method"], c.labels["steps"]) for c in rows(found)] == [("output", 4), ("none", 4), ("none", 8)]
    assert len(stages(plan("method=none", **both), "student")) == 1
    several = plan("steps=4,16", "sampler=dd?m", **both)
    assert {c.labels["sampler"] for c in several.cells} == {"ddim", "ddpm"}
    assert {c.labels["steps"] for c in several.cells} == {4}


def test_rows_of_the_teacher_follow_rules_about_what_they_have(plan):
    def steps(**rules):
        return [c.labels["steps"] for c in rows(plan(samplers=[{"ddim": {"steps": [4, 8]}}], **rules), "teacher")]

    assert steps() == [4, 8]
    assert steps(include=[{"method": "output"}]) == [4, 8]
    assert steps(include=[{"method": "output", "steps": 8}]) == [8]
    assert steps(exclude=[{"method": "output", "steps": 8}]) == [4, 8]
    assert steps(exclude=[{"steps": 8}]) == [4]


def test_a_teacher_is_a_student_of_that_name_in_rules(plan):
    def kinds(*only, **rules):
        found = plan(*only, samplers=[{"ddim": {"steps": [4, 8]}}], baselines=[], **rules)
        return [(cell.labels["student"] or cell.role, cell.labels["steps"]) for cell in found.cells]

    teacher, student = [("teacher", 4), ("teacher", 8)], [("half", 4), ("half", 8)]
    assert kinds() == teacher + student
    assert kinds("student=teacher") == kinds(include=[{"student": "teacher"}]) == teacher
    assert kinds("student=teacher", "steps=8") == [("teacher", 8)]
    assert kinds("student=teacher,half") == kinds("student=half") == teacher + student
    assert kinds(exclude=[{"student": "teacher"}]) == student
    assert kinds(exclude=[{"student": ["teacher", "half"], "steps": 8}]) == [("teacher", 4), ("half", 4)]
    both = [{"student": "teacher", "steps": 4}, {"student": "half", "steps": 8}]
    assert kinds(include=both) == [*teacher, ("half", 8)]
    # a pattern that would match any student is of students
    assert kinds(include=[{"student": "*"}], exclude=[{"student": "*", "steps": 4}]) == [*teacher, ("half", 8)]


def test_a_plan_of_nothing_is_an_error(plan):
    with pytest.raises(UserError, match="include: no cell is left after include, exclude and --only"):
        plan("sampler=ddpm")


def test_nothing_is_read_for_what_is_left_out(plan):
    folders = [{"image_folder": {"root": "gone", "size": 8}, "label": "folder"}, "digits"]
    teachers = [{**SUITE["teachers"][0], "dataset": "digits"}]
    teachers += [{"name": "broken", "dataset": "digits", "path": "gone"}]
    teachers += [{**SUITE["teachers"][0], "name": "f", "dataset": "folder"}]
    changes = {"datasets": folders, "teachers": teachers, "methods": ["output", "none"]}
    found = plan("dataset=digits", "teacher=t", **changes)
    assert {r["dataset"] for r in found.references} == {"digits"}
    # also a budget that is too small for what is left out
    tiny = plan("wrapper=single", wrappers=["single", {"o2mkd": {"students": 40}}], budgets=[64])
    assert len(rows(tiny)) == 1


# teachers from elsewhere


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A diffusers folder whose weights nobody loads at plan time."""
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))

    def write(channels=1, size=8, value=0.0):
        options = UNet2DOptions(block_out_channels=(8, 16), norm_num_groups=4)
        folder = tmp_path / f"{channels}-{size}-{value}"
        folder.mkdir()
        config = UNet2D().teacher_config(options, channels, size)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}', encoding="utf-8")
        save_file({"w": np.full(3, value)}, folder / "diffusion_pytorch_model.safetensors")
        return folder

    return write


def path_teacher(folder):
    return [{"name": "p", "path": str(folder)}]


def test_a_checkpoint_is_its_content_and_not_its_place(plan, checkpoint):
    one, two = checkpoint(), checkpoint(value=1.0)
    found, other = plan(teachers=path_teacher(one)), plan(teachers=path_teacher(two))
    assert stages(found, "teacher") != stages(other, "teacher")
    moved = one.rename(one.parent / "moved")
    assert stages(plan(teachers=path_teacher(moved)), "teacher") == stages(found, "teacher")
    assert rows(found)[0].trained.prediction == "v_prediction"


def test_a_teacher_of_another_shape_is_refused(plan, checkpoint):
    with pytest.raises(
        UserError, match=r"^teachers\.p: the teacher draws 3 x 32 x 32 images, dataset digits has 1 x 8"
    ):
        plan(teachers=path_teacher(checkpoint(3, 32)))


def test_a_teacher_of_the_hub_that_is_not_here_stops_nobody_else(plan, checkpoint):
    teachers = [*SUITE["teachers"], {"name": "h", "hub": "google/ddpm"}]
    found = plan(teachers=teachers, methods=["output", "none"], **{"seeds": [0, 1]})
    unresolved = [c for c in found.cells if c.unresolved]
    assert [(c.role, c.labels["method"], c.labels["seed"]) for c in unresolved] == [
        ("teacher", "", 0),
        ("teacher", "", 1),
        ("student", "output", 0),
        ("student", "output", 1),
        ("student", "none", 0),
        ("student", "none", 1),
    ]
    assert all("hub teacher google/ddpm is not on this machine" in c.unresolved for c in unresolved)
    assert all(not c.stages() for c in unresolved)
    assert {c.labels["teacher"] for c in found.cells if not c.unresolved} == {"t"}
    assert not [c for c in plan("teacher=t", teachers=teachers).cells if c.unresolved]
    asked = []
    here = plan(teachers=teachers[1:], locate=lambda *what: asked.append(what) or checkpoint())
    assert asked == [("google/ddpm", None)]
    assert not [c for c in here.cells if c.unresolved]


# rounds


def progressive(steps, **options):
    return [{"progressive": {"steps": steps, **options}}]


def test_rounds_train_each_expert_on_the_entries_of_its_interval(plan):
    wrappers = [{"o2mkd": {"students": 3, "intervals": [2, 500], "expert_batch": "full", "budget": "per_student"}}]
    (cell,) = rows(plan(wrappers=wrappers, samplers=progressive(2, start=8)))
    made = plan(wrappers=wrappers, samplers=progressive(2, start=8))
    rounds = [s for s in made.stages.values() if s.kind == "round"]
    # one conversion and two halvings; no entry of any grid lies in [0, 2)
    assert [(s.spec["round"]["kind"], len(s.spec["round"]["grid"]), s.spec["before"]["own"]) for s in rounds] == [
        ("convert", 8, 1),
        ("convert", 8, 2),
        ("halve", 4, 1),
        ("halve", 4, 2),
        ("halve", 2, 1),
        ("halve", 2, 2),
    ]
    assert [s.spec["entries"] for s in rounds] == [[0, 4], [4, 8], [0, 2], [2, 4], [0, 1], [1, 2]]
    kept = made.stages[cell.trained.students[0]]
    assert (kept.kind, kept.spec["job"]["trains"]) == ("student", [0, 2])
    assert [made.stages[s].kind for s in cell.trained.students[1:]] == ["round", "round"]
    assert all(set(s.needs["before"]) <= made.stages.keys() for s in rounds)
    assert rounds[2].needs["before"][1:] == (rounds[0].identity, rounds[1].identity)
    assert cell.trained.prediction == "v_prediction"
    assert cell.trained.rounds_images == 3 * (12800 // 4 // 64) * 64
    assert cell.calls == (0, 1, 1)
    assert not cell.probe


def test_a_student_that_predicts_v_is_not_converted(plan):
    found = plan(
        students=[{"name": "half", "width": 0.5, "prediction": "v_prediction"}], samplers=progressive(4, start=8)
    )
    assert [s.spec["round"]["kind"] for s in found.stages.values() if s.kind == "round"] == ["halve"]
    assert not rows(found, "teacher")


@pytest.mark.parametrize(
    ("student", "prediction", "kept"),
    [
        ("epsilon", "epsilon", False),
        ("epsilon", "v_prediction", True),
        ("v_prediction", "v_prediction", False),
        ("v_prediction", "epsilon", True),
    ],
)
def test_a_conversion_to_what_the_student_predicts_is_left_out(plan, monkeypatch, student, prediction, kept):
    def rounds(self, schedule, steps):
        fine = time_grid("trailing", 8, schedule.timesteps)
        return Round("convert", fine, (), prediction, 0.5), Round("halve", fine[::2], fine, prediction, 0.5)

    monkeypatch.setattr(Progressive, "rounds", rounds)
    found = plan(students=[{"name": "half", "width": 0.5, "prediction": student}], samplers=progressive(4, start=8))
    made = [s.spec["round"]["kind"] for s in found.stages.values() if s.kind == "round"]
    assert made == (["convert"] if kept else []) + ["halve"]


def test_rounds_that_cannot_be_are_refused(plan):
    with pytest.raises(UserError, match=r"^samplers\.progressive\(start=6\): .*cannot halve start: 6 down to 4"):
        plan(samplers=progressive(4, start=6))
    with pytest.raises(
        UserError, match=r"^samplers\.progressive.*: 0\.001 of 12800 images is less than one batch of 64"
    ):
        plan(samplers=progressive(4, start=8, share=0.001))
    fits = r"^samplers\.progressive.*: its rounds begin with students that predict epsilon, and those of half predict v"
    with pytest.raises(UserError, match=fits), pytest.warns(UserWarning, match="prefer prediction: v"):
        plan(
            students=[{"name": "half", "width": 0.5, "prediction": "v_prediction"}],
            samplers=progressive(4, start=8, prediction="epsilon"),
        )


def test_an_option_that_is_no_data_is_refused(plan):
    told = r"methods\.holding: an option of plugin kd_methods:acme:holding decides no identity \(ValueError: a Pure"
    with pytest.raises(UserError, match=told):
        plan(methods=["holding"])


def test_what_a_family_writes_into_is_its_own(plan):
    found = plan(teachers=[teacher("vandal")], students=[{"name": "half", "width": 0.5}, {"name": "full"}])
    (made,) = [stage for stage in found.stages.values() if stage.kind == "teacher"]
    assert made.spec["network"]["config"]["block_out_channels"] == [8, 16]
    again = Stage.make(made.kind, made.label, made.spec, made.needs)
    assert again.identity == made.identity
    widths = [s.spec["network"]["config"]["block_out_channels"] for s in found.stages.values() if s.kind == "student"]
    assert widths == [[4, 8], [8, 16]]


# errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samplers": [{"wrong": {"steps": 4}}]}, PluginError, r"samplers\.wrong: .*declares 5 evaluations for 4 st"),
        ({"samplers": [{"empty": {"steps": 4}}]}, PluginError, r"samplers:acme:empty returned NoneType from program"),
        ({"samplers": [{"far": {"steps": 4}}]}, PluginError, r"samplers:acme:far .* at timestep 1000, .*\[0, 1000"),
        ({"samplers": [{"crash": {"steps": 4}}]}, PluginError, r"samplers\.crash: the sampler failed: ZeroDivision"),
        ({"samplers": [{"ddim": {"steps": 2000}}]}, UserError, r"samplers\.ddim: 2000 sampling steps do not fit"),
        (
            {"samplers": [{"deaf": {"steps": 4}}], "sampling": {"clip": "none"}},
            PluginError,
            r"samplers:acme:deaf was asked for clip none and gives a program with clip x0",
        ),
        ({"wrappers": ["slim"]}, PluginError, r"wrapper acme:slim gives .* key 'widht'.*; did you mean 'width'"),
        ({"metrics": ["unsure"]}, PluginError, r"metrics:acme:unsure has higher_is_better 'no'; make it True or False"),
        ({"wrappers": ["bad"]}, PluginError, r"wrappers\.bad: wrap\(\) of plugin wrappers:acme:bad failed: KeyError"),
        (
            {"samplers": [{"texts": {"steps": 4}}]},
            PluginError,
            r"samplers\.texts: .*has t '999'; make it an int or a fl",
        ),
        (
            {"samplers": [{"unborn": {"steps": 4}}]},
            PluginError,
            r"samplers\.unborn: the class of plugin .*unborn failed",
        ),
        ({"samplers": [{"rounder": {"steps": 4}}]}, PluginError, r"rounds\(\) of plugin .*:rounder failed: TypeError"),
        ({"samplers": [{"odd": {"steps": 4}}]}, PluginError, r"samplers:acme:odd gives a dict as a round"),
        ({"datasets": ["gone"]}, PluginError, r"datasets\.gone: info\(\) of plugin datasets:acme:gone failed: OSError"),
        (
            {"datasets": ["dict"]},
            PluginError,
            r"datasets:acme:dict returns a dict, which is no o2mkd_bench\.DatasetInfo",
        ),
        ({"datasets": ["flipped"]}, PluginError, r"acme:flipped has flip 'no', which is True or False"),
        ({"datasets": ["numpy"]}, PluginError, r"acme:numpy has channels and size .*, which are positive ints"),
        ({"datasets": ["nameless"]}, PluginError, r"acme:nameless has fingerprint None and source"),
        ({"wrappers": ["layered"]}, UserError, r"students\.half: wrappers\.layered\.variant: unet2d, .* no variant"),
        ({"wrappers": ["serving"]}, UserError, r"wrappers\.serving: measured edges follow from a job that serves noth"),
        ({"wrappers": ["edgy"]}, UserError, r"wrappers\.edgy: 2 intervals with inner edges \[0\] do not cover"),
        ({"wrappers": ["parted"]}, UserError, r"wrappers\.parted: .* no whole number; use // for /"),
        (
            {"metrics": ["status"]},
            PluginError,
            r"metrics:acme:status gives the column 'status', which is a column of ev",
        ),
        (
            {"metrics": ["fid2"]},
            PluginError,
            r"metrics:acme:fid2 gives the column 'fid', which stands for the Inception",
        ),
        ({"metrics": ["spaced"]}, PluginError, r"gives the column 'a b', which is .*no word of a-z"),
        ({"teachers": [teacher("small")]}, PluginError, r"says sample_size 4 for images of 1 x 8 x 8; make it 8"),
        (
            {"teachers": [teacher("none")]},
            PluginError,
            r"teacher_config\(\) of plugin models:acme:none returns a NoneType",
        ),
        ({"teachers": [teacher("arrays")]}, PluginError, r"models:acme:arrays returns what is no JSON data \(a int64"),
        (
            {"teachers": [teacher("raising")]},
            PluginError,
            r"student_config\(\) of plugin models:acme:raising failed: Key",
        ),
        (
            {"teachers": [teacher("keyless")]},
            PluginError,
            r"student_keys of plugin models:acme:keyless is None; make it a",
        ),
        ({"wrappers": ["twins"]}, UserError, r"students\.half: .*cannot start from the weights of wide"),
        (
            {"wrappers": [{"o2mkd": {"init": "teacher"}}]},
            UserError,
            r"students\.half: wrappers\.o2mkd\(init=teacher\)\.init: .*another shape.*weights of its teacher; use init",
        ),
        (
            {"wrappers": [{"o2mkd": {"intervals": "unifrom"}}]},
            PluginError,
            r"wrappers\.o2mkd\(intervals=unifrom\)\.intervals: no intervals plugin .*did you mean 'uniform'",
        ),
        ({"wrappers": [{"o2mkd": {"intervals": [0]}}]}, UserError, r"\.intervals: 2 intervals with inner edges \[0\]"),
        ({"budgets": [63]}, UserError, r"budgets: 63 images are less than one batch of 64"),
        ({"sampling": {"images": 10}}, UserError, r"sampling\.images"),
        ({"metrics": ["half"]}, PluginError, r"metrics: plugin metrics:acme:half declares no network_id"),
        ({"metrics": ["nameless"]}, PluginError, r"metrics: network_id of .*acme:nameless returned None; make"),
        (
            {"metrics": ["lettered"]},
            PluginError,
            r"metrics: columns of .*acme:lettered returned 'kid'; make it a tuple",
        ),
        ({"metrics": ["objects"]}, PluginError, r"network_id of .*acme:objects returned what is no JSON data \(a Pure"),
        ({"metrics": ["careless"]}, PluginError, r"metrics: network_id of .*acme:careless failed: TypeError"),
        (
            {
                "metrics": [
                    {"kid": {"network": "embedded", "subset_size": 100}, "label": "large"},
                    {"fid": {"network": "embedded"}},
                    {"kid": {"network": "embedded", "subset_size": 10}, "label": "small"},
                ]
            },
            UserError,
            r"metrics: 'large' and 'small' both give the column kd_digits of dataset digits; score them in two suites",
        ),
        (
            {"metrics": [{"kid": {"network": "embedded"}}]},
            UserError,
            r"metrics\.kid\.subset_size: subsets of 1000 .* 640 of",
        ),
        ({"metrics": [{"fid": {"network": "timm:nope"}}]}, UserError, r"metrics\.network: timm has no model 'nope'"),
        (
            {"metrics": [{"fid": {"weights": "gone"}}]},
            UserError,
            r"metrics\.weights: .*gone is no file; set it to the w",
        ),
        (
            {"metrics": ["clip_score"]},
            UserError,
            r"metrics: 'clip_score' .* teacher t of dataset digits draws from no t",
        ),
        ({"datasets": [{"image_folder": {"root": "gone", "size": 8}}]}, UserError, r"datasets\.image_folder.*gone"),
        (
            {"teachers": [{"name": "t", "train": {"model": UNET, "images": 3}}]},
            UserError,
            r"teachers\.t\.train\.images: 3 images are less than one batch of 64",
        ),
        (
            {"students": [{"name": "half", "variant": "bk_tinny"}]},
            UserError,
            r"students\.half\.variant: unet2d, the family of its teacher, has no variant; .* by width, blocks, config$",
        ),
        (
            {"teachers": [{"name": "t", "train": {"model": {"unet2d": {"attention": [5]}}, "images": 3000}}]},
            UserError,
            r"teachers\.t\.train\.model: attention: no level has resolution 5",
        ),
    ],
)
def test_errors_begin_with_file_and_key(registry, tmp_path, changes, error, message):
    file = tmp_path / "suite.yaml"
    file.write_text(json.dumps({**SUITE, **changes}), encoding="utf-8")
    with pytest.raises(error, match=rf"^{file}: .*{message}") as caught:
        build(load(file, registry=registry), MACHINE, lambda *_: None, registry=registry)
    assert str(caught.value).count(str(file)) == 1


def test_a_family_that_says_nothing_of_its_students_keys_is_given_all(plan, monkeypatch):
    monkeypatch.delattr(UNet2D, "student_keys")
    assert len(rows(plan(students=[{"name": "half", "variant": "of its own"}]))) == 1


def test_a_rule_of_a_plugin_places_the_edges(plan):
    (cell,) = rows(plan(wrappers=[{"o2mkd": {"students": 3, "intervals": "thirds"}}]))
    assert cell.trained.edges == (333, 666)
    assert cell.calls == (1, 1, 2)


# size


def test_ten_thousand_cells_share_their_training(plan):
    found = plan(
        students=[{"name": f"s{i}", "width": 0.5 + i / 2} for i in range(5)],
        methods=["none", "output", "feature", "relation", {"output": {"weight": 0.5}, "label": "half"}],
        wrappers=["single", *({"o2mkd": {"students": k}} for k in (2, 3, 4))],
        seeds=[0, 1, 2, 3, 4],
        samplers=[
            {name: {"steps": [5, 8, 10, 15, 20], **options}, "label": str(i)}
            for i, (name, options) in enumerate(
                [("ddim", {}), ("ddim", {"eta": 1.0}), ("dpm_solver", {}), ("dpm_solver", {"order": 3})]
            )
        ],
    )
    assert len(rows(found)) == 10_000
    assert len({c.identity for c in found.cells}) == len(found.cells)
    # 5 students, 5 methods and 5 seeds: one warm-up for all K, then 1 + 2 + 3 + 4 students
    assert len(stages(found, "state")) == 125
    assert len(stages(found, "student")) == 1250
    # networks by width and number, programs by sampler and steps; the teacher of its own
    assert len(stages(found, "speed")) == (5 * 4) * 20


def test_a_recipe_is_how_a_row_is_made_whatever_its_seed(plan):
    def recipes(**changes):
        cells = plan(**{**LIFTED, "seeds": [0, 1], "samplers": [{"ddim": {"steps": [2, 4]}}], **changes}).cells
        found = {}
        for cell in cells:
            name = tuple(label for axis, label in cell.labels.items() if axis != "seed")
            found.setdefault(name, set()).add(cell.recipe)
        assert all(len(each) == 1 for each in found.values())
        each = {name: one for name, (one,) in found.items()}
        assert len(set(each.values())) == len(each)
        return each

    known = recipes()
    assert known == recipes(seeds=[7, 8], device="cpu")
    ways = {
        "training": {"batch": 64, "lr": 1e-3},
        "students": [{"name": "half", "width": 1}],
        "sampling": {"images": 1280},
        "precision": "bf16",
    }
    # null is a word of its own: no clipping
    trained = [
        recipes(samplers=[{"progressive": {"steps": 4, "start": 8}, "training": t}]) for t in ({}, {"clip": None})
    ]
    assert not set(trained[0].values()) & set(trained[1].values())
    for key, value in ways.items():
        other = recipes(**{key: value})
        assert known.keys() == other.keys()
        assert not {other[name] for name in other if name[2]} & set(known.values()), key
