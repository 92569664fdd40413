"""``intervals: auto``: edges that are measured first, and a plan that goes on when they are known."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import SUITE, Events, session, suite, walk_of

from o2mkd_bench import Interval, Job, Law, Lift, NoiseSchedule, UserError, cli, runner
from o2mkd_bench.core.edges import WAITING, equal_shares
from o2mkd_bench.core.errors import CorruptArtifact, StageFailed
from o2mkd_bench.core.status import Survey
from o2mkd_bench.engine.denoiser import Tables
from o2mkd_bench.results import document
from o2mkd_bench.runner import Results, run_session, settled
from o2mkd_bench.stages import edges as stage_edges
from o2mkd_bench.stages.bench import Bench
from o2mkd_plugins.wrappers.o2mkd import O2MKD
from o2mkd_plugins.wrappers.options import O2MKDOptions, SingleOptions
from o2mkd_plugins.wrappers.single import Single

T = 1000
POINTS = [round(t) for t in np.linspace(0, T - 1, 64)]
AUTO = {"o2mkd": {"students": 3, "intervals": "auto"}}
CONTROL = {"single": {"students": 3, "intervals": "auto"}}
FAST = {"speed": {"enabled": False}, "probe": {"enabled": False}}


# --- where the edges lie


def shares(error, students=4, timesteps=T):
    points = [round(t) for t in np.linspace(0, timesteps - 1, 64)]
    return equal_shares(students, timesteps, points, [error(t / timesteps) for t in points])


def test_equal_error_everywhere_gives_equal_widths():
    assert shares(lambda t: 0.3) == [250, 500, 750]
    assert shares(lambda t: 0.3, students=1) == []


def test_it_is_the_root_of_the_error_that_is_shared():
    # the root is u, of which the integral is u**2 / 2
    assert shares(lambda u: u * u) == pytest.approx([500, 707, 866], abs=1)


@pytest.mark.parametrize("seed", range(3))
def test_each_interval_has_its_share_to_a_timestep(seed):
    error = np.random.default_rng(seed).uniform(0.5, 4, 64)
    edges = equal_shares(5, T, POINTS, error.tolist())
    root = np.interp(np.arange(T), POINTS, np.sqrt(error))
    parts = [part.sum() for part in np.split(root, edges)]
    assert parts == pytest.approx([root.sum() / 5] * 5, abs=2 * root.max())


@pytest.mark.parametrize("place", [0, 32, 63])
def test_no_interval_is_narrower_than_a_hundredth_of_the_axis(place):
    error = [1e-12] * 64
    error[place] = 1.0
    edges = equal_shares(8, T, POINTS, error)
    widths = np.diff([0, *edges, T])
    assert len(widths) == 8
    assert widths.min() == 10
    # no further from the peak than there must be room for
    centre = np.clip(POINTS[place], 0, T)
    assert np.abs(np.array(edges) - centre).max() <= 8 * 10 + 16


def test_more_students_than_hundredths_share_what_there_is():
    assert equal_shares(4, 5, [0, 4], [1.0, 1.0]) == [1, 2, 4]
    assert np.diff([0, *equal_shares(200, 300, [0, 299], [0.0, 9.0]), 300]).min() == 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_error_without_shares_is_said(value):
    with pytest.raises(StageFailed, match="which has no shares"):
        shares(lambda t: value)


# --- what the wrappers ask for


def job(steps=100, batch=120):
    whole = Interval(0, T)
    return Job("student", whole, whole, Law.uniform(whole), batch, steps, steps)


PLAIN = job()


def asked(wrapper, given=PLAIN, edges=(100, 400)):
    """The jobs of a wrapper whose edges are measured, and what it asked for."""
    wishes = []

    def measured(students, warmup):
        wishes.append((students, warmup))
        return edges

    return wrapper.wrap(given, Lift(NoiseSchedule(), None, "s.yaml: wrappers.x", measured)), wishes


def o2mkd(**options):
    return O2MKD(O2MKDOptions(**{"students": 3, "intervals": "auto", **options}))


def test_the_student_that_is_measured_is_that_of_the_lineages_own_warm_up():
    jobs, wishes = asked(o2mkd())
    assert wishes == [(3, jobs[0])]
    assert [(j.serves.lo, j.serves.hi) for j in jobs[1:]] == [(0, 100), (100, 400), (400, T)]
    literal = O2MKD(O2MKDOptions(students=3, intervals=(100, 400))).wrap(job(), Lift(NoiseSchedule(), None))
    assert jobs == literal


@pytest.mark.parametrize("options", [{"budget": "per_student"}, {"expert_batch": "full"}, {"overlap": 0.3}])
def test_its_warm_up_does_not_depend_on_the_edges_where_the_lineages_does(options):
    jobs, ((_, measured),) = asked(o2mkd(**options))
    assert measured.horizon == 100 != jobs[0].horizon
    assert replace(jobs[0], horizon=100) == measured


def test_the_controls_ask_for_what_o2mkd_would():
    wish = asked(o2mkd())[1]
    options = {"students": 3, "intervals": "auto"}
    (control,), wishes = asked(Single(SingleOptions(**options, scale=2)))
    assert wishes == wish
    assert control.law == Law.equal([Interval(0, 100), Interval(100, 400), Interval(400, T)])
    (control,), wishes = asked(Single(SingleOptions(**options, normalise=True)))
    assert wishes == wish
    assert control.normalise == (100, 400)


def test_one_student_needs_no_measurement():
    jobs, wishes = asked(o2mkd(students=1, init="scratch"))
    assert not wishes
    assert [j.serves for j in jobs] == [Interval(0, T)]


@pytest.mark.parametrize(
    ("wrapper", "given"),
    [
        (o2mkd(warmup=0), job()),
        (o2mkd(init="scratch"), job()),
        (o2mkd(init="teacher"), job()),
        (Single(SingleOptions(students=2, intervals="auto")), job(steps=1)),
    ],
)
def test_without_a_warm_up_there_is_nothing_to_measure(wrapper, given):
    with pytest.raises(UserError, match=r"^s.yaml: wrappers.x.intervals: auto goes by .* use init: shared with"):
        asked(wrapper, given)


def test_the_wrong_number_of_edges_is_refused():
    with pytest.raises(UserError, match="3 students need 2 inner edges"):
        asked(o2mkd(), edges=(3,))


def test_a_lift_without_a_plan_has_no_measured_edges():
    with pytest.raises(UserError, match="there are no measured edges here"):
        o2mkd().wrap(job(), Lift(NoiseSchedule(), None))


# --- the plan


def planned(folder, edges=None, **changes):
    """A plan whose ``edges`` stages, if any are given, have all found these."""
    found = session(suite(wrappers=["single", AUTO, CONTROL], **{**FAST, **changes}), folder)
    if edges is not None:
        for name in found.plan.awaited():
            put(found, name, edges)
        found = found.again()
    return found


def put(found, name, edges):
    """An artifact as if the stage had been made."""
    stage = found.plan.stages[name]
    with found.store.writing(name, stage.kind, stage.label, stage.spec, stage.needs) as draft:
        (draft.dir / "edges.json").write_text(json.dumps({"edges": edges, "t": [0], "error": [1.0]}))


def kinds(plan):
    counts = {}
    for stage in plan.stages.values():
        counts[stage.kind] = counts.get(stage.kind, 0) + 1
    return counts


def students(plan):
    return [cell for cell in plan.cells if cell.role != "teacher"]


def test_an_empty_store_shows_the_cells_that_wait_and_plans_what_they_wait_for(tmp_path):
    found = planned(tmp_path, seeds=[0, 1], baselines=["equal_total", "per_student"])
    waiting = [cell for cell in found.plan.cells if cell.unresolved]
    # of both seeds: the students, the control, and two baselines
    assert len(waiting) == 8
    assert {cell.unresolved for cell in waiting} == {WAITING}
    assert {cell.role for cell in waiting} == {"student", "baseline"}
    assert [cell.labels["wrapper"] for cell in waiting][:3] == [
        "o2mkd(students=3, intervals=auto)",
        "single (total of o2mkd(students=3, intervals=auto))",
        "single (per student of o2mkd(students=3, intervals=auto))",
    ]
    assert {s.status for s in Survey(found.plan, found.store).standings()} == {"missing", "unresolved"}
    # both wrappers wait for one stage a seed, which takes one warm-up
    counts = kinds(found.plan)
    assert (counts["edges"], counts["state"], counts["student"]) == (2, 2, 2)
    for name in found.plan.awaited():
        stage = found.plan.stages[name]
        assert sorted(found.plan.stages[need].kind for need in stage.inputs()) == ["data", "state", "teacher"]
    order = list(found.plan.stages)
    assert all(order.index(need) < order.index(name) for name in order for need in found.plan.stages[name].inputs())


def test_known_edges_are_literal_edges(tmp_path):
    found = planned(tmp_path / "auto", [100, 400], baselines=["per_student"])
    assert not found.plan.awaited()
    literal = {"students": 3, "intervals": [100, 400]}
    wrappers = ["single", {"o2mkd": literal}, {"single": literal}]
    other = session(suite(wrappers=wrappers, baselines=["per_student"], **FAST), tmp_path / "literal")
    assert [c.identity for c in found.plan.cells] == [c.identity for c in other.plan.cells]
    assert found.plan.stages.keys() - other.plan.stages.keys() == set(found.plan.cells[2].measured)
    assert [c.trained.edges for c in students(found.plan)] == [(), (100, 400), (), ()]


def test_seeds_with_edges_of_their_own_have_one_recipe(tmp_path):
    rules = {"baselines": ["equal_total", "equal_batch"]}
    one, other = (
        students(planned(tmp_path / str(seed), edges, seeds=[seed], **rules).plan)
        for seed, edges in enumerate(([100, 400], [200, 500]))
    )
    assert [c.trained.edges for c in one] != [c.trained.edges for c in other]
    by_name = [{c.labels["wrapper"]: c.recipe for c in cells} for cells in (one, other)]
    shared = by_name[0].keys() & by_name[1].keys()
    assert {"o2mkd(students=3, intervals=auto)", "single"} <= shared
    assert [by_name[0][name] for name in shared] == [by_name[1][name] for name in shared]
    assert len({by_name[0][name] for name in shared}) == len(shared)


def test_what_decides_the_edges_stays_in_the_plan_of_a_cell_that_stands_there_literally(tmp_path):
    literal = {"o2mkd": {"students": 3, "intervals": [100, 400]}}
    found = session(suite(wrappers=[literal, AUTO], **FAST), tmp_path)
    (name,) = found.plan.awaited()
    put(found, name, [100, 400])
    found = found.again()
    (cell,) = students(found.plan)
    assert cell.measured == (name,)
    assert name in found.plan.stages
    # and is of no use to make again once it has answered
    assert name not in Survey(found.plan, found.store).missing()


def identities(folder, **changes):
    return set(planned(folder, **changes).plan.awaited())


def test_what_the_edges_depend_on(tmp_path):
    plain = identities(tmp_path)
    assert len(plain) == 1
    assert identities(tmp_path, name="other", sampling={"images": 641}) == plain
    for changes in (
        {"seeds": [1]},
        {"methods": ["none"]},
        {"budgets": [512]},
        {"precision": "bf16"},
        {"training": {**SUITE["training"], "lr": 1e-4}},
        {"students": [{"name": "half", "width": 1.0}]},
    ):
        assert plain.isdisjoint(identities(tmp_path, **changes)), changes
    more = {"o2mkd": {"students": 4, "intervals": "auto"}}
    longer = {"o2mkd": {"students": 3, "intervals": "auto", "warmup": 0.5}}
    found = session(suite(wrappers=[AUTO, more, longer], **FAST), tmp_path)
    assert len(found.plan.awaited()) == 3
    assert kinds(found.plan)["state"] == 2


def test_a_method_without_a_teacher_is_still_measured_against_it(tmp_path):
    found = planned(tmp_path, methods=["none"])
    (name,) = found.plan.awaited()
    stage = found.plan.stages[name]
    assert "teacher" in stage.needs
    assert "teacher" not in found.plan.stages[stage.needs["start"][0]].needs


def test_edges_that_the_wrapper_refuses_are_the_failure_of_its_cells_alone(tmp_path, monkeypatch, capsys):
    found = planned(tmp_path / "store", [1, 400])
    assert not found.plan.awaited()
    standings = {s.cell.labels["wrapper"].partition("(")[0]: s for s in Survey(found.plan, found.store).standings()}
    assert standings["o2mkd"].status == "failed"
    assert standings["o2mkd"].reason.startswith("wrappers.o2mkd(students=3, intervals=auto): expert 0 on [0, 1) would")
    assert [c.refused != "" for c in students(found.plan)] == [False, True, False]
    assert document(found)["rows"][2]["status"] == "failed"
    out = show(tmp_path, monkeypatch, capsys, "plan")
    assert "1 cell failed: " in out
    assert "would get less than one image a step" in " ".join(out.split())


def test_a_filter_is_kept_when_planned_again(tmp_path):
    found = session(suite(wrappers=["single", AUTO], **FAST), tmp_path, ["wrapper=o2mkd*"])
    (name,) = found.plan.awaited()
    put(found, name, [100, 400])
    assert [c.labels["wrapper"] for c in students(found.again().plan)] == ["o2mkd(students=3, intervals=auto)"]


def test_a_wrapper_that_is_wrong_whatever_is_measured_stops_the_plan(tmp_path):
    with pytest.raises(UserError, match="auto goes by the student of a shared warm-up"):
        session(suite(wrappers=[{"o2mkd": {"intervals": "auto", "warmup": 0}}]), tmp_path)


# --- the run


def show(folder, monkeypatch, capsys, verb, *words):
    """What a verb prints of the suite with ``store`` below ``folder``."""
    mapping = suite(wrappers=["single", AUTO, CONTROL], **FAST)
    (folder / "s.yaml").write_text(yaml.safe_dump(mapping))
    monkeypatch.setenv("COLUMNS", "160")
    capsys.readouterr()
    with suppress(SystemExit):
        cli.main([verb, str(folder / "s.yaml"), "--store", str(folder / "store"), *words])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def undrawn():
    """Reports without pictures, as drawing takes longer than all of the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "report", lambda session, out: Results(document(session), out))
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory, undrawn):
    """A finished run, its folder and its events."""
    folder, events = tmp_path_factory.mktemp("auto"), Events()
    results = run_session(planned(folder / "store"), folder, events)
    return results, folder, events


@pytest.fixture
def copied(ran, tmp_path):
    shutil.copytree(ran[1] / "store", tmp_path / "store")
    return tmp_path / "store"


def edges_file(store):
    (path,) = store.rglob("edges.json")
    return path


def test_a_run_measures_first_and_goes_on_with_literal_edges(ran):
    results, folder, events = ran
    rows = {row["wrapper"].partition("(")[0] or "teacher": row for row in results.document["rows"]}
    assert {row["status"] for row in results.document["rows"]} == {"done"}
    stored = json.loads(edges_file(folder / "store").read_text())
    assert rows["o2mkd"]["edges"] == stored["edges"] == equal_shares(3, T, stored["t"], stored["error"])
    assert stored["t"] == POINTS
    first, second = (event.data for event in events if event.kind == "plan")
    # data, teacher, warm-up, edges; then what is left, the experts beside the single students
    assert (first, second["reused"]) == ({"stages": 4, "reused": 0}, 0)
    label = "digits/half/output/o2mkd(students=3, intervals=auto)"
    assert events.labels("done")[2:4] == [f"{label} warmup seed 0", f"{label} edges of 3 seed 0"]
    assert len(events.labels("done")) == 4 + second["stages"]
    assert events.texts()[0] == "edges that 2 cells wait for are measured first"
    assert [event.data for event in events if event.kind == "end"] == [{"failed": 0, "made": 4 + second["stages"]}]


def test_a_second_run_makes_nothing(ran, undrawn):
    events = Events()
    found = run_session(planned(ran[1] / "store"), ran[1], events)
    assert events.labels("done") == []
    assert len([event for event in events if event.kind == "plan"]) == 1
    assert [row["edges"] for row in found.document["rows"]] == [row["edges"] for row in ran[0].document["rows"]]


def test_a_suite_with_those_edges_written_down_has_nothing_to_make(ran):
    edges = json.loads(edges_file(ran[1] / "store").read_text())["edges"]
    found = session(suite(wrappers=[{"o2mkd": {"students": 3, "intervals": edges}}], **FAST), ran[1] / "store")
    assert Survey(found.plan, found.store).missing() == {}


def test_the_error_is_that_of_the_averaged_warm_up_on_training_images(ran):
    found = planned(ran[1] / "store")
    (name,) = found.plan.cells[2].measured
    stage, bench = found.plan.stages[name], bench_of(found)
    images, noise, _ = stage_edges._images(stage, bench)
    train = np.load(found.store.read(stage.needs["data"][0], "train.npy"))
    known = {image.tobytes() for image in train}
    assert all(image.tobytes() in known for image in images.numpy())
    assert images.shape == noise.shape == (128, *train.shape[1:])
    state = load_file(found.store.read(stage.needs["start"][0], "state.safetensors"))
    about = bench.network(stage.needs["start"][0])
    network = bench.family(about).build(about["config"]).eval()
    network.load_state_dict({k.partition("/")[2]: v for k, v in state.items() if k.startswith("ema/")})
    teacher = bench.denoiser(stage.needs["teacher"][0], "ema")
    tables = Tables.of(bench.schedule(stage.needs["teacher"][0]), torch.device("cpu"))
    stored = json.loads(edges_file(found.store.root).read_text())
    for place in (0, 40, 63):
        t = torch.full((128,), POINTS[place])
        x_t = tables.alpha[t[0]] * (images / 127.5 - 1) + tables.sigma[t[0]] * noise
        with torch.no_grad():
            gap = network(x_t, t).sample - teacher(x_t, t).sample
        assert stored["error"][place] == pytest.approx(gap.square().mean().item(), rel=1e-5)


def bench_of(found):
    return Bench(found.store, "cpu", Events(), found.registry)


def test_the_images_are_drawn_by_the_seed_each_once(ran):
    found = planned(ran[1] / "store")
    (name,) = found.plan.cells[2].measured
    stage, bench = found.plan.stages[name], bench_of(found)

    def drawn(**changes):
        return stage_edges._images(replace(stage, spec={**stage.spec, **changes}), bench)

    images, noise, _ = drawn()
    assert torch.equal(drawn()[0], images)
    other, fresh, _ = drawn(seed=1)
    assert not torch.equal(other, images)
    assert not torch.equal(fresh, noise)
    every = np.load(found.store.read(stage.needs["data"][0], "train.npy"))
    # all of a small training set, in its order
    assert torch.equal(drawn(images=10**6)[0], torch.from_numpy(every))


def test_plan_and_status_say_how_many_wait(ran, tmp_path, monkeypatch, capsys):
    for verb in ("plan", "status"):
        out = " ".join(show(tmp_path, monkeypatch, capsys, verb).split())
        assert f"2 cells unresolved: {WAITING}" in out
        # of each cell, and of both together
        assert out.count(" unresolved") == {"plan": 3, "status": 4}[verb]
    assert not (tmp_path / "store").exists(), "a plan needs no store"
    cells = json.loads(show(tmp_path, monkeypatch, capsys, "plan", "--json"))["cells"]
    assert [(cell["status"], len(cell["stages"])) for cell in cells] == [("missing", 2)] * 2 + [("unresolved", 1)] * 2
    shutil.copytree(ran[1] / "store", tmp_path / "store")
    assert "unresolved" not in show(tmp_path, monkeypatch, capsys, "plan")
    assert "4 done" in show(tmp_path, monkeypatch, capsys, "status")


def test_damaged_edges_are_measured_again_and_are_the_same(copied, tmp_path, undrawn):
    path = edges_file(copied)
    told = path.read_bytes()
    path.write_bytes(told.replace(b"edges", b"egdes"))
    found = planned(copied)
    assert found.plan.awaited(), "a plan makes nothing of damaged edges, and does not fail"
    assert Survey(found.plan, found.store).standing(found.plan.cells[2]).status == "unresolved"
    with pytest.raises(CorruptArtifact):
        found.again()
    events = Events()
    results = run_session(found, tmp_path, events)
    assert events.labels("done") == ["digits/half/output/o2mkd(students=3, intervals=auto) edges of 3 seed 0"]
    assert path.read_bytes() == told
    assert {row["status"] for row in results.document["rows"]} == {"done"}


def test_what_other_source_made_is_measured_again_before_all_else(copied, tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(runner, "discard_changed", lambda found: found.store.discard(*edges_of(found)))
    monkeypatch.setattr(stage_edges, "equal_shares", lambda students, *_: [300, 600])
    results = run_session(planned(copied), tmp_path, Events(), rebuild_changed=True)
    assert results.document["rows"][2]["edges"] == [300, 600]
    assert {row["status"] for row in results.document["rows"]} == {"done"}


def edges_of(found):
    (name,) = found.plan.cells[2].measured
    return name, "for the test"


def test_edges_that_cannot_be_measured_fail_their_cells_alone(copied, tmp_path, undrawn, monkeypatch):
    def flat(*_):
        raise StageFailed("no shares")

    monkeypatch.setattr(stage_edges, "equal_shares", flat)
    found = planned(copied)
    found.store.discard(*edges_of(found))
    events = Events()
    results = run_session(planned(copied), tmp_path, events)
    assert [row["status"] for row in results.document["rows"]] == ["done", "done", "failed", "failed"]
    assert "edges of 3 seed 0: no shares" in results.document["rows"][2]["reason"]
    assert results.failed == 2
    # tried once
    assert len(events.labels("failed")) == 1
    assert len(events.texts()) == 1


def test_nothing_is_measured_with_a_teacher_that_is_not_what_it_should_be(tmp_path):
    teacher = {
        **SUITE["teachers"][0],
        "expect": {"column": "fd_digits", "value": 1e-3, "sampler": "ddim", "steps": 2, "tolerance": 0.01},
    }
    found = session(suite(wrappers=[AUTO], teachers=[teacher], **FAST), tmp_path)
    events = Events()
    walk = walk_of(found, events)
    found = settled(found, walk)
    assert found.plan.awaited()
    assert not [label for label in events.labels("start") if "warmup" in label or "edges" in label]
    (cell,) = students(found.plan)
    standing = Survey(found.plan, found.store).standing(cell)
    assert standing.status == "failed"
    assert "expected 0.001" in standing.reason
