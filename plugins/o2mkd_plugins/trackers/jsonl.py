"""Every event of a run as one line of JSON."""

from __future__ import annotations

from pathlib import Path

from o2mkd_bench import Event
from o2mkd_bench.core.events import line

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
        self._file.write(line(event))

    def close(self) -> None:
        self._file.close()
