"""One compilation for all networks of an architecture, and what is said where there can be none."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..core.mode import Compile

Say = Callable[[str], None]
"""Told in words what did not go as the suite asked."""

BACKEND: str | Callable[..., Any] = "inductor"
"""torch.compile's backend, where a test puts a cheaper one."""

# Ways in which one architecture is called: training or not, gradients or not, precisions, the first batch sizes.
# Beyond torch's own 8 a call would go on uncompiled, and only a log would say so.
_LIMITS = {
    ("recompile_limit", "cache_size_limit"): 64,
    ("accumulated_recompile_limit", "accumulated_cache_size_limit"): 4096,
}

_numbers = itertools.count()

_MODES: dict[Compile, str | None] = {"on": None, "max": "max-autotune-no-cudagraphs"}


class Compiled:
    """A function through torch.compile; where that fails, the function as it is, once said in words.

    Attributes:
        reason: why calls run uncompiled, in one line; None while they do not.
    """

    def __init__(self, function: Callable[..., Any], name: str, compile: Compile) -> None:
        """``function`` takes a network as an argument, so that all networks of an architecture share one graph."""
        self.reason: str | None = None
        self._function = function
        self._name = name
        self._compiled = torch.compile(_own_code(function), backend=BACKEND, mode=_MODES[compile])

    def __call__(self, say: Say, *arguments: Any) -> Any:
        """The function of ``arguments``.

        Raises:
            OutOfMemoryError: also where only the compiled function runs out of memory. And whatever the function does.
        """
        if self.reason is not None:
            return self._function(*arguments)
        try:
            return self._compiled(*arguments)
        except Exception as error:
            if isinstance(_cause(error), torch.OutOfMemoryError):
                raise _cause(error) from None
            # what fails uncompiled too is not the compiler's fault, and leaves as it always did
            found = self._function(*arguments)
            self.reason = one_line(error)
            say(f"{self._name} could not be compiled and runs uncompiled ({self.reason})")
            return found


def shared(
    function: Callable[..., Any], family: object, network: nn.Module, compile: Compile, variant: Hashable = ()
) -> Compiled:
    """The one compilation of ``function`` for all networks of the architecture of ``network``.

    ``variant``: what else the function's code depends on that torch.compile does not look at, such as hooks.
    """
    named = [*network.named_parameters(), *network.named_buffers()]
    shapes = tuple((name, tuple(value.shape)) for name, value in named)
    return _shared(function, (type(family), type(network), shapes, variant), type(network).__name__, compile, BACKEND)


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says; a compiler's wrapping is taken off.

    What another process raised comes as its whole traceback: then the last line is the one that says why.
    """
    cause = _cause(error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    return f"{type(cause).__name__}: {lines[-1 if any(line.startswith('Traceback') for line in lines) else 0]}"


def _cause(error: BaseException) -> BaseException:
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else error


@functools.cache
def _shared(function: Callable[..., Any], key: Hashable, name: str, compile: Compile, backend: Hashable) -> Compiled:
    _raise_limits()
    return Compiled(function, name, compile)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a module's function, with a code object of its own.

    torch.compile keeps graphs, their number, and the sizes it has seen by code object: with one for all architectures,
    images of two datasets would make the pixels of both dynamic.
    """
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{next(_numbers)}"
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _raise_limits() -> None:
    from torch._dynamo import config

    for names, least in _LIMITS.items():
        # the first name is that of later torch versions
        name = next(name for name in names if hasattr(config, name))
        setattr(config, name, max(least, getattr(config, name)))
