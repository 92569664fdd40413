"""What a grid starts from: the stages of datasets and teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint, read_checkpoint
from .configs import teacher_config
from .data import DatasetInfo
from .errors import PluginError, UserError
from .fingerprint import content_hash
from .identity import resolved
from .intervals import Interval, Law
from .jobs import Job
from .plan import Plan, Stage
from .plugins import Registry
from .schedule import NoiseSchedule
from .suite import Suite, TeacherEntry, Use
from .training import Latent, Source, TeacherSource, at, reference

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
        where = at(self.suite, f"datasets.{use.label}")
        # a dataset names its own key
        with use.plugin.calling("info()", where, tell=lambda text: at(self.suite, text)):
            info = use.plugin.load()(use.options, self.suite.base).info()
        if wrong := _wrong(info):
            raise PluginError(f"{where}: info() of plugin datasets:{use.plugin.key} {wrong}; correct the plugin")
        spec = {
            **reference(use),
            "fingerprint": info.fingerprint,
            "channels": info.channels,
            "size": info.size,
        }
        local = {"options": use.options.model_dump(mode="json"), "base": str(self.suite.base), "source": info.source}
        stage = self.plan.add(Stage.make("data", f"data {use.label}", spec, local=local))
        return Source(use, stage, info.channels, info.size, info.flip, info.captions)

    def teacher(self, entry: TeacherEntry, source: Source) -> TeacherSource | None:
        """The teacher ``entry`` for ``source``; None for one of the hub that is not on this machine.

        Raises:
            UserError: when it cannot be read or trained, or draws images of another shape.
        """
        if entry.train is not None:
            return self._trained(entry, source)
        where = at(self.suite, f"teachers.{entry.name}")
        try:
            path = self.suite.base / entry.path if entry.path else self.locate(entry.hub or "", entry.revision)
        except UserError as error:
            raise UserError(f"{where}.hub: {error}") from error
        if path is None:
            return None
        given = None if entry.schedule is None else NoiseSchedule(**entry.schedule.model_dump()).scheduler_config()
        checkpoint = read_checkpoint(path, where, schedule=given)
        config = checkpoint.model
        shape = (config.get("in_channels"), config.get("sample_size"))
        if checkpoint.codec:
            self._check_captioned(checkpoint, source, where)
        elif shape != (source.channels, source.size):
            raise UserError(
                f"{where}: the teacher draws {shape[0]} x {shape[1]} x {shape[1]} images, dataset {source.use.label} "
                f"has {source.channels} x {source.size} x {source.size}; name another teacher or dataset"
            )
        made = TeacherSource(
            entry.name, "", checkpoint.family, config, checkpoint.schedule, checkpoint.prediction, given=True
        )
        network = made.network(config, checkpoint.prediction)
        spec = {"source": "checkpoint", "hash": checkpoint.hash, "network": network}
        stage = Stage.make("teacher", f"teacher {entry.name}", spec, local={"path": str(path), "schedule": given})
        made = replace(made, stage=self.plan.add(stage))
        return replace(made, codec=self._codec(made, checkpoint, path)) if checkpoint.codec else made

    def _check_captioned(self, checkpoint: Checkpoint, source: Source, where: str) -> None:
        """Raise UserError unless the dataset has captions, images of the teacher's size, and prompts enough."""
        captions, size = source.captions, checkpoint.model.get("sample_size")
        if captions is None or checkpoint.pixels != captions.size or not isinstance(size, int):
            has = "no captions" if captions is None else f"captioned images of {captions.size} pixels"
            raise UserError(
                f"{where}: the teacher draws images of {checkpoint.pixels} pixels from text, dataset "
                f"{source.use.label} has {has}; name another teacher or dataset"
            )
        if self.suite.sampling.images > captions.count:
            raise UserError(
                f"{at(self.suite, 'sampling.images')}: {self.suite.sampling.images} images need as many prompts, "
                f"dataset {source.use.label} has {captions.count}; lower it or raise the dataset's prompts"
            )

    def _codec(self, teacher: TeacherSource, checkpoint: Checkpoint, path: Path) -> str:
        spec = {
            "family": {"name": teacher.family.key, "version": teacher.family.version},
            "files": {name: content_hash(file) for name, file in checkpoint.codec.items()},
        }
        stage = Stage.make("codec", f"codec of {teacher.name}", spec, local={"path": str(path)})
        return self.plan.add(stage)

    def encoded(self, source: Source, teacher: TeacherSource) -> Source:
        """``source`` as ``teacher`` sees it: itself for one on pixels, else with latents and conditions.

        Raises:
            UserError: for guidance where nothing is drawn from text.
        """
        if not teacher.codec:
            if self.suite.sampling.guidance is not None:
                where = at(self.suite, "sampling.guidance")
                raise UserError(f"{where}: teacher {teacher.name} draws from no text; leave the key out")
            return source
        captions, label = source.captions, source.use.label
        assert captions is not None
        local = {"options": source.use.options.model_dump(mode="json"), "base": str(self.suite.base)}
        needs = {"codec": (teacher.codec,)}
        spec = {**reference(source.use), "fingerprint": captions.pairs, "size": captions.size}
        made = Stage.make("latents", f"latents {label} {teacher.name}", spec, needs, local)
        asked = {**reference(source.use), "fingerprint": captions.prompts, "count": captions.count}
        prompts = Stage.make("prompts", f"prompts {label} {teacher.name}", asked, needs, local)
        size = teacher.config["sample_size"]
        shape = (teacher.config["in_channels"], size, size)
        latent = Latent(teacher.codec, self.plan.add(made), self.plan.add(prompts), shape)
        # a mirrored image has other latents than the mirrored latents
        return replace(source, flip=False, latent=latent)

    def _trained(self, entry: TeacherEntry, source: Source) -> TeacherSource:
        assert entry.train is not None
        recipe = entry.train
        where = at(self.suite, f"teachers.{entry.name}.train")
        family = recipe.model.plugin
        if source.captions is not None:
            raise UserError(
                f"{where}: dataset {source.use.label} is for teachers that draw from text; give one by path or hub"
            )
        config = teacher_config(family, recipe.model.options, (source.channels, source.size), f"{where}.model")
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


def _wrong(info: Any) -> str:
    """What is wrong with what a dataset says of itself, in words; empty where nothing is."""
    if not isinstance(info, DatasetInfo):
        return f"returns a {type(info).__name__}, which is no o2mkd_bench.DatasetInfo"
    shape = (info.channels, info.size)
    if not all(isinstance(text, str) and text for text in (info.fingerprint, info.source)):
        return f"has fingerprint {info.fingerprint!r} and source {info.source!r}, both of which are texts"
    if not all(type(number) is int and number > 0 for number in shape):
        return f"has channels and size {shape}, which are positive ints"
    return "" if isinstance(info.flip, bool) else f"has flip {info.flip!r}, which is True or False"
