"""What the benchmarks share: the networks, the clock, the ceiling, and the file of readings."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from o2mkd_bench.core.mode import Mode
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.engine.cost import network_cost
from o2mkd_plugins.models.unet2d import UNet2D

FAMILY = UNet2D()
SCHEDULE = NoiseSchedule()

# google/ddpm-cifar10-32 (Ho et al., arXiv 2006.11239): 35,746,307 parameters, attention at 16x16 with one head.
CIFAR = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
TOY = CIFAR | {"sample_size": 8, "block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}

KINDS = {
    "normalisation": ("group_norm",),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "update": ("multi_tensor", "adam"),
    "convolutions": ("conv", "fprop", "dgrad", "wgrad", "xmma", "cutlass"),
    "products": ("gemm", "nvjet", "cublas"),
}
"""Parts of a kernel's name, in the order in which they are looked for."""


class Frame:
    """One run of one benchmark: where it runs, how big it is, and what it found so far.

    Every part is written to ``--json`` as soon as it is read, so that a run that is cut off loses its last part alone.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.small: bool = arguments.small
        self.warm: bool = arguments.warm
        self._parts = arguments.parts
        self.device = torch.device(arguments.device)
        self.cuda = self.device.type == "cuda"
        self.mode = Mode(arguments.compile or ("on" if self.cuda else "off"), self.cuda)
        self.config = FAMILY.student_config(TOY if self.small else CIFAR, {}, "network")
        self._path: Path | None = arguments.json
        self._start, self._budget = time.monotonic(), arguments.budget
        self.found: dict[str, Any] = {"benchmark": name, "small": self.small, **about(self.device)}
        self.found["compile"] = self.mode.compile

    def half(self) -> dict[str, Any]:
        """The student of half the width."""
        return FAMILY.student_config(self.config, {"width": 0.5}, "half")

    def network(self, config: Mapping[str, Any], seed: int = 0) -> nn.Module:
        """Random weights, float32, on the device."""
        torch.manual_seed(seed)
        return FAMILY.build(config).to(self.device)

    def frozen(self, config: Mapping[str, Any], seed: int = 0) -> nn.Module:
        """The same for evaluation alone."""
        return self.network(config, seed).eval().requires_grad_(False)

    def flops(self, config: Mapping[str, Any]) -> int:
        """Floating-point operations of one evaluation of one image."""
        return 2 * network_cost(FAMILY, config, 3, config["sample_size"])["macs"]

    def seconds(self, once: Callable[[], object]) -> float:
        """Wall time of one call, with the device idle before and after it."""
        self.wait()
        start = time.perf_counter()
        once()
        self.wait()
        return time.perf_counter() - start

    def interleaved(self, cases: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
        """Median seconds of each case; all are read once a round, so that no clock or heat favours one of them.

        Cases come warm: what is compiled or captured at a first call has been.
        """
        read: dict[str, list[float]] = {name: [] for name in cases}
        if self.warm:
            return dict.fromkeys(cases, math.nan)
        for _ in range(rounds):
            for name, once in cases.items():
                read[name].append(self.seconds(once))
        return {name: statistics.median(values) for name, values in read.items()}

    def kinds(self, once: Callable[[], object], calls: float) -> tuple[dict[str, float], float]:
        """Microseconds of each kind of kernel, and the number of kernels, in one of the ``calls`` made by ``once``."""
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if self.cuda else activity.CPU]) as seen:
            once()
            self.wait()
        spent, count = dict.fromkeys([*KINDS, "other"], 0.0), 0
        for event in seen.key_averages():
            took = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            # the compiler names its own kernels after all that stood around them; it leaves convolutions to libraries
            name = event.key.lower().replace("convolution", "") if event.key.startswith("triton") else event.key.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
            spent[kind] += took / calls
            count += event.count if took else 0
        return spent, count / calls

    def matrix_rate(self) -> float:
        """Operations a second of a bf16 product of 8192 x 8192 matrices of random numbers: the ceiling of it all."""
        side, repeats = (8192, 20) if self.cuda else (256, 2)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)

        def once() -> None:
            for _ in range(repeats):
                torch.matmul(a, b, out=out)

        once()
        return 2 * side**3 * repeats / self.interleaved({"product": once})["product"]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def spent(self) -> bool:
        """Whether the time is up; parts not begun by then are left out, and said to be."""
        return time.monotonic() - self._start > self._budget

    def part(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure one part and note it; one that fails leaves its error, and the next begins."""
        begin = time.monotonic()
        if self._parts and name not in self._parts:
            return
        if self.spent():
            self.found[name] = {"left_out": f"the budget of {self._budget:.0f} s was spent"}
        else:
            try:
                self.found[name] = dict(measure())
            except Exception as error:
                self.found[name] = {
                    "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                }
            self._free()
            self.found[name]["part_seconds"] = round(time.monotonic() - begin, 1)
        print(f"{name}: {json.dumps(self.found[name])}", file=sys.stderr, flush=True)
        self.write()

    def _free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--small", action="store_true", help="a toy network, to try the script on a CPU")
    made.add_argument("--compile", choices=("off", "on", "max"), help="default: on with CUDA, off without")
    made.add_argument("--budget", type=float, default=3600, help="seconds after which no further part is begun")
    made.add_argument("--json", type=Path, help="where the readings go")
    made.add_argument("--parts", nargs="+", help="these alone")
    made.add_argument("--warm", action="store_true", help="only fill the compiler's cache on disk; nothing is read")
    return made


def about(device: torch.device) -> dict[str, str]:
    """The machine, in words, and the day."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda) if cuda else "none"}
    return {"device": name, **versions, "date": datetime.date.today().isoformat()}


def refuse(text: str) -> None:
    """For whoever says that something runs slower than asked: then there is no reading.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(text)


def true_float32() -> None:
    """No TF32, as the harness runs float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def torch_defaults() -> None:
    """TF32 in convolutions, not in matrix products: what somebody has who sets nothing."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
