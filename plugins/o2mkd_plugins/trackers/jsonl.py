"""Every event of a run as one line of JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from o2mkd_bench import Event

from .options import JsonLinesOptions


class JsonLines:
    """Appends to ``events.jsonl``: a resumed run goes on in the same file.

    A line holds ``time`` (UTC, ISO 8601), ``kind``, ``stage``, ``label`` and what the event says beside; it is on its
    way to the disk before the run goes on, so that a kill loses nothing.
    """

    def __init__(self, options: JsonLinesOptions, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "events.jsonl").open("a", encoding="utf-8", newline="\n", buffering=1)

    def __call__(self, event: Event) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": event.kind,
            "stage": event.stage,
            "label": event.label,
            **event.data,
        }
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()
