"""One training step and one sampling pass of each full-size system, with random weights: speed, memory, costs.

``python benchmarks/systems.py lsun_church --json FILE``; ``--small --device cpu`` for a try; ``--table DIR`` writes
DIR/README.md from the readings in DIR. Sizes of batches, precision and checkpointing are those of ``suites/NAME.yaml``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frame import CIFAR, about, true_float32
from torch import nn

from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.core.suite import Suite, load
from o2mkd_bench.engine import memory
from o2mkd_bench.engine.cost import network_cost
from o2mkd_bench.engine.denoiser import Call, Tables
from o2mkd_bench.engine.distil import Distil, Methods, Setting
from o2mkd_bench.engine.guidance import Guided
from o2mkd_bench.engine.learner import Course, Learner
from o2mkd_bench.engine.loop import Member
from o2mkd_bench.engine.router import Router, as_epsilon
from o2mkd_bench.engine.sample import run_program
from o2mkd_bench.engine.shared import Source, Teacher
from o2mkd_bench.engine.stream import Stream
from o2mkd_bench.stages.latents import CHUNK

SUITES = Path(__file__).parent.parent / "suites"
HALF = {"half": {"width": 0.5}}
# google/ddpm-church-256 and google/ddpm-celebahq-256: 113,673,219 parameters
DDPM_256: dict[str, Any] = {
    **CIFAR,
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
# CompVis/stable-diffusion-v1-4: 859,520,964 parameters
STABLE_DIFFUSION = {"sample_size": 64, "cross_attention_dim": 768}
REMOVED = {name: {"variant": name.replace("-", "_")} for name in ("bk-base", "bk-small", "bk-tiny")}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCHEDULE = NoiseSchedule()
REPEATS = 5


@dataclass(frozen=True)
class System:
    """``config``: where the teacher's differs from its family's defaults; ``small``: likewise of a toy of its kind."""

    family: str
    config: Mapping[str, Any]
    small: Mapping[str, Any]
    students: Mapping[str, Mapping[str, Any]]
    sampler: Mapping[str, Any]
    steps: int


_TOY = {"norm_num_groups": 4, "layers_per_block": 2}
SYSTEMS = {
    "cifar": System(
        "unet2d", CIFAR, {**_TOY, "sample_size": 8, "block_out_channels": [8, 16, 16, 16]}, HALF, {"ddim": {}}, 10
    ),
    "lsun_church": System(
        "unet2d",
        DDPM_256,
        {**_TOY, "sample_size": 32, "block_out_channels": [8, 8, 8, 16, 16, 16]},
        HALF,
        {"ddim": {}},
        10,
    ),
    "coco30k": System(
        "unet2d_condition",
        STABLE_DIFFUSION,
        {"sample_size": 8, "cross_attention_dim": 16, "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}
        | {"attention_head_dim": 2},
        REMOVED | HALF,
        {"pndm": {"offset": 1}},
        25,
    ),
}
SAME = {"celebahq": "lsun_church"}


class Reading:
    """One system on one device."""

    def __init__(self, name: str, device: str, small: bool) -> None:
        system = SYSTEMS[name]
        self.suite: Suite = load(SUITES / f"{name}.yaml")
        self.system, self.device, self.small = system, torch.device(device), small
        self.family = registry().get("models", system.family).load()()
        class_name = {"unet2d": "UNet2DModel", "unet2d_condition": "UNet2DConditionModel"}[system.family]
        whole = {"_class_name": class_name, **system.config, **(system.small if small else {})}
        self.teacher = self.family.student_config(whole, {}, "teacher")
        training = self.suite.training
        self.training = training.model_copy(update={"batch": 16, "micro_batch": 8, "group": 8}) if small else training
        asked = self.suite.sampling.batch
        self.batch = 2 if small else (64 if asked == "auto" else asked)
        self.steps = 2 if small else system.steps

    def network(self, config: Mapping[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        # where it is drawn matters for the time alone
        with self.device:
            return self.family.build(config)

    def frozen(self, config: Mapping[str, Any]) -> Call:
        network = self.network(config).eval().requires_grad_(False)
        return Call(self.family, network, self.suite.precision)

    def student(self, name: str) -> dict[str, Any]:
        return self.family.student_config(self.teacher, self.system.students[name], name)

    def costs(self, config: Mapping[str, Any]) -> dict[str, Any]:
        cost = network_cost(self.family, config, config["in_channels"], config["sample_size"])
        return {"parameters": cost["params"], "macs": cost["macs"]}

    def measured(self, once: Callable[[], object], images: int, estimate: memory.Estimate) -> dict[str, Any]:
        """The median of a few calls after one, and the most that tensors took meanwhile, beside what was reckoned."""
        once()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = [self._seconds(once) for _ in range(1 if self.small else REPEATS)]
        found = {"images_per_second": images / statistics.median(seconds), "seconds": seconds, "images": images}
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return found | {"estimated_bytes": estimate.total}

    def _seconds(self, once: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        once()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def train(self, name: str) -> dict[str, Any]:
        """Steps of output distillation of a student: the batch, its teacher's pass, the student's, the optimiser."""
        config, t = self.student(name), self.training
        network = self.network(config).train()
        if self.suite.checkpoint_activations:
            self.family.checkpoint_activations(network)
        source, interval = self._source(t.batch, t.group, network), Interval(0, SCHEDULE.timesteps)
        setting = Setting(source.stream, source.data, source.tables, "epsilon", interval, 100, source.conditions)
        method = registry().get("kd_methods", "output")
        taught = Teacher(self.frozen(self.teacher), "epsilon")
        methods = Methods({"output": method.load()(method.parse({}))})
        objective = Distil(setting, Call(self.family, network, self.suite.precision), methods, taught)
        learner = Learner(network, t.model_dump(), Course(100, horizon=100), self.suite.precision)
        member = Member(learner, objective, interval, micro_batch=t.micro_batch)

        def once() -> None:
            batch = source.stream.batch_at(member.step, self.device)
            rows = source.rows(batch, interval)
            member.take(source.at(batch, [(objective, rows)]), rows, t.group, 0)

        ours, theirs = (memory.Network(self.family, c) for c in (config, self.teacher))
        checkpoint = self.suite.checkpoint_activations
        part = t.micro_batch or t.batch
        step = memory.Step(ours, [theirs], t.batch, part, self.suite.precision, t.optimizer, checkpoint)
        return self.costs(config) | self.measured(once, t.batch, memory.training(step))

    def _source(self, batch: int, group: int, network: nn.Module) -> Source:
        """Random data: as many as two batches."""
        size, channels, count = self.teacher["sample_size"], self.teacher["in_channels"], 2 * batch
        law = Law.uniform(Interval(0, SCHEDULE.timesteps))
        stream = Stream(0, law, batch, count, False, group, "random")
        tables, followed = Tables.of(SCHEDULE, self.device), self.family.condition_shape(network)
        if followed is None:
            images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, device=self.device)
            return Source(stream, images, tables)
        latents = torch.randn(count, channels, size, size, device=self.device).half()
        texts = torch.randn(count, *followed, device=self.device).half()
        return Source(stream, latents, tables, conditions=texts)

    @torch.no_grad()
    def draw(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A pass of the sampler for a batch, guided where there is text; latents are not decoded."""
        (name, options), call = next(iter(self.system.sampler.items())), self.frozen(config)
        plugin = registry().get("samplers", name)
        sampler = plugin.load()(plugin.parse(options))
        grid = time_grid(self.suite.sampling.spacing, self.steps, SCHEDULE.timesteps)
        program = sampler.program(SCHEDULE, grid, (), "none")
        painter: Router | Guided = Router([call], ())
        followed, guidance = self.family.condition_shape(call.network), self.suite.sampling.guidance
        if followed is not None:
            texts = torch.randn(self.batch, *followed).half()
            painter = Guided(painter, texts.numpy(), texts[0].to(self.device), guidance)
            painter.prompt(torch.arange(self.batch))
        denoise, shape = as_epsilon(painter, SCHEDULE, "epsilon"), (config["in_channels"], *[config["sample_size"]] * 2)
        noise = torch.randn(self.batch, *shape, device=self.device)

        def once() -> None:
            run_program(program, SCHEDULE, denoise, noise, lambda _: torch.randn_like(noise))

        passes = 1 if guidance in (None, 1) else 2
        estimate = memory.sampling([memory.Network(self.family, config)], passes * self.batch, self.suite.precision)
        return self.costs(config) | {"nfe": passes * program.nfe} | self.measured(once, self.batch, estimate)

    @torch.no_grad()
    def decode(self) -> dict[str, Any]:
        """Latents to pixels, in float32, in the pieces in which the harness does it."""
        from diffusers import AutoencoderKL

        toy = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        torch.manual_seed(0)
        network = AutoencoderKL(**AUTOENCODER | (toy if self.small else {})).eval().to(self.device)
        latents = torch.randn(CHUNK, 4, *[self.teacher["sample_size"]] * 2, device=self.device)
        found = self.measured(lambda: network.decode(latents), CHUNK, memory.Estimate(0, 0, 0))
        del found["estimated_bytes"]
        return {"parameters": sum(p.numel() for p in network.parameters())} | found

    def parts(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for name in self.system.students:
            yield f"train {name}", lambda name=name: self.train(name)
        yield "sample teacher", lambda: self.draw(self.teacher)
        for name in self.system.students:
            yield f"sample {name}", lambda name=name: self.draw(self.student(name))
        if self.system.family == "unet2d_condition":
            yield "decode", self.decode


def read(name: str, device: str, small: bool, file: Path) -> bool:
    """Every part of a system, each written as soon as it is read; one that fails leaves its error, and a False."""
    true_float32()
    reading = Reading(name, device, small)
    found: dict[str, Any] = {"system": name, "small": small, **about(reading.device)}
    found |= {"precision": reading.suite.precision, "checkpoint": reading.suite.checkpoint_activations}
    found |= {"batch": reading.training.batch, "micro_batch": reading.training.micro_batch, "parts": {}}
    for part, measure in reading.parts():
        try:
            found["parts"][part] = measure()
        except Exception as error:  # the other parts go on
            found["parts"][part] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        print(part, json.dumps(found["parts"][part]), flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return not any("error" in facts for facts in found["parts"].values())


HEAD = """# Full-size systems on one GPU

Made by `results/systems/run.sh`: random weights; batches, precision and checkpointing of each suite; nothing compiled.
A training step is output distillation: the teacher's pass, the student's, the optimiser, the average. Peak is what
tensors took (`max_memory_allocated`); estimate is what `plan --memory` reckons without a GPU. GMACs are those of one
evaluation of one image, or latent. celebahq has the network and the sizes of lsun_church: it is measured once.
"""
UNREAD = "**Not run yet on a GPU.** The command is `results/systems/run.sh`; it takes at most nine minutes."
COLUMNS = ("system", "part", "parameters", "GMACs", "NFE", "images", "images/s", "peak GB", "estimate GB")


def table(folder: Path) -> None:
    """README.md of ``folder`` from the readings in it."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    found = [one for one in found if not one["small"] and one["cuda"] != "none"]
    lines = [HEAD]
    if found:
        told = {f"{one['device']}, torch {one['torch']}, CUDA {one['cuda']}, {one['date']}" for one in found}
        lines += ["; ".join(sorted(told)) + ".\n", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
        lines += [_row(_cells(one["system"], part, facts)) for one in found for part, facts in one["parts"].items()]
        if missing := sorted(SYSTEMS.keys() - {one["system"] for one in found}):
            lines.append(f"\n**Not read: {', '.join(missing)}.**")
    else:
        lines.append(UNREAD)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cells(system: str, part: str, facts: Mapping[str, Any]) -> list[str]:
    if "error" in facts:
        return [system, part, *[""] * 6, facts["error"]]
    scaled = {"parameters": 1e6, "macs": 1e9, "peak_bytes": 1e9, "estimated_bytes": 1e9}
    shown = {key: f"{facts[key] / by:.1f}" for key, by in scaled.items() if key in facts}
    return [
        system,
        part,
        f"{shown.get('parameters', '')} M",
        shown.get("macs", ""),
        str(facts.get("nfe", "")),
        str(facts["images"]),
        f"{facts['images_per_second']:.3g}",
        shown.get("peak_bytes", ""),
        shown.get("estimated_bytes", ""),
    ]


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", nargs="?", choices=[*SYSTEMS, *SAME])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="toy networks, to try the script on a CPU")
    parser.add_argument("--json", type=Path, help="where the readings go")
    parser.add_argument("--table", type=Path, metavar="DIR", help="write DIR/README.md instead")
    arguments = parser.parse_args()
    if arguments.table is not None:
        table(arguments.table)
    elif arguments.system is None or arguments.json is None:
        parser.error("name a system, and a file with --json")
    else:
        name = SAME.get(arguments.system, arguments.system)
        sys.exit(not read(name, arguments.device, arguments.small, arguments.json))


if __name__ == "__main__":
    main()
