"""The stages still to be made, and which of them wait for nothing any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..core.cohorts import KINDS
from ..core.plan import Stage


class Queue:
    """Stages in the plan's order, each held until all of the queue that it waits for is settled.

    Attributes:
        pending: identities of all that are not settled, also of those that were taken.
    """

    def __init__(self, stages: Sequence[Stage], awaited: Callable[[Stage], Iterable[str]]) -> None:
        """``awaited``: what a stage waits for beside its inputs."""
        self.pending = {stage.identity: stage for stage in stages}
        self._order = {name: place for place, name in enumerate(self.pending)}
        self._here = dict(self.pending)
        self._unmet: dict[str, set[str]] = {}
        self._heirs: dict[str, list[str]] = {}
        self._ready: dict[str, Stage] = {}
        for name, stage in self.pending.items():
            unmet = {one for one in (*stage.inputs(), *awaited(stage)) if one in self.pending}
            self._unmet[name] = unmet
            for one in unmet:
                self._heirs.setdefault(one, []).append(name)
            if not unmet:
                self._ready[name] = stage

    def __contains__(self, name: str) -> bool:
        return name in self._here

    def __bool__(self) -> bool:
        return bool(self._here)

    def waiting(self) -> list[Stage]:
        """All that were not taken."""
        return list(self._here.values())

    def ready(self) -> list[Stage]:
        """Those that wait for nothing, in the plan's order, but what trains behind what finishes rows, so that a run
        that is cut leaves rows, and what must run alone last.
        """
        return sorted(
            self._ready.values(), key=lambda one: (one.kind == "speed", one.kind in KINDS, self._order[one.identity])
        )

    def take(self, names: Iterable[str]) -> None:
        for name in names:
            del self._here[name]
            self._ready.pop(name, None)

    def put_back(self, name: str) -> None:
        """One that was taken and is not made, to be taken again."""
        self._here[name] = self.pending[name]
        if not self._unmet[name]:
            self._ready[name] = self.pending[name]

    def settle(self, name: str) -> None:
        """``name``, of the queue or not, is made or has failed."""
        if self.pending.pop(name, None) is None:
            return
        self._here.pop(name, None)
        self._ready.pop(name, None)
        for heir in self._heirs.get(name, ()):
            self._unmet[heir].discard(name)
            if not self._unmet[heir] and heir in self._here:
                self._ready[heir] = self._here[heir]
