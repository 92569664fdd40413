"""The table of the full-size systems, from readings and without any."""

from __future__ import annotations

import json
from pathlib import Path

from systems import SYSTEMS, UNREAD, table

READ = {"parameters": 113_673_219, "macs": 248.5e9, "nfe": 10, "images": 64, "images_per_second": 123.4}


def readings(folder: Path, **facts: object) -> str:
    parts = {"sample teacher": READ | {"peak_bytes": 5.04e9, "estimated_bytes": 4.96e9}, "train half": {"error": "no"}}
    found = {"system": "cifar", "small": False, "device": "a GPU", "torch": "2", "cuda": "12", "date": "2026-01-02"}
    found["parts"] = parts
    (folder / "cifar.json").write_text(json.dumps(found | facts), encoding="utf-8")
    table(folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_what_was_read_is_told_and_what_was_not(tmp_path: Path) -> None:
    text = readings(tmp_path)
    assert "| cifar | sample teacher | 113.7 M | 248.5 | 10 | 64 | 123 | 5.0 | 5.0 |" in text
    assert "| cifar | train half |  |  |  |  |  |  | no |" in text
    assert f"Not read: {', '.join(sorted(SYSTEMS.keys() - {'cifar'}))}" in text
    assert UNREAD not in text


def test_a_rehearsal_is_no_reading(tmp_path: Path) -> None:
    assert UNREAD in readings(tmp_path, small=True)
    assert UNREAD in readings(tmp_path, cuda="none")


def test_the_committed_table_is_that_of_the_committed_readings(tmp_path: Path) -> None:
    place = Path(__file__).parent.parent / "results" / "systems"
    for file in place.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (place / "README.md").read_text(encoding="utf-8")
