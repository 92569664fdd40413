"""Results made in parts, put together again."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from results_factory import make

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.report.merge import merge
from o2mkd_bench.report.shape import complaint
from o2mkd_bench.report.tables import markdown, terminal
from o2mkd_bench.report.write import copied, read, write


def part(whole, keep, **changes):
    """``whole`` with the cells that ``keep`` says, and the others missing."""
    found = {**copy.deepcopy(whole), **changes}
    for row in found["rows"]:
        if not keep(row):
            row |= {"status": "missing", "scores": {}, "speed": None, "probe": None, "samples": None}
    return found


def rows(found):
    """What rows say, save which run made them."""
    return [{key: value for key, value in row.items() if key != "run"} for row in found["rows"]]


def several_cell(whole):
    return next(row["cell"] for row in whole["rows"] if row["wrapper"].startswith("o2mkd"))


@pytest.fixture
def whole():
    found = {**make(), "datasets": [], "networks": {}, "teachers": []}
    for number, row in enumerate(found["rows"]):
        row["cell"] = f"{number:020x}"
    return found


def test_the_parts_of_a_table_make_it(whole):
    a = part(whole, lambda row: row["seed"] == 0, created="2026-01-01", git_commit="a" * 40)
    b = part(whole, lambda row: row["seed"] != 0, created="2026-01-02", git_commit="b" * 40)
    for one, other in ((a, b), (b, a)):
        found = merge([one, other])
        assert rows(found) == whole["rows"]
        assert (found["created"], found["git_commit"]) == ("2026-01-02", "b" * 40)
        assert {(run["created"], run["rows"]) for run in found["runs"]} == {
            (d["created"], sum(row["status"] == "done" for row in d["rows"])) for d in (a, b)
        }
    assert "made 2026-01-01 to 2026-01-02, in 2 runs, commits aaaaaaaaaaaa, bbbbbbbbbbbb" in markdown(found)
    # a third part comes to what is merged, whose runs it keeps, and none is counted twice
    again = merge([found, part(whole, lambda row: True, created="2026-01-03")])
    assert rows(again) == whole["rows"]
    assert again["runs"] == found["runs"]
    assert merge([a, found])["runs"] == merge([a, b])["runs"]
    assert not complaint(found)
    for row in found["rows"]:
        run = found["runs"][row["run"]]
        assert run["created"] == ("2026-01-01" if row["seed"] == 0 else "2026-01-02")
    found["rows"][0]["run"] = 2
    assert "not in 'runs'" in complaint(found)


def test_a_row_without_an_identity_gives_way_to_those_that_have_one(whole):
    """Rows whose intervals are not known yet have none, and each is a row all the same."""
    plan = part(whole, lambda row: False)
    several = [row for row in plan["rows"] if row["wrapper"].startswith("o2mkd")]
    assert len(several) > 1
    for row in several:
        row |= {"cell": "", "status": "unresolved", "spacing": None, "clip": None}
    assert rows(merge([plan, copy.deepcopy(plan)])) == plan["rows"]
    # one of them has been made, and stands in its place
    done = {**copy.deepcopy(whole), "rows": [row for row in whole["rows"] if row["cell"] == several_cell(whole)]}
    found = rows(merge([plan, done]))
    assert [row["status"] for row in found].count("unresolved") == len(several) - 1
    assert found.index(done["rows"][0]) == whole["rows"].index(done["rows"][0])
    assert rows(merge([plan, whole])) == whole["rows"]
    assert len(merge([whole, plan])["rows"]) == len(whole["rows"])


def test_an_unknown_baseline_gives_way_to_the_row_that_is_it(whole):
    plan, done = part(whole, lambda row: False), copy.deepcopy(whole)
    lone = next(row for row in plan["rows"] if row["wrapper"] == "single")
    of = ["equal_total of o2mkd"]
    plan["rows"].append(
        {**lone, "cell": "", "status": "unresolved", "wrapper": "single (total of o2mkd)", "baseline_of": of}
    )
    assert len(merge([plan, done])["rows"]) == len(plan["rows"])
    next(row for row in done["rows"] if row["cell"] == lone["cell"])["baseline_of"] = of
    assert rows(merge([plan, done])) == done["rows"]


def test_a_row_is_the_baseline_of_all_that_one_part_says(whole):
    other = part(whole, lambda row: False)
    index = next(n for n, row in enumerate(whole["rows"]) if row["baseline_of"])
    first = whole["rows"][index]["baseline_of"]
    other["rows"][index]["baseline_of"] = ["equal_total of another", *first]
    assert merge([whole, other])["rows"][index]["baseline_of"] == [*first, "equal_total of another"]
    whole["rows"][index]["baseline_of"] = None
    assert merge([whole, other])["rows"][index]["baseline_of"] == ["equal_total of another", *first]


def test_lines_of_one_name_are_said_with_their_cells(whole):
    other = copy.deepcopy(whole)
    for row in other["rows"]:
        row["cell"] = f"ee{row['cell']}"
        row["scores"] = {"fd_digits": 1.0}
    one = [part(found, lambda row: row["student"] == "half" and row["steps"] == 5) for found in (whole, other)]
    for found in one:
        found["rows"] = [row for row in found["rows"] if row["status"] == "done" and row["method"] == "none"]
        for number, row in enumerate(found["rows"]):
            row["cell"] = f"{number}{row['cell'][:2]:0<15}"
    found = merge(one)
    said = "digits half none single ddim 5: 2 lines of this name differ in what the table does not show; cells "
    assert f"{said}00000000, 10000000, 20000000 and 0ee00000, 1ee00000, 2ee00000" in markdown(found)
    text = " ".join(terminal(found, None).split())
    assert text.count("lines of this name") == 2
    assert said in text
    assert "lines of this name" not in markdown(whole)


def test_who_made_rows_is_told_and_not_who_planned_them(whole):
    made = {**copy.deepcopy(whole), "created": "2026-01-01", "machine": {"cpu": "one that works"}}
    plan = part(whole, lambda row: False, created="2026-01-02", machine={"cpu": "one that plans"})
    for row in plan["rows"]:
        row["device"] = "a desk"
    made["rows"] = made["rows"][1:]
    found = merge([plan, made])
    assert (found["created"], found["machine"]) == ("2026-01-01", made["machine"])
    assert "a desk" not in markdown(found)


def test_cells_of_other_grids_come_behind_in_their_order(whole):
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    first["rows"], second["rows"] = first["rows"][:3], second["rows"][2:5]
    second["axes"] = {**second["axes"], "sampler": [*second["axes"].get("sampler", []), "heun"]}
    found = merge([first, second])
    assert [row["cell"] for row in found["rows"]] == [row["cell"] for row in whole["rows"][:5]]
    assert found["axes"]["sampler"][-1] == "heun"


def test_what_one_run_lacks_of_a_cell_another_gives(whole):
    a, b = copy.deepcopy(whole), copy.deepcopy(whole)
    a["rows"][0] |= {"speed": None}
    # its speed is not there: to that run the cell is not done
    b["rows"][0] |= {"status": "missing", "scores": {}}
    assert rows(merge([a, b])) == whole["rows"]
    assert rows(merge([b, a])) == whole["rows"]
    failed = part(whole, lambda row: False)
    failed["rows"][0] |= {"status": "failed", "reason": "boom"}
    assert merge([part(whole, lambda row: False), failed])["rows"][0]["reason"] == "boom"
    assert rows(merge([failed, whole])) == whole["rows"]


def test_a_speed_is_that_of_all_cells_that_run_the_same_networks_in_the_same_way(whole):
    """It is of architectures and samplers, and not of weights."""
    for row in whole["rows"]:
        row["networks"] = [row["student"]] * row["students"]
    read_of = part(whole, lambda row: row["seed"] == 0 and row["method"] == "output")
    for row in (row for row in whole["rows"] if row["role"] == "student"):
        row["speed"] = None
    found = merge([whole, read_of])["rows"]
    read = {(r["student"], r["wrapper"], r["steps"]): r["speed"] for r in read_of["rows"] if r["speed"]}
    students = [row for row in found if row["role"] == "student"]
    assert len(read) == 12
    assert len(students) > len(read)
    for row in students:
        assert row["speed"] == read[row["student"], row["wrapper"], row["steps"]]
    # whose networks nobody knows has none, and another number of steps is another speed
    for row in (*whole["rows"], *read_of["rows"]):
        row["networks"] = None if row["steps"] == 5 else row["networks"]
    others = [row for row in merge([whole, read_of])["rows"] if row["role"] == "student" and row["seed"] == 1]
    assert {row["steps"] for row in others if row["speed"]} == {10}


def test_a_line_keeps_to_the_speeds_of_its_own_device(whole):
    for row in whole["rows"]:
        row["networks"] = [row["student"]] * row["students"]
    elsewhere = part(whole, lambda row: row["method"] == "none")
    for row in (row for row in elsewhere["rows"] if row["status"] == "done"):
        row |= {"device": "another", "speed": {**row["speed"], "device": "another", "images_per_second": 1.0}}
    here = part(whole, lambda row: row["method"] != "none")
    for row in here["rows"]:
        row["speed"] = row["speed"] if row["seed"] == 0 and row["method"] == "output" else None
    found = merge([elsewhere, here])["rows"]
    assert {row["speed"]["device"] for row in found if row["method"] == "none"} == {"another"}
    # one of another device is none of theirs, and one of their own seeds comes first
    assert {row["speed"]["device"] for row in found if row["method"] in ("output", "attention")} == {"cpu"}
    for row in here["rows"]:
        row["speed"] = None
    assert not any(row["speed"] for row in merge([elsewhere, here])["rows"] if row["method"] == "output")


def test_a_cell_has_the_name_that_the_suite_gives_it(whole):
    """Where it is planned as a baseline alone, it has one of what it stands beside."""
    lone = [row for row in whole["rows"] if row["wrapper"] == "single"]
    beside = copy.deepcopy(whole)
    for row in beside["rows"]:
        if row["wrapper"] == "single":
            row |= {
                "wrapper": "single (total of o2mkd-2)",
                "role": "baseline",
                "baseline_of": ["equal_total of o2mkd-2"],
            }
    of_suite = part(whole, lambda row: row["seed"] == 0 and row["wrapper"] == "single")
    for order in ([beside, of_suite], [of_suite, beside]):
        found = [row for row in merge(order)["rows"] if row["cell"] in {row["cell"] for row in lone}]
        assert {(row["wrapper"], row["role"], row["status"]) for row in found} == {("single", "student", "done")}


def test_seconds_are_of_one_training(whole):
    a, b = copy.deepcopy(whole), copy.deepcopy(whole)
    row = a["rows"][-1]
    row |= {"train_seconds": 3000.0, "device_seconds": None, "shared_with": 0}
    b["rows"][-1] |= {"train_seconds": 10.0, "device_seconds": 12.0, "shared_with": 3}
    assert merge([a, b])["rows"][-1]["device_seconds"] is None
    row |= {"train_seconds": None, "shared_with": None}
    found = merge([a, b])["rows"][-1]
    assert (found["train_seconds"], found["device_seconds"], found["shared_with"]) == (10.0, 12.0, 3)


def test_of_two_that_are_done_the_first_counts(whole):
    other = copy.deepcopy(whole)
    other["rows"][0]["scores"] = {"fd_digits": 0.0}
    assert rows(merge([whole, other])) == whole["rows"]
    assert merge([other, whole])["rows"][0]["scores"] == {"fd_digits": 0.0}


def test_the_row_with_more_scores_counts(whole):
    bare = part(whole, lambda row: True)
    for row in bare["rows"]:
        row |= {"scores": {}, "reason": "the network is not here"}
    for documents in ((bare, whole), (whole, bare)):
        found = merge(documents)
        assert rows(found) == whole["rows"]
        assert {row["reason"] for row in found["rows"]} == {None}


def test_one_dataset_read_in_two_ways_is_refused(whole):
    def read_as(identity):
        return {**whole, "datasets": [{"dataset": "digits", "fingerprint": "f", **identity}]}

    assert merge([read_as({"identity": "a"}), read_as({"identity": "a"}), read_as({})])
    with pytest.raises(UserError, match="dataset digits was read with different options"):
        merge([read_as({"identity": "a"}), read_as({"identity": "b"})])


def test_what_is_known_of_metrics_and_references_is_kept(whole):
    blank = part(whole, lambda row: False)
    for entry in blank["metrics"]:
        entry["protocol"] = None
    for entry in blank["references"]:
        entry["scores"] = {}
    found = merge([blank, whole])
    assert (found["metrics"], found["references"]) == (whole["metrics"], whole["references"])
    late = {**copy.deepcopy(whole), "references": [{**whole["references"][0], "scores": {"more": 1.0}}]}
    assert merge([whole, late])["references"][0]["scores"] == {**whole["references"][0]["scores"], "more": 1.0}


def test_teachers_are_those_whose_score_is_known(whole):
    told = {"dataset": "digits", "teacher": "small", "column": "fd_digits", "sampler": "ddim", "steps": 50, "seed": 0}
    before, after = ({**whole, "teachers": [{**told, "found": found}]} for found in (None, 1.5))
    for parts in ((before, after), (after, before)):
        assert [entry["found"] for entry in merge(parts)["teachers"]] == [1.5]


def test_what_does_not_belong_together_is_refused(whole):
    with pytest.raises(UserError, match="suites quickstart and other are no parts"):
        merge([{**whole, "suite": "quickstart"}, {**whole, "suite": "other"}])
    entry = {"dataset": "digits", "plugin": "digits", "source": "here", "fingerprint": "1", "images": {"train": 3}}
    with pytest.raises(UserError, match="dataset digits has another content in here and there"):
        merge(
            [
                {**whole, "datasets": [entry]},
                {**whole, "datasets": [{**entry, "source": "there", "fingerprint": "2"}]},
            ]
        )
    other = copy.deepcopy(whole)
    other["metrics"][0]["protocol"]["images"] = 7
    with pytest.raises(UserError, match="two protocols"):
        merge([whole, other])


def test_pictures_come_along(whole, tmp_path: Path):
    for row in whole["rows"]:
        row["samples"] = f"samples/{row['cell']}.png"
    folders = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        write(part(whole, lambda row, seed=seed: row["seed"] == seed), folder)
        (folder / "samples").mkdir()
        for row in whole["rows"]:
            if row["seed"] == seed:
                (folder / row["samples"]).write_text(row["cell"])
        folders.append(folder)
    (folders[0] / "samples" / "other.png").write_text("named by no row")
    found = merge([read(folder) for folder in folders])
    # into one of its own parts
    write(found, folders[1], copied(found, folders))
    named = {row["samples"] for row in found["rows"] if row["samples"]}
    assert {f"samples/{path.name}" for path in (folders[1] / "samples").iterdir()} == named
    assert json.loads((folders[1] / "run.json").read_text())["runs"] == found["runs"]
