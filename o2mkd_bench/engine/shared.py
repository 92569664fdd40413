"""What all students of one stream share at a step: noised images, and one pass of their frozen teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.intervals import Interval
from ..core.schedule import Prediction
from .denoiser import Call, Tables
from .replay import Tapped
from .stream import Stream, StreamBatch

if TYPE_CHECKING:
    from .images import Images

# On the CPU the teacher always sees the stream's batch in these pieces, whoever trains on it: the bits of a
# convolution depend on the batch it is part of.
CHUNK = 32


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher."""

    call: Call
    prediction: Prediction


@dataclass(frozen=True)
class Answer:
    """A teacher's raw prediction, float32 (R, C, H, W), and features by name, for ``rows`` (int64, on the host)."""

    rows: Tensor
    raw: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Answer:
        pick = _places(self.rows, rows, self.raw.device)
        return Answer(rows, self.raw[pick], {name: value[pick] for name, value in self.features.items()})


@dataclass(frozen=True)
class View:
    """Some samples of a step; images are float32 (R, C, H, W) in [-1, 1], the rest has shape (R,).

    Attributes:
        rows: int64, ascending, which samples of the batch these are; on the host, so that choosing never waits.
        x0, noise, x_t: the clean images, the noise, and the noised images.
        place: int64, the stream's t: a training timestep, or an entry of the source's grid.
        t: int64, training timesteps.
        alpha, sigma: the schedule at each t, float32.
        groups: int64, the relational group of each sample.
        answer: what the teacher says; None where nobody asked.
        condition: what both networks follow, floating (R, …); None where they follow nothing.
    """

    rows: Tensor
    x0: Tensor
    noise: Tensor
    x_t: Tensor
    place: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    groups: Tensor
    answer: Answer | None = None
    condition: Tensor | None = None

    def take(self, rows: Tensor, taught: bool = False) -> View:
        """These ``rows`` of the view, which must hold them; with ``taught`` also of the teacher's answer."""
        pick = _places(self.rows, rows, self.t.device)
        names = ("x0", "noise", "x_t", "place", "t", "alpha", "sigma", "groups")
        parts = {name: getattr(self, name)[pick] for name in names}
        answer = self.answer.take(rows) if taught and self.answer is not None else None
        condition = None if self.condition is None else self.condition[pick]
        return View(rows=rows, **parts, answer=answer, condition=condition)


class Objective(ABC):
    """What one student learns from a view.

    Attributes:
        teacher: whom it asks; all objectives of one source that have a teacher have the same.
        wanted: the teacher's features it asks for, name to module path.
    """

    teacher: Teacher | None = None
    wanted: Mapping[str, str] = {}

    def adapters(self) -> nn.Module | None:
        """Extra trainable parts, thrown away after."""
        return None

    @abstractmethod
    def loss(self, view: View, rows: Tensor, step: int, part: int = 0) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scalar to be minimised for the samples ``rows`` of ``view``, and its weighted parts by name.

        Args:
            rows: int64, ascending, on the host.
            step: the position in the stream.
            part: which part of this student's samples these are, where they do not pass at once.
        """


class Source:
    """A stream with its images and schedule. ``at`` is computed once a step, whoever learns from it.

    The bits of what an objective sees on the CPU do not depend on who else asks.

    Attributes:
        data: the training set, uint8 images or floating latents (N, C, H, W), or where it lives.
        grid: for a stream whose t counts entries: their training timesteps, int64, on the device.
        conditions: what networks follow at each of the training set, floating (N, …), where they follow something.
    """

    def __init__(
        self,
        stream: Stream,
        data: Tensor | Images,
        tables: Tables,
        grid: Tensor | None = None,
        conditions: Tensor | Images | None = None,
    ) -> None:
        self.stream = stream
        self.data = data
        self.tables = tables
        self.grid = grid
        self.conditions = conditions
        self._tapped: dict[tuple[Call, tuple[str, ...]], Tapped] = {}

    def rows(self, batch: StreamBatch, interval: Interval) -> Tensor:
        """Rows of the batch whose t lies in ``interval``: int64, ascending, on the host."""
        return self.stream.rows_in(batch, interval)

    @torch.no_grad()
    def at(self, batch: StreamBatch, asked: Sequence[tuple[Objective, Tensor]]) -> View:
        """All that the objectives, each for its rows, need to see of a step; only these rows are computed."""
        taught = self._taught(batch, asked)
        rows = _union([*(rows for _, rows in asked), *([] if taught is None else [taught])])
        view = self._noised(batch, rows)
        return view if taught is None else replace(view, answer=self._ask(view, taught, asked))

    def _taught(self, batch: StreamBatch, asked: Sequence[tuple[Objective, Tensor]]) -> Tensor | None:
        """The rows that the teacher sees."""
        asking = [rows for objective, rows in asked if objective.teacher is not None]
        if not asking:
            return None
        rows = _union(asking)
        if batch.t.device.type != "cpu":
            return rows
        touched = torch.unique(rows // CHUNK)
        seen = (touched[:, None] * CHUNK + torch.arange(CHUNK)).flatten()
        whole: Tensor = seen[seen < len(batch.t)]
        return whole

    def _noised(self, batch: StreamBatch, rows: Tensor) -> View:
        here = None if len(rows) == len(batch.t) else _sent(rows, batch.t.device)
        x0 = self.stream.images(batch, self.data, here)
        noise = self.stream.noise(batch, x0.shape[1:], here)
        place, groups = (v if here is None else v[here] for v in (batch.t, batch.groups))
        t = place if self.grid is None else self.grid[place]
        alpha, sigma = self.tables.alpha[t], self.tables.sigma[t]
        x_t = alpha.view(-1, 1, 1, 1) * x0 + sigma.view(-1, 1, 1, 1) * noise
        condition = None if self.conditions is None else self.stream.take(batch, self.conditions, here)
        return View(rows, x0, noise, x_t, place, t, alpha, sigma, groups, condition=condition)

    def _ask(self, view: View, rows: Tensor, asked: Sequence[tuple[Objective, Tensor]]) -> Answer:
        """One pass of the teacher, with every feature that any objective wants."""
        teacher = next(o.teacher for o, _ in asked if o.teacher is not None)
        paths = {name: path for objective, _ in asked for name, path in sorted(objective.wanted.items())}
        key = teacher.call, tuple(sorted(paths))
        if key not in self._tapped:
            self._tapped[key] = teacher.call.tapped(paths, "teacher")
        pick = _places(view.rows, rows, view.t.device)
        inputs = [value[pick] for value in (view.x_t, view.t, *optional(view.condition))]
        size = CHUNK if view.t.device.type == "cpu" else len(inputs[1])
        pieces = zip(*(torch.split(value, size) for value in inputs), strict=True)
        raws, features = zip(*(self._tapped[key](*piece) for piece in pieces), strict=True)
        return Answer(rows, _joined(raws), {name: _joined([f[name] for f in features]) for name in paths})


def optional(condition: Tensor | None) -> tuple[Tensor, ...]:
    """A condition as what follows (x, t) in a call; nothing for networks that follow nothing."""
    return () if condition is None else (condition,)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _union(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.unique(torch.cat(list(rows)))


def _places(of: Tensor, rows: Tensor, device: torch.device) -> slice | Tensor:
    """Where ``rows`` stand in ``of``; a range needs neither copies nor anything sent to the device."""
    places = torch.searchsorted(of, rows)
    first, end = int(places[0]), int(places[-1]) + 1
    return slice(first, end) if end - first == len(places) else _sent(places, device)


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Row numbers on the device, without waiting for what is queued there."""
    if device.type == "cpu":
        return rows
    return rows.pin_memory().to(device, non_blocking=True)
