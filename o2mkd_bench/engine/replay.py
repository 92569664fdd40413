"""Passes of a training step that come again and again in one batch size, each replayed as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .compiled import Say, one_line
from .graphs import Captured, capture, record, warmed_up

Tapped = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(x, t), or (x, t, condition), to the prediction and the features by name, all float32."""

# A size is captured when it comes so often; intervals that cut a batch differently each step are few beyond so many.
_OFTEN, _SIZES = 3, 4

Pass = Callable[[], tuple[Tensor, ...]]
"""From inputs where they are to the prediction and the features."""

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
    device, inputs = like[0].device, tuple(value.clone() for value in like)
    pool = _Pool.of(device, trained is not None)
    names: list[str] = []

    def once() -> tuple[Tensor, ...]:
        raw, features = ask(*inputs)
        names[:] = features
        return (raw, *features.values())

    # what a network draws while it is warmed up is not missing after
    with torch.random.fork_rng([device]), torch.cuda.device(device):
        run = _there(once, pool.handle, device) if trained is None else _there_and_back(once, trained, pool.handle)

    def again(*values: Tensor, pool: _Pool = pool) -> tuple[Tensor, dict[str, Tensor]]:
        for place, value in zip(inputs, values, strict=True):
            place.copy_(value.detach())
        raw, *features = run()
        return raw, dict(zip(names, features, strict=True))

    return again


def _there(once: Pass, pool: Any, device: torch.device) -> Pass:
    with torch.no_grad():
        captured = capture(once, pool, device)

    def run() -> tuple[Tensor, ...]:
        captured.replay()
        found: tuple[Tensor, ...] = captured.output
        return found

    return run


def _there_and_back(once: Pass, network: nn.Module, pool: Any) -> Pass:
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradients(outputs: Sequence[Tensor], given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        asked = [out for out, grad in zip(outputs, given, strict=True) if grad is not None]
        found = torch.autograd.grad(asked, parameters, [g for g in given if g is not None], allow_unused=True)
        # fused optimisers take all they work on to be strided alike
        return tuple(
            g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
            for p, g in zip(parameters, found, strict=True)
        )

    def places(outputs: Sequence[Tensor]) -> list[Tensor | None]:
        return [torch.zeros_like(out) if out.requires_grad else None for out in outputs]

    def both() -> None:
        outputs = once()
        gradients(outputs, places(outputs))

    stream = warmed_up(both)
    there = record(once, pool, stream)
    given = places(there.output)
    return Graphed(there, record(lambda: gradients(there.output, given), pool, stream), given, parameters)


class Graphed:
    """A pass with the way back through it, a graph each, that leaves gradients at the parameters themselves.

    As inputs of the pass they would be handed on by autograd one by one, which takes the host longer than the device
    takes for a small batch. Nothing of autograd's is kept: its nodes belong to the stream on which they were made.
    """

    def __init__(
        self, there: Captured, back: Captured, given: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]
    ) -> None:
        """``back`` goes from gradients of the output of ``there``, in ``given``, to those of ``parameters``."""
        self._there, self._back = there.replay, back.replay
        self._outputs = tuple(out.detach() for out in there.output)
        self._given = tuple(given)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = [
            (p, g) for p, g in zip(parameters, back.output, strict=True) if g is not None
        ]
        # for its sake autograd comes back
        self._gate = torch.zeros((), device=self._outputs[0].device, requires_grad=True)

    def __call__(self) -> tuple[Tensor, ...]:
        """The outputs for what the inputs hold."""
        found: tuple[Tensor, ...] = _Gate.apply(self._gate, self)
        return found

    def there(self) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The outputs, and those of them that no gradient comes back to."""
        self._there()
        outputs = tuple(out.detach() for out in self._outputs)
        return outputs, [out for out, grad in zip(outputs, self._given, strict=True) if grad is None]

    def back(self, gradients: Sequence[Tensor]) -> None:
        """From gradients of the outputs to those of the parameters, added to what they have."""
        for place, gradient in zip(self._given, gradients, strict=True):
            if place is not None:
                place.copy_(gradient)
        self._back()
        for parameter, gradient in self._gradients:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, graphs: Graphed) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        outputs, constant = graphs.there()
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.graphs.back(gradients)
        return None, None


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
