"""Walks the plan: makes what is missing, once, in order; a failure stops only what needs it."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .core.cohorts import gather
from .core.errors import CorruptArtifact, Diverged, NetworkUnavailable, StageFailed, StoreError, UserError
from .core.events import Event, Kind
from .core.machine import machine_record
from .core.plan import Expectation, Plan, Stage
from .core.sources import owner, sources
from .core.status import UNAVAILABLE, Survey
from .core.store import Draft
from .stages import maker
from .stages.bench import Bench

if TYPE_CHECKING:
    from .engine.loop import Left
    from .stages.cohort import Cohort

# A store that keeps giving back other bytes than were written is broken hardware; do not retrain for ever.
REPAIRS = 3


@dataclass
class Walk:
    """One walk over one plan. Several processes may walk one store: each stage is made by one of them.

    While a stage is made, its lock is held; a lock that is waited for meanwhile is always that of something the stage
    is made from, so that no two walks can wait for each other. Of students that train together several locks are held,
    and none is waited for.

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
    # those that found an input damaged, which is mended where no other lock is held
    _alone: set[str] = field(default_factory=set)
    _begun: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    # why nothing is trained from a teacher, or nothing; once known
    _verdicts: dict[Expectation, str] = field(default_factory=dict)

    def run(self, wanted: Collection[str] | None = None) -> None:
        """Make every missing stage of the plan's cells, or of ``wanted`` and what they are made from alone.

        What has failed on this walk is not tried again.

        Raises:
            StoreError: when the store cannot be written; nothing more can be done then.
        """
        if wanted is not None:
            # nothing is made from a teacher before it is known what it scores
            wanted = [*(one.score for one in self.plan.expectations), *wanted]
        missing = Survey(self.plan, self.bench.store).missing(wanted)
        needed = self.plan.stages if wanted is None else self.plan.closure(wanted)
        queue = [stage for name, stage in missing.items() if name not in self.failed]
        self._say("plan", data={"stages": len(queue), "reused": len(needed.keys() - missing.keys() - set(self.made))})
        self.work_off(queue)

    def work_off(self, queue: list[Stage], wait: bool = True) -> list[Stage]:
        """Make the stages of ``queue``; those another process is at are given back, or waited for with ``wait``."""
        while queue and not self._stopped:
            held = self._pass(queue)
            if len(held) == len(queue) and not self._stopped:
                if self._attend(held[0], held, wait):
                    held.pop(0)
                elif not wait:
                    return held
            queue = held
        return queue

    def _pass(self, queue: Sequence[Stage]) -> list[Stage]:
        """Attend to every stage in turn; gives back those that another process is at, and those that need them."""
        held: dict[str, Stage] = {}
        for place, stage in enumerate(queue):
            if self._stopped:
                break
            if self._settled(stage):
                continue
            waiting = [*held.values(), *queue[place:]]
            awaited = [*stage.inputs(), *(one.score for one in self._expected(stage))]
            if not held.keys().isdisjoint(awaited) or not self._attend(stage, waiting, wait=False):
                held[stage.identity] = stage
        return [stage for stage in held.values() if not self._settled(stage)]

    def _settled(self, stage: Stage) -> bool:
        return stage.identity in self.failed or stage.identity in self._ended

    def _attend(self, stage: Stage, queue: Sequence[Stage], wait: bool) -> bool:
        """Make ``stage``, and what of ``queue`` can train with it, or learn that it is made.

        False when another process is at it and we do not wait, and where it must be tried again.
        """
        if self._blocked(stage):
            return True
        store = self.bench.store
        held = store.lock(stage.identity) if wait else store.try_lock(stage.identity)
        if held is None:
            return False
        with ExitStack() as lock:
            lock.enter_context(held)
            if store.has(stage.identity):
                self._say("reused", stage)
            elif others := self._company(stage, queue):
                self._together(stage, others, lock)
                return self._settled(stage)
            else:
                self._make(stage)
        return True

    def _company(self, stage: Stage, queue: Sequence[Stage]) -> list[Stage]:
        """Who of ``queue`` can train with ``stage``."""
        if stage.identity in self._alone or stage.local.get("cohort") == 1:
            return []
        pending = {one.identity: one for one in queue if not self._settled(one)}
        others = [one for name, one in pending.items() if name not in self._alone and not self._doubted(one, pending)]
        return gather(stage, others, lambda name: name not in pending and name not in self.failed)

    def _together(self, first: Stage, others: Sequence[Stage], lock: ExitStack) -> None:
        """Train stages together, those that continue another of them from its end on; what does not end stays missing.

        ``lock`` is that of ``first``. Those that another process is at are left out.
        """
        from .stages.cohort import Cohort

        cohort = Cohort(self.bench, first.local["cohort"])
        names = {stage.identity for stage in (first, *others)}
        with ExitStack() as every:
            locks = {first.identity: lock, **self._seize(others, every)}
            crew = [stage for stage in (first, *others) if stage.identity in locks]
            for stage in crew:
                if names.isdisjoint(stage.inputs()) and not self._admit(cohort, stage):
                    locks.pop(stage.identity).close()
            with closing(cohort.train()) as leaving:
                try:
                    for stage, left in leaving:
                        self._take_leave(stage, left)
                        # it holds the memory of a network
                        del left
                        locks.pop(stage.identity).close()
                        if self._stopped:
                            return
                        for other in crew:
                            joins = stage.identity in other.inputs() and stage.identity in self._ended
                            if joins and not self._admit(cohort, other):
                                locks.pop(other.identity).close()
                except StoreError:
                    raise
                except Exception as error:
                    for stage in cohort.stages():
                        self._fail(stage, *classify(error))

    def _seize(self, stages: Sequence[Stage], until: ExitStack) -> dict[str, ExitStack]:
        """The locks of stages that nobody is at or has made, held ``until`` then, or until they are closed."""
        locks = {}
        for stage in stages:
            held = self.bench.store.try_lock(stage.identity)
            if held is not None:
                lock = until.enter_context(ExitStack())
                lock.enter_context(held)
                if self.bench.store.has(stage.identity):
                    lock.close()
                else:
                    locks[stage.identity] = lock
        return locks

    def _admit(self, cohort: Cohort, stage: Stage) -> bool:
        """Whether ``stage`` trains with the cohort now; if not, it has failed, or its turn comes later."""
        try:
            admitted = cohort.admit(stage)
        except StoreError:
            raise
        except CorruptArtifact:
            self._alone.add(stage.identity)
            return False
        except Exception as error:
            self._begin(stage)
            self._fail(stage, *classify(error))
            return False
        if admitted:
            self._begin(stage)
        return admitted

    def _take_leave(self, stage: Stage, left: Left) -> None:
        """Store what a student that trained with others has become, or why it has not."""
        if left.parked:
            text = f"{stage.label}: out of memory beside the others; it goes on after them"
            self._say("message", stage, {"text": text})
        elif left.error is not None:
            self._fail(stage, *classify(left.error))
        else:
            from .stages.train import write

            try:
                self._write(stage, lambda draft: write(stage, self.bench, draft, left.member))
            except StoreError:
                raise
            except Exception as error:
                self._fail(stage, *classify(error))
            else:
                self._end(stage)

    def _blocked(self, stage: Stage) -> bool:
        """Whether an input of ``stage`` has failed, which is then its own failure."""
        cause = next((name for name in stage.inputs() if name in self.failed), None)
        if cause is not None:
            self.failed[stage.identity] = f"needs {self.plan.stages[cause].label}, which failed"
        return cause is not None or self._refused(stage)

    def _expected(self, stage: Stage) -> list[Expectation]:
        return [one for one in self.plan.expectations if one.concerns(stage)]

    def _doubted(self, stage: Stage, pending: Container[str]) -> bool:
        """Whether ``stage`` would use a teacher that is not, or not yet, known to be what it should be."""
        return any(one.score in pending or self._verdict(one) for one in self._expected(stage))

    def _refused(self, stage: Stage) -> bool:
        """Whether ``stage`` would use a teacher that is not what it should be, which is then its failure."""
        for one in self._expected(stage):
            if reason := self._verdict(one):
                self.failed[stage.identity] = reason
                # under the teacher's name, so that all that is refused for it reads the same
                self.bench.store.fail(stage.identity, self.plan.stages[one.stage].label, reason, "user")
                return True
        return False

    def _verdict(self, expected: Expectation) -> str:
        """Why nothing is trained from a teacher whose score is there; what is wrong with it is said once."""
        if expected not in self._verdicts:
            found, cause = self._score(expected), self.failed.get(expected.score)
            if found is None:
                cause = cause or f"it gives no {expected.column}"
                said = f"{expected.where}: not checked, as what it scores is not known ({cause})"
            else:
                said = expected.complaint(found)
            refused = found is not None and expected.refuse
            self._verdicts[expected] = said if refused else ""
            if said and refused:
                self._stopped = self._stopped or self.fail_fast
                self._say("failed", self.plan.stages[expected.stage], {"reason": said, "category": "user"})
            elif said:
                self.bench.tell(said)
        return self._verdicts[expected]

    def _score(self, expected: Expectation) -> float | None:
        while True:
            try:
                return expected.found(self.bench.store)
            except CorruptArtifact as damage:
                self.repair(damage)

    def _make(self, stage: Stage) -> None:
        """Make ``stage``, whose lock is held, remaking inputs that turn out to be damaged."""
        self._begin(stage)
        done = False
        while not done and not self._blocked(stage):
            try:
                done = self._once(stage)
            except StoreError:
                raise
            except (Exception, SystemExit) as error:
                self._fail(stage, *classify(error))
                return
        if done:
            self._end(stage)

    def _begin(self, stage: Stage) -> None:
        # said once of one that was parked
        if stage.identity not in self._begun:
            self._begun.add(stage.identity)
            self._say("start", stage)

    def _end(self, stage: Stage) -> None:
        self.made.append(stage.identity)
        self._ended.add(stage.identity)
        self._begun.discard(stage.identity)
        self._say("done", stage)

    def _once(self, stage: Stage) -> bool:
        """Whether the stage was made; False after a damaged input was mended."""
        try:
            self._write(stage, lambda draft: maker(stage.kind)(stage, self.bench, draft))
        except CorruptArtifact as damage:
            self.repair(damage)
            return False
        return True

    def _write(self, stage: Stage, make: Callable[[Draft], None]) -> None:
        # not before there is work to do: a finished suite is recognised without torch
        import torch

        store = self.bench.store
        with store.writing(stage.identity, stage.kind, stage.label, stage.spec, stage.needs) as draft:
            draft.meta["machine"] = machine_record()
            draft.meta["device"] = self.bench.device
            draft.meta["threads"] = torch.get_num_threads()
            draft.meta["sources"] = sources(stage, self.bench.registry)
            make(draft)
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
                    f"the store {store.address}, or choose another with --store DIR"
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
        self._begun.discard(stage.identity)
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


def classify(error: Exception | SystemExit) -> tuple[str, str]:
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
    frames = traceback.extract_tb(error.__traceback__)
    named = ((plugin, frame) for frame in reversed(frames) if (plugin := owner(frame.filename)) is not None)
    plugin, place = next(named, (None, frames[-1]))
    told = f"{type(error).__name__}: {_line(error)} ({os.path.basename(place.filename)}:{place.lineno})"
    return (
        told if plugin is None else f"plugin {plugin.kind}:{plugin.key} failed: {told}; correct the plugin"
    ), "error"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
