"""The training loop: one stream, one learner, until the job's steps are done."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..core.errors import Diverged
from ..core.intervals import Interval
from .learner import Learner
from .philox import Philox
from .stream import Stream, StreamBatch

# Often enough to see a divergence early, seldom enough that reading the loss does not stall a GPU.
LOGS = 200


class Objective(ABC):
    """What is learned from a batch."""

    def adapters(self) -> nn.Module | None:
        """Extra trainable parts, thrown away after."""
        return None

    @abstractmethod
    def loss(self, batch: StreamBatch, rows: Tensor, step: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scalar to be minimised for the samples ``rows`` of ``batch``, and its weighted parts by name.

        ``step`` is the position in the stream.
        """


@dataclass
class Watch:
    """How a loop speaks to the outside: ``progress(done, total, images, loss)``, words, and when to save where."""

    progress: Callable[[int, int, int, float], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None
    checkpoint: Path | None = None
    every: float = 60.0
    clock: Callable[[], float] = time.monotonic


@dataclass
class Log:
    """What a training leaves behind beside weights; plain data, the same however often it was interrupted."""

    images: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def data(self) -> dict[str, Any]:
        """What is the same in every run; the seconds are not."""
        return {"images": self.images, "curve": self.curve}


def train(learner: Learner, objective: Objective, stream: Stream, interval: Interval, watch: Watch) -> Log:
    """Train ``learner`` on the samples of ``stream`` that fall into ``interval``, from its last checkpoint on.

    Raises:
        Diverged: when the loss or the weights are not finite.
    """
    steps, offset = learner.course.steps, learner.course.offset
    log = _resume(learner, watch)
    before, start = log.seconds, watch.clock()
    saved = start
    stride = max(1, steps // LOGS)
    # dropout draws from torch's global generator
    with torch.random.fork_rng([learner.device] if learner.device.type == "cuda" else []):
        while learner.position < steps:
            done = learner.position
            noted = done % stride == 0 or done + 1 == steps
            batch = stream.batch_at(offset + done, learner.device)
            rows = stream.rows_in(batch, interval)
            if len(rows) == 0:
                learner.skip()
            else:
                torch.manual_seed(Philox.torch_seed(stream.seed, f"dropout {offset + done}"))
                loss, terms = objective.loss(batch, rows, offset + done)
                learner.step(loss)
                log.images += len(rows)
                if noted:
                    _note(log, done, loss, terms)
            if noted:
                watch.progress(learner.position, steps, log.images, log.curve[-1]["loss"] if log.curve else math.nan)
            if watch.checkpoint is not None and watch.clock() - saved >= watch.every:
                saved = watch.clock()
                learner.save(watch.checkpoint, {**log.data(), "seconds": before + saved - start})
    log.seconds = before + watch.clock() - start
    if not all(bool(torch.isfinite(p).all()) for p in learner.network.parameters()):
        raise Diverged(f"the weights are not finite after step {steps}; lower the learning rate")
    return log


def _resume(learner: Learner, watch: Watch) -> Log:
    """The log so far, and the learner where its last checkpoint left it."""
    if watch.checkpoint is None or not watch.checkpoint.exists():
        return Log()
    try:
        log = Log(**learner.load(watch.checkpoint, resume=True))
    except SafetensorError as error:
        watch.say(f"the checkpoint cannot be read ({error}); training from the start")
        return Log()
    watch.say(f"going on at step {learner.position} of {learner.course.steps}")
    return log


def _note(log: Log, step: int, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} at step {step}; lower the learning rate or clip gradients")
    log.curve.append({"step": step, "loss": value, **{k: float(v.detach()) for k, v in terms.items()}})
