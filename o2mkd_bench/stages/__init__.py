"""One module a kind of stage: core's description in, the engine's work, an artifact out."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..core.plan import Stage
from ..core.store import Draft
from .bench import Bench

Maker = Callable[[Stage, Bench, Draft], None]

MAKERS = {
    "data": "data:make",
    "codec": "latents:make_codec",
    "latents": "latents:make",
    "prompts": "latents:make_prompts",
    "teacher": "train:make_teacher",
    "state": "train:make_state",
    "edges": "edges:make",
    "student": "train:make_student",
    "round": "rounds:make",
    "samples": "samples:make",
    "reference": "scores:make_reference",
    "score": "scores:make_score",
    "speed": "speed:make",
    "probe": "probe:make",
    "loss": "probe:make_loss",
}


def maker(kind: str) -> Maker:
    """The function that makes artifacts of ``kind``; torch is imported by it, not before."""
    module, _, name = MAKERS[kind].partition(":")
    made: Maker = getattr(importlib.import_module(f".{module}", __name__), name)
    return made
