"""Whether several students are better than the one that stands beside them, seed by seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from .columns import Column, plain
from .lines import CELL, Line, Metric, Section
from .text import decimals, finite, spread

TITLE = "Against one student"
RULE = (
    "against one student, seed by seed: better (worse) where every seed says so and the mean difference exceeds the "
    "larger of the two standard deviations, else undecided"
)
_REST = tuple(key for key in CELL if key != "wrapper")

Word = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """A cell beside its baseline, in one score of several seeds.

    Attributes:
        rule: what both have in common, such as ``equal_total``.
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
    def relative(self) -> float | None:
        """The mean difference as a share of the baseline's mean."""
        return fmean(self.differences) / abs(fmean(self.other)) if fmean(self.other) else None

    @property
    def favour(self) -> int:
        """How many seeds say that it is better."""
        return sum(value > 0 if self.metric.higher_is_better else value < 0 for value in self.differences)

    @property
    def word(self) -> Word:
        against = sum(value < 0 if self.metric.higher_is_better else value > 0 for value in self.differences)
        clear = abs(fmean(self.differences)) > max(stdev(self.mine), stdev(self.other))
        if clear and len(self.mine) in (self.favour, against):
            return "better" if self.favour else "worse"
        return "undecided"

    def data(self) -> dict[str, Any]:
        """As JSON data: what a program needs to find both lines, and what is said of them."""
        return {
            **{key: self.line[key] for key in CELL},
            "baseline": self.baseline["wrapper"],
            "rule": self.rule,
            "column": self.metric.column,
            "differences": list(self.differences),
            "relative": self.relative,
            "favour": self.favour,
            "verdict": self.word,
        }


def verdicts(section: Section) -> list[Verdict]:
    """Every line of a section that has a baseline, where both are scored on several seeds, in the order of lines.

    One seed says nothing.
    """
    named: defaultdict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in section.lines:
        named[_key(line, line["wrapper"])].append(line)
    found = []
    for baseline in section.lines:
        for label in baseline["baseline_of"] or ():
            rule, _, wrapper = str(label).partition(" of ")
            # of several under one name nobody knows whose baseline it is
            lines = named[_key(baseline, wrapper)]
            found += _compared(lines[0], baseline, rule, section.metrics) if len(lines) == 1 else []
    places = {id(line): place for place, line in enumerate(section.lines)}
    return sorted(found, key=lambda verdict: places[id(verdict.line)])


def _key(line: Line, wrapper: Any) -> tuple[Any, ...]:
    return (*(line[key] for key in _REST), wrapper)


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
        plain("against", _against, "left", names=True),
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
    # one that was made for it says so in its name
    return wrapper if verdict.baseline["role"] == "baseline" else f"{wrapper} ({rule})"


def _difference(verdict: Verdict) -> str:
    mean, places = fmean(verdict.differences), decimals([*verdict.mine, *verdict.other])
    return ("+" if mean > 0 else "") + spread(mean, stdev(verdict.differences), places)
