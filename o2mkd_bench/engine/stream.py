"""Which images, timesteps and noise a training step sees: a pure function of seed and step.

See docs/semantics.md, Streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.identity import identity
from ..core.intervals import Interval, Law
from .philox import Philox


@dataclass(frozen=True)
class StreamBatch:
    """Step ``step`` of a stream; all tensors have shape (B,) and lie on the device asked for, except ``host_t``.

    Attributes:
        index: int64, positions in the training set, drawn with replacement.
        t: int64, training timesteps.
        flip: bool, whether the image is mirrored horizontally.
        groups: int64, the relational group; neighbours in t share one.
        host_t: ``t`` on the CPU, so that choosing rows never waits for the device.
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

    @cached_property
    def identity(self) -> str:
        """The hash of dataset, seed, law of t, batch size, augmentation and group size."""
        law = {"ends": self.law.ends, "masses": [str(mass) for mass in self.law.masses]}
        return identity([self.fingerprint, self.count, self.seed, law, self.batch, self.flip, self.group])

    def batch_at(self, step: int, device: torch.device | str = "cpu") -> StreamBatch:
        """The batch of one step, ``step`` in [0, 2^31).

        The few integers that decide it are exact and made on the CPU, hence the same on every device.
        """
        draws = Philox.for_purpose(self.seed, "batch").uint32(torch.tensor([step]), 4 * self.batch).view(-1, 4)
        rows = torch.arange(self.batch)
        # Multiply and shift instead of a remainder: the bias is below count / 2^32.
        index = (draws[:, 0] * self.count) >> 32
        t = self.law.ends[0] + torch.searchsorted(self._thresholds, (rows << 32) + draws[:, 1], right=True)
        flip = (draws[:, 2] >> 31).bool() if self.flip else torch.zeros(self.batch, dtype=torch.bool)
        return StreamBatch(
            step, index.to(device), t.to(device), flip.to(device), (rows // self.group).to(device), host_t=t
        )

    def rows_in(self, batch: StreamBatch, interval: Interval) -> Tensor:
        """Rows of the batch whose t lies in ``interval``: int64, ascending, on the batch's device."""
        inside = (batch.host_t >= interval.lo) & (batch.host_t < interval.hi)
        return inside.nonzero().flatten().to(batch.t.device)

    def noise(self, batch: StreamBatch, shape: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """The noise of each sample, float32 (B, *shape), or of ``rows`` (int64) of the batch only: the same numbers."""
        sample = _rows(torch.arange(self.batch, device=batch.t.device), rows)
        return Philox.for_purpose(self.seed, "noise").normal((batch.step << 32) + sample, shape)

    def images(self, batch: StreamBatch, data: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean images of the batch, float32 (B, C, H, W) in [-1, 1], or of ``rows`` (int64) of it.

        Args:
            data: the training set, uint8 (N, C, H, W), on the batch's device.
        """
        if len(data) != self.count:
            raise ValueError(f"the stream draws from {self.count} images, the data holds {len(data)}")
        chosen = data[_rows(batch.index, rows)]
        flip = _rows(batch.flip, rows).view(-1, 1, 1, 1)
        return torch.where(flip, chosen.flip(-1), chosen).float().div_(127.5).sub_(1)

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


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]
