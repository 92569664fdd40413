"""Draw images: image i depends on the seed and on i, not on who else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from ..engine.finish import finished
from ..engine.guidance import Guided
from ..engine.philox import Philox
from ..engine.router import Router, as_epsilon
from ..engine.sample import Denoise, NoiseFor, auto_batch, sample_images, to_uint8
from .bench import Bench, Stopwatch
from .latents import CHUNK, open_codec


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


@dataclass(frozen=True)
class Painter:
    """How a router's states become images, for batches of ``batch`` of them.

    Attributes:
        denoise: asks the router, with the guidance and the condition of each image where it draws from text.
        prompt: told the indices of a batch before it is drawn; None for a router that follows nothing.
        render: last states to uint8 images; None for states that are images.
        ask: evaluates the networks once for as many images as it is told.
    """

    denoise: Denoise
    fit: Callable[[int], None]
    ask: Callable[[int], None]
    prompt: Callable[[Tensor], None] | None = None
    render: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, bench: Bench, router: Router, stage: Stage) -> Painter:
        """The painter of a sampling stage: on pixels the router itself, on latents with prompts and the codec."""
        shape, device = tuple(stage.spec["shape"]), torch.device(bench.device)
        if "prompts" not in stage.needs:
            return cls(router, router.fit, partial(router.ask_all, shape, device))
        (prompts,) = stage.needs["prompts"]
        conditions = np.load(bench.store.read(prompts, "text.npy"), mmap_mode="r", allow_pickle=False)
        null = np.load(bench.store.read(prompts, "null.npy"), allow_pickle=False)[0]
        guided = Guided(router, conditions, torch.from_numpy(null).to(device), stage.spec.get("guidance"))
        codec, finish = open_codec(bench, stage), stage.spec["finish"]

        def ask(batch: int) -> None:
            router.ask_all(shape, device, batch * guided.passes, null.shape)

        def render(latents: Tensor) -> Tensor:
            # an image takes a hundred times the memory of its latents
            drawn = [to_uint8(codec.decode(some)).cpu() for some in torch.split(latents, CHUNK)]
            return finished(torch.cat(drawn), finish)

        return cls(guided, guided.fit, ask, guided.prompt, render)


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
    device, batch = torch.device(bench.device), stage.local["batch"]
    painter = Painter.of(bench, router, stage)
    if batch == "auto":
        batch = auto_batch(painter.ask, device)

    def halved(batch: int) -> None:
        painter.fit(batch)
        say(f"out of memory; going on with {batch} image{'s' * (batch > 1)} at a time")

    painter.fit(min(batch, len(which)))
    return sample_images(
        program,
        schedule,
        as_epsilon(painter.denoise, schedule, types.pop()),
        noise_source(spec["seed"], tuple(spec["shape"])),
        torch.arange(which.start, which.stop, device=device),
        batch,
        render=painter.render,
        prompt=painter.prompt,
        on_batch=lambda done: bench.progress(stage, done, len(which)),
        on_halve=halved,
    )
