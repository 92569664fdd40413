"""The log of a run, ``runs/<run>/events.jsonl`` of its store: what happened, and what any terminal can watch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from .errors import UserError
from .events import Event, Observer, line
from .store import Store

# Seconds between two lines of progress of one stage.
SPARSE = 2.0
_NEWS = ("start", "reused", "failed")


class RunLog(AbstractContextManager["RunLog"]):
    """An observer that keeps a log and tells ``observer`` everything. A run that finds nothing to do leaves none.

    The first line names the ``suite`` and the ``pid``; all others are events with their ``time`` (UTC, ISO 8601). While
    the run is alive it holds the lock of its log's name.
    """

    def __init__(self, store: Store, suite: str, observer: Observer) -> None:
        self.store, self.suite, self.observer = store, suite, observer
        self._held = ExitStack()
        self._file: TextIOWrapper | None = None
        self._before: list[str] = []
        self._lost = False
        self._said: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if not self._lost and self._due(event):
            try:
                self._write(event)
            except (OSError, UserError) as error:
                self._lost = True
                text = f"the log of this run cannot be written and ends here ({error})"
                self.observer(Event("message", data={"text": text}))
        self.observer(event)

    def _due(self, event: Event) -> bool:
        if event.kind != "progress":
            return True
        now = time.monotonic()
        due = now - self._said.get(event.stage, -SPARSE) >= SPARSE
        if due:
            self._said[event.stage] = now
        return due

    def _write(self, event: Event) -> None:
        if self._file is None and event.kind not in _NEWS:
            self._before.append(line(event))
            return
        file = self._file or self._open()
        file.write(line(event))
        file.flush()

    def _open(self) -> TextIOWrapper:
        now = datetime.now(UTC)
        name = f"run-{now:%Y%m%dT%H%M%S}-{uuid4().hex[:8]}"
        # before the folder is there, so that nobody takes it for that of a run that is gone
        held = self.store.try_lock(name)
        if held is not None:
            self._held.enter_context(held)
        folder = self.store.root / "runs" / name
        folder.mkdir(parents=True)
        self._file = self._held.enter_context((folder / "events.jsonl").open("w", encoding="utf-8", newline="\n"))
        head = {"time": now.isoformat(timespec="milliseconds"), "kind": "run", "suite": self.suite, "pid": os.getpid()}
        self._file.write("".join([json.dumps(head, ensure_ascii=False) + "\n", *self._before]))
        return self._file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._held.close()
        except OSError:
            # what could not be written any more was said when it happened
            self._lost = True


class Follower:
    """Reads a log while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = 0

    def news(self) -> Iterator[tuple[float, Event]]:
        """Whole lines that came since the last call: seconds since the epoch, and the event."""
        with self.path.open("rb") as file:
            file.seek(self._place)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._place += len(raw)
                found: dict[str, Any] = json.loads(raw)
                moment = datetime.fromisoformat(found.pop("time")).timestamp()
                kind, stage, label = (found.pop(key, "") for key in ("kind", "stage", "label"))
                yield moment, Event(kind, stage, label, found)


def runs(store: Store, suite: str) -> list[Path]:
    """The logs of runs of a suite, newest first."""
    return [path for path in reversed(_logs(store)) if _head(path).get("suite") == suite]


def at_work(store: Store) -> list[str]:
    """The runs that go on in a store, each in words: its name, its suite, and its process."""
    heads = {path.parent.name: _head(path) for path in _logs(store) if alive(store, path)}
    return [f"{name} (suite {head.get('suite')}, process {head.get('pid')})" for name, head in heads.items()]


def _logs(store: Store) -> list[Path]:
    """Oldest first, as a run's name begins with its time."""
    return sorted((store.root / "runs").glob("run-*/events.jsonl"))


def _head(log: Path) -> dict[str, Any]:
    """What the first line of a log says; nothing while it is half written."""
    with log.open(encoding="utf-8") as file:
        first = file.readline()
    return json.loads(first) if first.endswith("\n") else {}


def alive(store: Store, log: Path) -> bool:
    """Whether the run that writes ``log`` still goes on."""
    lock = store.root / "locks" / f"{log.parent.name}.lock"
    if not lock.exists():
        return False
    held = store.try_lock(log.parent.name)
    if held is None:
        return True
    with held:
        return False
