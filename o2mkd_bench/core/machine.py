"""On what a number was measured, without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError

PACKAGES = (
    "o2mkd-bench",
    "torch",
    "torchvision",
    "diffusers",
    "torch-fidelity",
    "timm",
    "numpy",
    "scikit-learn",
    "safetensors",
)


class _Gpu(NamedTuple):
    name: str
    uuid: str


def machine_record() -> dict[str, Any]:
    """What goes into manifests: JSON data, never the host's name, a path or a user.

    ``memory`` in bytes, None where the system does not say; ``cores``: those this process may use; ``gpus``: those
    CUDA would show; ``versions``: of the packages that compute, as far as installed; ``commit``: of the checkout this
    code runs from, with ``-dirty`` where tracked files differ, None when it does not run from one.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory": _memory(),
        "gpus": [gpu.name for gpu in _visible_gpus()],
        "versions": _versions(),
        "commit": _commit(Path(__file__).resolve().parents[1]),
    }


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda:N`` for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; ``auto`` is the first GPU if there is one.

    Raises:
        UserError: for a device that is not known, or that ``nvidia-smi`` and ``CUDA_VISIBLE_DEVICES`` do not show.
    """
    if device == "cpu":
        return device
    count = len(_visible_gpus())
    if device == "auto":
        return "cuda:0" if count else "cpu"
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise UserError(f"device {device!r} is not known; use auto, cpu, cuda or cuda:N")
    index = int(match[1] or 0)
    if index >= count:
        shown = f"only {count} GPU{'s' * (count > 1)}" if count else "no GPU"
        mend = f"use cuda:0 to cuda:{count - 1}, or cpu" if count else "use cpu, or install the driver"
        mask = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if mask is None else f" under CUDA_VISIBLE_DEVICES={mask!r}"
        raise UserError(f"device {device!r} was asked for, but nvidia-smi shows {shown}{hidden}; {mend}")
    return f"cuda:{index}"


def gpus_like(device: str) -> tuple[str, ...]:
    """The UUIDs of the GPUs that a suite's ``device`` means: for ``auto`` and ``cuda`` all of the first one's model.

    Raises:
        UserError: as :func:`resolve_device`.
    """
    resolved = resolve_device(device)
    if resolved == "cpu":
        return ()
    gpus = _visible_gpus()
    first = gpus[int(resolved.removeprefix("cuda:"))]
    return (first.uuid,) if ":" in device else tuple(gpu.uuid for gpu in gpus if gpu.name == first.name)


def device_name(device: str) -> str:
    """The model of a resolved device, which is part of a speed reading's identity.

    For the CPU with the number of threads torch would use: ``OMP_NUM_THREADS``, else the cores of this process.

    Raises:
        UserError: as :func:`resolve_device`.
    """
    device = resolve_device(device)
    return named_device(device, {"cpu": _cpu_model(), "gpus": [gpu.name for gpu in _visible_gpus()]}, threads())


def named_device(device: str, record: Mapping[str, Any], threads: int) -> str:
    """The model of ``cpu`` or ``cuda:N`` on the machine of a :func:`machine_record`; torch had so many threads."""
    if device == "cpu":
        return f"{record['cpu']}, {threads} thread{'s' * (threads > 1)}"
    return str(record["gpus"][int(device.removeprefix("cuda:"))])


def threads() -> int:
    """The threads torch would use here: ``OMP_NUM_THREADS``, else the cores of this process."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else cores()


def _visible_gpus() -> list[_Gpu]:
    """The GPUs in CUDA's numbering, which ends at the first entry of its mask that is no GPU."""
    gpus = list(_gpus())
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return gpus
    found: list[_Gpu] = []
    for entry in (e.strip() for e in mask.split(",")):
        if entry.isdecimal():
            match = gpus[int(entry) : int(entry) + 1]
        else:
            match = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
        if len(match) != 1:
            break
        found += match
    return found


@lru_cache(maxsize=1)
def _gpus() -> tuple[_Gpu, ...]:
    """All GPUs of the machine by ``nvidia-smi``; none where it is not there or fails."""
    text = _output("nvidia-smi", "--query-gpu=name,uuid", "--format=csv,noheader")
    rows = (line.rpartition(",") for line in (text or "").splitlines())
    return tuple(_Gpu(name.strip(), uuid.strip()) for name, _, uuid in rows if uuid.strip().startswith("GPU-"))


@lru_cache(maxsize=1)
def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if match:
        return " ".join(match[1].split())
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _commit(package: Path) -> str | None:
    # an installed copy may lie inside somebody else's checkout, whose commit says nothing about this code
    if _output("git", "-C", str(package), "rev-parse", "--show-prefix") != f"{package.name}/":
        return None
    return _output("git", "-C", str(package), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _output(*command: str) -> str | None:
    """What a program says on its standard output, stripped; None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
