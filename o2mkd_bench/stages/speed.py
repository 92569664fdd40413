"""How fast a sampler runs on this device: architecture, program and router layout decide it, weights do not."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..core.plan import Stage
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..engine.denoiser import DTYPES
from ..engine.router import Router
from ..engine.sample import run_program
from .bench import Bench, Stopwatch, write_json
from .samples import noise_source, solver
from .train import build


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``speed.json``: raw readings in seconds at the given batch and at batch 1, and what follows from them."""
    spec, clock = stage.spec, Stopwatch()
    networks = stage.local["networks"]
    schedule = NoiseSchedule.from_scheduler_config(networks[0]["schedule"])
    program = solver(spec, schedule, bench.registry)
    modules = [build(bench, about, 0).eval().requires_grad_(False) for about in networks]
    router = Router(modules, spec["edges"], bench.family(networks[0]).forward, DTYPES[spec["precision"]])
    denoise = router.epsilon(schedule, networks[0]["prediction"])
    noise_for = noise_source(0, tuple(spec["shape"]))

    def draw(batch: int) -> Callable[[], None]:
        indices = torch.arange(batch, device=bench.device)
        noise = {0: noise_for(indices, 0)}

        def once() -> None:
            run_program(program, schedule, denoise, noise[0], lambda i: noise_for(indices, i + 1))

        return once

    if bench.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(bench.device)
    throughput = readings(draw(spec["batch"]), spec["repeats"], bench.device)
    memory = torch.cuda.max_memory_allocated(bench.device) / 2**20 if bench.device.startswith("cuda") else None
    latency = readings(draw(1), max(spec["repeats"], 5), bench.device)
    found = {
        "images_per_second": spec["batch"] / quantile(throughput, 0.5),
        "latency_ms_median": 1e3 * quantile(latency, 0.5),
        "latency_ms_p90": 1e3 * quantile(latency, 0.9),
        "batch": spec["batch"],
        "peak_memory_mb": memory,
        "device": spec["device"],
        "compile": spec["compile"],
        "readings": {"batch_seconds": throughput, "latency_seconds": latency},
    }
    write_json(draft.dir / "speed.json", found)
    draft.meta["seconds"] = clock.seconds()


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


def quantile(values: list[float], q: float) -> float:
    """The quantile by linear interpolation, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
