"""K networks, each in charge of an interval of t, seen by a sampler as one denoiser."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..core.schedule import NoiseSchedule, Prediction
from .kd import convert
from .sample import Denoise

Forward = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Router:
    """One denoiser for batches in which every image has the same t, so that one network answers a call.

    The choice is made from host integers: it never waits for the device.
    """

    def __init__(
        self, networks: Sequence[nn.Module], edges: Sequence[int], forward: Forward, dtype: torch.dtype = torch.float32
    ) -> None:
        """``networks``: least noisy interval first; ``edges``: the inner edges between them, rising.

        ``forward``: ``(network, x, t)`` with x float32 (B, C, H, W) and t int64 (B,) to the raw prediction, run under
        autocast to ``dtype`` unless that is float32.

        Raises:
            ValueError: unless there is one network more than edges, and the edges rise strictly.
        """
        if len(networks) != len(edges) + 1 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"{len(networks)} networks do not fit the inner edges {list(edges)}")
        self.networks = list(networks)
        self.edges = tuple(edges)
        self.forward = forward
        self.dtype = dtype

    def route(self, t: int) -> int:
        """The number of the network in charge of ``t``; an edge belongs to the noisier interval."""
        return bisect_right(self.edges, t)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """The raw prediction for ``x`` float32 (B, C, H, W) at timestep ``t``, float32 of the same shape."""
        times = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(self.networks[self.route(t)], x, times).float()

    def epsilon(self, schedule: NoiseSchedule, prediction: Prediction) -> Denoise:
        """This router as :func:`run_program` wants it: networks that predict ``prediction`` answer with epsilon."""

        def denoise(x: Tensor, t: int) -> Tensor:
            alpha, sigma = (x.new_full((len(x),), float(table[t])) for table in (schedule.alpha, schedule.sigma))
            return convert(self(x, t), prediction, "epsilon", x, alpha, sigma)

        return denoise
