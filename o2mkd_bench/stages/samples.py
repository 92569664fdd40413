"""Draw images: image i depends on the seed and on i, not on who else is in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import StageFailed
from ..core.grid import time_grid
from ..core.plan import Stage
from ..core.plugins import Registry
from ..core.program import Program
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..engine.philox import Philox
from ..engine.sample import NoiseFor, auto_batch, sample_images
from .bench import Bench, Stopwatch


def solver(spec: Mapping[str, Any], schedule: NoiseSchedule, registry: Registry) -> Program:
    """The solver program that a sampling or speed stage describes."""
    plugin = registry.get("samplers", spec["sampler"]["name"])
    sampler = plugin.load()(plugin.parse(spec["sampler"]["options"]))
    grid = time_grid(spec["spacing"], spec["steps"], schedule.timesteps)
    program: Program = sampler.program(schedule, grid, spec["edges"], spec["clip"])
    return program


def noise_source(seed: int, shape: tuple[int, ...]) -> NoiseFor:
    """Noise for images by index: the same for every method, sampler and device."""
    philox = Philox.for_purpose(seed, "sampling")

    def noise_for(indices: Tensor, number: int) -> Tensor:
        return philox.normal(indices, shape, stream=number)

    return noise_for


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``images.npy``: uint8 (N, C, H, W)."""
    spec, clock = stage.spec, Stopwatch()
    students = stage.needs["students"]
    images = draw(bench, spec, students, range(spec["images"]), stage)
    np.save(draft.dir / "images.npy", images.numpy(), allow_pickle=False)
    draft.meta["seconds"] = clock.seconds()


def draw(bench: Bench, spec: Mapping[str, Any], students: tuple[str, ...], which: range, stage: Stage) -> Tensor:
    """Images number ``which`` of a sampling stage, uint8 on the CPU."""
    schedule = bench.schedule(students[0])
    program = solver(spec, schedule, bench.registry)
    say = partial(bench.say, stage)
    router = bench.router(students, spec["edges"], spec["weights"], spec["precision"], say)
    # an expert that is never called may have been left in another type by the rounds of step distillation
    types = {bench.network(students[router.route(line.t)])["prediction"] for line in program.lines}
    if len(types) != 1:
        raise StageFailed(f"the experts of {stage.label} predict {' and '.join(sorted(types))}; train them alike")
    shape, device = tuple(spec["shape"]), torch.device(bench.device)
    batch = stage.local["batch"]
    if batch == "auto":
        batch = auto_batch(partial(router.ask_all, shape, device), device)

    def halved(batch: int) -> None:
        router.fit(batch)
        say(f"out of memory; going on with {batch} image{'s' * (batch > 1)} at a time")

    router.fit(min(batch, len(which)))
    return sample_images(
        program,
        schedule,
        router.epsilon(schedule, types.pop()),
        noise_source(spec["seed"], shape),
        torch.arange(which.start, which.stop, device=device),
        batch,
        on_batch=lambda done: bench.progress(stage, done, len(which)),
        on_halve=halved,
    )
