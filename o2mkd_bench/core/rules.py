"""Patterns of include and exclude that match no label of their axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .blocks import TEACHER, any_match
from .complaints import near

if TYPE_CHECKING:
    from .suite import Suite

# labels that a note names
SHOWN = 5


@dataclass(frozen=True)
class Stray:
    """A pattern that matches nothing: of which rule, for which axis, and the labels there are."""

    key: str
    number: int
    axis: str
    pattern: str
    labels: tuple[str, ...]

    def text(self, most: int) -> str:
        """What is wrong with it, and at most so many of the labels."""
        known = ", ".join(self.labels[:most])
        more = f" and {len(self.labels) - most} more" if len(self.labels) > most else ""
        hint = near(self.pattern, self.labels)
        return f"{self.pattern!r} matches no {self.axis} of this suite{hint} (known: {known}{more})"


def names(suite: Suite) -> dict[str, tuple[str, ...]]:
    """What a rule or ``--only`` may name on each axis: the labels, and a teacher among the students."""
    labels = suite.labels()
    return {**labels, "student": (*labels["student"], TEACHER)}


def stray_patterns(suite: Suite) -> Iterator[Stray]:
    """All of them, in their order. A suite as it is written has none; one that ``--set`` has changed may have some."""
    labels, known = suite.labels(), names(suite)
    for key, rules in (("include", suite.include), ("exclude", suite.exclude)):
        for number, rule in enumerate(rules):
            for axis, patterns in rule.patterns().items():
                for pattern in patterns:
                    # a pattern with * is of students
                    if pattern not in known[axis] and not any(any_match([pattern], label) for label in labels[axis]):
                        yield Stray(key, number, axis, pattern, known[axis])


def notes(suite: Suite) -> list[str]:
    """A line for each of them, with file and key."""
    where = f"{suite.path}: " if suite.path is not None else ""
    return [f"{where}{s.key}[{s.number}].{s.axis}: {s.text(SHOWN)}" for s in stray_patterns(suite)]
