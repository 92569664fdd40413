"""What a run tells its observers: the progress display, trackers, tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

Kind = Literal["plan", "start", "progress", "done", "reused", "failed", "message", "end"]


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


def line(event: Event) -> str:
    """An event of this moment as a line of JSON: ``time`` (UTC, ISO 8601), its fields, and those of ``data``."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    found = {"time": time, "kind": event.kind, "stage": event.stage, "label": event.label, **event.data}
    return json.dumps(found, ensure_ascii=False) + "\n"


def silent(event: Event) -> None:
    """An observer that looks away."""
