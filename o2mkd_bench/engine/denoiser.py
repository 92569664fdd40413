"""Networks that answer for intervals of t, seen as one denoiser of a batch with mixed t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.mode import PLAIN, Mode
from ..core.models import ModelFamily
from ..core.schedule import NoiseSchedule, Prediction
from .kd import convert
from .taps import Taps

Tapped = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(x, t) to the prediction and the features by name, all float32."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tables:
    """The schedule on a device, float32, shape (T,)."""

    alpha: Tensor
    sigma: Tensor
    snr: Tensor

    @classmethod
    def of(cls, schedule: NoiseSchedule, device: torch.device) -> Tables:
        a, s = schedule.alpha, schedule.sigma
        return cls(*(torch.from_numpy(v.astype("float32")).to(device) for v in (a, s, (a / s) ** 2)))


class Call:
    """One network as a function of (x, t): autocast to the suite's precision, the result in float32."""

    def __init__(self, family: ModelFamily, network: nn.Module, precision: str, mode: Mode = PLAIN) -> None:
        self.family = family
        self.network = network
        self.dtype = DTYPES[precision]
        self.mode = mode

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.family.forward(self.network, x, t, condition).float()

    def tapped(self, paths: Mapping[str, str], where: str) -> Tapped:
        """This call, giving the features of the modules at ``paths`` (name to path) too.

        Raises:
            UserError: as :class:`o2mkd_bench.engine.taps.Taps` does, ``where`` being the network in words.
        """
        taps = Taps(self.network, paths, where)

        def run(x: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with taps:
                return self(x, t), taps.take()

        return run


class Experts:
    """K networks by interval, for batches in which every sample has its own t.

    Each network answers in its own prediction type: rounds of step distillation leave an expert that no grid entry
    falls to as it was, while its neighbours change theirs.
    """

    def __init__(
        self, calls: Sequence[Call], edges: Sequence[int], predictions: Sequence[Prediction], tables: Tables
    ) -> None:
        """``calls``, ``predictions``: least noisy interval first; ``edges``: the inner edges between them, rising."""
        self.calls = list(calls)
        self.edges = torch.tensor(list(edges), dtype=torch.int64)
        self.predictions = list(predictions)
        self.tables = tables

    def predict(self, x: Tensor, t: Tensor, target: Prediction) -> Tensor:
        """What the network in charge of each sample's t says, as type ``target``; float32, shape of ``x``."""
        if len(self.calls) == 1:
            return self._ask(0, x, t, target)
        owner = torch.bucketize(t, self.edges.to(t.device), right=True)
        out = torch.empty_like(x)
        for k in range(len(self.calls)):
            mine = (owner == k).nonzero().flatten()
            if len(mine):
                out[mine] = self._ask(k, x[mine], t[mine], target)
        return out

    def _ask(self, k: int, x: Tensor, t: Tensor, target: Prediction) -> Tensor:
        alpha, sigma = self.tables.alpha[t], self.tables.sigma[t]
        return convert(self.calls[k](x, t), self.predictions[k], target, x, alpha, sigma)
