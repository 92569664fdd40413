"""Walks the plan: makes what is missing, once, in order; a failure stops only what needs it."""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from .core.errors import CorruptArtifact, StageFailed, StoreError, UserError
from .core.events import Event
from .core.machine import machine_record
from .core.plan import Plan, Stage
from .core.sources import sources
from .core.status import UNAVAILABLE, Survey
from .stages import maker
from .stages.bench import Bench

# A store that keeps giving back other bytes than were written is broken hardware; do not retrain for ever.
REPAIRS = 3


@dataclass
class Walk:
    """One walk over one plan.

    Attributes:
        failed: identity to the reason, also for stages that were never tried because an input had failed.
        made: identities made by this walk.
    """

    plan: Plan
    bench: Bench
    fail_fast: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    _repairs: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Make every missing stage of the plan's cells.

        Raises:
            StoreError: when the store cannot be written; nothing more can be done then.
        """
        missing = Survey(self.plan, self.bench.store).missing()
        self._say("plan", data={"stages": len(missing), "reused": len(self.plan.stages) - len(missing)})
        queue = deque(missing.values())
        waiting: deque[Stage] = deque()
        while queue or waiting:
            patient = not queue
            stage = (queue or waiting).popleft()
            if any(name in waiting_ids(waiting) for name in stage.inputs()) and not patient:
                waiting.append(stage)
            elif not self._attend(stage, patient):
                waiting.append(stage)
            if self.fail_fast and any(f not in self._skipped for f in self.failed):
                return

    @property
    def _skipped(self) -> set[str]:
        return {name for name, reason in self.failed.items() if reason.startswith("needs ")}

    def _attend(self, stage: Stage, patient: bool) -> bool:
        """Make ``stage`` or learn that it is made; False when another process is at it and we do not wait."""
        blocked = next((name for name in stage.inputs() if name in self.failed), None)
        if blocked is not None:
            self.failed[stage.identity] = f"needs {self.plan.stages[blocked].label}, which failed"
            return True
        store = self.bench.store
        held = store.lock(stage.identity) if patient else store.try_lock(stage.identity)
        if held is None:
            return False
        with held:
            if store.has(stage.identity):
                self._say("reused", stage)
            else:
                self._make(stage)
        return True

    def _make(self, stage: Stage) -> None:
        """Make ``stage``, remaking inputs whose files turn out to be damaged."""
        self._say("start", stage)
        while True:
            try:
                self._once(stage)
            except CorruptArtifact as damage:
                if not self._repair(damage):
                    self._fail(stage, f"{damage}; it was remade {REPAIRS} times", "corrupt")
                    return
            except (StoreError, KeyboardInterrupt):
                raise
            except Exception as error:
                self._fail(stage, *classify(error))
                return
            else:
                self.made.append(stage.identity)
                self._say("done", stage)
                return

    def _once(self, stage: Stage) -> None:
        store = self.bench.store
        with store.writing(stage.identity, stage.kind, stage.label, stage.spec, stage.needs) as draft:
            draft.meta["machine"] = machine_record()
            draft.meta["device"] = self.bench.device
            draft.meta["sources"] = sources(stage, self.bench.registry)
            maker(stage.kind)(stage, self.bench, draft)
        store.drop_work(stage.identity)

    def _repair(self, damage: CorruptArtifact) -> bool:
        """Discard a damaged artifact and make it anew; False when that has been tried too often."""
        self._repairs[damage.identity] = self._repairs.get(damage.identity, 0) + 1
        if self._repairs[damage.identity] > REPAIRS or damage.identity not in self.plan.stages:
            return False
        stage = self.plan.stages[damage.identity]
        self._say("message", stage, {"text": f"{stage.label} is damaged ({damage.reason}); making it anew"})
        self.bench.store.discard(damage.identity, damage.reason)
        with self.bench.store.lock(stage.identity):
            if not self.bench.store.has(stage.identity):
                for name in stage.inputs():
                    if not self.bench.store.has(name):
                        self._make(self.plan.stages[name])
                self._make(stage)
        return stage.identity not in self.failed

    def repair(self, damage: CorruptArtifact) -> None:
        """For a reader of finished artifacts: make a damaged one anew.

        Raises:
            StageFailed: when that does not help.
        """
        if not self._repair(damage):
            raise StageFailed(str(damage))

    def _fail(self, stage: Stage, reason: str, category: str) -> None:
        self.failed[stage.identity] = reason
        self.bench.store.fail(stage.identity, stage.label, reason, category)
        self._say("failed", stage, {"reason": reason, "category": category})

    def _say(self, kind: str, stage: Stage | None = None, data: Mapping[str, object] | None = None) -> None:
        name, label = (stage.identity, stage.label) if stage is not None else ("", "")
        self.bench.observer(Event(kind, name, label, data or {}))  # type: ignore[arg-type]


def waiting_ids(stages: deque[Stage]) -> set[str]:
    return {stage.identity for stage in stages}


def classify(error: Exception) -> tuple[str, str]:
    """Reason and category of a failed stage, for a person and for ``status``."""
    import torch

    from .engine.scoring import NetworkUnavailable

    if isinstance(error, NetworkUnavailable):
        return str(error), UNAVAILABLE
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {error}; lower the batch or the size of the network", "memory"
    if isinstance(error, StageFailed):
        return str(error), "diverged" if "finite" in str(error) or "loss" in str(error) else "failed"
    if isinstance(error, UserError):
        return str(error), "user"
    if os.environ.get("O2MKD_TRACEBACK"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})", "error"
