"""Where results go that were given no folder: never over rows that would be lost."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from ..core.errors import UserError
from .lines import Results
from .merge import scored
from .write import read


def place(results: Results, folder: Path) -> tuple[Path, str]:
    """The first of ``folder``, ``folder-2``, ``folder-3``, … that ``results`` may replace.

    Also one sentence about what those before it keep; empty where it is ``folder`` itself.
    """
    kept: list[str] = []
    for number in itertools.count(1):
        found = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not (reason := _kept(results, found)):
            break
        kept.append(f"{found} keeps {reason}")
    if not kept:
        return found, ""
    return found, f"{', '.join(kept)}: the tables of this run are in {found}; --out DIR chooses another folder"


def _kept(results: Results, folder: Path) -> str:
    """What ``folder`` would lose to ``results``; empty where that is nothing."""
    if not os.path.lexists(folder / "results.json"):
        return ""
    try:
        there = read(folder)
    except UserError:
        return "a results.json that cannot be read"
    done = [row for row in there["rows"] if row["status"] == "done"]
    if (suite := there.get("suite")) != results["suite"]:
        return f"{_rows(len(done))} of suite {suite}"
    mine = {row["cell"]: scored(row) for row in results["rows"] if row["status"] == "done"}
    # a row may be done with columns that are empty
    lost = sum(row["cell"] not in mine or bool(scored(row) - mine[row["cell"]]) for row in done)
    return f"{_rows(len(done))}, of which this run has {len(done) - lost}" if lost else ""


def _rows(number: int) -> str:
    return f"{number} done row{'' if number == 1 else 's'}"
