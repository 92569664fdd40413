"""What a table says of its teachers: whether they are what they should be, and how students compare at their speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .lines import Line, Metric, Results, Section
from .text import decimals, finite, si


def expected(results: Results) -> list[str]:
    """What each teacher scores beside what it should, and its epsilon loss on real images over t."""
    found = []
    for entry in results.get("teachers", ()):
        what = f"{entry['column']} of {entry['sampler']} {entry['steps']} (seed {entry['seed']})"
        score, value, tolerance = entry["found"], entry["expected"], entry["tolerance"]
        said = "not known" if score is None else f"{score:.4g}"
        verdict = ", which it is not" if entry["as_expected"] is False else ""
        found.append(
            f"teacher {entry['teacher']}: {what} is {said}, expected {value:.4g} within {tolerance:.0%}{verdict}"
        )
        if loss := entry["loss"]:
            found.append(_loss(str(entry["teacher"]), loss))
    return found


def _loss(teacher: str, loss: dict[str, Any]) -> str:
    errors = [finite(error) for error in loss["error"]]
    places = decimals(error for error in errors if error is not None)
    said = ", ".join("?" if error is None else f"{error:.{places}f}" for error in errors)
    return f"epsilon loss of teacher {teacher} at t = {', '.join(map(str, loss['t']))}: {said}"


def beside(results: Results, sections: Sequence[Section]) -> list[str]:
    """For the best line of each student size, the teacher's line that is nearest in images/s, a factor counting.

    Only where the suite gave the teacher steps of its own, and speed was read; by the first column of each section.
    """
    found = []
    for section in sections if results.get("teacher_steps") else ():
        if not section.metrics:
            continue
        metric = section.metrics[0]
        timed = [li for li in section.lines if metric.column in li.scores and li.mean("images_per_second")]
        teachers = [line for line in timed if line.is_teacher]
        students = [line for line in timed if not line.is_teacher]
        for size in dict.fromkeys(line["student"] for line in students) if teachers else ():
            best = metric.best(line for line in students if line["student"] == size)
            near = min(teachers, key=lambda line: abs(math.log(_speed(line) / _speed(best))))
            found.append(_compared(section, metric, best, near))
    return found


def _speed(line: Line) -> float:
    return line.mean("images_per_second") or math.nan


def _compared(section: Section, metric: Metric, best: Line, near: Line) -> str:
    column = metric.column
    places = decimals(line.scores[column].mean for line in (best, near))
    mine, other = (f"{line.scores[column].mean:.{places}f}" for line in (best, near))
    who = "/".join(best.text(key) for key in ("student", "method", "wrapper"))
    return (
        f"{section.dataset}: at the speed of {who} {_drawn(best)} ({column} {mine}, {si(_speed(best))} img/s) "
        f"teacher {section.teacher} has {other} ({_drawn(near)}, {si(_speed(near))} img/s)"
    )


def _drawn(line: Line) -> str:
    return f"{line.text('sampler')} {line.text('steps')}"
