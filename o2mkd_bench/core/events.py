"""What a run tells its observers: the progress display, trackers, tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["plan", "start", "progress", "log", "done", "reused", "failed", "message", "end"]


@dataclass(frozen=True)
class Event:
    """``stage``: identity of the stage it is about, empty for the run; ``label``: the same for a person.

    ``data`` of ``progress``: ``done``, ``total`` (steps or images), ``images``, ``seconds``; when training, ``loss``.
    """

    kind: Kind
    stage: str = ""
    label: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """An observer that looks away."""
