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

Tapped = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(x, t) to the prediction and the features by name, all float32."""

# A size is captured when it comes so often; intervals that cut a batch differently each step are few beyond so many.
_OFTEN, _SIZES = 3, 4

Record = Callable[[Tapped, nn.Module | None, Tensor, Tensor], Tapped]


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

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The pass, for ``x`` float32 (B, C, H, W) and ``t`` int64 (B,)."""
        size = len(x)
        if size not in self._known:
            self._seen[size] += 1
            if self.reason is not None or self._seen[size] < _OFTEN or len(self._known) == _SIZES:
                return self._ask(x, t)
            try:
                self._known[size] = self._record(self._ask, self._trained, x, t)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.reason = one_line(error)
                self._say(f"a training pass could not be captured; it is launched instead ({self.reason})")
                return self._ask(x, t)
        return self._known[size](x, t)


def recorded(ask: Tapped, trained: nn.Module | None, x: Tensor, t: Tensor) -> Tapped:
    """``ask`` for inputs like ``x`` and ``t`` as CUDA graphs.

    Raises:
        OutOfMemoryError, RuntimeError: for what cannot be captured, such as a call that waits for the device.
    """
    one, inputs, pool = _Pass(ask, trained), (x.clone(), t.clone()), _Pool.of(x.device)
    # what a network draws while it is warmed up is not missing after
    with torch.random.fork_rng([x.device]):
        run = (_forward if trained is None else _both)(one, inputs, pool.handle)

    def again(x: Tensor, t: Tensor, pool: _Pool = pool) -> tuple[Tensor, dict[str, Tensor]]:
        return one.named(run(x, t))

    return again


class _Pass(nn.Module):
    """A pass as a module of tensors alone, which is what torch can capture with its gradient."""

    def __init__(self, ask: Tapped, network: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self._ask = ask
        self._names: tuple[str, ...] = ()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        raw, features = self._ask(x, t)
        self._names = tuple(features)
        return (raw, *features.values())

    def named(self, values: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        raw, *features = values
        return raw, dict(zip(self._names, features, strict=True))


def _forward(one: _Pass, inputs: tuple[Tensor, Tensor], pool: Any) -> Callable[[Tensor, Tensor], Any]:
    with torch.no_grad():
        captured = capture(lambda: one(*inputs), pool, inputs[0].device)

    def run(x: Tensor, t: Tensor) -> Any:
        inputs[0].copy_(x)
        inputs[1].copy_(t)
        captured.replay()
        return captured.output

    return run


def _both(one: _Pass, inputs: tuple[Tensor, Tensor], pool: Any) -> Callable[[Tensor, Tensor], Any]:
    with torch.cuda.device(inputs[0].device):
        made: Callable[[Tensor, Tensor], Any] = torch.cuda.make_graphed_callables(
            one, inputs, allow_unused_input=True, pool=pool
        )
        return made


class _Pool:
    """Memory of all graphs of a device: of passes that follow each other, each may use what the one before has left.

    It ends with the last graph, as a pool that nobody uses cannot be used again.
    """

    _known: ClassVar[WeakValueDictionary[torch.device, _Pool]] = WeakValueDictionary()

    def __init__(self) -> None:
        self.handle: Any = torch.cuda.graph_pool_handle()

    @classmethod
    def of(cls, device: torch.device) -> _Pool:
        with torch.cuda.device(device):
            found = cls._known.get(device) or cls()
        cls._known[device] = found
        return found
