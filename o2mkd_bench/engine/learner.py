"""A network being trained: weights, average, optimiser, schedule position, and how all of it survives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.poly_lr import PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn


@dataclass(frozen=True)
class Course:
    """How a job runs along its lineage.

    Attributes:
        steps: optimiser steps of this job.
        offset: steps of the lineage before it.
        horizon: positions over which the learning rate is laid out, the same along a lineage.
        pace: positions a step; above 1 where a job must run through what is left in fewer steps than others.
        restart: first steps over which the learning rate rises linearly to what the schedule says, with moments begun
            anew; 0 for a job that takes over those of what it continues.
    """

    steps: int
    offset: int = 0
    horizon: int = 0
    pace: Fraction = Fraction(1)
    restart: int = 0

    def position(self, step: int) -> float:
        """Where step ``step`` of the job stands: ``offset + step * pace`` of ``horizon``."""
        return float(self.offset + step * self.pace)


def lr_schedule(optimizer: torch.optim.Optimizer, training: Mapping[str, Any], horizon: int) -> Scheduler:
    """The learning rate over ``horizon`` positions, by timm; ``warmup`` is a share of the horizon."""
    common = {
        "t_initial": max(horizon, 1),
        "lr_min": 0.0,
        "warmup_t": round(training["warmup"] * horizon),
        "warmup_lr_init": 0.0,
        "t_in_epochs": False,
    }
    if training["schedule"] == "cosine":
        return CosineLRScheduler(optimizer, **common)
    return PolyLRScheduler(optimizer, power=1.0 if training["schedule"] == "linear" else 0.0, **common)


def make_optimizer(parameters: list[nn.Parameter], training: Mapping[str, Any], fused: bool) -> torch.optim.Optimizer:
    """AdamW, Adam, or SGD with ``betas[0]`` as its momentum; ``fused``: in one kernel, which also never asks the device
    whether a scaled gradient overflowed."""
    lr, decay = training["lr"], training["weight_decay"]
    match training["optimizer"]:
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=lr, weight_decay=decay, momentum=training["betas"][0], fused=fused or None
            )
        case "adam":
            kind: type[torch.optim.Adam] = torch.optim.Adam
        case _:
            kind = torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=decay, betas=tuple(training["betas"]), fused=fused or None)


class Learner:
    """A network in training.

    ``training`` is a suite's ``training`` block as plain data, complete; ``adapters`` are trained along and thrown away
    after. The average (timm's ModelEmaV3) is a plain mean until its length reaches its horizon, the share
    ``training["ema"]`` of the lineage; at a pace above 1 from the start on, its first weights count for longer.
    """

    def __init__(
        self,
        network: nn.Module,
        training: Mapping[str, Any],
        course: Course,
        precision: str = "fp32",
        adapters: nn.Module | None = None,
    ) -> None:
        self.network = network
        self.adapters = adapters or nn.Module()
        self.course = course
        self.clip = training["clip"]
        self.position = 0
        self.device = next(network.parameters()).device
        self.parameters = [*network.parameters(), *self.adapters.parameters()]
        self.optimizer = make_optimizer(self.parameters, training, self.device.type == "cuda")
        self.schedule = lr_schedule(self.optimizer, training, course.horizon)
        # of positions, as the learning rate is, so that a job at twice the pace averages over half as many steps
        span = max(1.0, training["ema"] * course.horizon / float(course.pace))
        # parameters are walked faster than state dicts, and that differs only in buffers that can be averaged
        plain = not any(b.is_floating_point() for b in network.buffers())
        self.ema = ModelEmaV3(network, decay=1 - 1 / span, use_warmup=True, warmup_power=1.0, exclude_buffers=plain)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to what the next update goes by."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """One optimiser step on the gradients so far, which are gone after: nobody keeps them while others train."""
        # timm annotates whole updates; its formulas hold for every position
        self.schedule.step_update(self.course.position(self.position))  # type: ignore[arg-type]
        if self.position < self.course.restart:
            for group in self.optimizer.param_groups:
                group["lr"] *= (self.position + 1) / self.course.restart
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skip()

    def skip(self) -> None:
        """Pass one step: the average and the position move on."""
        self.ema.update(self.network, step=int(self.course.position(self.position)) + 1)
        self.position += 1

    def save(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Everything that training needs to go on, written atomically; ``extra`` is JSON data of the loop."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in (("net", self.network), ("ema", self.ema.module), ("adapters", self.adapters)):
            tensors |= {f"{prefix}/{k}": v for k, v in module.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"opt/{index}/{k}": v for k, v in entry.items() if isinstance(v, Tensor)}
        meta = {"position": self.position, "scaler": self.scaler.state_dict(), "extra": dict(extra)}
        part = path.with_suffix(".part")
        save_file(
            {k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata={"learner": json.dumps(meta)}
        )
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, path)

    def load(self, path: Path, resume: bool) -> dict[str, Any]:
        """Take over a saved state; with ``resume`` also its position within the job. Gives back ``extra``.

        Where the course restarts, moments are taken over with ``resume`` alone.

        Raises:
            SafetensorError: for a file that is no saved state; the learner is as it was then.
        """
        groups: dict[str, dict[str, Tensor]] = {"net": {}, "ema": {}, "adapters": {}, "opt": {}}
        with safe_open(path, framework="pt", device=str(self.device)) as file:
            meta = json.loads(file.metadata()["learner"])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                prefix, _, name = key.partition("/")
                groups[prefix][name] = file.get_tensor(key)
        self.network.load_state_dict(groups["net"])
        self.ema.module.load_state_dict(groups["ema"])
        self.adapters.load_state_dict(groups["adapters"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups["opt"].items():
            index, _, name = key.partition("/")
            # fused optimisers take all they work on to be strided alike
            moment = value.cpu() if name == "step" else torch.empty_like(self.parameters[int(index)]).copy_(value)
            state.setdefault(int(index), {})[name] = moment
        if resume or not self.course.restart:
            groups_now = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups_now})
        self.scaler.load_state_dict(meta["scaler"])
        if resume:
            self.position = int(meta["position"])
        extra: dict[str, Any] = meta["extra"]
        return extra
