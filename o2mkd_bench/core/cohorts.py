"""Which students can train together on one pass of their teacher (docs/semantics.md, Streams)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .blocks import Training
from .plan import Stage

KINDS = ("state", "student")
"""The kinds of stages that train on a stream of noised data; a teacher's own training stays alone."""


def stream_of(stage: Stage) -> list[Any]:
    """What stages must have in common to see the same noised images at each step, for one of :data:`KINDS`."""
    spec, job = stage.spec, stage.spec["job"]
    group = spec["training"].get("group", Training.model_fields["group"].default)
    stream = [spec["seed"], job.get("stream", 0), stage.needs["data"], job["batch"], job["law"], spec["flip"], group]
    return [*stream, spec["precision"], spec["network"]["schedule"]]


def gather(first: Stage, queue: Iterable[Stage], ready: Callable[[str], bool]) -> list[Stage]:
    """Stages of ``queue`` that can train with ``first``, which has all it needs, in the order of the queue.

    They read its stream and do not need another teacher. One that continues a stage that is among them joins when that
    stage is done; whatever else they are made from is ``ready``.
    """
    if first.kind not in KINDS:
        return []
    stream, teachers = stream_of(first), set(first.needs.get("teacher", ()))
    names, found = {first.identity}, []
    for stage in queue:
        if stage.kind not in KINDS or stage.identity in names or stream_of(stage) != stream:
            continue
        wanted = teachers.union(stage.needs.get("teacher", ()))
        start = set(stage.needs.get("start", ()))
        if len(wanted) > 1 or not all(ready(name) for name in stage.inputs() if name not in start & names):
            continue
        teachers = wanted
        names.add(stage.identity)
        found.append(stage)
    return found
