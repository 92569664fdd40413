"""o2mkd-bench: a benchmark harness for knowledge distillation and fast sampling of diffusion models.

What a plugin author or a script needs is here; everything that needs torch is imported on first use.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# GPUs are numbered as nvidia-smi numbers them; by itself CUDA puts the fastest first, where they differ
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

_HOME = {
    "hookimpl": "core.hookspecs",
    "Options": "core.options",
    "neutral": "core.options",
    "UserError": "core.errors",
    "NoiseSchedule": "core.schedule",
    "Interval": "core.intervals",
    "Law": "core.intervals",
    "Job": "core.jobs",
    "Lift": "core.jobs",
    "Wrapper": "core.jobs",
    "Line": "core.program",
    "Program": "core.program",
    "Round": "core.program",
    "Sampler": "core.program",
    "DatasetInfo": "core.data",
    "DatasetSource": "core.data",
    "Images": "core.data",
    "ModelFamily": "core.models",
    "Event": "core.events",
    "Executor": "core.executor",
    "KDMethod": "engine.kd",
    "StepContext": "engine.kd",
    "Metric": "engine.scoring",
    "Placement": "executors.choose",
    "Results": "runner",
    "run": "runner",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
