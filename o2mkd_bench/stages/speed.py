"""How fast a sampler runs on this device: architecture, program and router layout decide it, weights do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..core.errors import StageFailed
from ..core.machine import device_name
from ..core.mode import Mode
from ..core.plan import Stage
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..engine.guidance import Guided
from ..engine.router import Router, as_epsilon
from ..engine.sample import run_program
from .bench import Bench, Stopwatch, write_json
from .samples import noise_source, solver
from .train import build

# A GPU's clock wanders, and its readings are short.
CUDA_REPEATS, LATENCY_REPEATS, CUDA_LATENCY_REPEATS = 7, 5, 30


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``speed.json``: raw readings in seconds at the given batch and at batch 1, and what follows from them.

    What is measured is the way that sampling goes. ``compile`` and ``cuda_graphs`` are what really ran; where that is
    not what was asked for, ``fallback`` says why. ``peak_memory_mb`` is all that the process held on the device, after
    warm-up and at the given batch: graphs keep their memory, used or not. Of a
    model on latents it is the drawing of latents, not their decoding, which all rows share.
    """
    spec, clock = stage.spec, Stopwatch()
    if spec["device"] != (name := device_name(bench.device)):
        raise StageFailed(f"{stage.label} is for {spec['device']}, its worker has {name}; use machines of one kind")
    networks = stage.local["networks"]
    schedule = NoiseSchedule.from_scheduler_config(networks[0]["schedule"])
    program = solver(spec, schedule, bench.registry)
    modules = [build(bench, about, 0).eval().requires_grad_(False) for about in networks]
    here = replace(bench, mode=Mode(spec["compile"], spec["cuda_graphs"]))
    router = here.assemble(networks[0], modules, spec["edges"], spec["precision"], partial(bench.say, stage))
    followed = bench.family(networks[0]).condition_shape(modules[0])
    painter = _painter(router, followed, spec["batch"], spec.get("guidance"))
    denoise = as_epsilon(painter, schedule, networks[0]["prediction"])
    noise_for = noise_source(0, tuple(spec["shape"]))

    def draw(batch: int) -> Callable[[], None]:
        painter.fit(batch)
        indices = torch.arange(batch, device=bench.device)
        if isinstance(painter, Guided):
            painter.prompt(indices)
        noise = noise_for(indices, 0)

        def once() -> None:
            run_program(program, schedule, denoise, noise, lambda i: noise_for(indices, i + 1))

        return once

    throughput, memory = measured(draw(spec["batch"]), spec["repeats"], bench.device)
    least = CUDA_LATENCY_REPEATS if bench.device.startswith("cuda") else LATENCY_REPEATS
    latency = readings(draw(1), max(spec["repeats"], least), bench.device)
    found = {
        "images_per_second": spec["batch"] / float(np.quantile(throughput, 0.5)),
        "latency_ms_median": 1e3 * float(np.quantile(latency, 0.5)),
        "latency_ms_p90": 1e3 * float(np.quantile(latency, 0.9)),
        "batch": spec["batch"],
        "peak_memory_mb": memory,
        "device": spec["device"],
        **as_run(router, here.mode),
        "readings": {"batch_seconds": throughput, "latency_seconds": latency},
    }
    write_json(draft.dir / "speed.json", found)
    draft.meta["seconds"] = clock.seconds()


def _painter(router: Router, followed: tuple[int, ...] | None, batch: int, guidance: float | None) -> Router | Guided:
    """The router as sampling asks it: with guidance where its networks follow something, of which zeros will do."""
    if followed is None:
        return router
    device = next(router.calls[0].network.parameters()).device
    nothing = np.broadcast_to(np.zeros((), dtype=np.float16), (batch, *followed))
    return Guided(router, nothing, torch.zeros(followed, dtype=torch.float16, device=device), guidance)


def measured(once: Callable[[], None], repeats: int, device: str) -> tuple[list[float], float | None]:
    """Seconds of each call, and the MiB held on a CUDA device meanwhile."""
    if not device.startswith("cuda"):
        return readings(once, repeats, device), None
    # compilation and capture take memory, and time, that no later batch does
    once()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    found = readings(once, max(repeats, CUDA_REPEATS), device)
    return found, torch.cuda.max_memory_reserved(device) / 2**20


def as_run(router: Router, mode: Mode) -> dict[str, Any]:
    """``compile`` and ``cuda_graphs`` as they were for all networks of ``router``, and why not as ``mode`` says."""
    uncompiled = [call.fallback for call in router.calls if call.fallback is not None]
    ungraphed = [] if router.graphs is None or router.graphs.reason is None else [router.graphs.reason]
    return {
        "compile": "off" if uncompiled else mode.compile,
        "cuda_graphs": mode.cuda_graphs and not ungraphed,
        "fallback": "; ".join(dict.fromkeys([*uncompiled, *ungraphed])) or None,
    }


def readings(
    once: Callable[[], None], repeats: int, device: str, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of ``repeats`` calls after one warm-up, each between two synchronised readings of the clock."""

    def synchronised() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return clock()

    once()
    found = []
    for _ in range(repeats):
        start = synchronised()
        once()
        found.append(synchronised() - start)
    return found
