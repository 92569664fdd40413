"""Every verb, as a user meets it: what it prints where, its exit code, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import o2mkd_bench.core.plugins as plugins_module
from o2mkd_bench import UserError
from o2mkd_bench.cli import main
from o2mkd_bench.cli.common import bytes_text
from o2mkd_bench.core import sources
from o2mkd_bench.core.errors import CorruptArtifact
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.plugins import BrokenPlugin, Registry
from o2mkd_bench.core.runlog import RunLog
from o2mkd_bench.core.store import Store
from o2mkd_bench.doctor import INCEPTION_FILE

SUITE: dict[str, Any] = {
    "name": "tiny",
    "datasets": ["digits"],
    "teachers": [
        {
            "name": "small",
            "train": {
                "model": {"unet2d": {"block_out_channels": [8, 16], "norm_num_groups": 4}},
                "images": 256,
                "training": {"batch": 32},
            },
        }
    ],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["output"],
    "samplers": [{"ddim": {"steps": [2]}}],
    "metrics": [{"fid": {"network": "embedded"}}],
    "budgets": [256],
    "training": {"batch": 32},
    "sampling": {"images": 640, "batch": 320},
    "speed": {"batch": 4, "repeats": 1},
    "probe": {"points": 2, "images": 8},
}


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """A verb in this process: words to exit code, standard output and standard error."""

    def run(*words: object) -> Answer:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert isinstance(stopped.value.code, int)
        return Answer(stopped.value.code, *capsys.readouterr())

    return run


class Finished(NamedTuple):
    """A folder in which a suite has been run once."""

    suite: Path
    store: Path
    results: Path
    answer: Answer

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.results / "results.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("project")
    suite = folder / "tiny.yaml"
    suite.write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    done = process(folder, "run", suite, "--tracker", "jsonl")
    return Finished(suite, folder / ".o2mkd" / "store", folder / "results" / "tiny", done)


@pytest.fixture
def there(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """The finished project as working directory."""
    monkeypatch.chdir(finished.suite.parent)
    monkeypatch.setenv("COLUMNS", "120")
    return finished


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """A store of one's own with everything in it."""
    shutil.copytree(finished.store, tmp_path / "store")
    return tmp_path / "store"


def process(folder: Path, *words: object) -> Answer:
    code = "import sys; from o2mkd_bench.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


# ---- run -----------------------------------------------------------------------------------------------------------


def test_run_prints_the_table_and_says_the_rest_on_stderr(finished: Finished) -> None:
    code, out, err = finished.answer
    assert code == 0, err
    assert "fd_digits ↓" in out
    assert "half     output" in out
    lines = err.splitlines()
    assert lines[0].endswith("stages to make, 0 in the store")
    assert any(line.endswith("teacher small") for line in lines)
    assert "Warning" not in err
    assert lines[-1].startswith("made ")
    assert lines[-1].endswith("tables and pictures are in results/tiny")
    assert (finished.results / "results.md").exists()
    assert finished.document["suite_path"] == str(finished.suite)


def test_run_tells_its_trackers(finished: Finished) -> None:
    lines = [json.loads(line) for line in (finished.results / "events.jsonl").read_text("utf-8").splitlines()]
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["plan", "end"]
    assert sum(line["kind"] == "done" for line in lines) == lines[0]["stages"] == lines[-1]["made"]


def test_run_again_makes_nothing_and_prints_json_where_asked(there: Finished, call: Call) -> None:
    code, out, err = call("run", there.suite, "--json")
    assert code == 0
    assert json.loads(out)["tables"][0]["dataset"] == "digits"
    assert err.splitlines()[0].startswith("0 stages to make")


def test_run_says_failed_cells_with_exit_code_1(there: Finished, call: Call, tmp_path: Path) -> None:
    code, out, err = call(
        "run", there.suite, "--out", tmp_path / "out", "--store", tmp_path / "store", "--fail-fast",
        "--set", "teachers.0.train.training.lr=1e20", "--set", "teachers.0.train.training.clip=null",
    )  # fmt: skip
    assert code == 1
    assert "FAILED" in err
    assert ", 1 failed; tables" in err
    assert "failed" in out


def test_patterns_that_match_nothing_are_said(there: Finished, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = ["--set", "include=[{student: nobody}, {method: output}]"]
    rules += ["--set", "exclude=[{seed: [3]}, {student: teach*, steps: 2}, {student: teacher, seed: 7}]"]
    said = [
        f"note: {there.suite}: include[0].student: 'nobody' matches no student of this suite (known: half, teacher)",
        f"note: {there.suite}: exclude[0].seed: '3' matches no seed of this suite (known: 1, 2, 4, 5, 6 and 1 more)",
        f"note: {there.suite}: exclude[1].student: 'teach*' matches no student of this suite; did you mean 'teacher'? "
        "(known: half, teacher)",
    ]
    seeds = ["--set", "seeds=[1, 2, 4, 5, 6, 7]"]
    code, _, err = call("plan", there.suite, *rules, *seeds)
    assert (code, err.splitlines()) == (0, said)
    assert call("plan", there.suite, *rules, *seeds, "--json").err == ""
    monkeypatch.setattr("o2mkd_bench.runner.run_session", lambda *_, **__: 1 / 0)
    assert call("run", there.suite, *rules, *seeds).err.splitlines()[:3] == said


def test_run_can_be_interrupted(there: Finished, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("o2mkd_bench.runner.run_session", stop)
    code, out, err = call("run", there.suite)
    assert (code, out) == (130, "")
    assert one_line(err) == "interrupted; the same command goes on where it stopped"


def test_rebuild_changed_remakes_what_follows_too(
    there: Finished, call: Call, copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sources.module_hash
    monkeypatch.setattr(
        sources, "module_hash", lambda module: "0" * 16 if module == "o2mkd_plugins.kd.output" else real(module)
    )
    code, out, _ = call("status", there.suite, "--store", copied)
    assert code == 0
    assert "1 stage made by another source of their plugins than is installed now" in out
    assert [s["kind"] for s in json.loads(call("status", there.suite, "--store", copied, "--json").out)["changed"]] == [
        "student"
    ]
    code, _, err = call("run", there.suite, "--store", copied, "--rebuild-changed", "--out", tmp_path / "out")
    assert code == 0
    made = {line.partition("] ")[2].split()[0] for line in err.splitlines() if line.startswith("[")}
    assert made == {"digits/half/output/single", "samples", "score", "probe"}
    assert "another source" not in call("status", there.suite, "--store", copied).out


# ---- plan and status -----------------------------------------------------------------------------------------------


def test_plan_counts_what_is_there_and_what_is_to_make(there: Finished, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("plan", there.suite)
    assert code == 0
    assert "tiny  2 cells" in out
    assert "none to make" in out
    assert "everywhere: dataset digits, teacher small, method output" in out
    empty = call("plan", there.suite, "--store", tmp_path / "none").out
    assert "6 to make" in empty
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("width", ["80", "120"])
def test_tables_fit_the_terminal(there: Finished, call: Call, monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for words in (["plan", there.suite], ["status", there.suite], ["plugins"], ["report", "results/tiny"]):
        assert max(map(len, call(*words).out.splitlines())) <= int(width), words


def test_a_pipe_has_no_width(there: Finished, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    narrow = call("report", "results/tiny").out
    monkeypatch.delenv("COLUMNS")
    piped = call("report", "results/tiny").out
    assert max(map(len, piped.splitlines())) > 110, "a footnote is one line"
    assert [line for line in piped.splitlines() if "─" in line] == [line for line in narrow.splitlines() if "─" in line]


def test_plan_lists_stages(there: Finished, call: Call) -> None:
    lines = call("plan", there.suite, "--stages").out.splitlines()
    assert any(line.split()[1:] == ["teacher", "teacher", "small", "in", "store"] for line in lines if line)


def test_plan_as_json(there: Finished, call: Call, copied: Path) -> None:
    document = json.loads(call("plan", there.suite, "--json").out)
    assert {stage["state"] for stage in document["stages"]} == {"in store"}
    cells = {cell["student"]: cell for cell in document["cells"]}
    assert cells["half"]["status"] == "done"
    assert cells["half"]["nfe"] == 2
    assert [row["cell"] for row in there.document["rows"]] == [cell["cell"] for cell in document["cells"]]
    for kind, state in (("data", "not needed"), ("student", "to make")):
        # a student's costs stand in its row
        Store(copied).discard(next(one["stage"] for one in document["stages"] if one["kind"] == kind), "for the test")
        stages = json.loads(call("plan", there.suite, "--store", copied, "--json").out)["stages"]
        assert [one["state"] for one in stages if one["kind"] == kind] == [state]


def test_status_says_why_a_cell_failed(there: Finished, call: Call, copied: Path) -> None:
    document = json.loads(call("plan", there.suite, "--json").out)
    store = Store(copied)
    samples = next(s for s in document["stages"] if s["kind"] == "samples" and "half" in s["label"])
    store.discard(samples["stage"], "for the test")
    assert " missing" in call("status", there.suite, "--store", copied).out
    store.fail(samples["stage"], samples["label"], "out of memory [3 GiB]", "memory")
    out = call("status", there.suite, "--store", copied).out
    assert "1 done, 1 failed" in out
    assert "1 cell failed: samples digits half output" in out
    assert "out of memory [3 GiB]" in out
    cells = json.loads(call("status", there.suite, "--store", copied, "--json").out)["cells"]
    assert [cell["status"] for cell in cells] == ["done", "failed"]


def test_a_score_that_cannot_be_had_is_said_beside_a_done_cell(there: Finished, call: Call, copied: Path) -> None:
    score = json.loads(call("plan", there.suite, "--json").out)["cells"][1]["stages"][1]
    store = Store(copied)
    store.discard(score, "for the test")
    store.fail(score, "score half", "no weights here", "unavailable")
    assert "1 cell without a score: no weights here" in call("status", there.suite, "--store", copied).out


def test_a_hub_teacher_that_is_not_here_is_unresolved(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    suite = tmp_path / "hub.yaml"
    suite.write_text(yaml.safe_dump({**SUITE, "teachers": [{"name": "far", "hub": "nobody/nothing-at-all"}]}))
    out = call("plan", suite, "--store", tmp_path / "store").out
    assert "unresolved" in out
    assert "unresolved" in call("status", suite, "--store", tmp_path / "store").out
    (tmp_path / "store" / "locks").mkdir(parents=True)
    code, _, err = call("store", "gc", suite, "--store", tmp_path / "store")
    assert code == 2
    assert "is not known" in one_line(err)


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "piece"),
    [
        ("table", "fd_digits ↓"),
        ("md", "| student"),
        ("latex", r"\toprule"),
        ("csv", "cell,status,dataset"),
        ("json", '"tables"'),
    ],
)
def test_report_prints_a_folder_in_every_format(there: Finished, call: Call, format: str, piece: str) -> None:
    code, out, err = call("report", "results/tiny", "--format", format)
    assert (code, err) == (0, "")
    assert piece in out
    assert call("report", "results/tiny/results.json", "--format", format).out == out


def test_report_assembles_a_suite_anew(there: Finished, call: Call, tmp_path: Path) -> None:
    code, out, err = call("report", there.suite, "--format", "csv", "--out", tmp_path / "anew")
    assert code == 0
    assert one_line(err) == f"results in {tmp_path / 'anew'}"
    assert (tmp_path / "anew" / "results.csv").read_text("utf-8") == (there.results / "results.csv").read_text("utf-8")
    assert list((tmp_path / "anew" / "samples").glob("*.png"))
    call("report", tmp_path / "anew", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "results.csv").read_text("utf-8") == out


def test_report_of_a_suite_writes_nothing_unless_told_where(there: Finished, call: Call, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in there.suite.parent.rglob("*") if path.is_file()}
    code, out, err = call("report", there.suite, "--store", tmp_path / "empty", "--format", "csv")
    assert (code, err) == (0, "")
    assert ",missing," in out
    assert {path: path.stat().st_mtime_ns for path in there.suite.parent.rglob("*") if path.is_file()} == before
    assert "else nothing is written" in " ".join(call("report", "--help").out.replace("│", " ").split())


def test_a_part_of_the_grid_does_not_replace_the_whole(
    finished: Finished, call: Call, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    part = ("run", finished.suite, "--store", copied)
    whole = (*part, "--set", "samplers=[{ddim: {steps: [1, 2]}}]")
    assert call(*whole).code == 0
    before = (tmp_path / "results" / "tiny" / "results.json").read_bytes()
    code, _, err = call(*part)
    assert code == 0
    assert [line for line in err.splitlines() if "keeps" in line] == [
        "results/tiny keeps 4 done rows, of which this run has 2: the tables of this run are in results/tiny-2; "
        "--out DIR chooses another folder"
    ]
    assert err.splitlines()[-1].endswith("tables and pictures are in results/tiny-2")
    assert (tmp_path / "results" / "tiny" / "results.json").read_bytes() == before
    assert len(list((tmp_path / "results" / "tiny" / "samples").glob("*.png"))) == 4
    assert call(*whole).err.splitlines()[-1].endswith("tables and pictures are in results/tiny")
    assert call(*part, "--out", "results/tiny").code == 0
    assert len(list((tmp_path / "results" / "tiny" / "samples").glob("*.png"))) == 2


def test_report_of_a_folder_takes_no_options_of_a_suite(there: Finished, call: Call) -> None:
    code, _, err = call("report", "results/tiny", "--seed", "3")
    assert code == 2
    assert one_line(err).startswith("error: results/tiny is a folder of results")


def test_report_against_a_label_needs_seeds_and_a_table(there: Finished, call: Call) -> None:
    code, out, err = call("report", "results/tiny", "--against", "wrapper=single")
    assert (code, out) == (0, call("report", "results/tiny").out)
    assert one_line(err).startswith("--against wrapper=single: no line has two seeds in common")
    code, _, err = call("report", "results/tiny", "--against", "wrapper=single", "--format", "csv")
    assert code == 2
    assert one_line(err) == "error: --against says nothing in csv; use --format table, md or json"
    code, _, err = call("report", "results/tiny", "--against", "wrapper=single", "--out", "results/other")
    assert code == 2
    assert one_line(err) == "error: --against is printed and never written; leave --out away"
    assert not Path("results/other").exists()
    code, _, err = call("report", "results/tiny", "--against", "wrapper=none")
    assert code == 2
    assert one_line(err).startswith("error: --against wrapper=none: no student has that wrapper")


def test_compare_two_folders(there: Finished, call: Call) -> None:
    code, out, _ = call("compare", "results/tiny", "results/tiny")
    assert code == 0
    assert "| half" in out
    pairs = json.loads(call("compare", "results/tiny", "results/tiny", "--json").out)["pairs"]
    assert {pair["scores"]["fd_digits"]["change"] for pair in pairs} == {0.0}
    code, _, err = call("compare", "results/tiny", "results/nothing")
    assert (code, one_line(err).startswith("error: results/nothing/results.json")) == (2, True)


# ---- sample --------------------------------------------------------------------------------------------------------


def test_sample_draws_more_images_from_a_finished_cell(there: Finished, call: Call, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    cell = there.document["rows"][1]["cell"]
    code, out, err = call("sample", cell[:8], "--n", "3", "--out", tmp_path / "images")
    assert code == 0, err
    assert one_line(out) == f"3 images in {tmp_path / 'images'}"
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "00000.png", "00001.png", "00002.png", "grid.png",
    ]  # fmt: skip
    # the same noise through the same students: the first images are those that were scored
    plan = json.loads(call("plan", there.suite, "--json").out)
    scored = np.load(Store(there.store).read(plan["cells"][1]["stages"][0], "images.npy"))
    drawn = np.asarray(Image.open(tmp_path / "images" / "00002.png"))
    assert np.abs(drawn.astype(int) - scored[2, 0]).max() <= 1
    code, out, _ = call("sample", cell, "-n", "2", "--suite", there.suite, "--out", tmp_path / "deep" / "two.png")
    assert one_line(out).endswith("two.png")
    assert Image.open(tmp_path / "deep" / "two.png").size == (2 * 66 + 2, 68)


def test_sample_says_what_is_wrong(there: Finished, call: Call, tmp_path: Path) -> None:
    cell = there.document["rows"][1]["cell"]
    code, _, err = call("sample", "zzzzzzzz")
    assert (code, "name its suite with --suite" in one_line(err)) == (2, True)
    code, _, err = call("sample", "zzzzzzzz", "--suite", there.suite)
    assert (code, "the suite has no cell zzzzzzzz" in one_line(err)) == (2, True)
    code, _, err = call("sample", "", "--suite", there.suite)
    assert (code, "begins 2 cells" in one_line(err)) == (2, True)
    code, _, err = call("sample", cell, "--store", tmp_path)
    assert (code, "run its suite first" in one_line(err)) == (2, True)


def test_sample_looks_for_a_place_before_it_draws(
    there: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("o2mkd_bench.stages.samples.draw", lambda *_: pytest.fail("it draws"))
    cell = there.document["rows"][1]["cell"]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, said in {
        tmp_path / "file": "is not a folder; name another",
        tmp_path / "file" / "x.png": "is not a folder; name another",
        tmp_path / "file" / "below" / "x.png": "is not a folder; name another",
        tmp_path / "folder.png": "this is a folder, and a name that ends in .png is a file's",
        tmp_path / "x.jpg": "a grid is written as PNG; name a file that ends in .png, or a folder",
        "/proc/nowhere": "cannot be written",
        "": "it is empty; name a place, or leave the option out",
    }.items():
        code, _, err = call("sample", cell, "--out", out)
        assert (code, said in one_line(err)) == (2, True), err


def test_run_looks_for_a_place_before_it_works(there: Finished, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = call("run", there.suite, "--store", tmp_path / "store", "--out", tmp_path / "file")
    assert (code, "is not a folder; choose another with --out" in one_line(err)) == (2, True), err
    assert not Store(tmp_path / "store").ls()


def test_an_empty_place_is_not_the_working_directory(there: Finished, call: Call) -> None:
    for option in ("--out", "--store"):
        code, _, err = call("run", there.suite, option, "")
        assert code == 2
        assert one_line(err).startswith(f"error: invalid value for '{option}': it is empty; name a place")


# ---- store ---------------------------------------------------------------------------------------------------------


def test_store_ls(there: Finished, call: Call, tmp_path: Path) -> None:
    out = call("store", "ls").out
    assert "teacher small" in out
    listed = json.loads(call("store", "ls", "--json").out)
    assert f"{len(listed)} artifacts" in out
    assert all(one["bytes"] > 0 and one["files"] for one in listed)


@pytest.mark.parametrize("words", [("ls",), ("verify",), ("gc", "tiny.yaml"), ("export", "carried")])
def test_a_store_that_is_none_is_refused(there: Finished, call: Call, words: tuple[str, ...], tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        code, out, err = call("store", *words, "--store", place)
        assert (code, out) == (2, "")
        assert one_line(err) == f"error: there is no store in {place}; name it with --store DIR or O2MKD_STORE"


def test_a_store_that_cannot_be_read_is_named(
    there: Finished, call: Call, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def iterdir(path: Path) -> object:
        if path == copied / "artifacts":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for verb in ("ls", "verify"):
        code, _, err = call("store", verb, "--store", copied)
        assert (code, "artifacts cannot be read (permission denied); make it" in one_line(err)) == (2, True)


def test_store_gc_leaves_a_store_alone_in_which_a_run_is_at_work(there: Finished, call: Call, copied: Path) -> None:
    with RunLog(Store(copied), "other", lambda event: None) as log:
        log(Event("start", "x", "a stage"))
        code, _, err = call("store", "gc", there.suite, "--store", copied)
        assert code == 2
        assert re.match(rf"error: run-\S+ \(suite other, process {os.getpid()}\) is at work in ", one_line(err))
        assert call("store", "gc", there.suite, "--store", copied, "--dry-run").code == 0
    assert call("store", "gc", there.suite, "--store", copied).code == 0


def test_store_gc_keeps_what_the_suites_need(there: Finished, call: Call, copied: Path) -> None:
    assert "would remove 0 artifacts" in call("store", "gc", there.suite, "--store", copied, "--dry-run").out
    smaller = there.suite.with_name("smaller.yaml")
    smaller.write_text(yaml.safe_dump({"extends": "tiny.yaml", "sampling": {"images": 700}}))
    before = len(Store(copied).ls())
    assert call("store", "gc", smaller, "--store", copied, "--dry-run").out.startswith("would remove")
    assert len(Store(copied).ls()) == before
    assert call("store", "gc", smaller, "--store", copied).out.startswith("removed")
    assert {"teacher", "student"} <= {manifest.kind for manifest in Store(copied).ls()}
    assert len(Store(copied).ls()) < before


def test_store_verify_finds_damage_and_run_mends_it(there: Finished, call: Call, copied: Path, tmp_path: Path) -> None:
    assert call("store", "verify", "--store", copied).out.endswith(" artifacts sound\n")
    victim = next(copied.glob("artifacts/*/*/scores.json"))
    victim.write_text(victim.read_text().replace("1", "2"))
    code, out, err = call("store", "verify", "--store", copied)
    assert code == 1
    assert victim.parent.name in one_line(out)
    assert "`run` of their suites makes them anew" in one_line(err)
    code, _, err = call("report", there.suite, "--store", copied, "--out", tmp_path / "out")
    assert code == 1
    assert "makes damaged artifacts anew" in one_line(err)
    assert call("run", there.suite, "--store", copied, "--out", tmp_path / "out").code == 0
    assert call("store", "verify", "--store", copied).code == 0
    unread = next(path for path in copied.glob("artifacts/*/*/ema.safetensors"))
    content = bytearray(unread.read_bytes())
    content[-1] ^= 1
    unread.write_bytes(content)
    assert "after `store verify --discard`" in one_line(call("store", "verify", "--store", copied).err)
    assert call("store", "verify", "--discard", "--store", copied).code == 1
    assert not unread.exists()
    assert call("store", "verify", "--store", copied).code == 0


def test_store_is_carried_to_another_machine(there: Finished, call: Call, tmp_path: Path) -> None:
    code, _, err = call("store", "export", tmp_path / "carried", there.suite, "--part-size", "64K")
    assert (code, err) == (0, "")
    assert max(path.stat().st_size for path in (tmp_path / "carried").glob("part-*")) <= 64 * 1024
    assert call("store", "import", tmp_path / "carried", "--store", tmp_path / "store").out.startswith("imported")
    assert "none to make" in call("plan", there.suite, "--store", tmp_path / "store").out
    more = there.suite.with_name("more.yaml")
    more.write_text(yaml.safe_dump({"extends": "tiny.yaml", "seeds": [0, 7]}))
    other = call("store", "export", tmp_path / "some", more)
    assert "not made yet" in one_line(other.err)


def test_an_export_is_of_the_kinds_that_are_asked_for(copied: Path, call: Call, tmp_path: Path) -> None:
    """Training states, large and only good for going on, where they are asked for."""
    place = Store(copied)
    with place.writing("5" * 20, "state", "a warm-up", {}, {}) as draft:
        (draft.dir / "moments").write_bytes(b"large")
    whole = Counter(manifest.kind for manifest in place.ls())

    def kinds(*words: str) -> Counter[str]:
        dest = tmp_path / ("-".join(words) or "usual")
        assert call("store", "export", dest, *words, "--store", copied).code == 0
        index = json.loads((dest / "index.json").read_text())
        return Counter(place.manifest(name).kind for name in index["artifacts"])

    usual = Counter({kind: n for kind, n in whole.items() if kind != "state"})
    assert len(usual) > 4
    assert kinds() == usual
    assert kinds("--state") == whole
    assert kinds("--kind", "student, score") == Counter({kind: whole[kind] for kind in ("student", "score")})
    assert kinds("--kind", "student", "--kind", "state") == Counter({"student": whole["student"], "state": 1})
    code, _, err = call("store", "export", tmp_path / "x", "--kind", "students", "--store", copied)
    assert code == 2
    assert "--kind: 'students' is not allowed; did you mean 'student'?" in one_line(err)
    assert not (tmp_path / "x").exists()


def test_sizes_are_said_in_binary_units() -> None:
    sizes = [0, 1023, 1024, 150 * 1024, 5 * 2**40, 2**60]
    assert [bytes_text(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "150 KiB", "5.0 TiB", "1048576 TiB"]


# ---- plugins and this machine --------------------------------------------------------------------------------------


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The installed plugins, a name that two more claim, and one that is broken."""
    from types import ModuleType

    from o2mkd_bench import hookimpl

    found = Registry()
    import o2mkd_plugins

    found.add(o2mkd_plugins, "o2mkd-bench", "1", "o2mkd_plugins")
    for owner in ("acme", "other"):
        module = ModuleType(owner)
        module.api = 1  # type: ignore[attr-defined]
        module.register_kd_methods = hookimpl(  # type: ignore[attr-defined]
            lambda register: register("huber", "nowhere:Huber", summary="robust [loss]"), specname="register_kd_methods"
        )
        found.add(module, owner, "2.0", owner)
    found.broken.append(BrokenPlugin("rusty", "0.1", "rusty.plugin", "ImportError: no module named [gone]"))
    monkeypatch.setattr(plugins_module, "registry", lambda: found)
    monkeypatch.setattr("o2mkd_bench.doctor.registry", lambda: found)
    return found


def test_plugins_lists_all_with_owners_and_what_did_not_load(
    crowded: Registry, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = call("plugins")
    assert code == 0
    assert "robust [loss] (write acme:huber)" in out
    assert "acme 2.0" in out
    assert "all of o2mkd-bench 1" in call("plugins", "samplers").out
    assert "rusty 0.1 (rusty.plugin) did not load: ImportError: no module named [gone]" in out
    found = json.loads(call("plugins", "kd_methods", "--json").out)
    assert {plugin["kind"] for plugin in found["plugins"]} == {"kd_methods"}
    assert [p["write"] for p in found["plugins"] if p["name"] == "huber"] == ["acme:huber", "other:huber"]
    assert found["broken"][0]["distribution"] == "rusty"


def test_plugins_of_an_unknown_or_empty_kind(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = call("plugins", "sampler")
    assert (code, "did you mean 'samplers'?" in one_line(err)) == (2, True)
    monkeypatch.setattr(plugins_module, "registry", Registry)
    assert call("plugins", "samplers").out == "no samplers plugin is installed\n"


def test_schema(call: Call) -> None:
    document = json.loads(call("schema").out)
    assert "datasets" in document["properties"]
    assert "ddim" in json.loads(call("schema", "samplers").out)
    assert call("schema", "sampler").code == 2
    assert json.loads(call("schema", "datasets", "image_folder").out)["required"] == ["root", "size"]
    code, _, err = call("schema", "datasets", "image_folders")
    assert code == 2
    assert "no datasets plugin is called 'image_folders'; did you mean 'image_folder'?" in one_line(err)


def test_doctor_says_what_is_here_and_what_is_not(
    crowded: Registry, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / INCEPTION_FILE
    monkeypatch.setenv("O2MKD_INCEPTION_WEIGHTS", str(weights))
    code, out, _ = call("doctor", "--store", tmp_path / "store")
    assert code == 0
    assert "Inception weights" in out
    checks = {check["name"]: check for check in json.loads(call("doctor", "--store", tmp_path / "store", "--json").out)}
    assert checks["torch"]["state"] == checks["packages"]["state"] == checks["plugins"]["state"] == "ok"
    assert checks["Inception weights"]["state"] == "note"
    assert checks["plugin rusty"]["found"] == "ImportError: no module named [gone]"
    weights.write_bytes(b"something else")
    checks = {check["name"]: check for check in json.loads(call("doctor", "--store", tmp_path / "store", "--json").out)}
    assert "is another file" in checks["Inception weights"]["found"]
    assert not (tmp_path / "store").exists()


def test_doctor_survives_a_broken_machine(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import o2mkd_bench.doctor as doctor

    def gone(name: str) -> Any:
        raise OSError("libtorch.so: cannot open")

    record = {"versions": {"torch": "2"}, "cpu": "Test CPU", "cores": 2, "gpus": ["H100"]}
    monkeypatch.setattr(doctor, "machine_record", lambda: record)
    monkeypatch.setattr(doctor, "registry", Registry)
    monkeypatch.setattr(importlib, "import_module", gone)
    (tmp_path / "file").write_text("")
    checks = {check.name: check for check in doctor.examine(Store(tmp_path / "file" / "store"))}
    monkeypatch.undo()
    assert {name for name, check in checks.items() if check.state == "missing"} == {"packages", "torch", "plugins"}
    assert checks["torch"].found == "OSError: libtorch.so: cannot open"
    assert "torch sees 0" in checks["devices"].found


def test_doctor_fails_where_something_required_is_missing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    # however long the path of the store is, the table does not break the sentence
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("o2mkd_bench.doctor.tempfile.TemporaryFile", full)
    code, out, err = call("doctor", "--store", tmp_path)
    assert (code, err) == (1, "")
    assert "No space left on device" in out


def test_doctor_accepts_the_true_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Call) -> None:
    import hashlib

    import o2mkd_bench.doctor as doctor

    digest = hashlib.sha256(b"weights").hexdigest()
    path = tmp_path / f"weights-{digest[:8]}.pth"
    path.write_bytes(b"weights")
    monkeypatch.setattr(doctor, "INCEPTION_FILE", path.name)
    monkeypatch.delenv("O2MKD_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path))
    checks = {check["name"]: check for check in json.loads(call("doctor", "--store", tmp_path, "--json").out)}
    assert checks["Inception weights"] == {"name": "Inception weights", "state": "ok", "found": str(path), "mend": ""}


def test_new_plugin_writes_a_package(call: Call, tmp_path: Path) -> None:
    assert one_line(call("new", "plugin", "my-loss", "--dir", tmp_path).out) == str(tmp_path / "my-loss")
    assert (tmp_path / "my-loss" / "pyproject.toml").exists()
    code, _, err = call("new", "plugin", "my-loss", "--dir", tmp_path)
    assert (code, "is not empty" in one_line(err)) == (2, True)


# ---- the door ------------------------------------------------------------------------------------------------------

VERBS = ["run", "plan", "status", "report", "compare", "sample", "export", "plugins", "schema", "doctor"]
VERBS += ["store ls", "store gc", "store verify", "store export", "store import", "new plugin"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example(call: Call, verb: str) -> None:
    code, out, _ = call(*verb.split(), "--help")
    assert code == 0
    assert f"Example: o2mkd-bench {verb}" in " ".join(out.split())


def test_help_and_version(call: Call) -> None:
    code, out, _ = call()
    assert code == 0
    assert "A first session" in out
    assert call("--help").out == call("-h").out == out
    assert one_line(call("--version").out).startswith("o2mkd-bench ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bogus"], "error: no such command 'bogus'"),
        (["plan"], "error: missing argument 'SUITE'; see o2mkd-bench plan --help"),
        (["run", "x.yaml", "--sed", "3"], "error: no such option: --sed"),
        (["store"], "error: missing command; see o2mkd-bench store --help"),
        (["plan", "nowhere.yaml"], "error: nowhere.yaml: there is no such file"),
        (["plan", "x.yaml", "--seed", "two"], "error: invalid value for '--seed'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(call: Call, words: list[str], complaint: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert one_line(err).startswith(complaint)


def test_filters_and_suites_are_checked(there: Finished, call: Call) -> None:
    code, _, err = call("plan", there.suite, "--only", "metod=output")
    assert (code, "did you mean 'method'?" in one_line(err)) == (2, True)
    code, _, err = call("plan", there.suite, "--only", "method=outptu")
    assert (code, one_line(err)) == (2, "error: --only method=outptu leaves no cell; method is one of output")
    code, _, err = call("plan", there.suite, "--only", "student=hafl")
    assert (code, one_line(err)) == (2, "error: --only student=hafl leaves no cell; student is one of half, teacher")
    assert call("plan", there.suite, "--only", "student=hafl, teacher").code == 0
    code, _, err = call("plan", there.suite, "--only", "seed=7")
    assert (code, "no cell is left after" in one_line(err)) == (2, True)
    assert "2 cells" in call("plan", there.suite, "--only", "method=out*").out
    code, _, err = call("plan", there.suite, "--set", "sampling.imges=3")
    assert (code, "imges" in err) == (2, True)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend this"), 2, "error: mend this"),
        (CorruptArtifact("abc", "torn"), 1, "error: artifact abc: torn; run the suite again"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("odd"), 70, "error: ValueError: odd; this is a bug in o2mkd-bench"),
    ],
)
def test_no_error_ends_in_a_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.delenv("O2MKD_TRACEBACK", raising=False)
    monkeypatch.setattr(Store, "exists", fail)
    found = call("store", "ls")
    assert (found.code, found.out) == (code, "")
    if code != 130:
        assert one_line(found.err).startswith(said)


def test_a_bug_shows_its_traceback_where_asked(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_TRACEBACK", "1")
    monkeypatch.setattr(Store, "exists", lambda _: 1 / 0)
    code, _, err = call("store", "ls")
    assert code == 70
    assert err.startswith("Traceback")


def module(folder: Path, *words: str) -> Answer:
    """``python -m o2mkd_bench`` with what lies in ``folder`` before all that is installed."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "o2mkd_bench", *words]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def test_the_package_can_be_called_as_the_command_can(tmp_path: Path) -> None:
    code, out, err = module(tmp_path, "--version")
    assert (code, err) == (0, "")
    assert one_line(out).startswith("o2mkd-bench ")
    assert "see o2mkd-bench plan --help" in one_line(module(tmp_path, "plan").err)


def test_an_interrupt_of_the_first_imports_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    assert module(tmp_path, "plan") == Answer(130, "", "interrupted\n")


def test_a_reader_that_leaves_is_no_error(there: Finished) -> None:
    code = "import sys; from o2mkd_bench.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""


def test_a_plugin_that_ends_the_program_is_told(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*words: object, **options: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("o2mkd_bench.cli.door.app", leave)
    told = "error: a plugin ended the program with SystemExit(3); let it raise an error\n"
    assert call("plugins") == Answer(1, "", told)


FULL = b"error: No space left on device; make room, or print to another place\n"


def test_a_disk_that_is_full_of_what_is_printed_is_one_sentence(there: Finished) -> None:
    code = "import sys; from o2mkd_bench.cli import main; main(sys.argv[1:])"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code, "schema"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (2, FULL)


def test_a_disk_that_is_full_elsewhere_takes_nothing_from_what_is_printed(there: Finished) -> None:
    code = """
from o2mkd_bench.cli import door
def full(*words, **options):
    print("said before")
    open("/dev/full", "w", buffering=1).write("kept\\n")
door.app = full
door.main(["plugins"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"said before\n", FULL)


def test_folders_that_are_not_there_and_suites_among_folders_are_told(
    call: Call, there: Finished, tmp_path: Path
) -> None:
    found = call("report", tmp_path / "a", tmp_path / "b")
    assert found[:2] == (2, "")
    assert found.err.startswith(f"error: {tmp_path / 'a'}: there is no such folder; ")
    found = call("report", there.results, there.suite)
    assert found[:2] == (2, "")
    assert found.err.startswith(f"error: {there.suite} is no folder of results as {there.results} is; ")


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "plan tiny.yaml",
        "status tiny.yaml",
        "plugins",
        "schema",
        "store ls",
        "report results/tiny --format md",
        "report results/tiny",
        "compare results/tiny results/tiny",
    ],
)
def test_what_needs_no_torch_does_not_import_it(finished: Finished, words: str) -> None:
    code = f"""
import sys
from o2mkd_bench.cli import main
try:
    main({words.split()!r})
except SystemExit as stopped:
    assert stopped.code == 0
print(sorted({{"torch", "pandas", "matplotlib", "sklearn", "diffusers", "PIL"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=finished.suite.parent, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_report_of_a_suite_does_without_torch(finished: Finished, tmp_path: Path) -> None:
    code = f"""
import sys
from o2mkd_bench.cli import main
try:
    main(["report", "tiny.yaml", "--out", {str(tmp_path)!r}])
except SystemExit as stopped:
    assert stopped.code == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=finished.suite.parent, check=True, capture_output=True)
