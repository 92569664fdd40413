"""Stages that train on the noised data: teachers, shared warm-ups, students and experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.intervals import Interval, Law
from ..core.models import ModelFamily
from ..core.plan import Stage
from ..core.schedule import NoiseSchedule
from ..core.store import Draft
from ..core.suite import Training
from ..engine.cost import Cost, network_cost
from ..engine.denoiser import DTYPES, Call, Tables
from ..engine.distil import Distil, Methods, Setting
from ..engine.images import Images, open_images
from ..engine.kd import KDMethod
from ..engine.learner import Course, Learner
from ..engine.loop import Member, Watch, train
from ..engine.normalised import Normalised
from ..engine.philox import Philox
from ..engine.shared import Objective, Source, Teacher
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
    write_denoiser(stage, bench, draft, _alone(stage, bench))


def make_state(stage: Stage, bench: Bench, draft: Draft) -> None:
    """A training state that experts continue: raw weights, average, moments, adapters."""
    write_state(stage, bench, draft, _alone(stage, bench))


def write(stage: Stage, bench: Bench, draft: Draft, member: Member) -> None:
    """What a member of a cohort leaves: that of :func:`make_state` or of :func:`make_student`."""
    (write_state if stage.kind == "state" else write_denoiser)(stage, bench, draft, member)


def write_state(stage: Stage, bench: Bench, draft: Draft, member: Member) -> None:
    log = member.log
    member.learner.save(draft.dir / "state.safetensors", log.data())
    write_json(draft.dir / "network.json", stage.spec["network"])
    write_json(draft.dir / "log.json", log.data())
    draft.meta |= {"seconds": log.seconds, "shared_with": log.shared_with}


def write_denoiser(stage: Stage, bench: Bench, draft: Draft, member: Member) -> None:
    """Weights in the suite's store dtype, what the network is, what training saw, and what it costs."""
    learner, log, dtype = member.learner, member.log, DTYPES[stage.spec["store_dtype"]]
    save_weights(learner.network, draft.dir / "raw.safetensors", dtype)
    save_weights(learner.ema.module, draft.dir / "ema.safetensors", dtype)
    about = stage.spec["network"]
    write_json(draft.dir / "network.json", about)
    write_json(draft.dir / "log.json", log.data())
    draft.meta |= {"cost": dict(cost(bench, about)), "seconds": log.seconds, "shared_with": log.shared_with}


def cost(bench: Bench, about: Mapping[str, Any]) -> Cost:
    """Parameters and MACs of a network, from what its artifact says of it."""
    return _counted(type(bench.family(about)), json.dumps(about["config"], sort_keys=True))


@lru_cache(maxsize=64)
def _counted(family: type[ModelFamily], config: str) -> Cost:
    # experts that end together are of one architecture
    known = json.loads(config)
    return network_cost(family(), known, known["in_channels"], known["sample_size"])


def build(bench: Bench, about: Mapping[str, Any], seed: int) -> nn.Module:
    """A fresh network on the device; its initial weights depend on the seed and the architecture alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Philox.torch_seed(seed, "initialisation"))
        network = bench.family(about).built(about["config"])
    return bench.place(network).train()


def course(job: Mapping[str, Any]) -> Course:
    """The course of a job in its stage's spec; a lineage reaches its horizon with its last step."""
    return Course(job["steps"], job["offset"], job["horizon"], Fraction(job["pace"]), job.get("restart", 0))


def watcher(stage: Stage, bench: Bench, clock: Stopwatch) -> Watch:
    """Progress to the observers, checkpoints into the stage's scratch folder."""

    def progress(done: int, total: int, images: int, loss: float) -> None:
        bench.progress(stage, done, total, images=images, loss=loss, seconds=clock.seconds())

    def say(text: str) -> None:
        bench.say(stage, text)

    folder: Path = bench.store.work(stage.identity)
    return Watch(progress, say, folder / "checkpoint.safetensors", stage.local["checkpoint_every"])


def run(bench: Bench, source: Source, member: Member) -> Member:
    """Train under the store's guard, so that a full disk at a checkpoint is one clear sentence."""
    with bench.store.guard():
        train(source, member)
    return member


def source_of(stage: Stage, bench: Bench) -> Source:
    """The stream of a stage, with its images and schedule."""
    spec, (data,) = stage.spec, stage.needs["data"]
    job, group = spec["job"], Training.model_validate(spec["training"]).group
    images = open_images(bench.store.read(data, "train.npy"), bench.device)
    own, law = job.get("stream", 0), Law.from_spec(job["law"])
    seed = Philox.torch_seed(spec["seed"], f"stream {own}") if own else spec["seed"]
    stream = Stream(seed, law, job["batch"], len(images), spec["flip"], group, data)
    schedule = NoiseSchedule.from_scheduler_config(spec["network"]["schedule"])
    return Source(stream, images, Tables.of(schedule, images.device), conditions=conditions_of(bench, data))


def conditions_of(bench: Bench, data: str) -> Images | None:
    """What networks follow at each of a training set, where they follow something."""
    path = bench.conditions(data)
    return None if path is None else open_images(path, bench.device)


def teacher_of(stage: Stage, bench: Bench) -> Teacher | None:
    """The frozen teacher of a stage that needs one."""
    if "teacher" not in stage.needs:
        return None
    artifact = stage.needs["teacher"][0]
    about = bench.network(artifact)
    family, network = bench.family(about), bench.denoiser(artifact, "ema")
    call = Call(family, network, stage.spec["precision"], bench.mode, bench.tell, replay=True)
    return Teacher(call, about["prediction"])


def begin(stage: Stage, bench: Bench) -> nn.Module:
    """The network of a stage before its first step; one that continues a state takes it over when it is enlisted."""
    network = build(bench, stage.spec["network"], stage.spec["seed"])
    if stage.spec["start"] == "teacher":
        teacher, about = stage.needs["teacher"][0], stage.spec["network"]
        names = bench.family(about).inherited(network, bench.network(teacher)["config"])
        load_weights(network, bench.store.read(teacher, "ema.safetensors"), names)
    return network


def enlist(stage: Stage, bench: Bench, source: Source, network: nn.Module, teacher: Teacher | None) -> Member:
    """All that a stage trains with: ``network``, its methods, its optimiser, and where it speaks to."""
    spec = stage.spec
    about, job, training = spec["network"], spec["job"], Training.model_validate(spec["training"])
    interval = Interval(*job["trains"])
    # students that start alike on streams of their own have the adapters and draws of one seed, as experts do
    draws = replace(source.stream, seed=spec["seed"])
    setting = Setting(
        draws, source.data, source.tables, about["prediction"], interval, job["horizon"], source.conditions
    )
    methods: dict[str, KDMethod] = {}
    for ref in spec["methods"]:
        plugin = bench.registry.get("kd_methods", ref["name"])
        methods[ref["name"]] = plugin.load()(plugin.parse(ref["options"]))
    family = bench.family(about)
    if stage.local["checkpoint_activations"]:
        family.checkpoint_activations(network)
    # passes of parts or of intervals add up their gradients, and recomputed ones draw in the middle
    whole = training.micro_batch is None and "normalise" not in job and not stage.local["checkpoint_activations"]
    student = Call(family, network, spec["precision"], bench.mode, bench.tell, replay=whole)
    objective: Objective = Distil(setting, student, Methods(methods), teacher)
    if "normalise" in job:
        objective = Normalised(objective, source, job["normalise"])
    learner = Learner(network, training.model_dump(), course(job), spec["precision"], objective.adapters())
    if spec["start"] == "continue":
        learner.load(bench.store.read(stage.needs["start"][0], "state.safetensors"), resume=False)
    return Member(learner, objective, interval, watcher(stage, bench, Stopwatch()), training.micro_batch)


def _alone(stage: Stage, bench: Bench) -> Member:
    source = source_of(stage, bench)
    return run(bench, source, enlist(stage, bench, source, begin(stage, bench), teacher_of(stage, bench)))


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
