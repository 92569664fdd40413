"""From rows (one a cell and seed) to lines of a table (one a cell), and the rules a table keeps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, stdev
from typing import Any

from ..core.errors import UserError
from .text import finite

Results = Mapping[str, Any]
Row = Mapping[str, Any]

CELL = (
    "dataset",
    "teacher",
    "student",
    "method",
    "wrapper",
    "sampler",
    "steps",
    "spacing",
    "clip",
    "budget",
    "weights",
)
"""What describes a cell to a person; with the seed it names one row."""
TIMED = ("batch", "compile", "device")
"""What a speed reading depends on beside its cell."""


@dataclass(frozen=True)
class Metric:
    """A score column. ``protocols``: how it was measured, by dataset; the key is empty where it is the same for all."""

    column: str
    higher_is_better: bool
    protocols: Mapping[str, Mapping[str, Any]]

    def protocol(self, dataset: str) -> Mapping[str, Any]:
        return self.protocols.get(dataset, self.protocols.get("", {}))

    @property
    def header(self) -> str:
        return f"{self.column} {'↑' if self.higher_is_better else '↓'}"

    def best(self, lines: Iterable[Line]) -> Line:
        """The one of ``lines``, all of which have this score, whose mean is best; of equal ones the first."""
        pick = max if self.higher_is_better else min
        return pick(lines, key=lambda line: line.scores[self.column].mean)


@dataclass(frozen=True)
class Score:
    """``sd``: sample standard deviation over n seeds, None for n = 1. ``bold``: among the best of its NFE."""

    mean: float
    sd: float | None
    n: int
    bold: bool = False


@dataclass(frozen=True)
class Line:
    """One cell: its rows, one a seed, and their scores by column."""

    rows: tuple[Row, ...]
    scores: Mapping[str, Score] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        """The first value any of its rows has for ``key``, None when none has one."""
        return next((row[key] for row in self.rows if row.get(key) is not None), None)

    def text(self, key: str) -> str:
        value = self[key]
        return "" if value is None else str(value)

    def mean(self, key: str) -> float | None:
        """The mean over seeds of a number in the rows, or in their speed readings if all were read in one way."""
        if len(self.timed) > 1 and any(key in (row.get("speed") or {}) for row in self.rows):
            return None
        found = [finite((row.get("speed") or {}).get(key, row.get(key))) for row in self.rows]
        values = [value for value in found if value is not None]
        return fmean(values) if values else None

    @property
    def timed(self) -> set[tuple[Any, ...]]:
        """The several ways, by :data:`TIMED`, in which the speeds of its rows were read."""
        return {tuple(row["speed"].get(key) for key in TIMED) for row in self.rows if row.get("speed")}

    def differs(self, key: str) -> bool:
        """Whether seeds have different values of ``key``, as they do where edges are measured."""
        return len({repr(row[key]) for row in self.rows if row.get(key) is not None}) > 1

    @property
    def is_teacher(self) -> bool:
        return bool(self["role"] == "teacher")

    @property
    def is_baseline(self) -> bool:
        """Whether a verdict is against it, be it of the suite or beside it."""
        return any(row.get("baseline_of") for row in self.rows)

    @property
    def done(self) -> int:
        return sum(row["status"] == "done" for row in self.rows)

    @property
    def standing(self) -> str:
        """``done`` when any row is, else ``failed`` when any is, else what its first row is."""
        every = [str(row["status"]) for row in self.rows]
        return next((status for status in ("done", "failed") if status in every), every[0])

    def reasons(self, status: str) -> list[str]:
        """Why its rows of this status have it, each reason once; a done row with a reason has empty columns."""
        unsaid = "no reason given" if status == "failed" else None
        found = (row.get("reason") or unsaid for row in self.rows if row["status"] == status)
        return [" ".join(reason.split()) for reason in dict.fromkeys(found) if reason]


@dataclass(frozen=True)
class Section:
    """The table of one dataset and teacher."""

    dataset: str
    teacher: str
    metrics: tuple[Metric, ...]
    lines: tuple[Line, ...]


def metrics(results: Results) -> tuple[Metric, ...]:
    """The score columns in the order of the suite.

    Raises:
        UserError: when one column of one dataset was measured under two protocols: no table may mix them; or when
            rows have scores that no entry of ``metrics`` describes.
    """
    found: dict[str, Metric] = {}
    for entry in results.get("metrics", ()):
        column, dataset = entry["column"], entry.get("dataset") or ""
        protocol = entry.get("protocol") or {}
        known = found.get(column) or Metric(column, bool(entry.get("higher_is_better")), {})
        for other_dataset, other in known.protocols.items():
            if dataset == other_dataset or not (dataset and other_dataset):
                same_protocol(column, other, protocol)
        found[column] = Metric(column, known.higher_is_better, {**known.protocols, dataset: protocol})
    stray = sorted({column for row in results["rows"] for column in row.get("scores") or ()} - set(found))
    if stray:
        raise UserError(f"results: the scores {', '.join(stray)} have no protocol in 'metrics'; measure them again")
    return tuple(found.values())


def same_protocol(column: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise UserError naming every difference between two protocols of a column."""
    parts = [
        f"{key} {one.get(key)!r} and {other.get(key)!r}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]
    if parts:
        raise UserError(
            f"{column} was measured under two protocols ({'; '.join(parts)}) and a table never mixes them; "
            "score both again under one, or report them apart"
        )


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in CELL)


def numbered(rows: Iterable[Row], *beside: str) -> list[tuple[tuple[Any, ...], Row]]:
    """Each row with a key: its values of :data:`CELL` and ``beside``, and how many rows before it share these and seed.

    The number keeps cells apart that differ in something a table does not show, so that two rows of one seed are
    never averaged.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    found = []
    for row in rows:
        cell = (*_cell(row), *(row.get(key) for key in beside))
        name = (*cell, row.get("seed"))
        found.append(((*cell, seen[name]), row))
        seen[name] += 1
    return found


def lines(results: Results) -> list[Line]:
    """Rows gathered over seeds, in the order in which cells first appear, with nothing bold yet.

    Rows of one name that were trained or drawn in different ways are lines of their own, as their recipes say. A row
    without one, of results that were written before there were any, has that of its name where there is only one.
    """
    recipes: defaultdict[tuple[Any, ...], set[Any]] = defaultdict(set)
    for row in results["rows"]:
        recipes[_cell(row)] |= {row.get("recipe")} - {None}
    told = []
    for row in results["rows"]:
        known = recipes[_cell(row)]
        told.append({**row, "recipe": next(iter(known))} if len(known) == 1 else row)
    groups: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for key, row in numbered(told, "recipe"):
        groups[key].append(row)
    return [Line(tuple(rows), _scores(rows)) for rows in groups.values()]


def _scores(rows: Sequence[Row]) -> dict[str, Score]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for column, value in (row.get("scores") or {}).items() if row["status"] == "done" else ():
            if (number := finite(value)) is not None:
                values[column].append(number)
    return {c: Score(fmean(v), stdev(v) if len(v) > 1 else None, len(v)) for c, v in values.items()}


def sections(results: Results) -> list[Section]:
    """One table for each dataset and teacher; teachers first, then by NFE, student, method, wrapper, sampler, budget.

    Bold, for each metric among the students of one dataset and NFE: every line within one sd of the best, the sd
    being that of the best line. No line with n = 1 is bold, and none where the best itself has n = 1.

    Raises:
        UserError: see :func:`metrics`.
    """
    columns = metrics(results)
    everything = _emboldened(lines(results), columns)
    order = partial(_order, budgets(results))
    found = []
    for dataset, teacher in dict.fromkeys((line["dataset"], line["teacher"]) for line in everything):
        mine = [line for line in everything if (line["dataset"], line["teacher"]) == (dataset, teacher)]
        found.append(Section(str(dataset), str(teacher), _filled(columns, mine), tuple(sorted(mine, key=order))))
    return found


def _filled(columns: Sequence[Metric], mine: Sequence[Line]) -> tuple[Metric, ...]:
    """The columns that a section's lines fill; all of them while nothing is scored."""
    some = {column for line in mine for column in line.scores}
    return tuple(metric for metric in columns if metric.column in some or not some)


def budgets(results: Results) -> dict[str, int]:
    """The place of each label of a budget in the order of the suite, which as text they have not."""
    listed = [*(results.get("axes") or {}).get("budget", ()), *(row.get("budget") for row in results["rows"])]
    named = dict.fromkeys("" if label is None else str(label) for label in listed)
    return {label: place for place, label in enumerate(named)}


def _order(places: Mapping[str, int], line: Line) -> tuple[Any, ...]:
    nfe, budget = finite(line["nfe"]), places[line.text("budget")]
    names = [line.text(name) for name in ("student", "method", "wrapper", "sampler")]
    last = [line.text(name) for name in ("weights", "spacing", "clip")]
    return (not line.is_teacher, float("inf") if nfe is None else nfe, *names, budget, *last)


def _emboldened(plain: Sequence[Line], columns: Sequence[Metric]) -> list[Line]:
    bold: set[tuple[int, str]] = set()
    for metric in columns:
        groups: defaultdict[tuple[Any, Any], list[int]] = defaultdict(list)
        for i, line in enumerate(plain):
            if not line.is_teacher and metric.column in line.scores:
                groups[line["dataset"], line["nfe"]].append(i)
        for members in groups.values():
            scores = {i: plain[i].scores[metric.column] for i in members}
            best = metric.best(plain[i] for i in members).scores[metric.column]
            if best.sd is not None:
                near = [i for i, s in scores.items() if s.n > 1 and abs(s.mean - best.mean) <= best.sd]
                bold.update((i, metric.column) for i in near)
    return [
        Line(line.rows, {c: Score(s.mean, s.sd, s.n, (i, c) in bold) for c, s in line.scores.items()})
        for i, line in enumerate(plain)
    ]
