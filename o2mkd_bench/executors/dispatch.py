"""Which stages are ready, who makes them together, and what becomes of those whose worker is gone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from ..core.cohorts import KINDS, gather, stream_of
from ..core.errors import PluginError, StoreError
from ..core.events import Event
from ..core.executor import Executor, Outcome, Report, Task
from ..core.plan import Stage
from ..core.status import UNAVAILABLE
from ..execute import Walk
from .queue import Queue

# A stage whose worker dies is tried once more; machines may go away more often, as that is no fault of a stage.
DEATHS, LOSSES = 2, 10
# Seconds between two looks at what another process is at, and at the clock.
PAUSE = 1.0


@dataclass
class Flight:
    """A task on its way. ``began``: when its first stage started, by the clock of this process."""

    task: Task
    began: float | None = None
    overdue: bool = False


@dataclass
class Dispatch(Walk):
    """A walk whose stages are made by the workers of an executor.

    Students that can train on one teacher pass are one task, or several where slots would stay empty otherwise; what
    measures the device's speed comes when nothing else is left. Locks are held by the workers.

    Attributes:
        limit: seconds that a stage may take, several together as many times that; None for no limit.
    """

    executor: Executor = field(kw_only=True)
    limit: float | None = None
    clock: Callable[[], float] = time.monotonic
    _queue: Queue = field(init=False)
    _flights: dict[int, Flight] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)
    _landed: set[int] = field(default_factory=set)
    _deaths: Counter[str] = field(default_factory=Counter)
    _losses: Counter[str] = field(default_factory=Counter)
    # what another process is at, until when it is left alone
    _later: dict[str, float] = field(default_factory=dict)

    def work_off(self, queue: list[Stage], wait: bool = True) -> list[Stage]:
        """As :meth:`Walk.work_off`, which always waits here."""
        self._queue = Queue(queue, lambda stage: [one.score for one in self._expected(stage)])
        try:
            while not self._stopped and (self._flights or self._queue):
                self._launch()
                if self._flights or self._later:
                    for report in self.executor.wait(PAUSE):
                        self._take(report)
                    self._end_overdue()
        finally:
            # an interrupt, a store that cannot be written, or the first failure where that is enough
            if self._flights:
                self._flights.clear()
                self.executor.stop()
        return []

    def _launch(self) -> None:
        """Place all that is ready, as far as there is room."""
        now = self.clock()
        self._later = {name: until for name, until in self._later.items() if until > now}
        full = False
        for first in self._queue.ready():
            if self._blocked(first):
                self._settle(first.identity)
            elif first.identity in self._queue and first.identity not in self._later:
                # a speed reading is only asked for when nothing else can go on
                if full and not _alone(first):
                    continue
                full = not all(self._place(crew) for crew in self._crews(first)) or full

    def _place(self, crew: Sequence[Stage]) -> bool:
        names = tuple(stage.identity for stage in crew)
        task = Task(next(self._numbers), names, tuple(self.plan.closure(names).values()), _alone(crew[0]))
        if not self.executor.place(task):
            return False
        self._flights[task.number] = Flight(task)
        self._queue.take(names)
        return True

    def _crews(self, first: Stage) -> list[list[Stage]]:
        """``first`` and all who can train with it, in as many parts as it takes to leave no slot empty."""
        if first.kind not in KINDS or first.identity in self._alone or first.local.get("cohort") == 1:
            return [[first]]
        parts, pending = self._parts(), self._queue.pending
        # in one part, experts join in the middle where their warm-up ends; else they are for slots that are free then
        pool = self._queue.waiting() if parts == 1 else self._queue.ready()
        others = [
            one
            for one in pool
            if one.identity not in self._alone and one.identity not in self._later and not self._doubted(one, pending)
        ]
        found = [first, *gather(first, others, lambda name: name not in pending and name not in self.failed)]
        size = -(-len(found) // parts)
        return [found[start : start + size] for start in range(0, len(found), size)]

    def _parts(self) -> int:
        """How many slots there are for each stream: those of a machine with more seeds than GPUs have one."""
        ready = [one for one in self._queue.ready() if not _alone(one)]
        groups = {repr(stream_of(one)) if one.kind in KINDS else one.identity for one in ready}
        busy = sum(self.plan.stages[one.task.names[0]].kind in KINDS for one in self._flights.values())
        return max(1, self.executor.slots // (len(groups) + busy))

    def _settle(self, name: str) -> None:
        """``name`` is made or has failed: those that waited for it need not any more."""
        self._ended.add(name)
        self._queue.settle(name)

    def _take(self, report: Report) -> None:
        flight = self._flights.get(report.task)
        if flight is None:
            if report.task not in self._landed:
                raise PluginError(f"the executor reports of task {report.task}, which it was never given; correct it")
            return
        if report.event is not None:
            self._hear(flight, report.event)
            return
        self._landed.add(report.task)
        del self._flights[report.task]
        if report.outcome is not None:
            self._land(flight, report.outcome)
        else:
            self._lose(flight, report)

    def _hear(self, flight: Flight, event: Event) -> None:
        if event.kind == "start" and flight.began is None:
            flight.began = self.clock()
        if event.kind == "failed":
            self.failed[event.stage] = str(event.data["reason"])
            self._stopped = self._stopped or (self.fail_fast and event.data["category"] != UNAVAILABLE)
        if event.kind == "done":
            self.made.append(event.stage)
        self.bench.observer(event)
        if event.kind in ("done", "failed", "reused"):
            self._settle(event.stage)

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        if outcome.broken:
            raise StoreError(outcome.broken)
        self.failed.update(outcome.failed)
        for name in outcome.failed:
            self._settle(name)
        self._return(outcome.held, self.clock() + PAUSE)
        for name in (n for n in flight.task.names if n not in self._ended and n not in outcome.held):
            if self.bench.store.has(name):
                self.made.append(name)
            else:
                self._fail(self.plan.stages[name], "its executor never said how it ended; correct the plugin", "died")
            self._settle(name)

    def _return(self, names: Sequence[str], until: float = 0.0) -> None:
        for name in names:
            if name not in self._ended:
                self._queue.put_back(name)
                self._later[name] = until

    def _lose(self, flight: Flight, report: Report) -> None:
        """Try what was lost once more, each stage for itself, so that the one at fault is found; then it has failed."""
        left = [name for name in flight.task.names if name not in self._ended]
        self._alone.update(left)
        counter, most = (self._losses, LOSSES) if report.blameless else (self._deaths, DEATHS)
        if not flight.overdue:
            counter.update(left)
        for name in left:
            stage = self.plan.stages[name]
            if flight.overdue and len(flight.task.names) == 1:
                self._fail(stage, f"took longer than time_limit: {self.limit:g} and was ended", "time")
            elif not flight.overdue and counter[name] >= most:
                self._fail(stage, f"its worker {report.lost}, {counter[name]} times in a row", "died")
            else:
                how = "took too long together" if flight.overdue else f"its worker {report.lost}"
                self._say("message", stage, {"text": f"{stage.label}: {how}; trying once more"})
                self._return([name])
                continue
            self._settle(name)

    def _end_overdue(self) -> None:
        for number, flight in self._flights.items():
            most = (self.limit or 0.0) * len(flight.task.names)
            late = flight.began is not None and self.clock() - flight.began > most
            if self.limit is not None and late and not flight.overdue:
                flight.overdue = True
                self.executor.end(number)


def _alone(stage: Stage) -> bool:
    return stage.kind == "speed"
