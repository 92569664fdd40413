"""How a cell is named on the command line: by the first digits of its identity."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .report import RESULTS, read_results

if TYPE_CHECKING:
    from ..core.plan import Cell, Plan

SHOWN = 3

CellName = Annotated[
    str, typer.Argument(metavar="CELL", help="A cell as `plan` names it; its first digits do.", show_default=False)
]
CellSuite = Annotated[
    Path | None, typer.Option(metavar="SUITE", help="The cell's suite.", show_default="as results/*/results.json say")
]


def find_suite(cell: str) -> Path:
    """The suite that the results below the working directory name for ``cell``.

    Raises:
        UserError: when none of them has the cell, or its suite was no file; the cells that are most like it are named.
    """
    from ..core.errors import UserError
    from ..core.plan import AXES

    known: dict[str, str] = {}
    for path in sorted(Path("results").glob(f"*/{RESULTS}")):
        document = read_results(path)
        rows = [row for row in document["rows"] if row["cell"]]
        known |= {row["cell"]: " / ".join(str(row[a]) for a in AXES if row.get(a) not in ("", None)) for row in rows}
        if any(row["cell"].startswith(cell) for row in rows) and document.get("suite_path"):
            return Path(document["suite_path"])
    raise UserError(f"no results/*/{RESULTS} here has a cell {cell}{near(cell, known)}; name its suite with --suite")


def choose(plan: Plan, cell: str) -> Cell:
    """The one cell whose identity begins with ``cell``.

    Raises:
        UserError: when there is none, or more than one; the cells that are most like it are named.
    """
    from ..core.errors import UserError

    known = {each.identity: each for each in plan.cells if each.identity}
    found = [name for name in known if name.startswith(cell)]
    if len(found) == 1:
        return known[found[0]]
    if len(found) > 1:
        raise UserError(f"{cell} begins {len(found)} cells ({', '.join(sorted(found))}); write more of it")
    raise UserError(
        f"the suite has no cell {cell}{near(cell, {name: each.describe() for name, each in known.items()})}; "
        "`o2mkd-bench plan SUITE` lists them, with the same --set and --seed"
    )


def near(wanted: str, known: Mapping[str, str]) -> str:
    """``, most like it are ...``: the cells of ``known``, identity to description, that ``wanted`` may have meant."""

    def likeness(name: str) -> float:
        return max(SequenceMatcher(None, wanted, text).ratio() for text in (name[: len(wanted)], known[name]))

    best = sorted(known, key=likeness, reverse=True)[:SHOWN]
    return f", most like it are {', '.join(f'{name[:8]} ({known[name]})' for name in best)}" if best else ""
