"""Two results side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import UserError
from .lines import CELL, TIMED, Metric, Results, Row, metrics, numbered, same_protocol
from .text import decimals, finite, listed, markdown_text

_NAMES = (*CELL, "seed")
# what a speed depends on beside its cell and its reading
_RUN = ("precision", "guidance")
_WORDS = ("at batch {}", "with compile {}", "on {}", "in {}", "with guidance {}")
_READ = dict(zip((*TIMED, *_RUN), _WORDS, strict=True))


@dataclass(frozen=True)
class Difference:
    """One score of both sides; ``change`` is b - a, ``relative`` its share of a; None where a side lacks it."""

    a: float | None
    b: float | None

    @property
    def change(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def relative(self) -> float | None:
        return None if self.change is None or not self.a else self.change / abs(self.a)


@dataclass(frozen=True)
class Pair:
    """A row of both sides. ``a``, ``b``: its status there, or ``absent``; ``speed_ratio``: images/s of b over a.

    ``speeds_of``: how each of these was read, where that differs: ``at batch 8 on cpu``.
    """

    cell: Mapping[str, Any]
    a: str
    b: str
    scores: Mapping[str, Difference]
    speed_ratio: float | None
    speeds_of: tuple[str, str] | None = None


@dataclass(frozen=True)
class Comparison:
    """``names``: how the two sides are called; ``pairs``: in the order of a, then what only b has."""

    names: tuple[str, str]
    columns: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def markdown(self) -> str:
        """A table with one row a pair; cell columns that are the same everywhere are left out and said above it."""
        from tabulate import tabulate

        varying = [key for key in _NAMES if len({listed(pair.cell[key]) for pair in self.pairs}) > 1]
        first = self.pairs[0].cell if self.pairs else {}
        same = [f"{key} {text}" for key in first if key not in varying and (text := listed(first[key]))]
        places = {column: self._places(column) for column in self.columns}
        headers = [
            *varying,
            *(f"{c} {part}" for c in self.columns for part in ("a", "b", "b − a", "%")),
            "speed b/a",
            "note",
        ]
        rows = [
            [
                *(markdown_text(_named(pair.cell, key)) for key in varying),
                *(text for column in self.columns for text in _difference(pair.scores[column], places[column])),
                "" if pair.speed_ratio is None else f"{pair.speed_ratio:.2f}×",
                _only(pair),
            ]
            for pair in self.pairs
        ]
        align = ["left"] * len(varying) + ["right"] * (4 * len(self.columns) + 1) + ["left"]
        table = tabulate(rows, headers, tablefmt="pipe", colalign=align if rows else None, disable_numparse=True)
        said = [f"in all rows: {', '.join(map(markdown_text, same))}", ""] if same else []
        sides = [markdown_text(name) for name in self.names]
        return "\n".join([f"a: {sides[0]}, b: {sides[1]}", "", *said, table]) + "\n"

    def as_json(self) -> str:
        """The same as JSON text, unrounded."""
        pairs = [
            {
                **asdict(pair),
                "scores": {
                    column: {**asdict(score), "change": score.change, "relative": score.relative}
                    for column, score in pair.scores.items()
                },
            }
            for pair in self.pairs
        ]
        return json.dumps({"a": self.names[0], "b": self.names[1], "pairs": pairs}, indent=2, ensure_ascii=False) + "\n"

    def _places(self, column: str) -> int:
        scores = [pair.scores[column] for pair in self.pairs]
        return decimals(value for score in scores for value in (score.a, score.b) if value is not None)


def compare(a: Results, b: Results, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Rows of ``a`` and ``b`` matched by what describes their cell (:data:`~o2mkd_bench.report.lines.CELL`) and seed.

    Raises:
        UserError: when a column was measured under different protocols, or when the two share no column.
    """
    columns = _shared(metrics(a), metrics(b))
    left, right = _keyed(a), _keyed(b)
    pairs = [_pair(key, left.get(key), right.get(key), columns) for key in dict.fromkeys([*left, *right])]
    return Comparison(names, columns, tuple(pairs))


def _shared(left: Sequence[Metric], right: Sequence[Metric]) -> tuple[str, ...]:
    others = {metric.column: metric for metric in right}
    both = [(metric, others[metric.column]) for metric in left if metric.column in others]
    for one, other in both:
        for dataset in sorted({*one.protocols, *other.protocols}):
            if (mine := one.protocol(dataset)) and (theirs := other.protocol(dataset)):
                same_protocol(one.column, mine, theirs)
    if not both:
        names = [", ".join(metric.column for metric in side) or "none" for side in (left, right)]
        raise UserError(f"the two results share no score column ({names[0]} and {names[1]}); score one of them again")
    return tuple(one.column for one, _ in both)


def _keyed(results: Results) -> dict[tuple[Any, ...], Row]:
    """Rows by cell, seed and how many rows before share both."""
    return {(*key[:-1], row.get("seed"), key[-1]): row for key, row in numbered(results["rows"])}


def _pair(key: Sequence[Any], a: Row | None, b: Row | None, columns: Sequence[str]) -> Pair:
    def score(row: Row | None, column: str) -> float | None:
        return finite((row.get("scores") or {}).get(column)) if row and row["status"] == "done" else None

    before, after = (
        {**{key: row.get(key) for key in _RUN}, **(row.get("speed") or {})} if row else {} for row in (a, b)
    )
    timed = [finite(reading.get("images_per_second")) for reading in (before, after)]
    ratio = timed[1] / timed[0] if timed[0] and timed[1] else None
    differing = [key for key in _READ if before.get(key) != after.get(key)]
    first, second = (" ".join(_READ[key].format(reading.get(key)) for key in differing) for reading in (before, after))
    return Pair(
        cell=dict(zip(_NAMES, key, strict=False)),
        a=str(a["status"]) if a else "absent",
        b=str(b["status"]) if b else "absent",
        scores={column: Difference(score(a, column), score(b, column)) for column in columns},
        speed_ratio=ratio,
        speeds_of=(first, second) if ratio and differing else None,
    )


def _named(cell: Mapping[str, Any], key: str) -> str:
    return listed(cell[key]) or ("teacher" if key == "student" else "")


def _difference(score: Difference, places: int) -> list[str]:
    sides = ["" if value is None else f"{value:.{places}f}" for value in (score.a, score.b)]
    change = "" if score.change is None else f"{score.change:+.{places}f}"
    return [*sides, change, "" if score.relative is None else f"{100 * score.relative:+.1f}"]


def _only(pair: Pair) -> str:
    """Why a side stands empty: ``only in a``, or that the row failed or is missing there."""
    if pair.b == "absent":
        return "only in a" + (f" ({pair.a})" if pair.a != "done" else "")
    if pair.a == "absent":
        return "only in b" + (f" ({pair.b})" if pair.b != "done" else "")
    said = [f"{status} in {side}" for side, status in (("a", pair.a), ("b", pair.b)) if status != "done"]
    return ", ".join([*said, *([f"timed {' and '.join(pair.speeds_of)}"] if pair.speeds_of else [])])
