"""K networks, each in charge of an interval of t, seen by a sampler as one denoiser."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..core.schedule import NoiseSchedule, Prediction
from .denoiser import Call
from .graphs import Graphs
from .kd import convert
from .sample import Denoise


class Router:
    """One denoiser for batches in which every image has the same t, so that one network answers a call.

    The choice is made from host integers: it never waits for the device.
    """

    def __init__(self, calls: Sequence[Call], edges: Sequence[int], graphs: Graphs | None = None) -> None:
        """``calls``: least noisy interval first; ``edges``: the inner edges between them, rising.

        ``graphs``: the same calls, at one batch size.

        Raises:
            ValueError: unless there is one call more than edges, and the edges rise strictly.
        """
        if len(calls) != len(edges) + 1 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"{len(calls)} networks do not fit the inner edges {list(edges)}")
        self.calls = list(calls)
        self.edges = tuple(edges)
        self.graphs = graphs

    def route(self, t: float) -> int:
        """The number of the network in charge of ``t``; an edge belongs to the noisier interval."""
        return bisect_right(self.edges, t)

    def fit(self, batch: int) -> None:
        """From now on at most ``batch`` images come at once; what was captured for another number is dropped."""
        if self.graphs is not None:
            self.graphs.fit(batch)

    @torch.no_grad()
    def ask_all(
        self, shape: Sequence[int], device: torch.device, batch: int, condition: Sequence[int] | None = None
    ) -> None:
        """Evaluate every network once, uncompiled, for ``batch`` images (C, H, W) of zeros: to see what it takes.

        ``condition``: the shape of one image's condition, where the networks follow one.
        """
        x, t = torch.zeros(batch, *shape, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
        given = () if condition is None else (torch.zeros(batch, *condition, device=device),)
        for call in self.calls:
            call.eager(x, t, *given)

    def __call__(self, x: Tensor, t: float, *condition: Tensor) -> Tensor:
        """The raw prediction for ``x`` float32 (B, C, H, W) at timestep ``t``, float32 of the same shape.

        The network is handed int64 for an int, float32 for a float. ``condition``: (B, …), for networks that follow
        one.
        """
        times = torch.full((len(x),), t, dtype=torch.int64 if isinstance(t, int) else torch.float32, device=x.device)
        k = self.route(t)
        ask = self.calls[k] if self.graphs is None else partial(self.graphs.ask, k)
        return ask(x, times, *condition)


def as_epsilon(raw: Denoise, schedule: NoiseSchedule, prediction: Prediction) -> Denoise:
    """A denoiser that answers with ``prediction`` as one that answers with epsilon."""
    if prediction == "epsilon":
        return raw

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = (x.new_full((len(x),), level) for level in schedule.levels(t))
        return convert(raw(x, t), prediction, "epsilon", x, alpha, sigma)

    return denoise
