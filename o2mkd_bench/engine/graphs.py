"""Calls of one batch size, each replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compiled import Say, one_line

Ask = Callable[..., Tensor]
"""x float32 (B, C, H, W), t int64 (B,) and a condition (B, …) where there is one to the raw prediction, as x."""

# The first run compiles and picks kernels, the second makes what libraries keep between calls.
_WARM_UP = 3


@dataclass(frozen=True)
class Captured:
    """A call that was captured: ``replay`` does it again, from and to the same memory; ``output`` is where it ends."""

    replay: Callable[[], object]
    output: Any
    pool: Any


Capture = Callable[[Callable[[], Any], Any, torch.device], Captured]
"""A call without arguments, the memory pool to share or None for a new one, and the device."""


def capture(run: Callable[[], Any], pool: Any, device: torch.device) -> Captured:
    """``run`` as a CUDA graph, after a warm-up on a stream of its own.

    Raises:
        OutOfMemoryError, RuntimeError: for what cannot be captured, such as a call that waits for the device.
    """
    with torch.cuda.device(device):
        return record(run, pool, warmed_up(run))


def warmed_up(run: Callable[[], Any]) -> torch.cuda.Stream:
    """``run`` several times, for what is made at first calls; the stream of its own on which that was."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    return side


def record(run: Callable[[], Any], pool: Any, stream: torch.cuda.Stream) -> Captured:
    """``run``, warmed up on ``stream``, as a CUDA graph of the present device."""
    graph = torch.cuda.CUDAGraph()
    # other threads, of a progress display or a loader, may go on using the device meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return Captured(graph.replay, output, graph.pool())


class Graphs:
    """K calls that all see one batch size, whatever comes: fewer images are padded.

    One is replayed after the other, so they share input buffers and a memory pool, and an output is copied before
    anybody else runs. All stay captured: changing from one to the next costs nothing.

    Attributes:
        reason: why calls are not replayed as graphs though they should be, in one line; else None.
    """

    def __init__(self, calls: Sequence[Ask], say: Say, capture: Capture | None = capture) -> None:
        """``capture``: None for calls that are to be padded and no more, so that a compiled one sees one size."""
        self.calls = list(calls)
        self.reason: str | None = None
        self._say = say
        self._capture = capture
        self._batch: int | None = None
        self._buffers: tuple[Tensor, ...] | None = None
        self._captured: dict[int, Captured] = {}

    def fit(self, batch: int) -> None:
        """From now on at most ``batch`` images come at once; memory held for another number is given back."""
        if batch != self._batch:
            self._batch = batch
            self._buffers = None
            self._captured.clear()

    @torch.no_grad()
    def ask(self, k: int, x: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """What call ``k`` answers for ``x`` (B, C, H, W) and ``t`` (B,); the first size seen is the size, without fit.

        ``condition``: (B, …), always or never.

        Raises:
            ValueError: for more images than the batch size.
        """
        if self._batch is None:
            self.fit(len(x))
        inputs = self._fill(x, t, *condition)
        if k not in self._captured and self._capture is not None:
            self._record(k, inputs, self._capture)
        if k not in self._captured:
            return self.calls[k](*inputs)[: len(x)]
        captured = self._captured[k]
        captured.replay()
        output: Tensor = captured.output[: len(x)].clone()
        return output

    def _fill(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        assert self._batch is not None
        count = len(inputs[0])
        if count > self._batch:
            raise ValueError(f"{count} images do not fit a batch of {self._batch}")
        if self._buffers is None:
            self._buffers = tuple(value.new_zeros(self._batch, *value.shape[1:]) for value in inputs)
            for buffer in self._buffers:
                # a second size is compiled for itself, not for all sizes
                torch._dynamo.mark_static(buffer)
        # rows beyond keep what they had: no network looks from one image at another
        for buffer, value in zip(self._buffers, inputs, strict=True):
            buffer[:count].copy_(value)
        return self._buffers

    def _record(self, k: int, inputs: tuple[Tensor, ...], capture: Capture) -> None:
        pool = next((one.pool for one in self._captured.values()), None)
        try:
            self._captured[k] = capture(lambda: self.calls[k](*inputs), pool, inputs[0].device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._capture = None
            self.reason = one_line(error)
            self._say(f"a CUDA graph could not be captured; every call is launched instead ({self.reason})")
