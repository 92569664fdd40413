"""Which images, timesteps and noise a training step sees: a pure function of seed and step.

See docs/semantics.md, Streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.intervals import Interval, Law
from .philox import Philox

if TYPE_CHECKING:
    from .images import Images

# Steps drawn at once: one step costs as many small operations as all of these.
BLOCK = 32


@dataclass(frozen=True)
class StreamBatch:
    """Step ``step`` of a stream; all tensors have shape (B,) and lie on the device asked for, except ``host_t``.

    Attributes:
        index: int64, positions in the training set, drawn with replacement.
        t: int64, training timesteps.
        flip: bool, whether the image is mirrored horizontally.
        groups: int64, the relational group; neighbours in t share one.
        host_t: ``t`` on the CPU, so that choosing rows never waits for the device; rising, as the slices do.
    """

    step: int
    index: Tensor
    t: Tensor
    flip: Tensor
    groups: Tensor
    host_t: Tensor


@dataclass(frozen=True)
class Stream:
    """The training stream of one seed. Its equals fuse: jobs that read equal streams see the same batches.

    Attributes:
        seed: the training seed.
        law: the law of t. Sample i draws from the i-th of ``batch`` equal quantile slices of it.
        batch: B, samples a step.
        count: number of training images.
        flip: whether images are mirrored at random.
        group: samples of a relational group.
        fingerprint: of the dataset.

    Raises:
        UserError: when a batch, a dataset or a relational group is too small.
    """

    seed: int
    law: Law
    batch: int
    count: int
    flip: bool
    group: int = 32
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"a training batch of {self.batch} samples is empty; use at least 1")
        if not 1 <= self.count < 1 << 31:
            raise UserError(f"the training set has {self.count} images; use a dataset with 1 to {(1 << 31) - 1}")
        if self.group < 3:
            raise UserError(f"relational groups of {self.group} samples have no angles; use at least 3")

    def batch_at(self, step: int, device: torch.device | str = "cpu") -> StreamBatch:
        """The batch of one step, ``step`` in [0, 2^31).

        The few integers that decide it are exact and made on the CPU, hence the same on every device; the steps around
        it are made with it, and the newest such block is kept for each device.
        """
        number, place = divmod(step, BLOCK)
        device = torch.device(device)
        block = self._newest.get(device)
        if block is None or block.number != number:
            block = self._newest[device] = self._draw(number, device)
        index, t, flip, host_t = (v[place] for v in (block.index, block.t, block.flip, block.host_t))
        return StreamBatch(step, index, t, flip, block.groups, host_t)

    def rows_in(self, batch: StreamBatch, interval: Interval) -> Tensor:
        """Rows of the batch whose t lies in ``interval``: int64, ascending, on the CPU, which never waits for a device.

        They are a range, as the t of a batch rise.
        """
        first, end = torch.searchsorted(batch.host_t, torch.tensor([interval.lo, interval.hi])).tolist()
        return torch.arange(first, end)

    def noise(self, batch: StreamBatch, shape: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """The noise of each sample, float32 (B, *shape), or of ``rows`` (int64) of the batch only: the same numbers."""
        sample = _rows(torch.arange(self.batch, device=batch.t.device), rows)
        return Philox.for_purpose(self.seed, "noise").normal((batch.step << 32) + sample, shape)

    def images(self, batch: StreamBatch, data: Tensor | Images, rows: Tensor | None = None) -> Tensor:
        """Clean images of the batch, float32 (B, C, H, W), or of ``rows`` (int64) of it; see :func:`signal`.

        Args:
            data: the training set (N, C, H, W): a tensor on the batch's device, or wherever it lives.
        """
        chosen = self.take(batch, data, rows)
        flip = _rows(batch.flip, rows).view(-1, 1, 1, 1)
        return signal(torch.where(flip, chosen.flip(-1), chosen))

    def take(self, batch: StreamBatch, data: Tensor | Images, rows: Tensor | None = None) -> Tensor:
        """What ``data`` (N, …) holds for the batch, or for ``rows`` (int64) of it, as it is there."""
        if len(data) != self.count:
            raise ValueError(f"the stream draws from {self.count} images, the data holds {len(data)}")
        return data[_rows(batch.index, rows)] if isinstance(data, Tensor) else data.take(self, batch, rows)

    @cached_property
    def _newest(self) -> dict[torch.device, _Block]:
        return {}

    def _draw(self, number: int, device: torch.device) -> _Block:
        steps = torch.arange(number * BLOCK, (number + 1) * BLOCK)
        draws = Philox.for_purpose(self.seed, "batch").uint32(steps, 4 * self.batch).view(BLOCK, self.batch, 4)
        rows = torch.arange(self.batch)
        # Multiply and shift instead of a remainder: the bias is below count / 2^32.
        index = (draws[..., 0] * self.count) >> 32
        t = self.law.ends[0] + torch.searchsorted(self._thresholds, (rows << 32) + draws[..., 1], right=True)
        flip = (draws[..., 2] >> 31).bool() if self.flip else torch.zeros(BLOCK, self.batch, dtype=torch.bool)
        groups = rows // self.group
        return _Block(number, _send(index, device), _send(t, device), _send(flip, device), _send(groups, device), t)

    @cached_property
    def _thresholds(self) -> Tensor:
        """For each t but the first, the smallest quantile (in units of 1 / (B 2^32)) that reaches it, int64.

        Exact, so that a slice that ends at an interval's edge never spills over it.
        """
        lo, hi = self.law.ends[0], self.law.ends[-1]
        unit = self.batch << 32
        return torch.tensor(
            [math.ceil(self.law.mass(Interval(lo, t)) * unit) for t in range(lo + 1, hi)], dtype=torch.int64
        )


@dataclass(frozen=True)
class _Block:
    """Steps ``number * BLOCK`` and on: what a StreamBatch holds, with a first axis of BLOCK, but for ``groups``."""

    number: int
    index: Tensor
    t: Tensor
    flip: Tensor
    groups: Tensor
    host_t: Tensor


def signal(stored: Tensor) -> Tensor:
    """What networks are trained on, float32: uint8 images in [-1, 1], latents as they are."""
    return stored.float() if stored.is_floating_point() else stored.float().div_(127.5).sub_(1)


def _send(values: Tensor, device: torch.device) -> Tensor:
    # from pageable memory the copy would wait for all that is queued on the device
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]
