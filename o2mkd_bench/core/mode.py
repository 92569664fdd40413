"""How networks are run on a device: compiled or not, in CUDA graphs or not. It changes speed, and rounding at most."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from .errors import UserError

Compile = Literal["off", "on", "max"]


@dataclass(frozen=True)
class Mode:
    """What a speed reading records beside precision and batch.

    Attributes:
        compile: ``on`` is torch.compile's default, ``max`` searches kernels for minutes before the first step.
        cuda_graphs: whether a sampling network's call is replayed as one CUDA graph.
    """

    compile: Compile = "off"
    cuda_graphs: bool = False


PLAIN = Mode()


def resolve_mode(compile: str, cuda_graphs: str, device: str) -> Mode:
    """The mode that a suite's words mean on a resolved device; ``auto`` is everything on CUDA, and nothing on the CPU.

    Without Triton, which torch.compile needs on CUDA, ``auto`` is ``off``.

    Raises:
        UserError: for what was asked for by name and cannot be had here.
    """
    cuda = device.startswith("cuda")
    triton = importlib.util.find_spec("triton") is not None
    if cuda and not triton and compile in ("on", "max"):
        raise UserError(f"compile: {compile} needs Triton on {device}; install triton, or use compile: auto or off")
    if not cuda and cuda_graphs == "on":
        raise UserError(f"cuda_graphs: on needs a CUDA device, not {device}; use cuda_graphs: auto or off")
    if compile == "auto":
        compile = "on" if cuda and triton else "off"
    chosen: dict[str, Compile] = {"off": "off", "on": "on", "max": "max"}
    return Mode(chosen[compile], cuda and cuda_graphs != "off")
