"""Images a second of DDIM-50: diffusers as a user calls it, the best loop by hand, and ours with 1 and with 4 students.

``python benchmarks/sampling.py --json sampling.json``; ``--device cpu --small`` tries the script in a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers.utils import logging
from frame import FAMILY, SCHEDULE, Frame, parser, refuse, torch_defaults, true_float32
from torch import nn

STEPS = 50
Case = Callable[[], object]


def pipeline(frame: Frame, dtype: torch.dtype, batch: int, steps: int = STEPS, tf32: bool = True) -> Case:
    """diffusers' pipeline, its bar off; images as tensors, its cheapest output, fetched to the host.

    With ``tf32`` float32 runs as torch's defaults have it: TF32 in convolutions.
    """
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipe = DDIMPipeline(frame.frozen(frame.config).to(dtype), scheduler)
    pipe.set_progress_bar_config(disable=True)

    def once() -> None:
        if tf32:
            torch_defaults()
        pipe(batch_size=batch, num_inference_steps=steps, output_type="pt").images.cpu()
        true_float32()

    if not frame.warm:
        pipe(batch_size=batch, num_inference_steps=2, output_type="pt")  # cuDNN and the allocator are warm then
    return once


def by_hand(frame: Frame, config: Mapping[str, Any], batch: int) -> Case:
    """The bare network in bf16 and channels_last, compiled, called 50 times in a CUDA graph; no sampler, no images."""
    network = frame.frozen(config).to(torch.bfloat16).to(memory_format=torch.channels_last)
    size = config["sample_size"]
    x = torch.randn(batch, 3, size, size, device=frame.device, dtype=torch.bfloat16)
    x, t = x.to(memory_format=torch.channels_last), torch.full((batch,), 500, device=frame.device)
    call: Callable[..., Any] = network
    if frame.mode.compile != "off":
        mode = "max-autotune-no-cudagraphs" if frame.mode.compile == "max" else None
        call = torch.compile(lambda x, t: FAMILY.forward(network, x, t), dynamic=False, mode=mode)
    evaluate: Case = lambda: call(x, t)  # noqa: E731

    @torch.no_grad()
    def many() -> None:
        for _ in range(STEPS):
            evaluate()

    if frame.cuda:
        evaluate = captured(evaluate)
    return warmed(many)


def warmed(case: Case) -> Case:
    """The case after one call, which compiles and captures."""
    case()
    return case


@torch.no_grad()
def captured(once: Case) -> Case:
    """One call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def replay(what: Case = once) -> None:
        # a graph owns neither the kernels nor the tensors that it reads: ``what`` holds them
        graph.replay()

    return replay


def ours(frame: Frame, networks: Sequence[nn.Module], batch: int, batches: int = 1) -> Case:
    """``batches`` batches through the harness: noise, network, solver, uint8 images on the host."""
    from o2mkd_bench.core.grid import time_grid
    from o2mkd_bench.core.mode import PLAIN
    from o2mkd_bench.engine.denoiser import Call
    from o2mkd_bench.engine.graphs import Graphs, capture
    from o2mkd_bench.engine.router import Router
    from o2mkd_bench.engine.sample import sample_images
    from o2mkd_bench.stages.samples import noise_source
    from o2mkd_plugins.samplers.ddim import ddim_program

    calls = [Call(FAMILY, network, "bf16", frame.mode, refuse) for network in networks]
    edges = [1000 * k // len(calls) for k in range(1, len(calls))]
    graphs = None if frame.mode == PLAIN else Graphs(calls, refuse, capture if frame.mode.cuda_graphs else None)
    router = Router(calls, edges, graphs)
    router.fit(batch)
    program = ddim_program(SCHEDULE, time_grid("trailing", STEPS, 1000), 0.0, "x0")
    size = networks[0].config.sample_size
    noise = noise_source(0, (3, size, size))
    indices = torch.arange(batch * batches, device=frame.device)
    return lambda: sample_images(program, SCHEDULE, router, noise, indices, batch)


def throughput(frame: Frame, batch: int, large: bool = False) -> dict[str, Any]:
    """Images a second of everybody at one batch size.

    diffusers' at a ``large`` one, and in true float32, come from a fifth of the steps.
    """
    torch.compiler.reset()  # a second batch size in one process would be compiled for all sizes
    fifth = STEPS // 5
    usual = fifth if large else STEPS
    pipelines = {"diffusers_tf32": (torch.float32, usual, True), "diffusers_bf16": (torch.bfloat16, usual, True)}
    if not large:
        pipelines["diffusers_fp32"] = (torch.float32, fifth, False)
    slow = {name: pipeline(frame, dtype, batch, steps, tf32) for name, (dtype, steps, tf32) in pipelines.items()}
    batches = max(1, 768 // batch) if frame.cuda else 1
    fast = {
        "by_hand": by_hand(frame, frame.config, batch),
        "ours": warmed(ours(frame, [frame.frozen(frame.config)], batch, batches)),
        "ours_4": warmed(ours(frame, [frame.frozen(frame.config, seed) for seed in range(4)], batch, batches)),
    }
    seconds = frame.interleaved({**slow, **fast})
    share = {name: steps / STEPS for name, (_, steps, _) in pipelines.items()}
    share |= {"by_hand": 1, "ours": batches, "ours_4": batches}
    found: dict[str, Any] = {n: batch * share[n] / s for n, s in seconds.items()}
    told = {"batch": batch, "images_per_second": found}
    if large or frame.warm:
        return told
    return told | {"microseconds": {n: frame.kinds(fast[n], STEPS * share[n])[0] for n in ("by_hand", "ours")}}


def half_width(frame: Frame, batch: int) -> dict[str, Any]:
    """The student of half the width."""
    config, batches = frame.half(), 3 if frame.cuda else 1
    cases = {
        "by_hand": by_hand(frame, config, batch),
        "ours": warmed(ours(frame, [frame.frozen(config)], batch, batches)),
    }
    seconds = frame.interleaved(cases)
    rates = {n: batch * (batches if n == "ours" else 1) / s for n, s in seconds.items()}
    return {"batch": batch, "images_per_second": rates, "flops": frame.flops(config)}


def latency(frame: Frame) -> dict[str, Any]:
    """Seconds from nothing to one image."""
    cases = {
        "diffusers_bf16": pipeline(frame, torch.bfloat16, 1),
        "by_hand": by_hand(frame, frame.config, 1),
        "ours": warmed(ours(frame, [frame.frozen(frame.config)], 1)),
    }
    return {"batch": 1, "seconds": frame.interleaved(cases, rounds=5)}


def ceiling(frame: Frame) -> dict[str, Any]:
    return {"matrix_flops": frame.matrix_rate(), "flops": frame.flops(frame.config)}


def startup(frame: Frame, batch: int) -> dict[str, Any]:
    """Seconds from K networks on the device to the first images, for compilers that remember nothing."""
    with ExitStack() as running:
        started = {f"K={k}": running.enter_context(_cold(frame, k, batch)) for k in (1, 8)}
        return {"batch": batch, "seconds": {name: _ended(process) for name, process in started.items()}}


@contextmanager
def _cold(frame: Frame, students: int, batch: int) -> Iterator[subprocess.Popen[str]]:
    """A process of its own; those of all K run at the same time, and so share the machine's noise."""
    command = [sys.executable, __file__, "--device", str(frame.device), "--compile", frame.mode.compile]
    command += ["--first-image", str(students), str(batch), *(["--small"] if frame.small else [])]
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        with subprocess.Popen(
            command, env=os.environ | fresh, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            yield process


def _ended(process: subprocess.Popen[str]) -> float:
    told, complaint = process.communicate()
    if process.returncode:
        raise RuntimeError(complaint.strip().splitlines()[-1])
    return float(json.loads(told.splitlines()[-1]))


def first_image(frame: Frame, students: int, batch: int) -> float:
    """Seconds to the first images of ``students`` networks in this process."""
    networks = [frame.frozen(frame.config, seed) for seed in range(students)]
    frame.wait()
    start = time.perf_counter()
    ours(frame, networks, batch)()
    frame.wait()
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--first-image", nargs=2, type=int, metavar=("K", "BATCH"), help="used by the script itself")
    arguments = options.parse_args()
    frame = Frame("sampling", arguments)
    logging.set_verbosity_error()
    true_float32()
    if arguments.first_image:
        print(json.dumps(first_image(frame, *arguments.first_image)))
        return
    batches = (4, 8) if frame.small else (256, 1024)
    frame.part("startup", lambda: startup(frame, batches[0]))
    frame.part("ceiling", lambda: ceiling(frame))
    frame.part("batch_256", lambda: throughput(frame, batches[0]))
    frame.part("half_width", lambda: half_width(frame, batches[0]))
    frame.part("batch_1", lambda: latency(frame))
    frame.part("batch_1024", lambda: throughput(frame, batches[1], large=True))
    print(json.dumps(frame.found, indent=1))


if __name__ == "__main__":
    main()
