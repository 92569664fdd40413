"""What a verb begins with, and how far a plan is by what lies in the store."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from o2mkd_bench import UserError
from o2mkd_bench.core import session as module
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.plan import Stage
from o2mkd_bench.core.session import prepare, selection, store_at, this_machine
from o2mkd_bench.core.sources import module_hash, sources
from o2mkd_bench.core.status import UNAVAILABLE, Survey
from o2mkd_bench.core.suite import from_mapping

SUITE = {
    "name": "toy",
    "device": "cpu",
    "datasets": ["digits"],
    "teachers": [{"name": "t", "train": {"model": {"unet2d": {"block_out_channels": [32]}}, "images": 1024}}],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["none", "output"],
    "wrappers": ["single"],
    "samplers": [{"ddim": {"steps": 4}}, {"progressive": {"steps": 4, "start": 8}}],
    "metrics": [{"fid": {"network": "embedded"}}],
    "budgets": [12800],
    "sampling": {"images": 640},
}


@pytest.fixture
def session(tmp_path):
    return prepare(from_mapping(SUITE, tmp_path), tmp_path / "store")


def put(session, *names, **meta):
    """Artifacts of these stages, as if they had been made."""
    for name in names:
        stage = session.plan.stages[name]
        with session.store.writing(name, stage.kind, stage.label, stage.spec, stage.needs) as draft:
            draft.meta["sources"] = meta.get("sources", sources(stage, session.registry))


def row(session, method="output", sampler="ddim"):
    (cell,) = (c for c in session.plan.cells if (c.labels["method"], c.labels["sampler"]) == (method, sampler))
    return cell


def standing(session, cell):
    return Survey(session.plan, session.store).standing(cell)


# the session


def test_a_session_holds_what_a_verb_needs(session, tmp_path):
    assert session.store.root == tmp_path / "store"
    assert session.machine.device == "cpu"
    assert session.machine.versions.keys() == {"torch"}
    assert session.plan.cells


def test_the_store_is_the_one_named_or_that_of_the_environment_or_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("O2MKD_STORE", raising=False)
    assert store_at(None).root == tmp_path / ".o2mkd" / "store"
    monkeypatch.setenv("O2MKD_STORE", "elsewhere")
    assert store_at(None).root == tmp_path / "elsewhere"
    assert store_at(tmp_path / "named").root == tmp_path / "named"


def test_the_version_of_cuda_counts_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "resolve_device", lambda device: "cuda:0")
    monkeypatch.setattr(module, "device_name", lambda device: "H200")
    (tmp_path / "torch").mkdir()
    file = tmp_path / "torch" / "version.py"

    class Torch:
        version = "2"

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: Torch())
    for text, version in (("cuda: Optional[str] = '12.8'\n", "12.8"), ("cuda = '11'\nhip = 'x'\n", "11"), ("", "none")):
        file.write_text(f"__version__ = '2'\n{text}", encoding="utf-8")
        assert this_machine(from_mapping(SUITE, tmp_path)).versions["cuda"] == version


def test_a_device_that_is_not_here_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="was asked for"):
        this_machine(from_mapping({**SUITE, "device": "cuda:7"}, tmp_path))


def test_hub_teachers_are_downloaded_only_when_asked(tmp_path, monkeypatch):
    asked = []

    def download(repo, revision):
        asked.append(repo)
        raise UserError("no network")

    monkeypatch.setattr(module, "download_hub", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    suite = from_mapping({**SUITE, "teachers": [{"name": "h", "hub": "nobody/nothing"}]}, tmp_path)
    assert {c.unresolved != "" for c in prepare(suite, tmp_path / "store").plan.cells} == {True}
    assert not asked
    with pytest.raises(UserError, match=r"^teachers\.h\.hub: no network"):
        prepare(suite, tmp_path / "store", download=True)
    assert asked == ["nobody/nothing"]


LABELS = {"method": "output", "wrapper": "o2mkd(students=2, warmup=0.1)", "student": "", "steps": 4}


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("method=output", True),
        ("method=none", False),
        ("method=none, out*", True),
        ("steps=4", True),
        ("wrapper=o2mkd(students=2, warmup=0.1)", True),
        ("wrapper=o2mkd*", True),
        ("student=half", True),
    ],
)
def test_only_reads_patterns(text, accepted):
    assert selection(text)(LABELS) is accepted


@pytest.mark.parametrize("text", ["methd=output", "method", "=x"])
def test_only_refuses_what_is_no_axis(text):
    with pytest.raises(UserError, match=f"--only {text}: write axis=pattern.*\\(axes: dataset, teacher"):
        selection(text)
    with pytest.raises(UserError, match="did you mean 'method'"):
        selection("methd=x")


def test_values_of_one_axis_are_joined_by_commas(tmp_path):
    suite = from_mapping({**SUITE, "wrappers": ["single", "o2mkd"]}, tmp_path)
    text = "--only wrapper=single --only wrapper=o2* leaves no cell; join the values of one axis by commas: --only "
    with pytest.raises(UserError, match=re.escape(text) + r"wrapper=single,o2\*$"):
        prepare(suite, tmp_path / "store", ["wrapper=single", "wrapper=o2*"])
    assert prepare(suite, tmp_path / "store", ["wrapper=*", "wrapper=o2*"]).plan.cells


# the survey


def test_an_empty_store_lacks_everything(session):
    survey = Survey(session.plan, session.store)
    assert {s.status for s in survey.standings()} == {"missing"}
    assert survey.missing() == session.plan.stages
    assert list(survey.missing()) == list(session.plan.stages)


def test_a_cell_is_done_when_its_own_stages_are_there_whatever_became_of_their_inputs(session):
    cell = row(session)
    put(session, *cell.stages())
    assert standing(session, cell).status == "done"
    missing = Survey(session.plan, session.store).missing()
    assert not set(cell.stages()) & missing.keys()
    # the student is still needed, to draw with the other sampler
    assert cell.trained.students[0] in missing
    put(session, *missing)
    assert not Survey(session.plan, session.store).missing()
    shutil.rmtree(session.store.root)
    assert standing(session, cell).status == "missing"


def test_a_store_is_looked_at_once(session, monkeypatch):
    looked = []
    has, failure = session.store.has, session.store.failure
    monkeypatch.setattr(session.store, "has", lambda name: looked.append(name) or has(name))
    monkeypatch.setattr(session.store, "failure", lambda name: looked.append((name, "failure")) or failure(name))
    survey = Survey(session.plan, session.store)
    for _ in range(2):
        survey.standings()
        survey.missing()
    assert len(looked) == len(set(looked))


def test_a_failure_below_fails_every_cell_above_it_with_its_reason(session):
    cell = row(session)
    student = cell.trained.students[0]
    session.store.fail(student, "digits/half/output seed 0", "loss is not finite", "diverged")
    found = standing(session, cell)
    assert (found.status, found.reason) == ("failed", "digits/half/output seed 0: loss is not finite")
    assert standing(session, row(session, sampler="progressive(start=8)")).status == "failed"
    assert standing(session, row(session, "none")).status == "missing"
    put(session, student)
    assert standing(session, cell).status == "missing"


def test_the_first_failure_in_the_order_of_making_is_the_reason(session):
    cell = row(session)
    session.store.fail(cell.samples, "samples", "late", "error")
    session.store.fail(cell.trained.students[0], "student", "early", "error")
    assert standing(session, cell).reason == "student: early"


def test_a_network_that_cannot_be_had_leaves_columns_empty_and_the_cell_done(session):
    cell = row(session)
    session.store.fail(cell.scores[0], "score", "no weights", UNAVAILABLE)
    assert standing(session, cell).status == "missing"
    put(session, cell.samples, cell.speed, cell.probe)
    found = standing(session, cell)
    assert (found.status, found.empty, found.reason) == ("done", ("no weights",), "")
    session.store.fail(cell.scores[0], "score", "disk", "error")
    assert standing(session, cell).status == "failed"


def test_an_unresolved_cell_says_what_it_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    suite = from_mapping({**SUITE, "teachers": [{"name": "h", "hub": "nobody/nothing"}]}, tmp_path)
    found = prepare(suite, tmp_path / "store")
    assert {(s.status, s.reason) for s in Survey(found.plan, found.store).standings()} == {
        ("unresolved", "hub teacher nobody/nothing is not on this machine yet; `run` downloads it")
    }


def test_what_other_source_has_made_is_marked(session):
    cell = row(session)
    put(session, cell.trained.students[0], sources={"kd_methods:output": "0" * 16, "models:unet2d": "0" * 16})
    put(session, cell.samples, cell.scores[0])
    survey = Survey(session.plan, session.store)
    assert [s.identity for s in survey.changed(session.registry)] == [cell.trained.students[0]]
    # a manifest that cannot be read is no evidence of a change; whoever needs the artifact remakes it
    for path in session.store.root.rglob("manifest.json"):
        path.write_text("{", encoding="utf-8")
    assert Survey(session.plan, session.store).changed(session.registry) == []


def test_the_sources_of_a_stage_are_its_plugins_modules(session):
    kinds = {stage.kind: set(sources(stage, session.registry)) for stage in session.plan.stages.values()}
    assert kinds == {
        "data": {"datasets:digits"},
        "teacher": {"kd_methods:none", "models:unet2d"},
        "student": {"kd_methods:output", "models:unet2d"},
        "round": {"models:unet2d"},
        "samples": {"samplers:progressive"},
        "reference": {"metrics:fid"},
        "score": {"metrics:fid"},
        "speed": {"samplers:progressive", "models:unet2d"},
        "probe": set(),
    }


def test_a_source_is_hashed_by_content(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("some_plugin_a", "x = 1\n"), ("some_plugin_b", "x = 1\n"), ("some_plugin_c", "x = 2\n")):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    assert module_hash("some_plugin_a") == module_hash("some_plugin_b") != module_hash("some_plugin_c")


@pytest.mark.parametrize("name", ["no_such_module_at_all", "no_such_package.module", "sys"])
def test_a_module_without_source_is_an_error(name):
    with pytest.raises(PluginError, match=name):
        module_hash(name)


def test_a_stage_is_named_by_kind_spec_and_inputs_and_by_nothing_local():
    one = Stage.make("samples", "a", {"x": 1}, {"students": ("i",)}, {"batch": 1})
    assert Stage.make("samples", "b", {"x": 1.0}, {"students": ("i",)}, {"batch": 2}).identity == one.identity
    others = [
        Stage.make("score", "a", {"x": 1}, {"students": ("i",)}),
        Stage.make("samples", "a", {"x": 2}, {"students": ("i",)}),
        Stage.make("samples", "a", {"x": 1}, {"students": ("j",)}),
        Stage.make("samples", "a", {"x": 1}, {"teacher": ("i",)}),
    ]
    assert one.identity not in {o.identity for o in others}
    assert os.path.basename(one.identity) == one.identity
