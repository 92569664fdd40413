"""Results without a folder of their own replace nothing that they lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from results_factory import failed, make

from o2mkd_bench.report.place import place


@pytest.fixture
def whole() -> dict[str, Any]:
    found = make(students=("half",), methods=("output",), seeds=(0,))
    for number, row in enumerate(found["rows"]):
        row["cell"] = f"{number:064x}"
    return found


def left(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text, encoding="utf-8")


def test_a_folder_without_results_is_taken(whole: dict[str, Any], tmp_path: Path) -> None:
    assert place(whole, tmp_path / "suite") == (tmp_path / "suite", "")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "events.jsonl").touch()
    assert place(whole, tmp_path / "suite") == (tmp_path / "suite", "")


def test_results_are_replaced_by_those_that_have_all_they_have(whole: dict[str, Any], tmp_path: Path) -> None:
    rows = whole["rows"]
    left(tmp_path / "suite", json.dumps({**whole, "rows": [failed(rows[0], "boom"), *rows[1:3]]}))
    assert place(whole, tmp_path / "suite") == (tmp_path / "suite", "")


def test_done_rows_that_failed_or_are_absent_now_are_kept(whole: dict[str, Any], tmp_path: Path) -> None:
    rows = whole["rows"]
    left(tmp_path / "suite", json.dumps({**whole, "rows": rows[:3]}))
    less = {**whole, "rows": [failed(rows[0], "boom"), *rows[1:]]}
    found, said = place(less, tmp_path / "suite")
    assert found == tmp_path / "suite-2"
    assert said == (
        f"{tmp_path}/suite keeps 3 done rows, of which this run has 2: the tables of this run are in "
        f"{tmp_path}/suite-2; --out DIR chooses another folder"
    )
    left(tmp_path / "suite-2", json.dumps({**whole, "rows": rows[:1]}))
    found, said = place(less, tmp_path / "suite")
    assert found == tmp_path / "suite-3"
    assert f"{tmp_path}/suite-2 keeps 1 done row, of which this run has 0: " in said
    left(tmp_path / "suite-3", json.dumps({**whole, "rows": rows[1:2]}))
    assert place(less, tmp_path / "suite")[0] == tmp_path / "suite-3"


def test_a_score_that_is_empty_now_is_kept(whole: dict[str, Any], tmp_path: Path) -> None:
    left(tmp_path / "suite", json.dumps(whole))
    less = {**whole, "rows": [{**whole["rows"][0], "scores": {}}, *whole["rows"][1:]]}
    assert place(less, tmp_path / "suite")[0] == tmp_path / "suite-2"
    assert place(whole, tmp_path / "suite")[0] == tmp_path / "suite"


def test_rows_without_an_identity_are_kept(whole: dict[str, Any], tmp_path: Path) -> None:
    nameless = {**whole["rows"][0], "cell": ""}
    left(tmp_path / "suite", json.dumps({**whole, "rows": [nameless]}))
    waiting = failed(nameless, "waits", "unresolved")
    assert place({**whole, "rows": [waiting, *whole["rows"]]}, tmp_path / "suite")[0] == tmp_path / "suite-2"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"suite": "other"}, "13 done rows of suite other"), ({"rows": 3}, "a results.json that cannot be read")],
)
def test_foreign_and_damaged_results_are_kept(
    change: dict[str, Any], said: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    left(tmp_path / "suite", json.dumps({**whole, **change}))
    found, sentence = place(whole, tmp_path / "suite")
    assert found == tmp_path / "suite-2"
    assert sentence.startswith(f"{tmp_path}/suite keeps {said}: ")
