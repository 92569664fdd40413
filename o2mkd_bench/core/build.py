"""From a suite to its plan: datasets, teachers, the grid of cells, baselines, and the stages they share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from .checkpoints import read_checkpoint
from .errors import UserError
from .grid import time_grid
from .identity import identity, resolved
from .intervals import Interval, Law
from .jobs import Job
from .plan import AXES, Cell, Plan, Stage, Trained
from .plugins import Registry
from .plugins import registry as default_registry
from .program import Program, Sampler
from .schedule import NoiseSchedule
from .suite import MethodEntry, SamplerEntry, StudentEntry, Suite, TeacherEntry, Use, WrapperEntry
from .training import Recipe, Source, TeacherSource, Trainer, at, baseline_steps, reference

# Where a hub teacher lies on this machine, or None while it is not downloaded.
Locate = Callable[[str, str | None], Path | None]


@dataclass(frozen=True)
class Machine:
    """What a speed reading depends on beside the plan."""

    device: str
    name: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Trunk:
    """The part of a cell before its sampler: what is trained, from what, for whom."""

    recipe: Recipe
    trained: Trained
    labels: Mapping[str, Any]
    role: str = "student"
    baseline_of: tuple[str, ...] = ()


def build(
    suite: Suite,
    machine: Machine,
    locate: Locate,
    only: Sequence[Callable[[Mapping[str, Any]], bool]] = (),
    registry: Registry | None = None,
) -> Plan:
    """The plan of ``suite``.

    Args:
        only: further predicates on a cell's labels, beside the suite's own include and exclude.

    Raises:
        UserError: when the suite cannot be planned, or nothing is left of it.
    """
    plan = Builder(suite, machine, locate, registry or default_registry()).build(only)
    if not plan.cells:
        raise UserError(f"{at(suite, 'include')}: no cell is left after include, exclude and --only; relax one of them")
    return plan


class Builder:
    """Walks the axes and adds stages; see ``build``."""

    def __init__(self, suite: Suite, machine: Machine, locate: Locate, registry: Registry) -> None:
        self.suite = suite
        self.machine = machine
        self.locate = locate
        self.registry = registry
        self.plan = Plan()
        self.trainer = Trainer(suite, registry, self.plan)
        self.program = lru_cache(maxsize=None)(self._program)
        self.sampler = lru_cache(maxsize=None)(self._sampler)
        self.samplers = dict(enumerate(suite.samplers))

    def build(self, only: Sequence[Callable[[Mapping[str, Any]], bool]]) -> Plan:
        found: dict[str, Cell] = {}
        for cell in self._cells(only):
            key = cell.identity or cell.describe()
            if key in found:
                found[key] = replace(found[key], baseline_of=(*found[key].baseline_of, *cell.baseline_of))
            else:
                found[key] = cell
        self.plan.cells = list(found.values())
        used = self.plan.closure(self.plan.wanted())
        self.plan.stages = used
        return self.plan

    def _wanted(self, labels: Mapping[str, Any], only: Sequence[Callable[[Mapping[str, Any]], bool]]) -> bool:
        return self.suite.selects(labels) and all(accept(labels) for accept in only)

    def _cells(self, only: Sequence[Callable[[Mapping[str, Any]], bool]]) -> Iterator[Cell]:
        for use in self.suite.datasets:
            source = self._source(use)
            self._references(source)
            for entry in self.suite.teachers:
                if entry.dataset != use.label:
                    continue
                teacher = self._teacher(entry, source)
                base = {"dataset": use.label, "teacher": entry.name}
                if teacher is None:
                    yield Cell({**dict.fromkeys(AXES, ""), **base}, "teacher", unresolved=_unresolved(entry))
                    continue
                yield from self._teacher_cells(source, teacher, base, only)
                for trunk in self._trunks(source, teacher, base, only):
                    yield from self._student_cells(source, trunk, only)

    # sources

    def _source(self, use: Use) -> Source:
        reader = use.plugin.load()(use.options, self.suite.base)
        info = reader.info()
        spec = {
            **reference(use),
            "fingerprint": info.fingerprint,
            "channels": info.channels,
            "size": info.size,
        }
        local = {"options": use.options.model_dump(mode="json"), "base": str(self.suite.base), "source": info.source}
        stage = self.plan.add(Stage.make("data", f"data {use.label}", spec, local=local))
        return Source(use, stage, info.channels, info.size, info.flip)

    def _teacher(self, entry: TeacherEntry, source: Source) -> TeacherSource | None:
        if entry.train is not None:
            return self._trained_teacher(entry, source)
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
                f"{where}: the teacher draws {shape[0]} x {shape[1]} x {shape[1]} images, dataset {source.use.label} has "
                f"{source.channels} x {source.size} x {source.size}; name another teacher or dataset"
            )
        made = TeacherSource(entry.name, "", checkpoint.family, config, checkpoint.schedule, checkpoint.prediction)
        network = made.network(config, checkpoint.prediction)
        spec = {"source": "checkpoint", "hash": checkpoint.hash, "network": network}
        stage = Stage.make("teacher", f"teacher {entry.name}", spec, local={"path": str(path), "schedule": given})
        return replace(made, stage=self.plan.add(stage))

    def _trained_teacher(self, entry: TeacherEntry, source: Source) -> TeacherSource:
        assert entry.train is not None
        recipe = entry.train
        family = recipe.model.plugin
        config = family.load()().teacher_config(recipe.model.options, source.channels, source.size)
        schedule = NoiseSchedule(**entry.schedule.model_dump()) if entry.schedule else NoiseSchedule()
        training = self.suite.training.merged(recipe.training)
        steps = recipe.images // training.batch
        if steps < 1:
            where = at(self.suite, f"teachers.{entry.name}.train.images")
            raise UserError(f"{where}: {recipe.images} images are less than one batch of {training.batch}; raise it")
        everything = Interval(0, schedule.timesteps)
        job = Job("teacher", everything, everything, Law.uniform(everything), training.batch, steps, steps)
        made = TeacherSource(entry.name, "", family, config, schedule, entry.prediction)
        method = self.registry.get("kd_methods", "none")
        spec = {
            "source": "train",
            "network": made.network(config, made.prediction),
            "methods": [{"name": method.name, "version": method.version, "options": {}}],
            "training": resolved(training),
            "job": job.spec(),
            "start": "scratch",
            "flip": source.flip,
            "seed": recipe.seed,
            "precision": self.suite.precision,
            "store_dtype": "fp32",
        }
        local = {"checkpoint_every": self.suite.checkpoint_every}
        stage = Stage.make("teacher", f"teacher {entry.name}", spec, {"data": (source.stage,)}, local)
        return replace(made, stage=self.plan.add(stage))

    # the grid

    def _trunks(
        self,
        source: Source,
        teacher: TeacherSource,
        base: Mapping[str, Any],
        only: Sequence[Callable[[Mapping[str, Any]], bool]],
    ) -> Iterator[Trunk]:
        s = self.suite
        for student, method, wrapper, budget, seed in itertools.product(
            s.students, s.methods, s.wrappers, s.budgets, s.seeds
        ):
            labels = {
                **base,
                "student": student.name,
                "method": method.label,
                "wrapper": wrapper.label,
                "budget": budget.label,
                "seed": seed,
            }
            recipe = self._recipe(source, teacher, student, method, wrapper, seed, budget.images)
            jobs = self.trainer.jobs(recipe)
            trunk = Trunk(recipe, self.trainer.train(recipe, jobs), labels)
            yield trunk
            if not wrapper.use.plugin.load().lifts:
                continue
            for rule in s.baselines:
                yield self._baseline(trunk, rule)

    def _recipe(
        self,
        source: Source,
        teacher: TeacherSource,
        student: StudentEntry,
        method: MethodEntry,
        wrapper: WrapperEntry,
        seed: int,
        images: int,
    ) -> Recipe:
        tag = f"{source.use.label}/{student.name}/{method.label}/{wrapper.label}"
        return Recipe(source, teacher, student, method, wrapper, seed, images, tag)

    def _baseline(self, trunk: Trunk, rule: str) -> Trunk:
        recipe = trunk.recipe
        steps = baseline_steps(trunk.trained.jobs, rule, recipe.training(self.suite).batch)
        name = f"single ({'total' if rule == 'equal_total' else 'per student'} of {recipe.wrapper.label})"
        plain = replace(recipe, tag=recipe.tag.rsplit("/", 1)[0] + f"/{name}")
        trained = self.trainer.train(plain, self.trainer.jobs(plain, steps))
        labels = {**trunk.labels, "wrapper": name}
        return Trunk(plain, trained, labels, "baseline", (f"{rule} of {recipe.wrapper.label}",))

    def _student_cells(
        self, source: Source, trunk: Trunk, only: Sequence[Callable[[Mapping[str, Any]], bool]]
    ) -> Iterator[Cell]:
        for number, entry in self.samplers.items():
            for steps, weights in itertools.product(entry.steps, self.suite.sampling.weights):
                labels = {**trunk.labels, "sampler": entry.label, "steps": steps, "weights": weights}
                asked = labels if trunk.role == "student" else {**labels, "wrapper": trunk.recipe.wrapper.label}
                if not self._wanted(asked, only):
                    continue
                sampler = self.sampler(number)
                trained = trunk.trained
                if sampler.needs_rounds:
                    trained = self.trainer.rounds(trunk.recipe, trained, sampler, entry, steps, weights)
                yield self._cell(source, trunk.recipe.teacher, trained, labels, number, (trunk.role, trunk.baseline_of))

    def _teacher_cells(
        self,
        source: Source,
        teacher: TeacherSource,
        base: Mapping[str, Any],
        only: Sequence[Callable[[Mapping[str, Any]], bool]],
    ) -> Iterator[Cell]:
        blank = dict.fromkeys(("student", "method", "wrapper", "budget"), "")
        trained = Trained((), (), (teacher.stage,), (teacher.config,), teacher.prediction)
        for number, entry in self.samplers.items():
            if self.sampler(number).needs_rounds:
                continue
            for steps, seed in itertools.product(entry.steps, self.suite.seeds):
                labels = {**base, **blank, "sampler": entry.label, "steps": steps, "weights": "ema", "seed": seed}
                if all(accept(labels) for accept in only):
                    yield self._cell(source, teacher, trained, labels, number, ("teacher", ()))

    # what follows training

    def _sampler(self, number: int) -> Sampler:
        use = self.samplers[number].use
        made: Sampler = use.plugin.load()(use.options)
        return made

    def _program(self, number: int, steps: int, edges: tuple[int, ...], schedule: NoiseSchedule) -> Program:
        entry = self.samplers[number]
        where = at(self.suite, f"samplers.{entry.label}")
        try:
            grid = time_grid(entry.spacing or self.suite.sampling.spacing, steps, schedule.timesteps)
            program = self.sampler(number).program(schedule, grid, edges, entry.clip or self.suite.sampling.clip)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        declared = self.sampler(number).nfe(steps)
        if program.nfe != declared:
            raise UserError(f"{where}: declares {declared} evaluations for {steps} steps, its program has {program.nfe}")
        return program

    def _cell(
        self,
        source: Source,
        teacher: TeacherSource,
        trained: Trained,
        labels: Mapping[str, Any],
        number: int,
        role: tuple[str, tuple[str, ...]],
    ) -> Cell:
        s, entry = self.suite, self.samplers[number]
        steps, edges = labels["steps"], trained.edges
        program = self.program(number, steps, edges, teacher.schedule)
        course = {
            "sampler": self._sampler_reference[number],
            "steps": steps,
            "spacing": entry.spacing or s.sampling.spacing,
            "clip": entry.clip or s.sampling.clip,
            "edges": list(edges),
            "precision": s.precision,
        }
        name = " ".join(str(labels[a]) for a in ("dataset", "student", "method", "wrapper") if labels[a]) or "teacher"
        name = f"{name} {entry.label} {steps} {labels['weights']} seed {labels['seed']}"
        drawn = {
            **course,
            "weights": labels["weights"],
            "images": s.sampling.images,
            "seed": labels["seed"],
            "shape": [source.channels, source.size, source.size],
        }
        samples = self.plan.add(
            Stage.make("samples", f"samples {name}", drawn, {"students": trained.students}, {"batch": s.sampling.batch})
        )
        scores = tuple(
            self.plan.add(Stage.make("score", f"score {name}", spec, {**needs, "samples": (samples,)}, local))
            for spec, needs, local in self._scoring(source)
        )
        return Cell(
            labels=labels,
            role=role[0],
            identity=identity([samples, scores]),
            samples=samples,
            scores=scores,
            speed=self._speed(teacher, trained, course, source, name) if s.speed.enabled else "",
            probe=self._probe(source, teacher, trained, labels) if s.probe.enabled and labels["student"] else "",
            nfe=program.nfe,
            calls=tuple(program.calls(edges, teacher.schedule.timesteps)),
            trained=trained,
            facts={"spacing": course["spacing"], "clip": course["clip"], "precision": s.precision},
            baseline_of=role[1],
        )

    @cached_property
    def _sampler_reference(self) -> dict[int, dict[str, Any]]:
        return {number: reference(entry.use) for number, entry in self.samplers.items()}

    def _speed(
        self, teacher: TeacherSource, trained: Trained, course: Mapping[str, Any], source: Source, name: str
    ) -> str:
        spec = {
            **course,
            "networks": [identity(config) for config in trained.configs],
            "batch": self.suite.speed.batch,
            "repeats": self.suite.speed.repeats,
            "shape": [source.channels, source.size, source.size],
            "device": self.machine.name,
            "versions": dict(self.machine.versions),
            "compile": "off",
        }
        local = {"networks": [teacher.network(config, trained.prediction) for config in trained.configs]}
        return self.plan.add(Stage.make("speed", f"speed {name}", spec, local=local))

    def _probe(self, source: Source, teacher: TeacherSource, trained: Trained, labels: Mapping[str, Any]) -> str:
        if trained.rounds:
            return ""
        spec = {
            "points": self.suite.probe.points,
            "images": self.suite.probe.images,
            "edges": list(trained.edges),
            "weights": labels["weights"],
            "precision": self.suite.precision,
        }
        needs = {"data": (source.stage,), "teacher": (teacher.stage,), "students": trained.students}
        name = " ".join(str(labels[a]) for a in ("dataset", "student", "method", "wrapper"))
        return self.plan.add(Stage.make("probe", f"probe {name} seed {labels['seed']}", spec, needs))

    @lru_cache(maxsize=None)  # noqa: B019 - a builder lives as long as one plan
    def _scoring(self, source: Source) -> tuple[tuple[dict[str, Any], dict[str, tuple[str, ...]], dict[str, Any]], ...]:
        """Spec, needs and local data of the score stages of one set of images, one a feature network."""
        networks: dict[str, tuple[dict[str, Any], list[Use]]] = {}
        for use in self.suite.metrics:
            self._check_images(use, source)
            network = use.plugin.traits["network_id"](use.options, source.use.name, self.suite.base)
            networks.setdefault(identity(network), (network, []))[1].append(use)
        found = []
        for network, uses in networks.values():
            metrics = [reference(u) for u in uses]
            local = {
                "dataset": source.use.name,
                "options": [u.options.model_dump(mode="json") for u in uses],
                "base": str(self.suite.base),
            }
            spec = {"network": network, "metrics": metrics, "images": self.suite.sampling.images}
            label = f"reference {source.use.label} {network['network']}"
            basis = {"network": network, "metrics": metrics}
            known = Stage.make("reference", label, basis, {"data": (source.stage,)}, local)
            needs = {"data": (source.stage,), "reference": (self.plan.add(known),)}
            found.append((spec, needs, local))
        return tuple(found)

    def _check_images(self, use: Use, source: Source) -> None:
        check = use.plugin.traits.get("check_images")
        if check is not None:
            try:
                check(use.options, source.use.name, self.suite.sampling.images)
            except UserError as error:
                raise UserError(at(self.suite, str(error))) from None

    def _references(self, source: Source) -> None:
        """What the scores of noise and of held-out real images are, so that a reader can place the rows."""
        for spec, needs, local in self._scoring(source):
            for what in ("noise", "held-out real images"):
                own = {**spec, "source": what, "shape": [source.channels, source.size, source.size]}
                stage = Stage.make("score", f"score {source.use.label} {what}", own, needs, local)
                self.plan.references.append(
                    {"dataset": source.use.label, "what": what, "score": self.plan.add(stage)}
                )


def _unresolved(entry: TeacherEntry) -> str:
    return f"hub teacher {entry.hub} is not on this machine yet; `run` downloads it"
