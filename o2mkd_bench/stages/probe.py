"""Student against teacher over t: why O2MKD helps, or does not. And the teacher against the noise itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.mode import PLAIN
from ..core.plan import Stage
from ..core.store import Draft
from ..engine.denoiser import Experts, Tables
from ..engine.philox import Philox
from ..engine.stream import signal
from .bench import Bench, Stopwatch, write_json

BATCH = 64

Gap = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""An error of a batch, from x_t (B, C, H, W), t int64 (B,), the noise that is in x_t, and what networks follow."""


class Pictures(NamedTuple):
    """Images, uint8, or latents (N, C, H, W), a noise for each, and what networks follow at each, if anything."""

    images: Tensor
    noise: Tensor
    conditions: Tensor | None


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``probe.json``: mean squared difference of the two epsilon predictions at each of ``points`` timesteps.

    Held-out images where the dataset has them, the same images and noise for every student.
    """
    spec, clock = stage.spec, Stopwatch()
    # a compilation would take longer than the few calls there are
    students = bench.experts(stage.needs["students"], spec["edges"], spec["weights"], spec["precision"], PLAIN)
    teacher = teacher_of(stage, bench)

    def gap(x_t: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return students.predict(x_t, t, "epsilon", condition) - teacher.predict(x_t, t, "epsilon", condition)

    points = spread(spec["points"], len(teacher.tables.alpha))
    errors = curve(stage, bench, teacher.tables, points, _images(stage, bench), gap)
    write_json(draft.dir / "probe.json", {"t": points, "error": errors})
    draft.meta["seconds"] = clock.seconds()


def make_loss(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``loss.json``: mean squared difference of the teacher's epsilon and the noise at each timestep of ``t``.

    On the same images and noise as the probe of students: what the teacher was trained to make small.
    """
    clock, teacher, points = Stopwatch(), teacher_of(stage, bench), stage.spec["t"]

    def gap(x_t: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return teacher.predict(x_t, t, "epsilon", condition) - noise

    errors = curve(stage, bench, teacher.tables, points, _images(stage, bench), gap)
    write_json(draft.dir / "loss.json", {"t": points, "error": errors})
    draft.meta["seconds"] = clock.seconds()


def teacher_of(stage: Stage, bench: Bench) -> Experts:
    """The teacher of a stage, uncompiled, as one that answers for all timesteps."""
    return bench.experts(stage.needs["teacher"], [], "ema", stage.spec["precision"], PLAIN)


def spread(points: int, timesteps: int) -> list[int]:
    """At most ``points`` different timesteps at equal distances, the first and the last among them."""
    return sorted({round(t) for t in np.linspace(0, timesteps - 1, points).tolist()})


def _images(stage: Stage, bench: Bench) -> Pictures:
    """The first held-out images, training images where the dataset has none, and a noise for each."""
    split, artifact = "test", stage.needs["data"][0]
    data = bench.images(artifact, split)
    if len(data) == 0:
        split = "train"
        data = bench.images(artifact)
    count = min(stage.spec["images"], len(data))
    images = data[:count].to(bench.device)
    noise = Philox.for_purpose(0, "probe").normal(torch.arange(count, device=images.device), images.shape[1:])
    return Pictures(images, noise, followed(bench, artifact, split, np.arange(count)))


def followed(bench: Bench, data: str, split: str, rows: NDArray[np.int64]) -> Tensor | None:
    """What networks follow at ``rows`` of a split, on the device; None where they follow nothing."""
    path = bench.conditions(data, split)
    if path is None:
        return None
    return torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False)[rows]).to(bench.device)


def curve(
    stage: Stage, bench: Bench, tables: Tables, points: Sequence[int], pictures: Pictures, gap: Gap
) -> list[float]:
    """The mean square of ``gap`` at each of ``points``, on ``pictures``."""
    images, noise, conditions = signal(pictures.images), pictures.noise, pictures.conditions
    parts = [None] * -(-len(images) // BATCH) if conditions is None else torch.split(conditions, BATCH)
    errors = []
    for done, t in enumerate(points):
        # added up where it is, so that nothing waits for the device within a point
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for x0, fresh, own in zip(torch.split(images, BATCH), torch.split(noise, BATCH), parts, strict=True):
            times = torch.full((len(x0),), t, dtype=torch.int64, device=x0.device)
            x_t = tables.alpha[t] * x0 + tables.sigma[t] * fresh
            with torch.no_grad():
                total += gap(x_t, times, fresh, own).square().flatten(1).mean(1).double().sum()
        errors.append(float(total) / len(images))
        bench.progress(stage, done + 1, len(points))
    return errors
