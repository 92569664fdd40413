"""The stages that train: a teacher, the jobs of a wrapper, the rounds of step distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import UserError
from .identity import resolved
from .intervals import Interval, Law
from .jobs import Job, Lift, Wrapper, check_cover, lineage, total_images
from .plan import Plan, Stage, Trained
from .plugins import Plugin, Registry
from .program import Round, Sampler
from .schedule import NoiseSchedule
from .suite import MethodEntry, SamplerEntry, StudentEntry, Suite, Training, Use, WrapperEntry


def at(suite: Suite, key: str) -> str:
    """Where in which file a key stands, for the start of an error."""
    return f"{suite.path}: {key}" if suite.path is not None else key


def reference(use: Use) -> dict[str, Any]:
    """A plugin and its options as they enter an identity."""
    return {"name": use.plugin.name, "version": use.plugin.version, "options": resolved(use.options)}


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset in the plan."""

    use: Use
    stage: str
    channels: int
    size: int
    flip: bool


@dataclass(frozen=True)
class TeacherSource:
    """A teacher in the plan: its artifact, and what is known of it without opening it."""

    name: str
    stage: str
    family: Plugin
    config: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction: str

    def network(self, config: Mapping[str, Any], prediction: str) -> dict[str, Any]:
        """What a trained artifact says of its network."""
        return {
            "family": {"name": self.family.name, "version": self.family.version},
            "config": dict(config),
            "schedule": self.schedule.scheduler_config(),
            "prediction": prediction,
        }


@dataclass(frozen=True)
class Recipe:
    """One combination of the training axes; ``tag`` names it for people."""

    source: Source
    teacher: TeacherSource
    student: StudentEntry
    method: MethodEntry
    wrapper: WrapperEntry
    seed: int
    images: int
    tag: str

    def training(self, suite: Suite, sampler: SamplerEntry | None = None) -> Training:
        rounds = () if sampler is None else (sampler.training,)
        return suite.training.merged(self.student.training, self.wrapper.training, *rounds)

    @property
    def prediction(self) -> str:
        return self.student.prediction or self.teacher.prediction


class Trainer:
    """Adds training stages to a plan."""

    def __init__(self, suite: Suite, registry: Registry, plan: Plan) -> None:
        self.suite = suite
        self.registry = registry
        self.plan = plan

    def jobs(self, recipe: Recipe, steps: int | None = None) -> tuple[Job, ...]:
        """The wrapper's jobs for a budget; with ``steps``, one unwrapped student of that length (a baseline)."""
        training = recipe.training(self.suite)
        timesteps = recipe.teacher.schedule.timesteps
        everything = Interval(0, timesteps)
        own = recipe.images // training.batch if steps is None else steps
        where = at(self.suite, f"wrappers.{recipe.wrapper.label}")
        if own < 1:
            raise UserError(
                f"{at(self.suite, 'budgets')}: {recipe.images} images are less than one batch of {training.batch}; "
                "raise the budget or lower training.batch"
            )
        job = Job("student", everything, everything, Law.uniform(everything), training.batch, own, own)
        job = replace(job, student=recipe.student.model_dump(include={"width", "blocks", "config"}))
        if steps is not None:
            return (job,)
        wrapper: Wrapper = recipe.wrapper.use.plugin.load()(recipe.wrapper.use.options)
        lift = Lift(recipe.teacher.schedule, lambda name: self.registry.get("intervals", name).load(), where)
        jobs = wrapper.wrap(job, lift)
        check_cover(jobs, timesteps, where)
        return jobs

    def train(self, recipe: Recipe, jobs: tuple[Job, ...]) -> Trained:
        """Stages for ``jobs``; the artifacts that serve each interval, in order of the intervals."""
        by_role: dict[str, str] = {}
        configs: dict[str, Mapping[str, Any]] = {}
        for job in jobs:
            stage, configs[job.role] = self._job(recipe, job, by_role, lone=len(jobs) == 1)
            by_role[job.role] = self.plan.add(stage)
        serving = sorted((j for j in jobs if j.serves is not None), key=lambda j: j.serves or Interval(0, 1))
        return Trained(
            jobs=jobs,
            edges=tuple(j.serves.lo for j in serving[1:] if j.serves is not None),
            students=tuple(by_role[j.role] for j in serving),
            configs=tuple(configs[j.role] for j in serving),
            prediction=recipe.prediction,
        )

    def _job(
        self, recipe: Recipe, job: Job, by_role: Mapping[str, str], lone: bool
    ) -> tuple[Stage, Mapping[str, Any]]:
        teacher = recipe.teacher
        where = at(self.suite, f"students.{recipe.student.name}")
        config = teacher.family.load()().student_config(teacher.config, job.student, where)
        if job.start == "teacher" and config != {**teacher.config, "dropout": config.get("dropout")}:
            raise UserError(
                f"{where}: wrappers.{recipe.wrapper.label}.init: a student of another shape cannot start from "
                f"the teacher's weights; use init: shared or scratch, or give students.{recipe.student.name} width 1"
            )
        needs = {"data": (recipe.source.stage,)}
        if job.start == "teacher" or any(u.plugin.traits.get("needs_teacher", True) for u in recipe.method.uses):
            needs["teacher"] = (teacher.stage,)
        if job.start in by_role:
            needs["start"] = (by_role[job.start],)
        kind = "student" if job.serves is not None else "state"
        spec = {
            "network": teacher.network(config, recipe.prediction),
            "methods": [reference(u) for u in recipe.method.uses],
            "training": resolved(recipe.training(self.suite)),
            "job": job.spec(),
            "start": "continue" if job.start in by_role else job.start,
            "flip": recipe.source.flip,
            "seed": recipe.seed,
            "precision": self.suite.precision,
        }
        if kind == "student":
            spec["store_dtype"] = self.suite.store_dtype
        label = f"{recipe.tag} seed {recipe.seed}" if lone else f"{recipe.tag} {job.role} seed {recipe.seed}"
        return Stage.make(kind, label, spec, needs, {"checkpoint_every": self.suite.checkpoint_every}), config

    def rounds(self, recipe: Recipe, trained: Trained, sampler: Sampler, entry: SamplerEntry, steps: int, weights: str) -> Trained:
        """Train the rounds that ``sampler`` needs on top of ``trained``; nothing for a training-free sampler."""
        try:
            rounds = sampler.rounds(recipe.teacher.schedule, steps)
        except UserError as error:
            raise UserError(f"{at(self.suite, 'samplers')}.{entry.label}: {error}") from None
        if trained.prediction == "v_prediction":
            rounds = tuple(r for r in rounds if r.kind != "convert")
        images = 0
        for number, one in enumerate(rounds):
            trained, seen = self._round(recipe, trained, one, entry, number, weights)
            images += seen
        return replace(trained, rounds=rounds, rounds_images=images)

    def _round(
        self, recipe: Recipe, trained: Trained, one: Round, entry: SamplerEntry, number: int, weights: str
    ) -> tuple[Trained, int]:
        training = recipe.training(self.suite, entry)
        steps = int(recipe.images * one.share) // training.batch
        if steps < 1:
            raise UserError(
                f"{at(self.suite, 'samplers')}.{entry.label}: {one.share} of {recipe.images} images is less than one batch "
                f"of {training.batch}; raise the share or the budget"
            )
        grid = sorted(one.grid)
        students = list(trained.students)
        ends = [0, *trained.edges, recipe.teacher.schedule.timesteps]
        for k, (lo, hi) in enumerate(zip(ends, ends[1:], strict=False)):
            inside = [i for i, t in enumerate(grid) if lo <= t < hi]
            if not inside:
                continue
            spec = {
                "network": recipe.teacher.network(trained.configs[k], one.prediction),
                "round": {"kind": one.kind, "grid": grid, "fine": sorted(one.fine)},
                "entries": [inside[0], inside[-1] + 1],
                "before": {"edges": list(trained.edges), "prediction": trained.prediction, "own": k, "weights": weights},
                "clip": entry.clip or self.suite.sampling.clip,
                "training": resolved(training),
                "batch": training.batch,
                "steps": steps,
                "flip": recipe.source.flip,
                "seed": recipe.seed,
                "number": number,
                "precision": self.suite.precision,
                "store_dtype": self.suite.store_dtype,
            }
            name = f"{one.kind} {len(grid)}"
            label = f"{recipe.tag} {name} seed {recipe.seed}" if len(students) == 1 else f"{recipe.tag} {name} expert-{k} seed {recipe.seed}"
            needs = {"data": (recipe.source.stage,), "before": trained.students}
            stage = Stage.make("round", label, spec, needs, {"checkpoint_every": self.suite.checkpoint_every})
            students[k] = self.plan.add(stage)
        return replace(trained, students=tuple(students), prediction=one.prediction), steps * training.batch


def baseline_steps(jobs: tuple[Job, ...], rule: str, batch: int) -> int:
    """Steps of one student that sees as many images as all jobs together, or as the longest lineage among them."""
    if rule == "equal_total":
        return max(1, round(total_images(jobs) / batch))
    return max(1, round(max(total_images(lineage(jobs, j)) for j in jobs if j.serves is not None) / batch))
