"""Rounds of progressive distillation: each starts from, and learns two steps of, the students of the round before."""

from __future__ import annotations

from ..core.intervals import Interval, Law
from ..core.plan import Stage
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..core.suite import Training
from ..engine.denoiser import Call, Tables
from ..engine.distil import Setting
from ..engine.halve import Halve
from ..engine.images import open_images
from ..engine.learner import Course, Learner
from ..engine.loop import Member
from ..engine.stream import Stream
from .bench import Bench, Stopwatch
from .train import conditions_of, run, watcher, write_denoiser


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A denoiser artifact; the stream's t counts entries of the round's grid."""
    spec = stage.spec
    about, before, one = spec["network"], spec["before"], spec["round"]
    training = Training.model_validate(spec["training"])
    data = open_images(bench.store.read(stage.needs["data"][0], "train.npy"), bench.device)
    stream = Stream(
        # no round sees the noise of another, nor that of the training before
        spec["seed"] + (spec["number"] + 1) * 1_000_003,
        Law.uniform(Interval(0, len(one["grid"]))),
        spec["batch"],
        len(data),
        spec["flip"],
        training.group,
        stage.needs["data"][0],
    )
    entries = Interval(*spec["entries"])
    schedule = NoiseSchedule.from_scheduler_config(about["schedule"])
    tables, conditions = Tables.of(schedule, data.device), conditions_of(bench, stage.needs["data"][0])
    setting = Setting(stream, data, tables, about["prediction"], entries, spec["steps"], conditions)
    network = bench.denoiser(stage.needs["before"][before["own"]], before["weights"]).requires_grad_(True).train()
    teachers = bench.experts(stage.needs["before"], before["edges"], before["weights"], spec["precision"])
    family = bench.family(about)
    if stage.local["checkpoint_activations"]:
        family.checkpoint_activations(network)
    objective = Halve(
        setting,
        Call(family, network, spec["precision"], bench.mode),
        teachers,
        one["grid"],
        one["fine"],
        spec["clip"],
    )
    learner = Learner(network, training.model_dump(), Course(spec["steps"], horizon=spec["steps"]), spec["precision"])
    member = Member(learner, objective, entries, watcher(stage, bench, Stopwatch()), training.micro_batch)
    write_denoiser(stage, bench, draft, run(bench, objective.source(), member))
