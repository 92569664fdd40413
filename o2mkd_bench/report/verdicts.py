"""Whether a line is better than the one that stands beside it, seed by seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from ..core.complaints import near
from ..core.errors import UserError
from .columns import Column, plain
from .lines import CELL, Line, Metric, Results, Row, Section, lines
from .text import decimals, finite, spread

AXES = tuple(key for key in CELL if key not in ("dataset", "teacher"))
"""What a line may differ in from the one beside it."""
RULE = (
    "verdicts go seed by seed: better (worse) where every seed says so and the mean difference exceeds the larger of "
    "the two standard deviations, else undecided"
)

Word = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """A line beside another, its baseline, in one score of several seeds.

    Attributes:
        rule: what a baseline has in common with its line, such as ``equal_total``, or several joined; else empty.
        mine, other: their scores of the seeds that both have, in one order.
    """

    line: Line
    baseline: Line
    rule: str
    metric: Metric
    mine: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(self.mine, self.other, strict=True))

    @property
    def gains(self) -> tuple[float, ...]:
        """The differences, above 0 where it is better."""
        return self.differences if self.metric.higher_is_better else tuple(-value for value in self.differences)

    @property
    def relative(self) -> float | None:
        """The mean difference as a share of the baseline's mean."""
        base = abs(fmean(self.other))
        return finite(fmean(self.differences) / base) if base else None

    @property
    def favour(self) -> int:
        """How many seeds say that it is better."""
        return sum(gain > 0 for gain in self.gains)

    @property
    def word(self) -> Word:
        gains, deviation = self.gains, max(stdev(self.mine), stdev(self.other))
        if all(gain > 0 for gain in gains) and fmean(gains) > deviation:
            return "better"
        if all(gain < 0 for gain in gains) and fmean(gains) < -deviation:
            return "worse"
        return "undecided"

    def data(self) -> dict[str, Any]:
        """As JSON data: the line, what its baseline has in place of what it has, and what is said of them."""
        return {
            **{key: self.line[key] for key in CELL},
            "against": {key: self.baseline[key] for key in CELL if self.baseline[key] != self.line[key]},
            "rule": self.rule,
            "column": self.metric.column,
            "differences": list(self.differences),
            "relative": self.relative,
            "favour": self.favour,
            "verdict": self.word,
        }


@dataclass(frozen=True)
class Beside:
    """What a line is compared with: the one whose ``axis`` is ``label``, all else equal; with no axis its baseline."""

    axis: str = ""
    label: str = ""

    @classmethod
    def parse(cls, text: str, results: Results) -> Beside:
        """What ``AXIS=LABEL`` means.

        Raises:
            UserError: for an axis that there is not, or a label that no line of ``results`` has.
        """
        axis, given, label = text.partition("=")
        if not given or axis not in AXES:
            raise UserError(f"--against {text}: give AXIS=LABEL{near(axis, AXES)} (axes: {', '.join(AXES)})")
        known = list(dict.fromkeys(line.text(axis) for line in lines(results) if not line.is_teacher))
        if label not in known:
            listed = ", ".join(filter(None, known)) or "none"
            raise UserError(f"--against {text}: no student has that {axis}{near(label, known)} (known: {listed})")
        return cls(axis, label)

    @property
    def title(self) -> str:
        return f"Against {self.axis} {self.label}" if self.axis else "Against one student"

    def pairs(self, section: Section) -> Iterator[tuple[Line, Line, str]]:
        """Lines, what stands beside each, and by which rule; of several of one name nobody knows which is meant."""
        students = [line for line in section.lines if not line.is_teacher]
        return _labelled(students, self.axis, self.label) if self.axis else _baselines(students)


def _labelled(students: Sequence[Line], axis: str, label: str) -> Iterator[tuple[Line, Line, str]]:
    named = _by_name(students, axis)
    for line in students:
        found = [other for other in named[_name(line, axis)] if other.text(axis) == label]
        if len(found) == 1 and found[0] is not line:
            yield line, found[0], ""


def _baselines(students: Sequence[Line]) -> Iterator[tuple[Line, Line, str]]:
    """By seed, as what a cell is the baseline of may differ between seeds where edges are measured."""
    named = _by_name(students)
    beside: defaultdict[tuple[str, ...], defaultdict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for line in students:
        for row in line.rows:
            for text in row.get("baseline_of") or ():
                rule, _, wrapper = str(text).partition(" of ")
                beside[(*_name(line, "wrapper", "budget"), wrapper)][rule].append(row)
    for line in students:
        if len(named[_name(line)]) > 1:
            continue
        found: dict[tuple[int, ...], tuple[list[Row], list[str]]] = {}
        for rule, every in beside[(*_name(line, "wrapper", "budget"), line.text("wrapper"))].items():
            fair = [row for row in every if _fair(line, row, rule)]
            # with two of a seed nobody knows which is meant
            if fair and len({row.get("seed") for row in fair}) == len(fair):
                found.setdefault(tuple(map(id, fair)), (fair, []))[1].append(rule)
        for fair, rules in found.values():
            yield line, Line(tuple(fair)), " and ".join(rules)


def _fair(line: Line, baseline: Row, rule: str) -> bool:
    """Whether ``baseline`` saw what ``rule`` says: equal cells of two budgets are one, which has the rules of both."""
    mine = next((row for row in line.rows if row.get("seed") == baseline.get("seed")), None)
    if mine is None:
        return False
    each = mine.get("images_per_student")
    longest = [value for value in map(finite, each if isinstance(each, list) else [each]) if value is not None]
    wanted = max(longest, default=None) if rule == "per_student" else _images(mine)
    seen, batch = _images(baseline), finite(baseline.get("batch"))
    if wanted is None or seen is None or batch is None:
        return bool(mine.get("budget") == baseline.get("budget"))
    # whole steps
    return abs(seen - wanted) <= batch


def _images(row: Row) -> float | None:
    """Training images of all students, without those of rounds."""
    total = finite(row.get("images_total"))
    return None if total is None else total - (finite(row.get("rounds_images")) or 0)


def _by_name(students: Sequence[Line], *without: str) -> defaultdict[tuple[str, ...], list[Line]]:
    found: defaultdict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in students:
        found[_name(line, *without)].append(line)
    return found


def _name(line: Line, *without: str) -> tuple[str, ...]:
    return tuple(line.text(key) for key in CELL if key not in without)


BASELINES = Beside()


def verdicts(section: Section, beside: Beside = BASELINES) -> list[Verdict]:
    """Every line of a section beside another, where both are scored on several seeds, in the order of lines.

    One seed says nothing.
    """
    found = [one for pair in beside.pairs(section) for one in _compared(*pair, section.metrics)]
    places = {id(line): place for place, line in enumerate(section.lines)}
    return sorted(found, key=lambda verdict: places[id(verdict.line)])


def _compared(line: Line, baseline: Line, rule: str, metrics: Sequence[Metric]) -> list[Verdict]:
    found = []
    for metric in metrics:
        mine, other = _by_seed(line, metric.column), _by_seed(baseline, metric.column)
        seeds = [seed for seed in mine if seed in other]
        if len(seeds) > 1:
            pair = tuple(mine[seed] for seed in seeds), tuple(other[seed] for seed in seeds)
            found.append(Verdict(line, baseline, rule, metric, *pair))
    return found


def _by_seed(line: Line, column: str) -> dict[Any, float]:
    done = [row for row in line.rows if row["status"] == "done"]
    scored = {row.get("seed"): finite((row.get("scores") or {}).get(column)) for row in done}
    return {seed: value for seed, value in scored.items() if value is not None}


def columns(found: Sequence[Verdict], extra: Sequence[str]) -> list[Column[Verdict]]:
    """The columns of their table; ``extra`` as in the table of all lines."""

    def named(key: str) -> Column[Verdict]:
        return plain(key, lambda verdict: verdict.line.text(key), "left", names=True)

    several = len({verdict.metric.column for verdict in found}) > 1
    return [
        *(named(key) for key in ("student", "method", "wrapper")),
        *([plain("against", _against, "left", names=True)] if any(verdict.rule for verdict in found) else []),
        *(named(key) for key in ("sampler", *extra)),
        plain("NFE", lambda verdict: verdict.line.text("nfe"), names=True),
        *([plain("score", lambda verdict: verdict.metric.header, "left", names=True)] if several else []),
        plain("difference" if several else f"Δ {found[0].metric.header}", _difference),
        plain("%", lambda verdict: "" if verdict.relative is None else f"{100 * verdict.relative:+.1f}"),
        plain("seeds for it", lambda verdict: f"{verdict.favour} of {len(verdict.mine)}"),
        plain("verdict", lambda verdict: verdict.word, "left"),
    ]


def _against(verdict: Verdict) -> str:
    wrapper, rule = verdict.baseline.text("wrapper"), verdict.rule.replace("_", " ")
    # one that was made for this line says so in its name
    own = wrapper.endswith(f" of {verdict.line.text('wrapper')})") and " and " not in rule
    return wrapper if own else f"{wrapper} ({rule})"


def _difference(verdict: Verdict) -> str:
    mean, places = fmean(verdict.differences), decimals([*verdict.mine, *verdict.other])
    if verdict.word != "undecided" and not round(mean, places):
        # better by nothing would be a riddle
        places = decimals([mean])
    return ("+" if mean > 0 else "") + spread(mean, stdev(verdict.differences), places)
