"""What a grid starts from: the stages of datasets and teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints import read_checkpoint
from .errors import UserError
from .identity import resolved
from .intervals import Interval, Law
from .jobs import Job
from .plan import Plan, Stage
from .plugins import Registry
from .schedule import NoiseSchedule
from .suite import Suite, TeacherEntry, Use
from .training import Source, TeacherSource, at, reference

# Where a hub teacher lies on this machine, or None while it is not downloaded.
Locate = Callable[[str, str | None], Path | None]


class Inputs:
    """Adds datasets and teachers to a plan."""

    def __init__(self, suite: Suite, registry: Registry, plan: Plan, locate: Locate) -> None:
        self.suite = suite
        self.registry = registry
        self.plan = plan
        self.locate = locate

    def source(self, use: Use) -> Source:
        """The dataset ``use``, its content known by its fingerprint.

        Raises:
            UserError: when its data are not there.
        """
        try:
            info = use.plugin.load()(use.options, self.suite.base).info()
        except UserError as error:
            raise type(error)(at(self.suite, str(error))) from None
        spec = {
            **reference(use),
            "fingerprint": info.fingerprint,
            "channels": info.channels,
            "size": info.size,
        }
        local = {"options": use.options.model_dump(mode="json"), "base": str(self.suite.base), "source": info.source}
        stage = self.plan.add(Stage.make("data", f"data {use.label}", spec, local=local))
        return Source(use, stage, info.channels, info.size, info.flip)

    def teacher(self, entry: TeacherEntry, source: Source) -> TeacherSource | None:
        """The teacher ``entry`` for ``source``; None for one of the hub that is not on this machine.

        Raises:
            UserError: when it cannot be read or trained, or draws images of another shape.
        """
        if entry.train is not None:
            return self._trained(entry, source)
        where = at(self.suite, f"teachers.{entry.name}")
        path = self.suite.base / entry.path if entry.path else self.locate(entry.hub or "", entry.revision)
        if path is None:
            return None
        given = None if entry.schedule is None else NoiseSchedule(**entry.schedule.model_dump()).scheduler_config()
        checkpoint = read_checkpoint(path, where, schedule=given)
        config = checkpoint.model
        shape = (config.get("in_channels"), config.get("sample_size"))
        if shape != (source.channels, source.size):
            raise UserError(
                f"{where}: the teacher draws {shape[0]} x {shape[1]} x {shape[1]} images, dataset {source.use.label} "
                f"has {source.channels} x {source.size} x {source.size}; name another teacher or dataset"
            )
        made = TeacherSource(entry.name, "", checkpoint.family, config, checkpoint.schedule, checkpoint.prediction)
        network = made.network(config, checkpoint.prediction)
        spec = {"source": "checkpoint", "hash": checkpoint.hash, "network": network}
        stage = Stage.make("teacher", f"teacher {entry.name}", spec, local={"path": str(path), "schedule": given})
        return replace(made, stage=self.plan.add(stage))

    def _trained(self, entry: TeacherEntry, source: Source) -> TeacherSource:
        assert entry.train is not None
        recipe = entry.train
        where = at(self.suite, f"teachers.{entry.name}.train")
        family = recipe.model.plugin
        try:
            config = family.load()().teacher_config(recipe.model.options, source.channels, source.size)
        except UserError as error:
            raise type(error)(f"{where}.model: {error}") from None
        schedule = NoiseSchedule(**entry.schedule.model_dump()) if entry.schedule else NoiseSchedule()
        training = self.suite.training.merged(recipe.training)
        steps = recipe.images // training.batch
        if steps < 1:
            raise UserError(
                f"{where}.images: {recipe.images} images are less than one batch of {training.batch}; raise it"
            )
        everything = Interval(0, schedule.timesteps)
        job = Job("teacher", everything, everything, Law.uniform(everything), training.batch, steps, steps)
        made = TeacherSource(entry.name, "", family, config, schedule, entry.prediction)
        method = self.registry.get("kd_methods", "none")
        spec: dict[str, Any] = {
            "source": "train",
            "network": made.network(config, made.prediction),
            "methods": [{"name": method.key, "version": method.version, "options": {}}],
            "training": resolved(training),
            "job": job.spec(),
            "start": "scratch",
            "flip": source.flip,
            "seed": recipe.seed,
            "precision": self.suite.precision,
            "store_dtype": "fp32",
        }
        local = {
            "checkpoint_every": self.suite.checkpoint_every,
            "checkpoint_activations": self.suite.checkpoint_activations,
        }
        stage = Stage.make("teacher", f"teacher {entry.name}", spec, {"data": (source.stage,)}, local)
        return replace(made, stage=self.plan.add(stage))
