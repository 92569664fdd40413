"""One student whose loss weighs every interval of timesteps alike, whatever the scale of each interval's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .shared import Objective, Source, View

# Steps that a running mean looks back.
HORIZON = 100
# So small that only a loss that is zero meets it.
FLOOR = 1e-12


class RunningMeans(nn.Module):
    """How large the losses of K intervals are: exponential means over steps, the bias of their start taken out.

    A step counts once, whatever number of parts it comes in: it waits until the next step begins, so that one that is
    taken again after it was cut off counts once too. All of it is buffers on ``device``, and nothing is read back.
    """

    mean: Tensor
    weight: Tensor
    total: Tensor
    count: Tensor
    step: Tensor

    def __init__(self, intervals: int, device: torch.device) -> None:
        super().__init__()
        for name in ("mean", "weight", "total", "count"):
            self.register_buffer(name, torch.zeros(intervals, device=device))
        self.register_buffer("step", torch.tensor(-1, device=device))

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Take in the step before ``step``, and forget what ``step`` itself has left so far."""
        value = self.total / self.count.clamp(min=1)
        # an overflow that the loss scaler passes over must not stay
        counts = (self.step != step) & (self.count > 0) & value.isfinite()
        rate = counts / HORIZON
        self.mean += rate * (torch.where(counts, value, self.mean) - self.mean)
        self.weight += rate * (1 - self.weight)
        self.total.zero_()
        self.count.zero_()
        self.step.fill_(step)

    @torch.no_grad()
    def scale(self, interval: int, loss: Tensor, samples: int) -> Tensor:
        """What to divide ``loss``, the mean over ``samples`` of ``interval``, by: a scalar, at least ``FLOOR``.

        It is the running mean of the steps before, and in an interval's first step that of the step so far.
        """
        self.total[interval] += loss.detach().abs() * samples
        self.count[interval] += samples
        before, now = self.mean[interval] / self.weight[interval], self.total[interval] / self.count[interval]
        return torch.where(self.weight[interval] > 0, before, now).clamp(min=FLOOR)


class Normalised(Objective):
    """The mean over samples of the loss of each one's interval, divided by the running mean of that loss.

    Adam makes each expert blind to the scale of its interval's loss; one student on all intervals is not, and this
    takes the difference away. Terms of a KD method are scalars over samples, so ``inner`` is asked once an interval.
    The running means are training state, carried with the adapters.

    Args:
        source: what the student learns from.
        edges: the K - 1 inner edges of the intervals, rising.
    """

    def __init__(self, inner: Objective, source: Source, edges: Sequence[int]) -> None:
        self.inner = inner
        self.teacher, self.wanted = inner.teacher, inner.wanted
        self.source = source
        self.edges = torch.tensor(edges)
        self.means = RunningMeans(len(edges) + 1, source.data.device)

    def adapters(self) -> nn.Module:
        inner = self.inner.adapters()
        return nn.ModuleDict({"means": self.means} | ({} if inner is None else {"inner": inner}))

    def loss(self, view: View, rows: Tensor, step: int, part: int = 0) -> tuple[Tensor, Mapping[str, Tensor]]:
        if part == 0:
            self.means.begin(step)
        found: dict[str, Tensor] = {}
        whole: list[Tensor] = []
        for interval, own in enumerate(self._split(view, rows, step)):
            if len(own) == 0:
                continue
            loss, terms = self.inner.loss(view, own, step, part * (len(self.edges) + 1) + interval)
            weight = len(own) / len(rows) / self.means.scale(interval, loss, len(own))
            whole.append(loss * weight)
            for name, value in terms.items():
                found[name] = found.get(name, 0) + value * weight
        return torch.stack(whole).sum(), found

    def _split(self, view: View, rows: Tensor, step: int) -> Sequence[Tensor]:
        """``rows`` by interval: int64, on the host, as is the t that decides."""
        t = self.source.stream.batch_at(step, view.t.device).host_t[rows]
        cuts = torch.searchsorted(t, self.edges)
        return torch.tensor_split(rows, cuts)
