"""Networks that answer for intervals of t, seen as one denoiser of a batch with mixed t."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import PluginError
from ..core.mode import PLAIN, Mode
from ..core.models import ModelFamily
from ..core.schedule import NoiseSchedule, Prediction
from .compiled import Say, shared
from .kd import convert
from .replay import Replay, Tapped
from .taps import Taps

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


def warn(text: str) -> None:
    """Say it as a Python warning, where there is nobody else to tell."""
    warnings.warn(text, stacklevel=2)


def forward(
    family: ModelFamily, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The raw prediction in float32, all inputs cast to ``dtype``; on CUDA laid out as ``x`` usually is."""
    layout = torch.contiguous_format if x.is_cuda else torch.preserve_format
    condition = None if condition is None else condition.to(dtype)
    raw = family.forward(network, x.to(dtype), t, condition)
    if not isinstance(raw, Tensor) or raw.shape != x.shape:
        found = tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
        raise PluginError(
            f"forward() of {type(family).__name__} gives {found} for x of {tuple(x.shape)}; give the raw prediction, "
            "a tensor of the same shape"
        )
    return raw.to(torch.float32, memory_format=layout)


def tapped_forward(
    family: ModelFamily,
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    condition: Tensor | None,
    dtype: torch.dtype,
    taps: Taps,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`forward`, and what ``taps``, whose hooks stand in ``network``, have seen of it."""
    return forward(family, network, x, t, condition, dtype), taps.take()


class Call:
    """One network as a function of (x, t): in the suite's precision and mode, the result in float32.

    On the CPU, and wherever gradients flow into the weights, these stay float32, and a narrow precision is autocast. On
    CUDA the network is prepared in place: channels last for a narrow precision, and a frozen network's weights are cast
    to it once. A frozen network that is compiled there runs as its family's ``optimise`` gives it.

    Attributes:
        network: the network that was given, for its modules and their paths.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        precision: str,
        mode: Mode = PLAIN,
        say: Say = warn,
        replay: bool = False,
    ) -> None:
        """``say``: told once, in words, when the network cannot be compiled or captured.

        ``replay``: :meth:`tapped` passes may be CUDA graphs, where the mode has them: each, and its gradient, is done
        with before the next.
        """
        self.family = family
        self.network = network
        self.dtype = DTYPES[precision]
        self.mode = mode
        self._say = say
        cuda = any(p.is_cuda for p in network.parameters())
        self._trained = any(p.requires_grad for p in network.parameters())
        frozen = cuda and not self._trained
        self._input = self.dtype if frozen else torch.float32
        if cuda and self.dtype != torch.float32:
            network.to(dtype=self._input, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fast = family.optimise(network) if frozen and mode.compile != "off" else network
        self._replay = replay and cuda and mode.cuda_graphs
        self._compiled = shared(forward, family, self._fast, mode.compile) if mode.compile != "off" else None

    @property
    def fallback(self) -> str | None:
        """Why the network runs uncompiled though the mode asks for more, in one line."""
        return None if self._compiled is None else self._compiled.reason

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw prediction for ``x`` float32 (B, C, H, W) and ``t`` int64 (B,), float32 of the same shape.

        ``condition``: (B, L, D) for a family that follows one, in any floating type.
        """
        run: Callable[..., Tensor] = forward if self._compiled is None else partial(self._compiled, self._say)
        found: Tensor = self._in_precision(run, self._fast, x, t, condition)
        return found

    def eager(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The same of the given network, never compiled: for a single call, and for hooks of one's own."""
        found: Tensor = self._in_precision(forward, self.network, x, t, condition)
        return found

    def tapped(self, paths: Mapping[str, str], where: str) -> Tapped:
        """This call, giving the features of the modules at ``paths`` (name to path) too.

        Raises:
            UserError: as :class:`o2mkd_bench.engine.taps.Taps` does, ``where`` being the network in words.
        """
        ask = self._ask(paths, where) if paths else self._untapped
        return Replay(ask, self.network if self._trained else None, self._say) if self._replay else ask

    def _untapped(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return self(x, t, condition), {}

    def _ask(self, paths: Mapping[str, str], where: str) -> Tapped:
        known = {path for path, _ in self._fast.named_modules()}
        network = self._fast if known.issuperset(paths.values()) else self.network
        taps = Taps(network, paths, where)
        run: Callable[..., Any] = tapped_forward
        if self.mode.compile != "off":
            # torch.compile does not look whether there are hooks: a graph with some is never that without
            variant: Hashable = tuple(paths.items())
            run = partial(shared(run, self.family, network, self.mode.compile, variant), self._say)

        def ask(x: Tensor, t: Tensor, condition: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            with taps:
                found: tuple[Tensor, dict[str, Tensor]] = self._in_precision(run, network, x, t, condition, taps)
                return found

        return ask

    def _in_precision(
        self, run: Callable[..., Any], network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None, *taps: Taps
    ) -> Any:
        if self.mode.compile != "off":
            x, t = _from_the_start(x), _from_the_start(t)
            condition = None if condition is None else _from_the_start(condition)
            for value in (x, t, condition):
                # students of one architecture see whole batches, halves and quarters: one graph for all of them
                if self._trained and value is not None:
                    torch._dynamo.maybe_mark_dynamic(value, 0)
        before = _versions(x, t, condition)
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != self._input):
            found = run(self.family, network, x, t, condition, self._input, *taps)
        if _versions(x, t, condition) != before:
            raise PluginError(
                f"forward() of {type(self.family).__name__} writes into what it is given, from which others go on; "
                "work on a copy"
            )
        return found


def _versions(*values: Tensor | None) -> list[int]:
    """How often each was written into, where torch keeps count."""
    return [value._version for value in values if value is not None and not value.is_inference()]


def _from_the_start(value: Tensor) -> Tensor:
    """``value`` at the start of its storage: for a slice from further on, a graph would be compiled anew."""
    return value if value.storage_offset() == 0 else value.clone(memory_format=torch.preserve_format)


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

    def predict(self, x: Tensor, t: Tensor, target: Prediction, condition: Tensor | None = None) -> Tensor:
        """What the network in charge of each sample's t says, as type ``target``; float32, shape of ``x``."""
        if len(self.calls) == 1:
            return self._ask(0, x, t, target, condition)
        owner = torch.bucketize(t, self.edges.to(t.device), right=True)
        out = torch.empty_like(x)
        for k in range(len(self.calls)):
            mine = (owner == k).nonzero().flatten()
            if len(mine):
                own = None if condition is None else condition[mine]
                out[mine] = self._ask(k, x[mine], t[mine], target, own)
        return out

    def _ask(self, k: int, x: Tensor, t: Tensor, target: Prediction, condition: Tensor | None) -> Tensor:
        alpha, sigma = self.tables.alpha[t], self.tables.sigma[t]
        return convert(self.calls[k](x, t, condition), self.predictions[k], target, x, alpha, sigma)
