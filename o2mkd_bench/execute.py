"""Walks the plan: makes what is missing, once, in order; a failure stops only what needs it."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from .core.errors import CorruptArtifact, Diverged, NetworkUnavailable, StageFailed, StoreError, UserError
from .core.events import Event, Kind
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
    """One walk over one plan. Several processes may walk one store: each stage is made by one of them.

    While a stage is made, its lock is held; a lock that is waited for meanwhile is always that of something the stage
    is made from, so that no two walks can wait for each other.

    Attributes:
        failed: identity to the reason, also for stages that were never tried because an input had failed.
        made: identities made by this walk.
    """

    plan: Plan
    bench: Bench
    fail_fast: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    _repairs: Counter[str] = field(default_factory=Counter)
    _stopped: bool = False

    def run(self) -> None:
        """Make every missing stage of the plan's cells.

        Raises:
            StoreError: when the store cannot be written; nothing more can be done then.
        """
        missing = Survey(self.plan, self.bench.store).missing()
        self._say("plan", data={"stages": len(missing), "reused": len(self.plan.stages) - len(missing)})
        queue = list(missing.values())
        while queue and not self._stopped:
            held = self._pass(queue)
            if len(held) == len(queue) and not self._stopped:
                self._attend(held.pop(0), wait=True)
            queue = held

    def _pass(self, queue: Sequence[Stage]) -> list[Stage]:
        """Attend to every stage in turn; gives back those that another process is at, and those that need them."""
        held: dict[str, Stage] = {}
        for stage in queue:
            if self._stopped:
                break
            if not held.keys().isdisjoint(stage.inputs()) or not self._attend(stage, wait=False):
                held[stage.identity] = stage
        return list(held.values())

    def _attend(self, stage: Stage, wait: bool) -> bool:
        """Make ``stage`` or learn that it is made; False when another process is at it and we do not wait."""
        if self._blocked(stage):
            return True
        store = self.bench.store
        held = store.lock(stage.identity) if wait else store.try_lock(stage.identity)
        if held is None:
            return False
        with held:
            if store.has(stage.identity):
                self._say("reused", stage)
            else:
                self._make(stage)
        return True

    def _blocked(self, stage: Stage) -> bool:
        """Whether an input of ``stage`` has failed, which is then its own failure."""
        cause = next((name for name in stage.inputs() if name in self.failed), None)
        if cause is not None:
            self.failed[stage.identity] = f"needs {self.plan.stages[cause].label}, which failed"
        return cause is not None

    def _make(self, stage: Stage) -> None:
        """Make ``stage``, whose lock is held, remaking inputs that turn out to be damaged."""
        self._say("start", stage)
        done = False
        while not done and not self._blocked(stage):
            try:
                done = self._once(stage)
            except StoreError:
                raise
            except Exception as error:
                self._fail(stage, *classify(error))
                return
        if done:
            self.made.append(stage.identity)
            self._say("done", stage)

    def _once(self, stage: Stage) -> bool:
        """Whether the stage was made; False after a damaged input was mended."""
        try:
            self._write(stage)
        except CorruptArtifact as damage:
            self.repair(damage)
            return False
        return True

    def _write(self, stage: Stage) -> None:
        # not before there is work to do: a finished suite is recognised without torch
        import torch

        store = self.bench.store
        with store.writing(stage.identity, stage.kind, stage.label, stage.spec, stage.needs) as draft:
            draft.meta["machine"] = machine_record()
            draft.meta["device"] = self.bench.device
            draft.meta["threads"] = torch.get_num_threads()
            draft.meta["sources"] = sources(stage, self.bench.registry)
            maker(stage.kind)(stage, self.bench, draft)
        store.drop_work(stage.identity)

    def repair(self, damage: CorruptArtifact) -> None:
        """Make a damaged artifact anew; where its stage fails now, it is absent after, with the failure recorded.

        Raises:
            StoreError: when the store keeps giving back other bytes than were written.
            StageFailed: when it is not damaged, and still not what its reader wants.
        """
        name, store = damage.identity, self.bench.store
        stage = self.plan.stages[name]
        self._repairs[name] += 1
        with store.lock(name):
            # another process may have mended it while we waited
            reason = self._damage(name)
            if self._repairs[name] > REPAIRS:
                if reason is None:
                    raise StageFailed(str(damage))
                raise StoreError(
                    f"{stage.label} is damaged ({reason}) though it was made anew {REPAIRS} times; look at the disk of "
                    f"the store {store.root}, or choose another with --store DIR"
                )
            if reason is not None:
                self._say("message", stage, {"text": f"{stage.label} is damaged ({reason}); making it anew"})
                store.discard(name, reason)
                self._restore(stage, locked=True)

    def _damage(self, name: str) -> str | None:
        store = self.bench.store
        try:
            for file in store.manifest(name).files:
                store.read(name, file)
        except CorruptArtifact as found:
            return found.reason
        return None

    def _restore(self, stage: Stage, locked: bool = False) -> None:
        """Make ``stage``, and before it whatever of its inputs is gone."""
        with nullcontext() if locked else self.bench.store.lock(stage.identity):
            if self.bench.store.has(stage.identity):
                return
            for name in stage.inputs():
                if name not in self.failed:
                    self._restore(self.plan.stages[name])
            self._make(stage)

    def _fail(self, stage: Stage, reason: str, category: str) -> None:
        self.failed[stage.identity] = reason
        # columns that stay empty are no failure
        self._stopped = self._stopped or (self.fail_fast and category != UNAVAILABLE)
        self.bench.store.fail(stage.identity, stage.label, reason, category)
        if category == "diverged":
            # nothing can be resumed from there, not even after the plugin at fault is mended
            self.bench.store.drop_work(stage.identity)
        self._say("failed", stage, {"reason": reason, "category": category})

    def _say(self, kind: Kind, stage: Stage | None = None, data: Mapping[str, object] | None = None) -> None:
        name, label = (stage.identity, stage.label) if stage is not None else ("", "")
        self.bench.observer(Event(kind, name, label, data or {}))


def classify(error: Exception) -> tuple[str, str]:
    """Reason and category of a failed stage, for a person and for ``status``."""
    import torch

    match error:
        case NetworkUnavailable():
            return str(error), UNAVAILABLE
        case MemoryError() | torch.OutOfMemoryError():
            told = f" ({_line(error)})" if str(error) else ""
            return f"out of memory{told}; lower the batch or the size of the network", "memory"
        case Diverged():
            return str(error), "diverged"
        case StageFailed():
            return str(error), "failed"
        case UserError():
            return str(error), "user"
    if os.environ.get("O2MKD_TRACEBACK"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_line(error)} ({os.path.basename(place.filename)}:{place.lineno})", "error"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
