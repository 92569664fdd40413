"""The training loop: one stream, and the learners that are trained on it together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.disk import keep, kept
from ..core.errors import Diverged, SharedChanged
from ..core.interrupts import held_back
from ..core.intervals import Interval
from .learner import Learner
from .ledger import Ledger
from .philox import Philox
from .shared import Objective, Source, View

# Losses that are looked at in a training: often enough to see a divergence early, and on short ones seldom enough that
# a GPU is not stalled by every other step, as long as a few remain.
LOGS, FEW, APART = 200, 50, 16

Clock = Callable[[], float]

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass
class Watch:
    """How a learner speaks to the outside: ``progress(done, total, images, loss)``, words, and when to save where."""

    progress: Callable[[int, int, int, float], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None
    checkpoint: Path | None = None
    every: float = 60.0


@dataclass
class Log:
    """What a training leaves behind beside weights; plain data, the same however often it was interrupted.

    Attributes:
        seconds: wall time: its own, and its part of what was done for all.
        shared_with: most other learners that it ever shared a step with.
    """

    images: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    shared_with: int = 0

    def data(self) -> dict[str, Any]:
        """What is the same in every run; the seconds are not, nor is the company."""
        return {"images": self.images, "curve": self.curve}


@dataclass(eq=False)
class Member:
    """A learner in training, on the samples of a stream that fall into ``interval``.

    Attributes:
        micro_batch: samples that pass the network at once, or None for all; parts end where a relational group does.
    """

    learner: Learner
    objective: Objective
    interval: Interval
    watch: Watch = field(default_factory=Watch)
    micro_batch: int | None = None
    log: Log = field(default_factory=Log)
    _entered: bool = False
    _saved: float = 0.0
    # whether the weights are between two steps
    _torn: bool = False

    @property
    def step(self) -> int:
        """Its position in the stream."""
        return self.learner.course.offset + self.learner.position

    @property
    def done(self) -> bool:
        return self.learner.position >= self.learner.course.steps

    @property
    def noted(self) -> bool:
        """Whether the step to come is one whose loss is looked at."""
        done, steps = self.learner.position, self.learner.course.steps
        return done % max(1, steps // LOGS, min(APART, steps // FEW)) == 0 or done + 1 == steps

    def enter(self, now: float) -> None:
        """Go on from the last checkpoint, where there is one."""
        if self._entered:
            return
        self._entered, self._saved = True, now
        path = self.watch.checkpoint
        if path is None or not path.exists():
            return
        if not kept(path):
            self.watch.say("the checkpoint is damaged; training from the start")
            return
        self.log = Log(**self.learner.load(path, resume=True))
        self.watch.say(f"going on at step {self.learner.position} of {self.learner.course.steps}")

    def take(self, view: View | None, rows: Tensor, group: int, seed: int) -> None:
        """One step on ``rows`` of ``view``, which is None where there are none.

        Raises:
            Diverged: for a loss that is not finite, on steps that are noted.
        """
        noted, done, step = self.noted, self.learner.position, self.step
        if view is None or len(rows) == 0:
            self._torn = True
            self.learner.skip()
            self._torn = False
            return
        # dropout draws from torch's global generator
        torch.manual_seed(Philox.torch_seed(seed, f"dropout {step}"))
        loss, terms = self._learn(view, parts(rows, group, self.micro_batch), step)
        self._torn = True
        self.learner.update()
        self._torn = False
        self.log.images += len(rows)
        if noted:
            _note(self.log, done, loss, terms)

    def _learn(self, view: View, samples: Sequence[Tensor], step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The gradient of the mean over all samples; the loss and its terms, detached."""
        count = sum(len(rows) for rows in samples)
        told: list[dict[str, Tensor]] = []
        for part, rows in enumerate(samples):
            share = len(rows) / count
            loss, terms = self.objective.loss(view, rows, step, part)
            self.learner.backward(loss if share == 1 else loss * share)
            found = {"": loss.detach(), **{name: value.detach() for name, value in terms.items()}}
            told.append(found if share == 1 else {name: value * share for name, value in found.items()})
        whole = {name: sum((one[name] for one in told[1:]), told[0][name]) for name in told[0]}
        return whole.pop(""), whole

    def tell(self, noted: bool, now: float) -> None:
        """Progress to the observers, and a checkpoint when one is due."""
        log, learner = self.log, self.learner
        if noted:
            loss = log.curve[-1]["loss"] if log.curve else math.nan
            self.watch.progress(learner.position, learner.course.steps, log.images, loss)
        if now - self._saved >= self.watch.every:
            self._saved = now
            self.save()

    def save(self) -> None:
        if self.watch.checkpoint is not None:
            extra = {**self.log.data(), "seconds": self.log.seconds, "shared_with": self.log.shared_with}
            fresh = self.watch.checkpoint.with_suffix(".fresh")
            self.learner.save(fresh, extra)
            keep(fresh, self.watch.checkpoint)

    def park(self) -> None:
        """Leave everything where it can be gone on from; what was cut in the middle goes on from before."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        if not self._torn:
            self.save()


@dataclass
class Left:
    """A member that trains no longer: it is done, or ``error`` says why not, or it is ``parked``.

    Parked is whoever found no memory beside others; it goes on from its checkpoint when there is room.
    """

    member: Member
    error: Exception | None = None
    parked: bool = False


def train(source: Source, member: Member, clock: Clock = time.perf_counter) -> Log:
    """Train one learner from its last checkpoint on.

    Raises:
        Diverged: when the loss or the weights are not finite.
    """
    (left,) = train_together(source, [member], clock)
    if left.error is not None:
        raise left.error
    return member.log


def train_together(source: Source, members: list[Member], clock: Clock = time.perf_counter) -> Iterator[Left]:
    """Train ``members``, each from its last checkpoint on, and give each back when it leaves.

    Those at the smallest position of the stream make a step together while the others wait for them, so that whoever
    is behind catches up. ``members`` may be added to whenever a member is given back. On the CPU each ends with the
    bits that it would have alone. Let go of what you are given: it holds the memory of a network. An interrupt comes
    between two steps, with all checkpoints kept.
    """
    while members:
        for member in members:
            member.enter(clock())
        device = members[0].learner.device
        ledger = Ledger(device, clock)
        left: list[Left] = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), held_back() as interrupted:
            ledger.open()
            while not left and not interrupted():
                left = _step(source, members, ledger, clock)
            ledger.close()
            if interrupted():
                broken = [one.member for one in left if one.error is not None]
                for member in members:
                    if member not in broken:
                        member.park()
        gone = {id(one.member) for one in left}
        members[:] = [member for member in members if id(member) not in gone]
        del member
        while left:
            yield left.pop(0)


def _step(source: Source, members: Sequence[Member], ledger: Ledger, clock: Clock) -> list[Left]:
    """One step of those who are behind; who leaves after it."""
    done = [_ended(member) for member in members if member.done]
    if done:
        return done
    step = min(member.step for member in members)
    present = [member for member in members if member.step == step]
    ledger.begin([member.log for member in present], any(member.noted for member in present))
    batch = source.stream.batch_at(step, present[0].learner.device)
    asked = [(member, source.rows(batch, member.interval)) for member in present]
    asking = [(member.objective, rows) for member, rows in asked if len(rows)]
    try:
        view = source.at(batch, asking) if asking else None
    except OUT_OF_MEMORY as error:
        # one less to keep in memory, and the others try again
        return [_stopped(present[-1], error, len(members))]
    except Exception as error:
        return [Left(member, error) for member in present]
    ledger.share()
    left: list[Left] = []
    for place, (member, rows) in enumerate(asked):
        if len(rows):
            member.log.shared_with = max(member.log.shared_with, len(asking) - 1)
        noted = member.noted
        try:
            member.take(view, rows, source.stream.group, source.stream.seed)
        except SharedChanged as error:
            # those behind it would learn from what it wrote
            return [Left(one, error) for one in present]
        except Exception as error:
            left.append(_stopped(member, error, len(members) - len(left)))
        else:
            member.tell(noted, clock())
        ledger.own(place)
    return left


def parts(rows: Tensor, group: int, most: int | None) -> list[Tensor]:
    """``rows`` (int64, ascending) in parts of at most ``most`` that hold whole relational groups, at least one each."""
    if most is None or len(rows) <= most:
        return [rows]
    sizes = torch.unique_consecutive(rows // group, return_counts=True)[1].tolist()
    merged: list[int] = []
    for size in sizes:
        if merged and merged[-1] + size <= most:
            merged[-1] += size
        else:
            merged.append(size)
    return list(torch.split(rows, merged))


def _ended(member: Member) -> Left:
    if all(bool(torch.isfinite(p).all()) for p in member.learner.network.parameters()):
        return Left(member)
    steps = member.learner.course.steps
    return Left(member, Diverged(f"the weights are not finite after step {steps}; lower the learning rate"))


def _stopped(member: Member, error: Exception, together: int) -> Left:
    """What an error means to a member: the end, or that it must make room for the others."""
    if together == 1 or not isinstance(error, OUT_OF_MEMORY):
        return Left(member, error)
    # its frames hold the activations
    error.__traceback__ = None
    member.park()
    if member.learner.device.type == "cuda":
        torch.cuda.empty_cache()
    return Left(member, parked=True)


def _note(log: Log, step: int, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    value = float(loss)
    if not math.isfinite(value):
        of = ", ".join(name for name, term in terms.items() if not math.isfinite(float(term)))
        mend = "lower the learning rate or clip gradients" if step else "nothing was learned yet, so look at the method"
        raise Diverged(f"the loss is {value} at step {step}{f' (by {of})' if of else ''}; {mend}")
    log.curve.append({"step": step, "loss": value, **{k: float(v) for k, v in terms.items()}})
