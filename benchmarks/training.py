"""Student-images a second of output distillation: a plain loop one student after the other, our loop, and the bound.

One teacher, half-width students. ``single`` takes the whole batch, K = 2 halves of it, K = 4 quarters: seven students
that share one stream. ``python benchmarks/training.py --json training.json``; ``--device cpu --small`` for a try.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from frame import FAMILY, SCHEDULE, Frame, parser, refuse, torch_defaults, true_float32
from torch import Tensor, nn

from o2mkd_bench.core.blocks import Training
from o2mkd_bench.core.intervals import Interval, Law

Step = Callable[[], object]
COUNT = 50_000
WIDTHS = {1: 1, 2: 2, 4: 4}
"""K to the number of students that take a K-th of the batch."""

TRAINING = Training(lr=2e-4).model_dump()


def data(frame: Frame) -> Tensor:
    """Random images, uint8, on the device."""
    size, count = frame.config["sample_size"], 256 if frame.small else COUNT
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=frame.device)


def intervals(students: int) -> list[Interval]:
    """K equal intervals."""
    ends = [1000 * k // students for k in range(students + 1)]
    return [Interval(lo, hi) for lo, hi in pairwise(ends)]


def plain(frame: Frame, images: Tensor, teacher: nn.Module, batch: int, students: int, compiled: bool) -> Step:
    """A step of the loop of diffusers' training examples, bf16 autocast, for the last of ``students`` students.

    Generous: its images are on the device, and nothing is logged.
    """
    student = frame.network(frame.half(), 1).train()
    run_teacher, run_student = (runner(frame, network, compiled) for network in (teacher, student))
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    optimizer = torch.optim.AdamW(student.parameters(), lr=TRAINING["lr"])
    rate = get_cosine_schedule_with_warmup(optimizer, 500, 100_000)
    average = EMAModel(student.parameters(), decay=0.9999)
    rows, interval = batch // students, intervals(students)[-1]

    def step() -> None:
        index = torch.randint(0, len(images), (rows,), device=frame.device)
        x0 = images[index].float() / 127.5 - 1
        noise = torch.randn_like(x0)
        t = torch.randint(interval.lo, interval.hi, (rows,), device=frame.device)
        x_t = scheduler.add_noise(x0, noise, t)
        with torch.autocast(frame.device.type, torch.bfloat16):
            with torch.no_grad():
                target = run_teacher(x_t, t)
            loss = nn.functional.mse_loss(run_student(x_t, t).float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(student.parameters())

    return step


def runner(frame: Frame, network: nn.Module, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of (x, t).

    Compiled it is the harness's own call, so that nothing is compiled twice in one run; a user's would keep a teacher
    in float32, and not channels last.
    """
    from o2mkd_bench.engine.denoiser import Call

    if compiled:
        return Call(FAMILY, network, "bf16", frame.mode, refuse)
    return lambda x, t: FAMILY.forward(network, x, t)


def measured(frame: Frame, step: Step, steps: int, warmup: int = 4) -> float:
    """Median seconds of a step, of three runs of ``steps`` of them."""
    for _ in range(warmup):
        step()
    if frame.warm:
        return math.nan

    def many() -> None:
        for _ in range(steps):
            step()

    return statistics.median(frame.seconds(many) / steps for _ in range(3))


def one_after_the_other(frame: Frame, batch: int, compiled: bool) -> dict[str, Any]:
    """The seven students, each with a teacher pass of its own; students of one K cost the same and are timed once."""
    torch_defaults()
    images, teacher = data(frame), frame.frozen(frame.config)
    seconds = {}
    for k in WIDTHS:
        step = plain(frame, images, teacher, batch, k, compiled)
        seconds[f"K={k}"] = measured(frame, step, 2 if frame.small else 8)
    true_float32()
    whole = sum(count * seconds[f"K={k}"] for k, count in WIDTHS.items())
    single = batch / seconds["K=1"]
    return {"batch": batch, "step_seconds": seconds, "single": single, "seven": len(WIDTHS) * batch / whole}


class Enough(BaseException):
    """Ends a course that is longer than what is timed; no failure of a student's."""


class Marks:
    """The clock at the steps that the loop notes, when it has just waited for the device."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._read: list[tuple[int, float]] = []

    def __call__(self, done: int, total: int, images: int, loss: float) -> None:
        self._read.append((done, time.perf_counter()))
        if len(self._read) > self._wanted:
            raise Enough

    def seconds(self) -> float:
        """Median seconds of a step; the first stretch, in which everything is compiled, is not counted."""
        (_, *rest) = self._read
        return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(rest))


def our_loop(frame: Frame, images: Tensor, batch: int, kinds: Sequence[int]) -> float:
    """Seconds of a step of our loop, for the students of these K on one stream."""
    from o2mkd_bench.engine.denoiser import Call, Tables
    from o2mkd_bench.engine.distil import Distil, Methods, Setting
    from o2mkd_bench.engine.learner import Course, Learner
    from o2mkd_bench.engine.loop import Member, Watch, train_together
    from o2mkd_bench.engine.shared import Teacher
    from o2mkd_bench.engine.stream import Stream
    from o2mkd_plugins.kd.options import OutputOptions
    from o2mkd_plugins.kd.output import OutputMatching

    # notes come every 200th part of a course, on which alone the loop waits for the device
    steps = 400 if frame.small else 4_000
    stream = Stream(0, Law.uniform(Interval(0, 1000)), batch, len(images), True)
    teacher = Teacher(Call(FAMILY, frame.frozen(frame.config), "bf16", frame.mode, refuse, replay=True), "epsilon")
    tables = Tables.of(SCHEDULE, frame.device)
    marks = Marks(3 if frame.small else 4)
    members: list[Member] = []
    for interval in [i for k in kinds for i in intervals(k)]:
        setting = Setting(stream, images, tables, "epsilon", interval, steps)
        network = frame.network(frame.half(), 1).train()
        methods = Methods({"output": OutputMatching(OutputOptions())})
        student = Call(FAMILY, network, "bf16", frame.mode, refuse, replay=True)
        objective = Distil(setting, student, methods, teacher)
        learner = Learner(network, TRAINING, Course(steps, horizon=steps), "bf16", objective.adapters())
        # they go in step, so one of them tells the time for all
        members.append(Member(learner, objective, interval, Watch() if members else Watch(progress=marks)))
    with contextlib.suppress(Enough):
        for left in train_together(setting.source(), members):
            if left.error is not None:
                raise left.error
    return marks.seconds()


def together(frame: Frame, batch: int, kinds: Sequence[int]) -> dict[str, Any]:
    """Our loop: the students of these K at once."""
    seconds = our_loop(frame, data(frame), batch, kinds)
    return {"batch": batch, "step_seconds": seconds, "images_per_second": len(kinds) * batch / seconds}


def bound(frame: Frame, batch: int) -> dict[str, Any]:
    """What no loop can beat: each student's forward, backward and step alone, and the teacher's pass alone."""
    from o2mkd_bench.engine.denoiser import Call
    from o2mkd_bench.engine.learner import Course, Learner
    from o2mkd_bench.engine.replay import Tapped

    steps = 2 if frame.small else 15
    seconds: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    for k in WIDTHS:
        network = frame.network(frame.half(), 1).train()
        student = Call(FAMILY, network, "bf16", frame.mode, refuse, replay=True).tapped({}, "student")
        learner = Learner(network, TRAINING, Course(10**6, horizon=10**6), "bf16")
        some = inputs(frame, batch // k)

        def step(student: Tapped = student, learner: Learner = learner, some: tuple[Tensor, Tensor] = some) -> None:
            learner.backward(student(*some)[0].square().mean())
            learner.update()

        seconds[f"K={k}"] = measured(frame, step, steps)
        parts[f"K={k}"] = {} if frame.warm else one_step(frame, step)
    # last, as sampling is warmed up beside this and compiles the teacher first
    teacher = Call(FAMILY, frame.frozen(frame.config), "bf16", frame.mode, refuse, replay=True).tapped({}, "teacher")
    x, t = inputs(frame, batch)
    seconds["teacher"] = measured(frame, torch.no_grad()(lambda: teacher(x, t)), steps)
    whole = seconds["teacher"] + sum(count * seconds[f"K={k}"] for k, count in WIDTHS.items())
    single = batch / (seconds["teacher"] + seconds["K=1"])
    return {"batch": batch, "seconds": seconds, "single": single, "seven": len(WIDTHS) * batch / whole, "parts": parts}


def tried(frame: Frame, batch: int) -> dict[str, Any]:
    """The bound where cuDNN tries its algorithms out on each shape, which the harness does not let it do."""
    torch.backends.cudnn.benchmark = True
    try:
        return bound(frame, batch)
    finally:
        torch.backends.cudnn.benchmark = False


def one_step(frame: Frame, step: Step) -> dict[str, float]:
    """Milliseconds of a step: until the host is through with it, and of each kind of kernel; how many there are."""
    host = []
    for _ in range(5):
        frame.wait()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    spent, kernels = frame.kinds(step, 1)
    return {"host": 1e3 * statistics.median(host), "kernels": kernels} | {k: v / 1e3 for k, v in spent.items()}


def inputs(frame: Frame, rows: int) -> tuple[Tensor, Tensor]:
    size = frame.config["sample_size"]
    return torch.randn(rows, 3, size, size, device=frame.device), torch.full((rows,), 500, device=frame.device)


def main() -> None:
    frame = Frame("training", parser(__doc__ or "").parse_args())
    batch = 8 if frame.small else 256
    true_float32()
    frame.part("plain", lambda: one_after_the_other(frame, batch, compiled=False))
    frame.part("ours_1", lambda: together(frame, batch, [1]))
    frame.part("bound", lambda: bound(frame, batch))
    frame.part("ours_7", lambda: together(frame, batch, [1, 2, 4]))
    if frame.mode.compile != "off":
        frame.part("plain_compiled", lambda: one_after_the_other(frame, batch, compiled=True))
    frame.part("tried", lambda: tried(frame, batch))
    print(json.dumps(frame.found, indent=1))


if __name__ == "__main__":
    main()
