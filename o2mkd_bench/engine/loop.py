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
from torch import Tensor, nn

from ..core.errors import StageFailed
from ..core.intervals import Interval
from .learner import Learner
from .stream import Stream, StreamBatch

# Often enough to see a divergence early, seldom enough that reading the loss does not stall a GPU.
LOGS = 200


class Objective(ABC):
    """What is learned from a batch."""

    def adapters(self) -> nn.Module | None:
        """Extra trainable parts, thrown away after."""
        return None

    @abstractmethod
    def loss(self, batch: StreamBatch, rows: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to be minimised for the samples ``rows`` of ``batch``, and its weighted parts by name.

        ``step`` is the position in the stream.
        """


@dataclass
class Watch:
    """How a loop speaks to the outside: ``progress(done, total, images, loss)``, and when to save where."""

    progress: Callable[[int, int, int, float], None] = lambda *_: None
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
        StageFailed: when the loss is not finite.
    """
    steps, offset = learner.course.steps, learner.course.offset
    log = Log()
    if watch.checkpoint is not None and watch.checkpoint.exists():
        log = Log(**learner.load(watch.checkpoint, resume=True))
    before = log.seconds
    stride = max(1, steps // LOGS)
    start = saved = watch.clock()
    loss = torch.zeros(())
    terms: Mapping[str, Tensor] = {}
    while learner.position < steps:
        done = learner.position
        batch = stream.batch_at(offset + done, learner.device)
        rows = stream.rows_in(batch, interval)
        if len(rows) == 0:
            learner.skip()
        else:
            loss, terms = objective.loss(batch, rows, offset + done)
            learner.step(loss)
        log.images += len(rows)
        if done % stride == 0 or learner.position == steps:
            _note(log, done, loss, terms)
            watch.progress(learner.position, steps, log.images, float(loss))
        if watch.checkpoint is not None and watch.clock() - saved >= watch.every:
            saved = watch.clock()
            learner.save(watch.checkpoint, {**log.data(), "seconds": before + saved - start})
    log.seconds = before + watch.clock() - start
    if not all(bool(torch.isfinite(p).all()) for p in learner.network.parameters()):
        raise StageFailed(f"the weights are not finite after step {steps}; lower the learning rate")
    return log


def _note(log: Log, step: int, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise StageFailed(f"the loss is {value} at step {step}; lower the learning rate or clip gradients")
    log.curve.append({"step": step, "loss": value, **{k: float(v) for k, v in terms.items()}})
