"""The stages that train: the jobs of a wrapper, and the rounds of step distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from .blocks import STUDENT_KEYS
from .complaints import near
from .configs import family_of, student_config
from .data import Captions
from .edges import IMAGES, POINTS, WAITING, Undecided
from .errors import PluginError, UserError
from .identity import identity, resolved
from .intervals import Interval, Law
from .jobs import Job, Lift, Wrapper, check_jobs
from .plan import Plan, Stage, Trained
from .plugins import Plugin, Registry
from .program import Clip, Round, Sampler
from .schedule import NoiseSchedule
from .suite import MethodEntry, SamplerEntry, StudentEntry, Suite, Training, Use, WrapperEntry


def at(suite: Suite, key: str) -> str:
    """Where in which file a key stands, for the start of an error."""
    return f"{suite.path}: {key}" if suite.path is not None else key


def reference(use: Use) -> dict[str, Any]:
    """A plugin and its options as they enter an identity."""
    return {"name": use.plugin.key, "version": use.plugin.version, "options": use.plugin.decides(use.options)}


@dataclass(frozen=True)
class Latent:
    """Stages of a codec, of the latents and conditions that train, and of the conditions that are drawn from."""

    codec: str
    stage: str
    prompts: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset in the plan, and what a teacher on latents makes of it.

    Attributes:
        stage: its images at the size at which they are scored.
        latent: what networks see and draw in place of images; None for pixels.
    """

    use: Use
    stage: str
    channels: int
    size: int
    flip: bool
    captions: Captions | None = None
    latent: Latent | None = None

    @property
    def trained_on(self) -> str:
        """The stage whose arrays networks are trained on."""
        return self.latent.stage if self.latent else self.stage

    @property
    def shape(self) -> list[int]:
        """What networks draw."""
        return list(self.latent.shape) if self.latent else [self.channels, self.size, self.size]


@dataclass(frozen=True, eq=False)
class TeacherSource:
    """A teacher in the plan: its artifact, what is known of it without opening it, and the stage of its codec.

    ``given``: it was not trained here.
    """

    name: str
    stage: str
    family: Plugin
    config: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction: str
    codec: str = ""
    given: bool = False

    def network(self, config: Mapping[str, Any], prediction: str) -> dict[str, Any]:
        """What a trained artifact says of its network."""
        return {
            "family": {"name": self.family.key, "version": self.family.version},
            "config": config,
            "schedule": self.schedule.scheduler_config(),
            "prediction": prediction,
        }


@dataclass(frozen=True, eq=False)
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

    @property
    def prediction(self) -> str:
        return self.student.prediction or self.teacher.prediction


@dataclass(frozen=True, eq=False)
class Draw:
    """One way of drawing images from a network: a sampler's entry with its number of steps, and which weights."""

    entry: SamplerEntry
    sampler: Sampler
    steps: int
    weights: str


Edges = Callable[[str], Sequence[int] | None]
"""The identity of an ``edges`` stage to its edges; None while it is not made."""


class Trainer:
    """Adds training stages to a plan; ``edges`` knows what has been measured."""

    def __init__(self, suite: Suite, registry: Registry, plan: Plan, edges: Edges) -> None:
        self.suite = suite
        self.registry = registry
        self.plan = plan
        self.edges = edges

    def training(self, recipe: Recipe, sampler: SamplerEntry | None = None) -> Training:
        """How the jobs of ``recipe`` are trained, or the rounds of ``sampler`` after them."""
        rounds = () if sampler is None else (sampler.training,)
        return self.suite.training.merged(recipe.student.training, recipe.wrapper.training, *rounds)

    def way(self, recipe: Recipe) -> str:
        """The hash of how ``recipe`` is trained, whatever its seed and the edges that are measured with it."""
        student = recipe.student.model_dump(mode="json", include={*STUDENT_KEYS, "init", "prediction"})
        decides = {
            "data": recipe.source.trained_on,
            "teacher": recipe.teacher.stage,
            "student": student,
            "methods": [reference(use) for use in recipe.method.uses],
            "wrapper": reference(recipe.wrapper.use),
            "training": resolved(self.training(recipe)),
            "images": recipe.images,
            "flip": recipe.source.flip,
            "precision": self.suite.precision,
            "store_dtype": self.suite.store_dtype,
        }
        return identity(decides)

    def lifted(self, recipe: Recipe) -> tuple[tuple[Job, ...], tuple[str, ...]]:
        """The wrapper's jobs for the recipe's budget, and the ``edges`` stages that their intervals come from.

        Raises:
            UserError: for a budget of less than one batch, or options that the wrapper refuses. PluginError for a
                wrapper that fails.
            Undecided: when edges are not measured yet, or the wrapper refuses what was measured, which says nothing
                against the rest of the suite.
        """
        asked: list[str] = []
        try:
            return self._wrapped(recipe, partial(self._measured, recipe, asked)), tuple(asked)
        except UserError as error:
            if not asked:
                raise
            raise Undecided(tuple(asked), str(error), refused=True) from None

    def _measured(self, recipe: Recipe, asked: list[str], students: int, warmup: Job) -> Sequence[int]:
        """Edges by the error over t of the student that ``warmup`` makes; their stage is added to ``asked``."""
        if warmup.serves is not None:
            raise UserError(
                f"measured edges follow from a job that serves nothing, and {warmup.role} serves; make serves None"
            )
        config = self._config(recipe, warmup, {})
        label = f"{recipe.tag} {warmup.role} seed {recipe.seed}"
        start = self.plan.add(self._job(recipe, warmup, config, label, None))
        spec = {
            "students": students,
            "points": POINTS,
            "images": IMAGES,
            "network": recipe.teacher.network(config, recipe.prediction),
            "seed": recipe.seed,
            "precision": self.suite.precision,
        }
        needs = {"data": (recipe.source.trained_on,), "teacher": (recipe.teacher.stage,), "start": (start,)}
        label = f"{recipe.tag} edges of {students} seed {recipe.seed}"
        asked.append(self.plan.add(Stage.make("edges", label, spec, needs)))
        found = self.edges(asked[-1])
        if found is None:
            raise Undecided(tuple(asked), WAITING, refused=False)
        return found

    def _wrapped(self, recipe: Recipe, measured: Callable[[int, Job], Sequence[int]]) -> tuple[Job, ...]:
        batch = self.training(recipe).batch
        steps = recipe.images // batch
        if steps < 1:
            raise UserError(
                f"{at(self.suite, 'budgets')}: {recipe.images} images are less than one batch of {batch}; "
                "raise the budget or lower training.batch"
            )
        where = at(self.suite, f"wrappers.{recipe.wrapper.label}")
        plugin = recipe.wrapper.use.plugin
        lift = Lift(recipe.teacher.schedule, self._interval_rule, where, measured)
        with plugin.calling(
            "wrap()", where, Undecided, tell=lambda text: text if where in text else f"{where}: {text}"
        ):
            wrapper: Wrapper = plugin.load()(recipe.wrapper.use.options)
            jobs = tuple(wrapper.wrap(self.plain(recipe, steps), lift))
        check_jobs(jobs, recipe.teacher.schedule.timesteps, where)
        if strange := [key for job in jobs for key in job.student if key not in STUDENT_KEYS]:
            raise PluginError(
                f"{where}: wrapper {plugin.key} gives a student the key {strange[0]!r}, which none has"
                f"{near(strange[0], STUDENT_KEYS)} (known: {', '.join(STUDENT_KEYS)})"
            )
        return jobs

    def plain(self, recipe: Recipe, steps: int) -> Job:
        """One student for all timesteps: what a wrapper is given, and what a baseline is."""
        everything = Interval(0, recipe.teacher.schedule.timesteps)
        batch = self.training(recipe).batch
        student = recipe.student.model_dump(include=set(STUDENT_KEYS))
        law = Law.uniform(everything)
        return Job("student", everything, everything, law, batch, steps, steps, student=student)

    def _interval_rule(self, name: str) -> Callable[[int, NoiseSchedule], list[int]]:
        rule: Callable[[int, NoiseSchedule], list[int]] = self.registry.get("intervals", name).load()
        return rule

    def train(self, recipe: Recipe, jobs: tuple[Job, ...]) -> Trained:
        """Stages for ``jobs``; the artifacts that serve each interval, in order of the intervals."""
        by_role: dict[str, str] = {}
        configs: dict[str, Mapping[str, Any]] = {}
        for job in jobs:
            configs[job.role] = self._config(recipe, job, configs)
            label = f"{recipe.tag} {job.role}" if len(jobs) > 1 else recipe.tag
            stage = self._job(recipe, job, configs[job.role], f"{label} seed {recipe.seed}", by_role.get(job.start))
            by_role[job.role] = self.plan.add(stage)
        serving = sorted((job.serves, job.role) for job in jobs if job.serves is not None)
        return Trained(
            jobs=jobs,
            edges=tuple(interval.lo for interval, _ in serving[1:]),
            students=tuple(by_role[role] for _, role in serving),
            configs=tuple(configs[role] for _, role in serving),
            prediction=recipe.prediction,
        )

    def _config(self, recipe: Recipe, job: Job, configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """The architecture of a job, which must be that of what it starts from."""
        where = at(self.suite, f"students.{recipe.student.name}")
        teacher = recipe.teacher
        own = job.student == recipe.student.model_dump(include=set(STUDENT_KEYS))
        asked = where if own else f"{where}: wrappers.{recipe.wrapper.label}"
        config = student_config(teacher.family, teacher.config, job.student, asked, teacher.given)
        before = configs.get(job.start)
        if self._origin(recipe, job) == "teacher":
            asked = where if recipe.student.init == "teacher" else f"{where}: wrappers.{recipe.wrapper.label}"
            # refused now, not when the teacher is there
            with teacher.family.calling("check_start()", asked):
                family_of(teacher.family, where).check_start(deepcopy(dict(teacher.config)), deepcopy(config), asked)
        # dropout has no weights
        elif before is not None and {**before, "dropout": 0} != {**config, "dropout": 0}:
            raise UserError(
                f"{where}: wrappers.{recipe.wrapper.label}.init: a student of another shape cannot start from the "
                f"weights of {job.start}; use init: shared or scratch, or give students.{recipe.student.name} width 1"
            )
        return config

    def _job(self, recipe: Recipe, job: Job, config: Mapping[str, Any], label: str, before: str | None) -> Stage:
        needs = {"data": (recipe.source.trained_on,)}
        origin = self._origin(recipe, job)
        if origin == "teacher" or any(u.plugin.traits.get("needs_teacher", True) for u in recipe.method.uses):
            needs["teacher"] = (recipe.teacher.stage,)
        if before is not None:
            needs["start"] = (before,)
        spec = {
            "network": recipe.teacher.network(config, recipe.prediction),
            "methods": [reference(u) for u in recipe.method.uses],
            "training": resolved(self.training(recipe)),
            "job": job.spec(),
            "start": origin if before is None else "continue",
            "flip": recipe.source.flip,
            "seed": recipe.seed,
            "precision": self.suite.precision,
        }
        if job.serves is None:
            return Stage.make("state", label, spec, needs, self._local)
        return Stage.make("student", label, {**spec, "store_dtype": self.suite.store_dtype}, needs, self._local)

    @staticmethod
    def _origin(recipe: Recipe, job: Job) -> str:
        """What a job starts from: a student that is carved out of its teacher never starts from scratch."""
        return "teacher" if job.start == "scratch" and recipe.student.init == "teacher" else job.start

    @property
    def _local(self) -> dict[str, Any]:
        return {
            "checkpoint_every": self.suite.checkpoint_every,
            "checkpoint_activations": self.suite.checkpoint_activations,
            "cohort": self.suite.cohort,
        }

    def rounds(self, recipe: Recipe, trained: Trained, draw: Draw) -> Trained:
        """Train the rounds that a sampler needs on top of ``trained``; nothing for a training-free sampler.

        Raises:
            UserError: for steps that its rounds cannot reach, or a share of less than one batch.
        """
        where = at(self.suite, f"samplers.{draw.entry.label}")
        plugin = draw.entry.use.plugin
        with plugin.calling("rounds()", where, tell=lambda text: f"{where}: {text}"):
            rounds = tuple(draw.sampler.rounds(recipe.teacher.schedule, draw.steps))
        if strange := [type(one).__name__ for one in rounds if not isinstance(one, Round)]:
            raise PluginError(
                f"{where}: plugin samplers:{plugin.key} gives a {strange[0]} as a round, which is no Round"
            )
        rounds = tuple(r for r in rounds if (r.kind, r.prediction) != ("convert", trained.prediction))
        if rounds and rounds[0].kind == "halve" and rounds[0].prediction != trained.prediction:
            raise UserError(
                f"{where}: its rounds begin with students that predict {rounds[0].prediction}, and those of "
                f"{recipe.student.name} predict {trained.prediction}; let one predict what the other does"
            )
        batch = self.training(recipe, draw.entry).batch
        images = 0
        for number, one in enumerate(rounds):
            steps = int(recipe.images * one.share) // batch
            if steps < 1:
                raise UserError(
                    f"{where}: {one.share} of {recipe.images} images is less than one batch of {batch}; "
                    "raise the share or the budget"
                )
            students = self._round(recipe, trained, draw, one, {"number": number, "steps": steps, "batch": batch})
            trained = replace(trained, students=students, prediction=one.prediction)
            images += steps * batch
        return replace(trained, rounds=rounds, rounds_images=images)

    def _round(
        self, recipe: Recipe, trained: Trained, draw: Draw, one: Round, course: Mapping[str, int]
    ) -> tuple[str, ...]:
        """The students after one round: an expert for the grid entries in each interval; one with none stays."""
        grid = sorted(one.grid)
        students = list(trained.students)
        ends = [0, *trained.edges, recipe.teacher.schedule.timesteps]
        spec = {
            "round": {"kind": one.kind, "grid": grid, "fine": sorted(one.fine)},
            "clip": clip_of(self.suite, draw.entry, recipe.source),
            "training": resolved(self.training(recipe, draw.entry)),
            **course,
            "flip": recipe.source.flip,
            "seed": recipe.seed,
            "precision": self.suite.precision,
            "store_dtype": self.suite.store_dtype,
        }
        before = {"edges": trained.edges, "prediction": trained.prediction, "weights": draw.weights}
        needs = {"data": (recipe.source.trained_on,), "before": trained.students}
        for k, (lo, hi) in enumerate(pairwise(ends)):
            inside = [i for i, t in enumerate(grid) if lo <= t < hi]
            if not inside:
                continue
            own = {
                "network": recipe.teacher.network(trained.configs[k], one.prediction),
                "entries": [inside[0], inside[-1] + 1],
                "before": {**before, "own": k},
            }
            who = f" expert-{k}" if len(students) > 1 else ""
            label = f"{recipe.tag} {one.kind} {len(grid)}{who} seed {recipe.seed}"
            students[k] = self.plan.add(Stage.make("round", label, {**spec, **own}, needs, self._local))
        return tuple(students)


def clip_of(suite: Suite, entry: SamplerEntry, source: Source) -> Clip:
    """How x0 is clipped; latents have no bounds and are not, unless the suite says so."""
    if entry.clip is not None:
        return entry.clip
    unsaid = source.latent is not None and "clip" not in suite.sampling.model_fields_set
    return "none" if unsaid else suite.sampling.clip
