"""Student against teacher over t: why O2MKD helps, or does not."""

from __future__ import annotations

import numpy as np
import torch

from ..core.mode import PLAIN
from ..core.plan import Stage
from ..core.store import Draft
from ..engine.philox import Philox
from .bench import Bench, Stopwatch, write_json

BATCH = 64


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``probe.json``: mean squared difference of the two epsilon predictions at each of ``points`` timesteps.

    Held-out images where the dataset has them, the same images and noise for every student.
    """
    spec, clock = stage.spec, Stopwatch()
    # a compilation would take longer than the few calls there are
    students = bench.experts(stage.needs["students"], spec["edges"], spec["weights"], spec["precision"], PLAIN)
    teacher = bench.experts(stage.needs["teacher"], [], "ema", spec["precision"], PLAIN)
    data = bench.images(stage.needs["data"][0], "test")
    if len(data) == 0:
        data = bench.images(stage.needs["data"][0])
    count = min(spec["images"], len(data))
    images = data[:count].float().div(127.5).sub(1)
    noise = Philox.for_purpose(0, "probe").normal(torch.arange(count, device=images.device), images.shape[1:])
    timesteps = len(teacher.tables.alpha)
    points = sorted({round(t) for t in np.linspace(0, timesteps - 1, spec["points"]).tolist()})
    errors = []
    for done, t in enumerate(points):
        # added up where it is, so that nothing waits for the device within a point
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        for x0, fresh in zip(torch.split(images, BATCH), torch.split(noise, BATCH), strict=True):
            times = torch.full((len(x0),), t, dtype=torch.int64, device=x0.device)
            x_t = teacher.tables.alpha[t] * x0 + teacher.tables.sigma[t] * fresh
            with torch.no_grad():
                gap = students.predict(x_t, times, "epsilon") - teacher.predict(x_t, times, "epsilon")
            total += gap.square().flatten(1).mean(1).double().sum()
        errors.append(float(total) / count)
        bench.progress(stage, done + 1, len(points))
    write_json(draft.dir / "probe.json", {"t": points, "error": errors})
    draft.meta["seconds"] = clock.seconds()
