"""How far a plan is: what is in the store, what failed and why, what is missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import CorruptArtifact
from .plan import Cell, Plan, Stage
from .plugins import Registry
from .sources import sources
from .store import Store

# A feature network whose weights are not here leaves its columns empty; the cell is not at fault.
UNAVAILABLE = "unavailable"


@dataclass(frozen=True)
class Standing:
    """A cell's state; ``reason`` says why it failed; ``empty`` why columns of a done cell are."""

    cell: Cell
    status: Literal["done", "failed", "missing", "unresolved"]
    reason: str = ""
    empty: tuple[str, ...] = ()


class Survey:
    """How far ``plan`` is; each artifact and each failure is looked up in the store once."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store
        self._present: dict[str, bool] = {}
        self._failures: dict[str, dict[str, Any] | None] = {}
        self._order = {name: number for number, name in enumerate(plan.stages)}

    def present(self, identity: str) -> bool:
        """Whether the artifact is there; looked up once."""
        if identity not in self._present:
            self._present[identity] = self.store.has(identity)
        return self._present[identity]

    def missing(self, wanted: Iterable[str] | None = None) -> dict[str, Stage]:
        """The stages that must still be made for the plan's cells, or for ``wanted`` alone, in the plan's order."""
        ends = self.plan.wanted() if wanted is None else wanted
        return {name: self.plan.stages[name] for name in self._absent(ends)}

    def standing(self, cell: Cell) -> Standing:
        """Done, failed with the reason of the first stage that failed, missing or unresolved."""
        if cell.refused:
            return Standing(cell, "failed", cell.refused)
        absent = [name for name in cell.stages() if not self.present(name)]
        if not absent and not cell.unresolved:
            return Standing(cell, "done")
        found = [self._failure(name) for name in self._absent(absent)]
        failures = [failure for failure in found if failure is not None]
        serious = [f for f in failures if f["category"] != UNAVAILABLE]
        if serious:
            return Standing(cell, "failed", f"{serious[0]['label']}: {serious[0]['reason']}")
        if cell.unresolved:
            return Standing(cell, "unresolved", cell.unresolved)
        if failures and set(absent) <= set(cell.scores):
            return Standing(cell, "done", empty=tuple(dict.fromkeys(f["reason"] for f in failures)))
        return Standing(cell, "missing")

    def _absent(self, wanted: Iterable[str]) -> list[str]:
        """Which of ``wanted``, and of what must be made for them, is not there, in the plan's order."""
        needed: set[str] = set()
        queue = list(wanted)
        while queue:
            name = queue.pop()
            if name not in needed and not self.present(name):
                needed.add(name)
                queue.extend(self.plan.stages[name].inputs())
        return sorted(needed, key=self._order.__getitem__)

    def _failure(self, identity: str) -> dict[str, Any] | None:
        if identity not in self._failures:
            self._failures[identity] = self.store.failure(identity)
        return self._failures[identity]

    def standings(self) -> list[Standing]:
        return [self.standing(cell) for cell in self.plan.cells]

    def changed(self, registry: Registry) -> list[Stage]:
        """Present stages whose plugins have another source now than when they were made."""
        found = []
        for name, stage in self.plan.stages.items():
            if not self.present(name):
                continue
            try:
                made_by = self.store.manifest(name).meta.get("sources", {})
            except CorruptArtifact:
                continue
            if made_by != sources(stage, registry):
                found.append(stage)
        return found
