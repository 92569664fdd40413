"""Stages against independent computations, through the full path from a suite to artifacts."""

import copy
import json
import shutil
import types

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from toy import Events, run, session, suite, walk_of

import o2mkd_bench
from o2mkd_bench.core import sources
from o2mkd_bench.core.errors import StageFailed, UserError
from o2mkd_bench.core.hookspecs import hookimpl
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.core.store import Store
from o2mkd_bench.engine.kd import KDMethod
from o2mkd_bench.engine.philox import Philox
from o2mkd_bench.engine.stream import Stream
from o2mkd_bench.report.compare import compare
from o2mkd_bench.report.merge import merge
from o2mkd_bench.report.tables import markdown
from o2mkd_bench.runner import discard_changed, results_folder, run_session
from o2mkd_bench.stages.samples import draw
from o2mkd_bench.stages.speed import readings
from o2mkd_bench.stages.train import course


def find(found, kind, part=""):
    return [s for s in found.plan.stages.values() if s.kind == kind and part in s.label]


def bench(found):
    return walk_of(found, lambda _: None).bench


def test_every_kind_of_stage_is_made_once_and_says_on_what(toy_run):
    assert len(set(toy_run.events.labels("done"))) == len(toy_run.session.plan.stages)
    kinds = {stage.kind for stage in toy_run.session.plan.stages.values()}
    assert kinds == {
        "data", "reference", "teacher", "state", "student", "round", "samples", "score", "speed", "probe"
    }  # fmt: skip
    for name in toy_run.session.plan.stages:
        meta = Store(toy_run.store).manifest(name).meta
        assert meta["threads"] == torch.get_num_threads()
        assert meta["device"] == "cpu"
        assert meta["machine"]["versions"]["torch"]
    assert {row["status"] for row in toy_run.results.document["rows"]} == {"done"}
    assert not any((toy_run.store / "work").iterdir()), "checkpoints are gone when their stage is done"


@pytest.mark.parametrize("warmup", [0.3, 0.875])
def test_one_student_behind_any_warm_up_is_the_unlifted_job_bit_for_bit(toy_run, tmp_path, warmup):
    both = suite(
        methods=["feature"],
        wrappers=["single", {"o2mkd": {"students": 1, "warmup": warmup}}],
        sampling={"images": 640, "batch": 320, "weights": ["ema", "raw"]},
    )
    run(both, toy_run.store, tmp_path, Events())
    found = session(both, toy_run.store)
    cells = {
        (c.labels["wrapper"].startswith("o2mkd"), c.labels["weights"]): c for c in found.plan.cells if c.trained.jobs
    }
    assert len(cells) == 4
    assert len(find(found, "state")) == 1
    for weights in ("ema", "raw"):
        plain, lifted = cells[False, weights], cells[True, weights]
        assert plain.trained.students != lifted.trained.students
        for names, file in (
            ((plain.trained.students[0], lifted.trained.students[0]), f"{weights}.safetensors"),
            ((plain.samples, lifted.samples), "images.npy"),
            ((plain.probe, lifted.probe), "probe.json"),
        ):
            a, b = (found.store.read(name, file).read_bytes() for name in names)
            assert a == b, file
    rows = [row for row in run(both, toy_run.store, tmp_path, Events()).document["rows"] if row["role"] == "student"]
    assert len({json.dumps(row["scores"]) for row in rows if row["weights"] == "ema"}) == 1


def test_experts_see_only_their_own_images(toy_run):
    store = Store(toy_run.store)
    for expert in find(toy_run.session, "student", "expert"):
        job = expert.spec["job"]
        stream = Stream(0, Law.from_spec(job["law"]), job["batch"], 1498, False, 4)
        interval = Interval(*job["trains"])
        steps = range(job["offset"], job["offset"] + job["steps"])
        expected = sum(len(stream.rows_in(stream.batch_at(step), interval)) for step in steps)
        assert store.read_json(expert.identity, "log.json")["images"] == expected > 0


def test_probe_is_the_mean_squared_difference_from_the_teacher(toy_run):
    found, workbench = toy_run.session, bench(toy_run.session)
    (stage,) = find(found, "probe")
    stored = found.store.read_json(stage.identity, "probe.json")
    assert stored["t"] == [0, 500, 999]
    schedule = NoiseSchedule()
    x0 = torch.from_numpy(np.load(found.store.read(stage.needs["data"][0], "test.npy"))[:8]).float() / 127.5 - 1
    noise = Philox.for_purpose(0, "probe").normal(torch.arange(8), (1, 8, 8))
    teacher = workbench.denoiser(stage.needs["teacher"][0], "ema")
    student = workbench.denoiser(stage.needs["students"][0], "ema")
    for t, error in zip(stored["t"], stored["error"], strict=True):
        x_t = float(schedule.alpha[t]) * x0 + float(schedule.sigma[t]) * noise
        with torch.no_grad():
            gap = (student(x_t, t).sample - teacher(x_t, t).sample).double()
        assert error == pytest.approx(float(gap.square().mean()), rel=1e-5)


def test_samples_do_not_depend_on_who_else_is_drawn(toy_run):
    found, workbench = toy_run.session, bench(toy_run.session)
    for stage in find(found, "samples"):
        stored = np.load(found.store.read(stage.identity, "images.npy"))
        assert stored.shape == (640, 1, 8, 8)
        some = draw(workbench, stage.spec, stage.needs["students"], range(5, 9), stage).numpy()
        assert np.abs(stored[5:9].astype(int) - some.astype(int)).max() <= 1
        assert len(np.unique(stored[:8], axis=0)) == 8


def test_rounds_change_what_the_students_predict(toy_run):
    found = toy_run.session
    rounds = find(found, "round")
    assert [r.spec["round"]["kind"] for r in rounds] == ["convert", "convert", "halve", "halve"]
    for stage in rounds:
        assert found.store.read_json(stage.identity, "network.json")["prediction"] == "v_prediction"
        before = found.store.read(stage.needs["before"][stage.spec["before"]["own"]], "ema.safetensors")
        after = found.store.read(stage.identity, "raw.safetensors")
        assert before.read_bytes() != after.read_bytes()
        assert found.store.read_json(stage.identity, "log.json")["curve"]


def test_a_called_expert_of_another_type_is_refused_and_an_idle_one_is_not(toy_run):
    found, workbench = toy_run.session, bench(toy_run.session)
    (stage,) = [s for s in find(found, "samples") if s.spec["sampler"]["name"] == "progressive"]
    old = find(found, "student", "expert-0")[0].identity
    mixed = (old, stage.needs["students"][1])
    with pytest.raises(StageFailed, match="predict epsilon and v_prediction"):
        draw(workbench, stage.spec, mixed, range(2), stage)
    idle = {**stage.spec, "edges": [1]}
    assert draw(workbench, idle, mixed, range(2), stage).shape == (2, 1, 8, 8)


def test_store_dtype_is_what_later_stages_load(toy_run, tmp_path):
    half = suite(store_dtype="fp16", probe={"enabled": False}, speed={"enabled": False})
    run(half, toy_run.store, tmp_path, Events())
    (student,) = find(session(half, toy_run.store), "student")
    for name in ("ema", "raw"):
        stored = load_file(Store(toy_run.store).read(student.identity, f"{name}.safetensors"))
        assert {v.dtype for v in stored.values()} == {torch.float16}
    network = bench(session(half, toy_run.store)).denoiser(student.identity, "ema")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in network.parameters())


def test_readings_are_warm_and_leave_the_warm_up_out():
    calls, ticks = [], iter([0.0, 1.0, 10.0, 12.5, 20.0, 23.0])
    assert readings(lambda: calls.append(1), 3, "cpu", lambda: next(ticks)) == [1.0, 2.5, 3.0]
    assert len(calls) == 4


def test_speed_says_what_it_measured(toy_run):
    stage = find(toy_run.session, "speed")[0]
    found = Store(toy_run.store).read_json(stage.identity, "speed.json")
    assert found["images_per_second"] == pytest.approx(4 / found["readings"]["batch_seconds"][0])
    assert len(found["readings"]["latency_seconds"]) == 5
    assert found["latency_ms_median"] == pytest.approx(1e3 * np.median(found["readings"]["latency_seconds"]))
    assert (found["batch"], found["compile"], found["peak_memory_mb"]) == (4, "off", None)


def test_a_course_is_that_of_its_job():
    found = course({"steps": 4, "offset": 2, "horizon": 8, "pace": "3/2"})
    assert [found.position(i) for i in range(5)] == [2.0, 3.5, 5.0, 6.5, 8.0]


def test_the_last_word_on_each_row_is_in_the_document(toy_run):
    rows = {row["wrapper"]: row for row in toy_run.results.document["rows"] if row["role"] == "student"}
    lifted, single = rows["o2mkd"], rows["single"]
    assert single["images_total"] == 256
    assert lifted["images_total"] == 256 + lifted["rounds_images"]
    assert lifted["rounds"] == ["convert 4", "halve 2"]
    assert lifted["params_total"] == 2 * single["params_total"]
    assert lifted["params_active"] == single["params_active"]
    assert lifted["macs_per_image"] == single["macs_per_image"]
    assert lifted["train_seconds"] > 0
    assert lifted["device_seconds"] is None


class MyMethod(KDMethod):
    """What a third party might write."""

    def student_features(self):
        return ("mid",)

    def weights(self):
        return {"mine": 0.5}

    def terms(self, ctx):
        return {"mine": (ctx.student - ctx.teacher).abs().mean() + ctx.student_features["mid"].square().mean()}


def test_o2mkd_lifts_a_method_nobody_here_has_seen(toy_run, tmp_path):
    @hookimpl
    def register_kd_methods(register):
        register("mine", f"{__name__}:MyMethod", summary="a test's own")

    registry().add(types.SimpleNamespace(api=1, register_kd_methods=register_kd_methods), "third-party", "0", "mine")
    try:
        mapping = suite(methods=["mine"], wrappers=[{"o2mkd": {"students": 2}}])
        results = run(mapping, toy_run.store, tmp_path, Events())
        found = session(mapping, toy_run.store)
    finally:
        del registry()._plugins["kd_methods", "mine"]
    row = next(row for row in results.document["rows"] if row["role"] == "student")
    assert (row["status"], row["method"], row["students"]) == ("done", "mine", 2)
    manifest = found.store.manifest(find(found, "student")[0].identity)
    assert any(name.endswith("mine") for name in manifest.meta["sources"])


def test_run_writes_tables_and_pictures(toy_run, tmp_path):
    events = Events()
    one = session(suite(), toy_run.store)
    results = run_session(one, tmp_path / "out", events)
    assert events.labels("start") == []
    assert [e.kind for e in events] == ["plan", "end"]
    assert events[-1].data == {"failed": 0, "made": 0}
    assert (tmp_path / "out" / "results.csv").is_file()
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 2
    assert len(results.frame()) == 2
    assert results.failed == 0


def test_run_takes_a_mapping_and_filters(toy_run, tmp_path):
    results = o2mkd_bench.run(suite(), out=tmp_path, store=toy_run.store, only=["method=output"], fail_fast=True)
    assert [row["method"] for row in results.document["rows"]] == ["", "output"]
    assert results.out == tmp_path
    assert results_folder(toy_run.session.suite).parts == ("results", "toy")


def test_what_another_source_made_goes_with_all_that_follows_from_it(toy_run, tmp_path, monkeypatch):
    store = Store(shutil.copytree(toy_run.store, tmp_path / "store"))
    known = sources.module_hash
    monkeypatch.setattr(sources, "module_hash", lambda name: "other" if name.endswith("kd.output") else known(name))
    discard_changed(session(toy_run.suite, store.root))
    gone = {stage.kind for name, stage in toy_run.session.plan.stages.items() if not store.has(name)}
    kept = {stage.kind for name, stage in toy_run.session.plan.stages.items() if store.has(name)}
    assert gone == {"state", "student", "round", "samples", "score", "probe"}
    assert kept == {"data", "reference", "teacher", "samples", "score", "speed"}, "the teacher's own rows stay"


def test_a_checkpoint_is_a_teacher_like_any_other(toy_run, tmp_path):
    (trained,) = find(toy_run.session, "teacher")
    workbench = bench(toy_run.session)
    network = workbench.denoiser(trained.identity, "ema")
    scheduler = DDPMScheduler(**workbench.schedule(trained.identity).scheduler_config())
    folder = tmp_path / "checkpoint"
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    mapping = suite(teachers=[{"name": "given", "path": str(folder)}])
    results = run(mapping, toy_run.store, tmp_path, Events())
    assert [row["status"] for row in results.document["rows"]] == ["done", "done"]
    found = session(mapping, toy_run.store)
    (given,) = find(found, "teacher")
    theirs = load_file(found.store.read(given.identity, "ema.safetensors"))
    assert all(torch.equal(theirs[name], value) for name, value in network.state_dict().items())
    mine, own = (s.needs["students"] for s in (find(found, "probe")[0], find(toy_run.session, "probe")[0]))
    assert len(mine) == len(own) == 1
    files = [found.store.read(names[0], "ema.safetensors").read_bytes() for names in (mine, own)]
    assert files[0] == files[1], "equal weights teach equally, wherever they come from"


def test_options_that_change_a_number_are_part_of_its_protocol(toy_run, tmp_path):
    shutil.copytree(toy_run.store, tmp_path / "store")
    fid = {"fid": {"network": "embedded"}}

    def scored(size):
        kid = {"kid": {"network": "embedded", "subset_size": size, "subsets": 2}}
        return run(suite(metrics=[fid, kid]), tmp_path / "store", tmp_path / str(size), Events()).document

    many, few = scored(200), scored(10)
    protocols = {entry["column"]: entry["protocol"] for entry in many["metrics"]}
    assert protocols["fd_digits"] == toy_run.results.document["metrics"][0]["protocol"]
    assert set(protocols["kd_digits"]) - set(protocols["fd_digits"]) == {"kid.subset_size", "kid.subsets"}
    assert "kid.subsets 2; kid.subset_size 200" in markdown(many)
    two = r"kd_digits was measured under two protocols \(kid\.subset_size 200 and 10\)"
    for put_together in (lambda: compare(many, few), lambda: merge([many, few])):
        with pytest.raises(UserError, match=two):
            put_together()
    # results of before do not say which options theirs had
    old = copy.deepcopy(many)
    for key in ("kid.subset_size", "kid.subsets"):
        del old["metrics"][1]["protocol"][key]
    with pytest.raises(UserError, match=r"kid\.subset_size None and 200"):
        merge([old, many])
    merge([toy_run.results.document, {**many, "metrics": many["metrics"][:1], "rows": []}])
