"""Stages that train on the noised data: teachers, shared warm-ups, students and experts."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.intervals import Interval, Law
from ..core.plan import Stage
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..core.suite import Training
from ..engine.cost import Cost, network_cost
from ..engine.denoiser import DTYPES, Call, Tables
from ..engine.distil import Distil, Methods, Setting, Teacher
from ..engine.kd import KDMethod
from ..engine.learner import Course, Learner
from ..engine.loop import Log, Objective, Watch, train
from ..engine.philox import Philox
from ..engine.stream import Stream
from ..engine.weights import load_checkpoint, load_weights, read_weights, save_weights
from .bench import Bench, Stopwatch, write_json


def make_teacher(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A denoiser artifact from a checkpoint or from training; ``raw`` weights only where it was trained."""
    if stage.spec["source"] == "checkpoint":
        _copy_checkpoint(stage, bench, draft)
    else:
        make_student(stage, bench, draft)


def make_student(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A denoiser artifact: ``network.json``, ``ema.safetensors``, ``raw.safetensors``, ``log.json``."""
    learner, log = _train(stage, bench)
    write_denoiser(stage, bench, draft, learner, log)
    draft.meta["seconds"] = log.seconds


def make_state(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A training state that experts continue: raw weights, average, moments, adapters."""
    learner, log = _train(stage, bench)
    learner.save(draft.dir / "state.safetensors", log.data())
    write_json(draft.dir / "network.json", stage.spec["network"])
    write_json(draft.dir / "log.json", log.data())
    draft.meta["seconds"] = log.seconds


def write_denoiser(stage: Stage, bench: Bench, draft: Draft, learner: Learner, log: Log) -> None:
    """Weights in the suite's store dtype, what the network is, what training saw, and what it costs."""
    dtype = DTYPES[stage.spec["store_dtype"]]
    save_weights(learner.network, draft.dir / "raw.safetensors", dtype)
    save_weights(learner.ema.module, draft.dir / "ema.safetensors", dtype)
    about = stage.spec["network"]
    write_json(draft.dir / "network.json", about)
    write_json(draft.dir / "log.json", log.data())
    draft.meta["cost"] = dict(cost(bench, about))


def cost(bench: Bench, about: Mapping[str, Any]) -> Cost:
    """Parameters and MACs of a network, from what its artifact says of it."""
    config = about["config"]
    return network_cost(bench.family(about), config, config["in_channels"], config["sample_size"])


def build(bench: Bench, about: Mapping[str, Any], seed: int) -> nn.Module:
    """A fresh network on the device; its initial weights depend on the seed and the architecture alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Philox.torch_seed(seed, "initialisation"))
        network = bench.family(about).build(about["config"])
    return bench.place(network).train()


def course(job: Mapping[str, Any]) -> Course:
    """The course of a job in its stage's spec; a lineage reaches its horizon with its last step."""
    return Course(job["steps"], job["offset"], job["horizon"], Fraction(job["pace"]))


def watcher(stage: Stage, bench: Bench, clock: Stopwatch) -> Watch:
    """Progress to the observers, checkpoints into the stage's scratch folder."""

    def progress(done: int, total: int, images: int, loss: float) -> None:
        bench.progress(stage, done, total, images=images, loss=loss, seconds=clock.seconds())

    def say(text: str) -> None:
        bench.say(stage, text)

    folder: Path = bench.store.work(stage.identity)
    return Watch(progress, say, folder / "checkpoint.safetensors", stage.local["checkpoint_every"])


def run(stage: Stage, bench: Bench, learner: Learner, objective: Objective, task: tuple[Stream, Interval]) -> Log:
    """Train under the store's guard, so that a full disk at a checkpoint is one clear sentence."""
    with bench.store.guard():
        return train(learner, objective, *task, watcher(stage, bench, Stopwatch()))


def _train(stage: Stage, bench: Bench) -> tuple[Learner, Log]:
    spec = stage.spec
    about, job = spec["network"], spec["job"]
    training = Training.model_validate(spec["training"])
    data = bench.images(stage.needs["data"][0])
    device = data.device
    schedule = NoiseSchedule.from_scheduler_config(about["schedule"])
    stream = Stream(
        spec["seed"],
        Law.from_spec(job["law"]),
        job["batch"],
        len(data),
        spec["flip"],
        training.group,
        stage.needs["data"][0],
    )
    interval = Interval(*job["trains"])
    setting = Setting(stream, data, Tables.of(schedule, device), about["prediction"], interval, job["horizon"])
    network = build(bench, about, spec["seed"])
    if spec["start"] == "teacher":
        load_weights(network, bench.store.read(stage.needs["teacher"][0], "ema.safetensors"))
    student = Call(bench.family(about), network, spec["precision"])
    methods: dict[str, KDMethod] = {}
    for ref in spec["methods"]:
        plugin = bench.registry.get("kd_methods", ref["name"])
        methods[ref["name"]] = plugin.load()(plugin.parse(ref["options"]))
    objective = Distil(setting, student, Methods(methods), _teacher(stage, bench))
    learner = Learner(network, training.model_dump(), course(job), spec["precision"], objective.adapters())
    if spec["start"] == "continue":
        learner.load(bench.store.read(stage.needs["start"][0], "state.safetensors"), resume=False)
    return learner, run(stage, bench, learner, objective, (stream, interval))


def _teacher(stage: Stage, bench: Bench) -> Teacher | None:
    if "teacher" not in stage.needs:
        return None
    artifact = stage.needs["teacher"][0]
    about = bench.network(artifact)
    call = Call(bench.family(about), bench.denoiser(artifact, "ema"), stage.spec["precision"])
    return Teacher(call, about["prediction"])


def _copy_checkpoint(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A checkpoint's weights, checked strictly against the architecture, stored in their own dtype."""
    from ..core.checkpoints import read_checkpoint

    about = stage.spec["network"]
    checkpoint = read_checkpoint(Path(stage.local["path"]), stage.label, schedule=stage.local["schedule"])
    load_checkpoint(checkpoint, bench.family(about))
    state = read_weights(checkpoint.weights)
    floating = {v.dtype for v in state.values() if v.is_floating_point()}
    save_weights(state, draft.dir / "ema.safetensors", floating.pop() if len(floating) == 1 else torch.float32)
    write_json(draft.dir / "network.json", about)
    draft.meta["cost"] = dict(cost(bench, about))
