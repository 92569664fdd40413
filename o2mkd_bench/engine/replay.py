"""Passes of a training step that come again and again in one batch size, each replayed as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .compiled import Say, one_line
from .graphs import capture

Tapped = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(x, t), or (x, t, condition), to the prediction and the features by name, all float32."""

# A size is captured when it comes so often; intervals that cut a batch differently each step are few beyond so many.
_OFTEN, _SIZES = 3, 4

Record = Callable[..., Tapped]
"""What :func:`recorded` does."""


class Replay:
    """A pass whose launches cost the host next to nothing from the third batch of a size on.

    For whoever is through with one pass, its gradients included, before the next: that overwrites them.

    Attributes:
        reason: why passes are launched one by one, in one line; None while they are not.
    """

    def __init__(self, ask: Tapped, trained: nn.Module | None, say: Say, record: Record | None = None) -> None:
        """``trained``: the network that gradients flow into, and back through; None for a frozen one."""
        self.reason: str | None = None
        self._ask = ask
        self._trained = trained
        self._say = say
        self._record = record or recorded
        self._seen: Counter[int] = Counter()
        self._known: dict[int, Tapped] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The pass, for ``x`` float32 (B, C, H, W), ``t`` int64 (B,), and a condition (B, …) where there is one."""
        size = len(inputs[0])
        if size not in self._known:
            self._seen[size] += 1
            if self.reason is not None or self._seen[size] < _OFTEN or len(self._known) == _SIZES:
                return self._ask(*inputs)
            try:
                self._known[size] = self._record(self._ask, self._trained, *inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.reason = one_line(error)
                self._say(f"a training pass could not be captured; it is launched instead ({self.reason})")
                return self._ask(*inputs)
        return self._known[size](*inputs)


def recorded(ask: Tapped, trained: nn.Module | None, *like: Tensor) -> Tapped:
    """``ask`` for inputs as these as CUDA graphs.

    Raises:
        OutOfMemoryError, RuntimeError: for what cannot be captured, such as a call that waits for the device.
    """
    device = like[0].device
    one, inputs = _Pass(ask, trained), tuple(value.clone() for value in like)
    pool = _Pool.of(device, trained is not None)
    # what a network draws while it is warmed up is not missing after
    with torch.random.fork_rng([device]):
        run = (_forward if trained is None else _both)(one, inputs, pool.handle)

    def again(*inputs: Tensor, pool: _Pool = pool) -> tuple[Tensor, dict[str, Tensor]]:
        return one.named(run(*inputs))

    return again


class _Pass(nn.Module):
    """A pass as a module of tensors alone, which is what torch can capture with its gradient."""

    def __init__(self, ask: Tapped, network: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self._ask = ask
        self._names: tuple[str, ...] = ()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raw, features = self._ask(*inputs)
        self._names = tuple(features)
        return (raw, *features.values())

    def named(self, values: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        raw, *features = values
        return raw, dict(zip(self._names, features, strict=True))


def _forward(one: _Pass, inputs: tuple[Tensor, ...], pool: Any) -> Callable[..., Any]:
    with torch.no_grad():
        captured = capture(lambda: one(*inputs), pool, inputs[0].device)

    def run(*values: Tensor) -> Any:
        for place, value in zip(inputs, values, strict=True):
            place.copy_(value)
        captured.replay()
        return captured.output

    return run


def _both(one: _Pass, inputs: tuple[Tensor, ...], pool: Any) -> Callable[..., Any]:
    with torch.cuda.device(inputs[0].device):
        made: Callable[..., Any] = torch.cuda.make_graphed_callables(one, inputs, allow_unused_input=True, pool=pool)
        return made


class _Pool:
    """Memory of graphs of a device: of passes that follow each other, each may use what the one before has left.

    What a frozen network said is still needed while one in training runs: each kind has a pool of its own. It ends with
    the last graph, as a pool that nobody uses cannot be used again.
    """

    _known: ClassVar[WeakValueDictionary[tuple[torch.device, bool], _Pool]] = WeakValueDictionary()

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, device: torch.device, trained: bool) -> _Pool:
        with torch.cuda.device(device):
            found = cls._known.get((device, trained)) or cls()
        cls._known[device, trained] = found
        return found
