"""Tables, comparisons and the results folder."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from results_factory import PROTOCOL, failed, make, row, two_datasets

from o2mkd_bench.core.columns import LEADING_COLUMNS, TIMING_COLUMNS
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.report.compare import compare
from o2mkd_bench.report.frame import frame, write_csv
from o2mkd_bench.report.lines import lines, sections
from o2mkd_bench.report.notes import NO_SPREAD
from o2mkd_bench.report.tables import as_json, latex, markdown, terminal
from o2mkd_bench.report.text import decimals, finite, listed, markdown_text, shared, si, si_listed, spread
from o2mkd_bench.report.verdicts import BASELINES, RULE, Beside
from o2mkd_bench.report.write import read, write

Document = dict[str, Any]


def of(rows: list[dict[str, Any]], **changes: Any) -> Document:
    return {**make(students=(), seeds=(0,)), "rows": rows, **changes}


def scored(wrapper: str, *scores: float, **changes: Any) -> list[dict[str, Any]]:
    """One cell with a seed for each of ``scores``."""
    column = changes.pop("column", "fd_digits")
    steps, method = changes.pop("steps", 10), changes.pop("method", "output")
    return [
        row("half", method, wrapper, steps=steps, seed=seed, **{"scores": {column: score}, **changes})
        for seed, score in enumerate(scores)
    ]


def bold(results: Document) -> set[str]:
    tables = json.loads(as_json(results))["tables"]
    return {
        line["wrapper"]
        for t in tables
        for line in t["lines"]
        if any(score["bold"] for score in line["scores"].values())
    }


def table_of(page: str) -> list[dict[str, str]]:
    """The Markdown table that comes first in ``page``, one dict a row."""
    table = page[page.index("|") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()]
    return [dict(zip(rows[0], cells, strict=True)) for cells in rows[2:]]


def judged(results: Document) -> list[dict[str, str]]:
    """The table of verdicts in the Markdown page, one dict a row; nothing where there is none."""
    _, found, rest = markdown(results).partition(f"### {BASELINES.title}")
    return table_of(rest) if found else []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0, "0"),
        (50_000, "50k"),
        (51_234, "51.2k"),
        (12.01, "12.0"),
        (12.0, "12"),
        (999.7, "1.00k"),
        (1_000_000, "1M"),
        (449_123, "449k"),
        (0.02134, "0.0213"),
        (2.41e9, "2.41G"),
        (5e15, "5000T"),
        (-1234.5, "-1.23k"),
    ],
)
def test_si_keeps_three_digits(value: float | None, text: str) -> None:
    assert si(value) == text


def test_numbers_as_people_read_them() -> None:
    assert [decimals(v) for v in ([], [0.0], [3.2, 400], [123.0], [0.0021])] == [2, 2, 2, 1, 5]
    assert spread(12.306, 0.4, 2) == "12.31 ± 0.40"
    assert spread(12.306, None, 1) == "12.3"
    assert [finite(v) for v in (None, True, "3", float("nan"), float("inf"), 3)] == [None] * 5 + [3.0]
    assert listed([5.0, 2.5, 3]) == "5, 2.5, 3"
    assert listed("ddim") == "ddim"
    assert listed(None) == ""
    assert shared([4, 4]) == 4
    assert shared([4, 5]) == [4, 5]
    assert si_listed([1000, 2500]) == "1k, 2.5k"
    assert si_listed([1000, 1000]) == "1k"
    assert markdown_text("a|b *c*\nfd_digits _x_") == r"a\|b \*c\* fd_digits \_x\_"


def test_frame_has_stable_columns_with_timings_last() -> None:
    table = frame(two_datasets(make(students=("half",))))
    assert list(table.columns) == [*LEADING_COLUMNS, "fd_digits", "fid", "is", *TIMING_COLUMNS]
    assert list(frame(of([])).columns) == [*LEADING_COLUMNS, "fd_digits", *TIMING_COLUMNS]


def test_frame_keeps_values_and_leaves_gaps_empty() -> None:
    one = row("half", "output", "o2mkd-2", steps=5, seed=3, steps_per_student=[390, 391], extra="ignored")
    table = frame(of([one, failed(one, "out of memory")]))
    first, second = table.to_dict("records")
    assert first["fd_digits"] == one["scores"]["fd_digits"]
    assert (first["calls"], first["steps_per_student"], first["edges"]) == ("2;3", "390;391", "500")
    assert (first["speed_batch"], first["images_per_second"]) == (128, one["speed"]["images_per_second"])
    assert second["reason"] == "out of memory"
    assert pd.isna(second["fd_digits"])
    assert pd.isna(second["speed_batch"])
    assert str(table["nfe"].dtype) == "Int64"


def test_a_count_that_is_not_whole_stays_exact() -> None:
    assert frame(of([row("half", "none", "single", steps=5, seed=0, images_total=12.5)]))["images_total"][0] == 12.5


def test_csv_but_for_timings_does_not_depend_on_the_run(tmp_path: Path) -> None:
    slow, fast = make(students=("half",)), make(students=("half",))
    for entry in fast["rows"]:
        entry["train_seconds"] *= 2
        entry["speed"]["images_per_second"] *= 2
    write_csv(slow, tmp_path / "slow.csv")
    write_csv(fast, tmp_path / "fast.csv")
    texts = [(tmp_path / name).read_bytes().decode() for name in ("slow.csv", "fast.csv")]
    assert texts[0] != texts[1]
    assert "\r" not in texts[0]
    without = [pd.read_csv(io.StringIO(text)).drop(columns=list(TIMING_COLUMNS)).to_csv() for text in texts]
    assert without[0] == without[1]


def test_seeds_are_averaged_with_the_sample_deviation() -> None:
    (line,) = lines(of(scored("single", 10.0, 12.0, 14.0)))
    assert (line.scores["fd_digits"].mean, line.scores["fd_digits"].sd, line.scores["fd_digits"].n) == (12.0, 2.0, 3)


def test_two_rows_of_one_seed_are_never_averaged() -> None:
    found = lines(of([*scored("single", 10.0, 12.0), *scored("single", 20.0, 22.0, batch=256)]))
    assert [line.scores["fd_digits"].mean for line in found] == [11.0, 21.0]


def test_bold_is_every_line_within_one_deviation_of_the_best() -> None:
    rows = [*scored("a", 9.0, 11.0), *scored("b", 11.0, 11.2), *scored("c", 12.0, 12.2)]
    assert bold(of(rows)) == {"a", "b"}
    assert "**10.00 ± 1.41**" in markdown(of(rows))
    assert r"\textbf{10.00 $\pm$ 1.41}" in latex(of(rows))


def test_bold_turns_round_where_higher_is_better() -> None:
    rows = [*scored("a", 9.0, 9.2), *scored("b", 11.0, 11.2)]
    metrics = [{"column": "fd_digits", "higher_is_better": True, "protocol": PROTOCOL}]
    assert bold(of(rows, metrics=metrics)) == {"b"}


def test_bold_is_given_apart_for_each_nfe_and_dataset() -> None:
    rows = [*scored("a", 9.0, 9.2), *scored("b", 19.0, 19.2, nfe=20, steps=20), *scored("c", 8.0, 8.2, dataset="other")]
    assert bold(of(rows)) == {"a", "b", "c"}


def test_nothing_is_bold_where_n_is_1() -> None:
    results = of([*scored("a", 9.0), *scored("b", 10.0)])
    assert bold(results) == set()
    assert NO_SPREAD in markdown(results)
    # nor beside a best that has no spread to be near to
    assert bold(of([*scored("a", 9.0), *scored("b", 10.0, 10.5)])) == set()
    # nor a single reading near a best that has one
    assert bold(of([*scored("a", 9.0, 11.0), *scored("b", 10.0)])) == {"a"}


def test_a_ladder_without_a_score_is_a_table_all_the_same() -> None:
    found = {**make(), "metrics": [], "teacher_steps": [5]}
    for each in found["rows"]:
        each["scores"] = {}
    assert "teacher" in markdown(found)


def test_the_teacher_never_competes() -> None:
    teacher = [{**r, "role": "teacher", "student": "", "method": ""} for r in scored("t", 1.0, 1.1)]
    assert bold(of([*teacher, *scored("a", 9.0, 9.2)])) == {"a"}


def test_teachers_come_first_then_nfe_student_method_wrapper() -> None:
    results = make()
    results["rows"].reverse()
    (section,) = sections(results)
    keys = [(not li.is_teacher, li["nfe"], li["student"], li["method"], li["wrapper"]) for li in section.lines]
    assert keys == sorted(keys)
    assert section.lines[0].is_teacher


def test_markdown_says_what_each_line_cost() -> None:
    one = row("half", "output", "o2mkd-2", steps=5, seed=0, steps_per_student=[390, 391], batch_per_student=[60, 68.5])
    first, second = table_of(markdown(of([one, *scored("single", 20.0)])))
    assert first["params (total / active)"] == "898k / 449k"
    assert first["train images (each / total)"] == "25k / 50k"
    assert first["batch×steps (each)"] == "(60, 68.5)×(390, 391)"
    assert first["calls (each)"] == "2, 3"
    assert first["MACs/image"] == "63M"
    assert second["batch×steps (each)"] == "128×391"
    assert second["fd_digits ↓"] == "20.00"


def test_what_differs_between_lines_is_a_column_and_the_rest_a_note() -> None:
    rows = [*scored("single", 10.0), *scored("single", 11.0, weights="raw")]
    page = markdown(of(rows))
    assert [line["weights"] for line in table_of(page)] == ["ema", "raw"]
    assert "- all students: budget 50k, spacing trailing, clip x0, precision fp32" in page
    heun = markdown(of([*rows, *scored("heun", 9.0, steps=10, nfe=19), *scored("heun", 9.0, steps=5, nfe=9)]))
    assert [line["steps"] for line in table_of(heun)] == ["5", "10", "10", "10"]
    assert "steps" not in table_of(markdown(make()))[0]


def test_failed_and_missing_cells_are_seen() -> None:
    good = scored("single", 10.0, 11.0, 12.0)
    good[2] = failed(good[2], "loss is NaN | step 12")
    lost = [failed(r, "CUDA out of memory: " + 60 * "x") for r in scored("o2mkd-2", 1.0)]
    none = [failed(r, None, "missing") for r in scored("o2mkd-4", 1.0)]
    mute = [failed(r, None) for r in scored("o2mkd-8", 1.0)]
    results = of([*good, *lost, *none, *mute])
    found = {line["wrapper"]: line for line in table_of(markdown(results))}
    assert (found["single"]["n"], found["single"]["fd_digits ↓"]) == ("2 of 3", "**10.50 ± 0.71**")
    assert found["o2mkd-2"]["fd_digits ↓"].startswith("failed: CUDA out of memory: xx")
    assert found["o2mkd-2"]["fd_digits ↓"].endswith("…")
    assert (found["o2mkd-4"]["fd_digits ↓"], found["o2mkd-4"]["n"]) == ("missing", "0 of 1")
    assert found["o2mkd-8"]["fd_digits ↓"] == "failed: no reason given"
    page = markdown(results)
    assert "- 3 failed and 1 missing of 6 rows" in page
    assert f"- failed: digits half output o2mkd-2 ddim 10: CUDA out of memory: {60 * 'x'}" in page
    assert r"loss is NaN \| step 12" in page


def test_unresolved_cells_and_empty_columns_say_why() -> None:
    teacher = {"cell": "", "status": "unresolved", "reason": "not downloaded", "dataset": "digits", "teacher": "small"}
    teacher |= {"role": "teacher", "student": "", "steps": "", "seed": "", "nfe": 0, "calls": []}
    empty = scored("single", 1.0, scores={}, reason="Inception weights are not here")
    results = of([teacher, *empty])
    page = markdown(results)
    first = table_of(page)[0]
    assert (first["fd_digits ↓"], first["NFE"]) == ("unresolved: not downloaded", "")
    assert "- 1 unresolved of 2 rows" in page
    assert "- unresolved: digits teacher small: not downloaded" in page
    assert "- empty columns: digits half output single ddim 10: Inception weights are not here" in page
    assert frame(results)["steps"].tolist() == [pd.NA, 10]


def test_many_failures_of_one_reason_are_one_note() -> None:
    rows = [failed(r, "boom") for n in range(6) for r in scored(f"w{n}", 1.0)]
    assert "w3 ddim 10, and 2 more: boom" in markdown(of(rows))


def test_notes_state_protocol_references_machine_and_baselines() -> None:
    page = markdown(make())
    assert (
        "- fd_digits: lower is better; network resnet-digits (sha256 0123456789ab); against train (1497 images, "
        "hash fedcba987654); 1000 generated images; uint8 round; resize none" in page
    )
    assert (
        "- scale of fd_digits on digits: noise 1234.00, held-out real images 2.31, teacher small at best (50 NFE)"
        in page
    )
    assert "- device: cpu; machine: cpu Test CPU, cores 2, python 3.11, torch 2.6.0; speed at batch 128, " in page
    assert ", compile off, on cpu\n" in page
    assert "- † baselines: equal_total of o2mkd-2" in page
    assert "- made 2026-01-02T03:04:05Z, commit c0ffeec0ffee" in page
    assert "single (total of o2mkd-2) †" in {line["wrapper"] for line in table_of(page)}


BASE = {"baseline_of": ["equal_total of o2mkd-4"]}


@pytest.mark.parametrize(
    ("mine", "other", "favour", "verdict"),
    [
        ((10.0, 11.0, 12.0), (13.0, 14.0, 15.0), "3 of 3", "better"),
        ((13.0, 14.0, 15.0), (10.0, 11.0, 12.0), "0 of 3", "worse"),
        # all seeds, by less than they differ among themselves
        ((10.0, 11.0, 12.0), (10.5, 11.5, 12.5), "3 of 3", "undecided"),
        # by more than that, and one seed against it
        ((10.0, 10.0, 10.0), (12.0, 12.0, 9.9), "2 of 3", "undecided"),
        # the larger deviation counts
        ((10.0, 10.1, 10.2), (10.3, 10.4, 15.0), "3 of 3", "undecided"),
        ((10.0, 11.0), (10.0, 11.0), "0 of 2", "undecided"),
    ],
)
def test_verdicts_go_seed_by_seed(mine: Any, other: Any, favour: str, verdict: str) -> None:
    (found,) = judged(of([*scored("o2mkd-4", *mine), *scored("single", *other, **BASE)]))
    assert (found["wrapper"], found["against"]) == ("o2mkd-4", "single (equal total)")
    assert (found["seeds for it"], found["verdict"]) == (favour, verdict)


def test_a_verdict_gives_the_difference_and_its_share() -> None:
    results = of([*scored("o2mkd-4", 9.0, 11.0), *scored("single", 11.0, 14.0, **BASE)])
    (found,) = judged(results)
    assert (found["Δ fd_digits ↓"], found["%"]) == ("-2.50 ± 0.71", "-20.0")
    assert f"- {RULE}" in markdown(results)
    (verdict,) = json.loads(as_json(results))["tables"][0]["verdicts"]
    assert verdict["differences"] == [-2.0, -3.0]
    assert (verdict["wrapper"], verdict["against"]) == ("o2mkd-4", {"wrapper": "single"})
    assert (verdict["rule"], verdict["relative"]) == ("equal_total", -0.2)
    assert re.search(r"-2\.50 ± 0\.71 +-20\.0 +2 of 2 +better$", terminal(results), re.MULTILINE)


def test_verdicts_turn_round_where_higher_is_better() -> None:
    metric = {**make()["metrics"][0], "higher_is_better": True}
    rows = [*scored("o2mkd-4", 10.0, 11.0), *scored("single", 13.0, 14.0, **BASE)]
    assert [line["verdict"] for line in judged(of(rows, metrics=[metric]))] == ["worse"]


def test_a_verdict_pairs_the_seeds_that_both_have() -> None:
    mine = scored("o2mkd-4", 10.0, 11.0, 99.0)
    other = [failed(row, "boom") if row["seed"] == 2 else row for row in scored("single", 13.0, 14.0, 15.0, **BASE)]
    (found,) = judged(of([*mine, *reversed(other)]))
    assert (found["seeds for it"], found["Δ fd_digits ↓"]) == ("2 of 2", "-3.00 ± 0.00")


def test_nothing_is_said_of_one_seed_or_of_another_cell() -> None:
    assert not judged(of([*scored("o2mkd-4", 10.0), *scored("single", 13.0, **BASE)]))
    other = scored("single", 13.0, 14.0, **BASE, budget="100k", images_total=100_000)
    assert not judged(of([*scored("o2mkd-4", 10.0, 11.0), *other]))
    twice = [*scored("o2mkd-4", 10.0, 11.0), *scored("o2mkd-4", 20.0, 21.0), *scored("single", 13.0, 14.0, **BASE)]
    page = markdown(of(twice))
    assert BASELINES.title not in page
    assert RULE not in page


def test_one_baseline_of_several_and_several_of_one() -> None:
    both = {"baseline_of": ["equal_total of o2mkd-2", "equal_total of o2mkd-4"]}
    made = {"role": "baseline", "baseline_of": ["per_student of o2mkd-4"], "images_total": 25_000}
    small = {"baseline_of": ["equal_batch of o2mkd-4"]}
    results = of(
        [
            *scored("o2mkd-2", 10.0, 11.0),
            *scored("o2mkd-4", 10.0, 11.0),
            *scored("single", 13.0, 14.0, **both),
            *scored("single (per student of o2mkd-4)", 5.0, 6.0, **made),
            *scored("single-batch-16", 8.0, 8.5, **small),
        ]
    )
    assert [(line["wrapper"], line["against"], line["verdict"]) for line in judged(results)] == [
        ("o2mkd-2", "single (equal total)", "better"),
        ("o2mkd-4", "single (equal total)", "better"),
        ("o2mkd-4", "single (per student of o2mkd-4)", "worse"),
        ("o2mkd-4", "single-batch-16 (equal batch)", "worse"),
    ]


def test_a_baseline_that_serves_two_budgets_stands_beside_what_saw_as_much() -> None:
    told = ["equal_total of o2mkd-2", "per_student of o2mkd-2"]
    results = of(
        [
            *scored("o2mkd-2", 10.0, 11.0, budget="50k", images_per_student=[30_000, 30_000]),
            *scored("o2mkd-2", 4.0, 5.0, budget="100k", images_total=100_000, images_per_student=[50_040, 50_040]),
            *scored("single", 13.0, 14.0, baseline_of=told),
        ]
    )
    assert [(line["budget"], line["against"], line["Δ fd_digits ↓"]) for line in judged(results)] == [
        ("50k", "single (equal total)", "-3.00 ± 0.00"),
        ("100k", "single (per student)", "-9.00 ± 0.00"),
    ]
    bare = [{**row, "batch": None, "images_total": None, "images_per_student": None} for row in results["rows"]]
    # one row that two rules mean is one comparison
    assert [(line["budget"], line["against"]) for line in judged(of(bare))] == [
        ("50k", "single (equal total and per student)")
    ]


def test_what_a_wrapper_is_compared_with_may_have_another_name_in_every_seed() -> None:
    """Where edges are measured steps are cut by seed, and the equal total of one seed is a row of the suite."""
    first, *rest = scored("single", 6.0, 6.1, 6.0)
    made = "single (total of o2mkd-4)"
    rows = [{**first, **BASE}, *rest, *({**row, "wrapper": made, "role": "baseline", **BASE} for row in rest)]
    (found,) = judged(of([*scored("o2mkd-4", 4.0, 4.1, 9.0), *rows]))
    assert (found["seeds for it"], found["verdict"]) == ("2 of 3", "undecided")
    assert found["against"] == "single (equal total)"


def test_rows_of_one_name_are_averaged_only_if_they_were_made_in_one_way() -> None:
    first, second = scored("single", 6.0, 8.0)
    assert [line["n"] for line in table_of(markdown(of([first, second])))] == ["2"]
    apart = of([{**first, "recipe": "a"}, {**second, "recipe": "b"}])
    assert [line["n"] for line in table_of(markdown(apart))] == ["1", "1"]
    assert "2 lines of this name differ in what the table does not show" in markdown(apart)
    # results that are older than recipes join those of their name
    assert [line["n"] for line in table_of(markdown(of([{**first, "recipe": "a"}, second])))] == ["2"]
    # the same two recipes in every seed are two lines of both
    other = [{**row, "recipe": recipe} for row, recipe in zip(scored("single", 6.0, 8.0), "ba", strict=True)]
    both = of([{**first, "recipe": "a"}, {**second, "recipe": "b"}, *other])
    assert [line["n"] for line in table_of(markdown(both))] == ["2", "2"]


def test_speeds_of_several_devices_are_no_mean() -> None:
    rows = scored("single", 6.0, 8.0)
    assert table_of(markdown(of(rows)))[0]["images/s"]
    rows[1]["speed"] = {**rows[1]["speed"], "device": "another"}
    page = markdown(of(rows))
    assert table_of(page)[0]["images/s"] == ""
    assert table_of(page)[0]["MACs/image"]
    assert "no speed: digits half output single ddim 10: seeds were timed on different devices" in page
    found = compare(of(rows[:1]), of([{**rows[1], "seed": 0}])).markdown()
    assert re.search(r"\| +\d\.\d\d× \| timed on cpu and on another \|$", found, re.MULTILINE)
    rows[1]["speed"] = {**rows[0]["speed"], "batch": 8, "compile": "on"}
    found = compare(of(rows[:1]), of([{**rows[1], "seed": 0}])).markdown()
    assert re.search(r"timed at batch 128 with compile off and at batch 8 with compile on \|$", found, re.MULTILINE)
    rows[1] |= {"speed": rows[0]["speed"], "precision": "bf16"}
    found = compare(of(rows[:1]), of([{**rows[1], "seed": 0}])).markdown()
    assert re.search(r"timed in fp32 and in bf16 \|$", found, re.MULTILINE)


def test_what_seeds_have_in_their_own_way_is_marked() -> None:
    rows = scored("o2mkd-4", 6.0, 8.0)
    assert "≈" not in markdown(of(rows))
    rows[1]["calls"] = [9, 1]
    page = markdown(of(rows))
    assert table_of(page)[0]["calls (each)"].startswith("≈ ")
    assert not table_of(page)[0]["batch×steps (each)"].startswith("≈")
    assert "- ≈ of the first seed; its intervals were measured, and those of other seeds differ\n" in page
    assert json.loads(as_json(of(rows)))["tables"][0]["lines"][0]["differs"] == ["calls"]


def test_n_counts_scores_and_not_rows_without_one() -> None:
    rows = scored("single", 6.0, 8.0)
    rows[1]["scores"] = {}
    assert table_of(markdown(of(rows)))[0]["n"] == "1 of 2"


def test_budgets_stand_in_the_order_of_the_suite() -> None:
    rows = [row for budget in ("16k", "64k", "256k") for row in scored("single", 6.0, 8.0, budget=budget)]
    results = {**of(rows[::-1]), "axes": {"budget": ["16k", "64k", "256k"]}}
    assert [line["budget"] for line in table_of(markdown(results))] == ["16k", "64k", "256k"]


def test_rounds_are_said_to_count_in_total_alone() -> None:
    rows = scored("single", 6.0, 8.0)
    assert "step distillation" not in markdown(of(rows))
    rows[0]["rounds_images"] = 100
    assert "- total images count those of step distillation's rounds; " in markdown(of(rows))


def test_seeds_of_which_a_row_is_no_baseline_do_not_count() -> None:
    mine, other = scored("o2mkd-4", 10.0, 11.0, 12.0), scored("single", 13.0, 14.0, 15.0)
    for row_ in other[1:]:
        row_ |= BASE
    (found,) = judged(of([*mine, *other]))
    assert found["seeds for it"] == "2 of 2"


def test_of_two_baselines_of_one_name_neither_is_meant() -> None:
    base = scored("single", 13.0, 14.0, **BASE)
    assert judged(of([*scored("o2mkd-4", 10.0, 11.0), *base]))
    assert not judged(of([*scored("o2mkd-4", 10.0, 11.0), *base, *scored("single", 23.0, 24.0, **BASE)]))


def test_a_difference_is_never_shown_as_none() -> None:
    (found,) = judged(of([*scored("o2mkd-4", 250.0, 250.01), *scored("single", 250.04, 250.05, **BASE)]))
    assert (found["Δ fd_digits ↓"], found["verdict"]) == ("-0.0400 ± 0.0000", "better")


def test_a_share_of_next_to_nothing_is_left_out() -> None:
    results = of([*scored("o2mkd-4", 1.0, 2.0), *scored("single", 1e-310, 1e-310, **BASE)])
    assert json.loads(as_json(results))["tables"][0]["verdicts"][0]["relative"] is None
    assert judged(results)[0]["%"] == ""


def test_each_score_has_its_verdict() -> None:
    first = judged(wide())
    assert first
    assert all("score" not in line for line in first)
    _, _, second = markdown(wide()).rpartition(f"### {BASELINES.title}")
    assert {line["score"] for line in table_of(second)} == {"fid ↓", "is ↑"}


def test_every_line_may_be_judged_against_one_that_is_named() -> None:
    results = of(
        [
            *scored("single", 13.0, 14.0),
            *scored("o2mkd-4", 10.0, 11.0),
            *scored("o2mkd-2", 15.0, 16.0),
            *scored("o2mkd-4", 1.0, 2.0, steps=20, nfe=20),
            *scored("o2mkd-8", 1.0, 2.0, steps=30, nfe=30),
            *scored("single", 3.0, 4.0, steps=30, nfe=30),
            *scored("single", 5.0, 6.0, steps=30, nfe=30),
            *[row("", "", "single", steps=10, seed=seed) for seed in (0, 1)],
            *scored("single", 9.0, 9.0, method="none"),
            *scored("o2mkd-4", 9.0, 9.0, method="none"),
        ]
    )

    def found(text: str) -> list[tuple[str, str, str]]:
        tables = json.loads(as_json(results, Beside.parse(text, results)))["tables"]
        return [(one["method"], one["wrapper"], one["verdict"]) for one in tables[0]["verdicts"]]

    assert found("wrapper=single") == [
        ("none", "o2mkd-4", "undecided"),
        ("output", "o2mkd-2", "worse"),
        ("output", "o2mkd-4", "better"),
    ]
    assert found("method=none") == [("output", "o2mkd-4", "worse"), ("output", "single", "worse")]
    assert found("steps=20") == [("output", "o2mkd-4", "worse")]
    beside = Beside.parse("wrapper=single", results)
    assert "\nAgainst wrapper single\n" in terminal(results, beside=beside)
    page = markdown(results, beside)
    assert "### Against wrapper single" in page
    assert f"- {RULE}" in page
    assert "against" not in table_of(page.partition("### ")[2])[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("wrapper", r"--against wrapper: give AXIS=LABEL \(axes: student, method, "),
        ("wraper=single", "--against wraper=single: give AXIS=LABEL; did you mean 'wrapper'"),
        ("dataset=digits", "--against dataset=digits: give AXIS=LABEL"),
        ("wrapper=singel", r"no student has that wrapper; did you mean 'single'\? \(known: single\)"),
    ],
)
def test_a_line_that_is_not_there_is_one_sentence(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Beside.parse(text, of(scored("single", 1.0)))


def test_a_bare_document_gives_bare_tables() -> None:
    bare = {
        "cell": "x",
        "status": "done",
        "dataset": "d",
        "teacher": "t",
        "student": "s",
        "scores": {"fd": float("nan")},
    }
    results = {"metrics": [{"column": "fd"}], "rows": [{**bare, "images_total": 5, "batch_per_student": 3}]}
    (line,) = table_of(markdown(results))
    assert (line["fd ↓"], line["train images (each / total)"], line["batch×steps (each)"]) == ("", "? / 5", "")
    assert "network unknown; against unknown" in markdown(results)
    assert terminal({**results, "rows": []}) == "\n"


def test_each_dataset_has_its_table_with_its_metrics() -> None:
    results = two_datasets(make(students=("half",)))
    digits, cifar = sections(results)
    assert [metric.column for metric in digits.metrics] == ["fd_digits"]
    assert [metric.column for metric in cifar.metrics] == ["fid", "is"]
    page = markdown(results)
    assert "## cifar10, teacher ddpm" in page
    assert "hash fedcba987654); 50000 generated images; uint8 round; resize none (cifar10)" in page
    best = min(line.scores["is"].mean for line in cifar.lines if line.is_teacher)
    assert f"teacher ddpm at best (50 NFE) {best:.2f}" not in page


def test_one_protocol_for_two_datasets_is_said_once() -> None:
    results = of([*scored("single", 3.0), *scored("single", 4.0, dataset="other")])
    assert markdown(results).count("network resnet-digits") == 1
    assert "resize none (digits, other)" in markdown(results)


def test_a_table_refuses_to_mix_protocols() -> None:
    results = make(seeds=(0,))
    other = {**PROTOCOL, "images": 5000}
    results["metrics"].append({"column": "fd_digits", "higher_is_better": False, "protocol": other})
    for use in (markdown, latex, as_json, terminal, frame):
        with pytest.raises(UserError, match=r"fd_digits was measured under two protocols \(images 1000 and 5000\)"):
            use(results)
    results["metrics"][-1]["dataset"] = "digits"
    with pytest.raises(UserError, match="two protocols"):
        markdown(results)


def test_datasets_may_have_protocols_of_their_own() -> None:
    metrics = [
        {"column": "fd_digits", "dataset": name, "protocol": {**PROTOCOL, "reference_hash": name}}
        for name in ("a", "b")
    ]
    page = markdown(of([*scored("single", 1.0, dataset="a"), *scored("single", 1.0, dataset="b")], metrics=metrics))
    assert "hash a)" in page
    assert "hash b)" in page


def test_a_score_without_a_protocol_is_refused() -> None:
    with pytest.raises(UserError, match="the scores fid have no protocol"):
        markdown(of(scored("single", 3.0, column="fid")))


def test_latex_escapes_and_balances() -> None:
    page = latex(of([*scored("50%_x|y", 3.0, 4.0), *scored("tab", 5.0)]))
    assert r"50\%\_x$|$y" in page
    assert page.count(r"\begin") == page.count(r"\end") == 2
    body = [line for line in page.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {9}
    assert page.splitlines()[-1].startswith("% ")


def test_json_of_tables_is_whole() -> None:
    document = json.loads(as_json(make(seeds=(0, 1))))
    (table,) = document["tables"]
    line = next(line for line in table["lines"] if line["wrapper"] == "o2mkd-2")
    assert {"dataset", "nfe", "scores", "images_per_second", "edges", "rows", "done", "reasons"} <= set(line)
    assert line["scores"]["fd_digits"]["n"] == 2
    assert document["notes"]


@pytest.mark.parametrize("width", [100, 120])
def test_terminal_fits_its_width(width: int) -> None:
    results = make()
    results["rows"][-1] = failed(results["rows"][-1], "boom")
    text = terminal(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert "digits  teacher small" in text
    assert "attention" in text
    assert "2 of 3" in text
    assert "\x1b" not in text
    assert "…" not in text


def wide() -> Document:
    """Results with several metrics and long names."""
    results = two_datasets(make(students=("half",), methods=("output", "attention_transfer"), seeds=(0, 1)))
    for entry in results["rows"]:
        entry |= {"student": entry["student"] and "half_width", "sampler": "dpm_solver_multistep"}
        entry["speed"] = {**entry["speed"], "images_per_second": 839.0}
    return results


def fields(text: str) -> list[list[str]]:
    """What stands in the tables of all cells in ``text``, line by line."""
    tables = re.sub(rf"^{BASELINES.title}$.*?(?=^\w+  teacher|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.split(r"  +", line.strip()) for line in tables.splitlines() if line.strip() and line[1] not in "·─ "]


def test_terminal_without_a_limit_is_one_table_with_everything() -> None:
    text = terminal(wide(), None)
    assert all(
        {"839", "dpm_solver_multistep"} <= set(line) for line in fields(text) if line[0] in ("teacher", "half_width")
    )
    header = next(line for line in fields(text) if "is ↑" in line)
    assert header == ["student", "method", "wrapper", "sampler", "NFE", "fid ↓", "is ↑", "img/s", "MACs", "images", "n"]
    assert "attention_transfer" in text


@pytest.mark.parametrize("width", [105, 110, 120])
def test_a_table_wider_than_the_screen_stands_in_blocks(width: int) -> None:
    text, whole = terminal(wide(), width), terminal(wide(), None)
    assert max(map(len, text.splitlines())) <= width
    headers = [line for line in fields(text) if line[0] == "student"]
    assert len(headers) > len(sections(wide()))
    assert all(line[:5] == ["student", "method", "wrapper", "sampler", "NFE"] and len(line) > 5 for line in headers)
    assert {word for line in fields(text) for word in line} == {word for line in fields(whole) for word in line}


def test_a_screen_narrower_than_the_names_cuts_nothing() -> None:
    def tables(text: str) -> list[str]:
        return text.split("\n ·")[0].splitlines()

    assert tables(terminal(wide(), 40)) == tables(terminal(wide(), None))


def test_terminal_shows_gaps_and_the_best_in_colour() -> None:
    lost = [failed(r, "boom") for r in scored("o2mkd-2", 1.0)]
    none = [failed(r, None, "missing") for r in scored("o2mkd-4", 1.0)]
    text = terminal(of([*scored("single", 3.0, 3.1), *lost, *none]), colour=True)
    assert "\x1b[1;32m3.05 ± 0.07\x1b[0m" in text
    assert re.search(r"\x1b\[31m *failed\x1b\[0m", text)
    assert re.search(r"\x1b\[33m *missing\x1b\[0m", text)


def test_compare_matches_rows_and_gives_differences() -> None:
    a = of([*scored("single", 10.0), *scored("gone", 5.0), *scored("zero", 0.0)])
    b = of([*scored("single", 9.0), *(failed(r, "boom") for r in scored("new", 5.0)), *scored("zero", 1.0)])
    for entry in b["rows"]:
        if entry["speed"]:
            entry["speed"]["images_per_second"] *= 1.5
    found = compare(a, b, ("old.d", "new.d"))
    by = {pair.cell["wrapper"]: pair for pair in found.pairs}
    score = by["single"].scores["fd_digits"]
    assert (score.a, score.b, score.change, score.relative) == (10.0, 9.0, -1.0, -0.1)
    assert by["single"].speed_ratio == pytest.approx(1.5)
    assert by["zero"].scores["fd_digits"].relative is None
    assert (by["gone"].a, by["gone"].b, by["new"].a, by["new"].b) == ("done", "absent", "absent", "failed")
    notes = {line["wrapper"]: line["note"] for line in table_of(found.markdown())}
    assert notes == {"single": "", "gone": "only in a", "zero": "", "new": "only in b (failed)"}
    first = table_of(found.markdown())[0]
    assert (first["fd_digits b − a"], first["fd_digits %"], first["speed b/a"]) == ("-1.00", "-10.0", "1.50×")
    assert "in all rows: dataset digits, teacher small, student half" in found.markdown()
    document = json.loads(found.as_json())
    assert (document["a"], document["pairs"][0]["scores"]["fd_digits"]["change"]) == ("old.d", -1.0)


def test_compare_says_where_a_row_failed() -> None:
    lost = [failed(r, "boom") for r in scored("single", 10.0)]
    assert table_of(compare(of(lost), of(scored("single", 1.0))).markdown())[0]["note"] == "failed in a"
    assert table_of(compare(of(lost), of([])).markdown())[0]["note"] == "only in a (failed)"
    teacher = row("", "", "", steps=4, seed=0)
    assert table_of(compare(of([*lost, teacher]), of([])).markdown())[1]["student"] == "teacher"
    assert compare(of([]), of([])).pairs == ()
    assert compare(of([]), of([])).markdown().startswith("a: a, b: b")


def test_compare_refuses_other_protocols_and_other_columns() -> None:
    a = make(students=("half",), seeds=(0,))
    b = copy.deepcopy(a)
    b["metrics"][0]["protocol"]["sha256"] = "other"
    with pytest.raises(UserError, match="sha256"):
        compare(a, b)
    with pytest.raises(UserError, match=r"share no score column \(fd_digits and none\)"):
        compare(a, of([], metrics=[]))


def test_write_then_read(tmp_path: Path) -> None:
    results = make(students=("half",), seeds=(0,))
    results["rows"][0]["scores"]["fd_digits"] = float("nan")

    def pictures(folder: Path) -> None:
        (folder / "samples").mkdir()
        (folder / "samples" / "a.png").write_bytes(b"picture")

    out = tmp_path / "deep" / "out"
    write(results, out, pictures)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    tables = {"results.csv", "results.md", "results.json", "run.json"}
    assert names == tables | {"quality_vs_speed.png", "per_timestep.png", str(Path("samples", "a.png"))}
    found = read(out)
    assert found["rows"][0]["scores"]["fd_digits"] is None
    assert found["rows"][1:] == results["rows"][1:]
    assert json.loads((out / "run.json").read_text())["git_commit"] == results["git_commit"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write(results, out, pictures)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_pictures_of_rows_that_are_gone_are_removed(tmp_path: Path) -> None:
    results = make(students=("half",), seeds=(0,))
    for number, entry in enumerate(results["rows"]):
        entry["samples"] = f"samples/{number}.png"
    results["rows"][1]["samples"] = "samples/../mine.txt"

    def pictures(folder: Path) -> None:
        (folder / "samples").mkdir()
        for number in range(len(results["rows"])):
            (folder / "samples" / f"{number}.png").write_bytes(b"picture")

    write(results, tmp_path, pictures)
    mine = [tmp_path / "mine.txt", tmp_path / "samples" / "mine.png"]
    for path in mine:
        path.write_text("keep")
    write({**results, "rows": results["rows"][2:]}, tmp_path)
    assert all(path.exists() for path in mine)
    assert not (tmp_path / "samples" / "0.png").exists()
    assert (tmp_path / "samples" / "2.png").exists()


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("old")
    results = make(seeds=(0,))
    results["metrics"] = []
    with pytest.raises(UserError):
        write(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert (tmp_path / "results.csv").read_text() == "old"


def _remove(path: Path) -> None:
    path.unlink()


def _says(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove, "is not there"),
        (_says("{"), "is not JSON"),
        (_says("[]"), "is no results document"),
        (_says('{"schema_version": 1}'), "is no results document"),
        (_says('{"schema_version": 2, "rows": []}'), "schema_version 2 and this version reads 1; upgrade o2mkd-bench"),
        (_says('{"schema_version": 0, "rows": []}'), "write it again"),
    ],
)
def test_read_refuses_what_it_cannot_read(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    (tmp_path / "results.json").write_text("{}")
    spoil(tmp_path / "results.json")
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_importing_the_report_stays_light() -> None:
    heavy = ("torch", "pandas", "matplotlib", "tabulate", "rich", "PIL")
    code = (
        "import sys; import o2mkd_bench.report.write, o2mkd_bench.report.compare\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
