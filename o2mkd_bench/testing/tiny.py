"""A training small enough for a test: digits, a U-Net of a few channels, four steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.blocks import Training
from ..core.intervals import Interval, Law
from ..core.jobs import Job, Lift
from ..core.models import ModelFamily
from ..core.plugins import registry
from ..core.schedule import NoiseSchedule
from ..engine.denoiser import Call, Tables
from ..engine.distil import Distil, Methods, Setting
from ..engine.kd import KDMethod
from ..engine.learner import Course, Learner
from ..engine.loop import Member
from ..engine.loop import train as learn
from ..engine.shared import Teacher
from ..engine.stream import Stream

SCHEDULE = NoiseSchedule()
EVERYTHING = Interval(0, SCHEDULE.timesteps)
BATCH, STEPS = 16, 4

Fresh = Callable[[], tuple[str, KDMethod, bool]]
"""A new instance of a method: its name, itself, and whether it needs a teacher."""


@lru_cache(maxsize=1)
def images() -> Tensor:
    """The training digits, uint8 (N, 1, 8, 8)."""
    plugin = registry().get("datasets", "digits")
    return torch.from_numpy(plugin.load()(plugin.parse({}), Path()).load().train)


def family() -> ModelFamily:
    made: ModelFamily = registry().get("models", "unet2d").load()()
    return made


def config(width: float = 1.0) -> dict[str, Any]:
    options = registry().get("models", "unet2d").parse({"block_out_channels": [16, 16], "norm_num_groups": 4})
    teacher = family().teacher_config(options, channels=1, size=8)
    return family().student_config(teacher, {"width": width}, "tiny")


def network(width: float, seed: int) -> Call:
    """A network with fresh weights as a function of x and t."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Call(family(), family().build(config(width)), "fp32")


def setting(job: Job | None = None) -> Setting:
    law, interval = (job.law, job.trains) if job else (Law.uniform(EVERYTHING), EVERYTHING)
    stream = Stream(0, law, BATCH, len(images()), flip=False, group=4)
    return Setting(stream, images(), Tables.of(SCHEDULE, torch.device("cpu")), "epsilon", interval, STEPS)


def teacher(call: Call) -> Teacher:
    return Teacher(call, "epsilon")


def jobs(students: int | None) -> tuple[Job, ...]:
    """One job of ``STEPS`` steps, lifted by ``o2mkd`` unless ``students`` is None."""
    job = Job("student", EVERYTHING, EVERYTHING, Law.uniform(EVERYTHING), BATCH, STEPS, STEPS)
    if students is None:
        return (job,)
    plugin = registry().get("wrappers", "o2mkd")
    lift = Lift(SCHEDULE, lambda name: registry().get("intervals", name).load())
    lifted: tuple[Job, ...] = plugin.load()(plugin.parse({"students": students, "warmup": 0.5})).wrap(job, lift)
    return lifted


def train(fresh: Fresh, folder: Path, students: int | None, width: float) -> dict[str, dict[str, Tensor]]:
    """The weights that every job of the (lifted) method ends with, by role."""
    guide = network(1.0, seed=1)
    guide.network.eval().requires_grad_(False)
    trained = {}
    for job in jobs(students):
        name, method, needs_teacher = fresh()
        student = network(width, seed=2)
        objective = Distil(setting(job), student, Methods({name: method}), teacher(guide) if needs_teacher else None)
        course = Course(job.steps, job.offset, job.horizon, job.pace(), job.restart)
        learner = Learner(student.network, Training().model_dump(), course, adapters=objective.adapters())
        if job.start != "scratch":
            learner.load(folder / f"{job.start}.safetensors", resume=False)
        learn(objective.setting.source(), Member(learner, objective, job.trains))
        learner.save(folder / f"{job.role}.safetensors", {})
        trained[job.role] = {key: value.clone() for key, value in learner.network.state_dict().items()}
    return trained
