"""What follows training: the stages that draw images, score them, time the drawing, and probe the error over t."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .columns import COLUMN, INCEPTION_COLUMNS, LEADING_COLUMNS, TIMING_COLUMNS
from .errors import PluginError, UserError
from .grid import time_grid
from .identity import identity, plain
from .mode import PLAIN, Mode
from .plan import Cell, Expectation, Plan, Stage, Trained
from .plugins import BUILTIN
from .program import Clip, Program, passes
from .schedule import NoiseSchedule
from .suite import Expect, SamplerEntry, Suite, Use
from .training import Draw, Source, TeacherSource, at, clip_of, reference


@dataclass(frozen=True)
class Machine:
    """What a speed reading depends on beside the plan: ``name`` is the model of the device."""

    device: str
    name: str
    versions: Mapping[str, str]
    mode: Mode = PLAIN


@dataclass(frozen=True)
class Scoring:
    """Score stages of one feature network, less the images that are scored."""

    spec: Mapping[str, Any]
    needs: Mapping[str, tuple[str, ...]]
    local: Mapping[str, Any]
    columns: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """Who is measured: trained networks, what they were made for, how they are trained, and the labels of the row.

    ``recipe``: the hash of how, whatever the seed. ``labels`` need ``dataset``, ``student``, ``method``, ``wrapper``,
    ``seed``, ``weights``.
    """

    source: Source
    teacher: TeacherSource
    trained: Trained
    recipe: str
    labels: Mapping[str, Any]

    @property
    def name(self) -> str:
        words = [str(self.labels[a]) for a in ("dataset", "student", "method", "wrapper") if self.labels[a]]
        return " ".join(words if self.labels["student"] else [*words, "teacher"])


class Measures:
    """Adds the stages that measure to a plan."""

    def __init__(self, suite: Suite, plan: Plan, machine: Machine) -> None:
        self.suite = suite
        self.plan = plan
        self.machine = machine
        self._scorings: dict[str, tuple[Scoring, ...]] = {}
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._ways: dict[tuple[Any, ...], str] = {}
        self._architectures: dict[tuple[str, int], tuple[Mapping[str, Any], str]] = {}

    def cell(self, subject: Subject, draw: Draw, role: str, baseline_of: tuple[str, ...] = ()) -> Cell:
        """The row of ``subject`` drawn by ``draw``, its stages added.

        Raises:
            UserError: when the sampler cannot run on this grid. PluginError when it declares another NFE than it has.
        """
        trained = subject.trained
        program = self._program(draw, subject)
        course = self._course(draw, subject)
        name = f"{subject.name} {draw.entry.label} {draw.steps} {draw.weights} seed {subject.labels['seed']}"
        drawn = {
            **course,
            "weights": draw.weights,
            "images": self.suite.sampling.images,
            "seed": subject.labels["seed"],
            "shape": subject.source.shape,
        }
        needs = {"students": trained.students}
        self._check_drawn_from_text(subject)
        if latent := subject.source.latent:
            assert subject.source.captions is not None
            drawn["finish"] = list(subject.source.captions.finish)
            needs |= {"codec": (latent.codec,), "prompts": (latent.prompts,)}
        local = {"batch": self.suite.sampling.batch}
        samples = self.plan.add(Stage.make("samples", f"samples {name}", drawn, needs, local))
        drawn_from = {slot: needs[slot] for slot in ("prompts",) if slot in needs}
        scores = tuple(
            self.plan.add(
                Stage.make("score", f"score {name}", s.spec, {**s.needs, "samples": (samples,), **drawn_from}, s.local)
            )
            for s in self._scoring(subject.source)
        )
        return Cell(
            labels=subject.labels,
            role=role,
            identity=identity([samples, scores]),
            recipe=identity([subject.recipe, self._way(draw, subject, drawn)]),
            samples=samples,
            scores=scores,
            speed=self._speed(subject, course, name),
            probe=self._probe(subject, draw.weights),
            nfe=program.nfe * passes(self.suite.sampling.guidance),
            calls=tuple(n * passes(self.suite.sampling.guidance) for n in program.calls(trained.edges)),
            trained=trained,
            facts={key: course[key] for key in ("spacing", "clip", "precision", "guidance") if key in course},
            baseline_of=baseline_of,
        )

    def expected(self, expect: Expect, subject: Subject, cell: Cell) -> None:
        """Note what ``cell``, a row of a teacher, should score; its epsilon loss is measured beside it."""
        teacher, labels = subject.teacher, subject.labels
        scored = zip(self._scoring(subject.source), cell.scores, strict=True)
        timesteps = teacher.schedule.timesteps
        spec = {
            "t": [timesteps * tenth // 10 for tenth in (1, 3, 5, 7, 9)],
            "images": self.suite.probe.images,
            "precision": self.suite.precision,
        }
        needs = {"data": (subject.source.trained_on,), "teacher": (teacher.stage,)}
        found = Expectation(
            where=at(self.suite, f"teachers.{teacher.name}.expect"),
            dataset=labels["dataset"],
            teacher=teacher.name,
            sampler=expect.sampler,
            steps=expect.steps,
            seed=labels["seed"],
            column=expect.column,
            value=expect.value,
            tolerance=expect.tolerance,
            refuse=expect.refuse,
            stage=teacher.stage,
            score=next(score for scoring, score in scored if expect.column in scoring.columns),
            loss=self.plan.add(Stage.make("loss", f"loss {subject.name} {teacher.name}", spec, needs)),
        )
        self.plan.expectations.append(found)

    def references(self, source: Source) -> None:
        """What the scores of noise and of held-out real images are, so that a reader can place the rows."""
        for scoring in self._scoring(source):
            for what in ("noise", "held-out real images"):
                spec = {**scoring.spec, "source": what, "shape": source.shape}
                label = f"score {source.use.label} {what}"
                score = self.plan.add(Stage.make("score", label, spec, scoring.needs, scoring.local))
                self.plan.references.append({"dataset": source.use.label, "what": what, "score": score})

    def _course(self, draw: Draw, subject: Subject) -> dict[str, Any]:
        """What decides a solver program and who is called when."""
        guidance = self.suite.sampling.guidance
        return {
            "sampler": reference(draw.entry.use),
            "steps": draw.steps,
            "spacing": self._spacing(draw.entry),
            "clip": clip_of(self.suite, draw.entry, subject.source),
            "edges": list(subject.trained.edges),
            "timesteps": subject.teacher.schedule.timesteps,
            "precision": self.suite.precision,
            **({} if guidance is None else {"guidance": guidance}),
        }

    def _way(self, draw: Draw, subject: Subject, drawn: Mapping[str, Any]) -> str:
        """The hash of how images are drawn, whatever the seed and the edges."""
        # the label names the sampler's entry
        key = (subject.source.use.label, subject.teacher.name, draw.entry.label, draw.steps, draw.weights)
        if key not in self._ways:
            seedless = {key: value for key, value in drawn.items() if key not in ("seed", "edges")}
            self._ways[key] = identity([seedless, draw.entry.training.model_dump(mode="json", exclude_unset=True)])
        return self._ways[key]

    def _spacing(self, entry: SamplerEntry) -> Any:
        return entry.spacing or self.suite.sampling.spacing

    def _program(self, draw: Draw, subject: Subject) -> Program:
        # the label names the sampler's entry
        key = (draw.entry.label, draw.steps, subject.trained.edges, subject.teacher.schedule)
        if key not in self._programs:
            self._programs[key] = self._checked(draw, subject)
        return self._programs[key]

    def _checked(self, draw: Draw, subject: Subject) -> Program:
        schedule, edges = subject.teacher.schedule, subject.trained.edges
        where = at(self.suite, f"samplers.{draw.entry.label}")
        try:
            grid = time_grid(self._spacing(draw.entry), draw.steps, schedule.timesteps)
            clip = clip_of(self.suite, draw.entry, subject.source)
            program = draw.sampler.program(schedule, grid, edges, clip)
            declared = draw.sampler.nfe(draw.steps)
        except UserError as error:
            raise type(error)(f"{where}: {error}") from None
        except Exception as error:
            raise PluginError(f"{where}: the sampler failed: {type(error).__name__}: {error}") from error
        if wrong := _wrong(program, declared, clip, draw, schedule):
            raise PluginError(f"{where}: plugin samplers:{draw.entry.use.plugin.key} {wrong}; correct the plugin")
        return program

    def _speed(self, subject: Subject, course: Mapping[str, Any], name: str) -> str:
        if not self.suite.speed.enabled:
            return ""
        teacher, trained = subject.teacher, subject.trained
        spec = {
            **course,
            "networks": [self._architecture(teacher, config) for config in trained.configs],
            "batch": self.suite.speed.batch,
            "repeats": self.suite.speed.repeats,
            "shape": subject.source.shape,
            "device": self.machine.name,
            "versions": self.machine.versions,
            "compile": self.machine.mode.compile,
            "cuda_graphs": self.machine.mode.cuda_graphs,
        }
        local = {"networks": [teacher.network(config, trained.prediction) for config in trained.configs]}
        return self.plan.add(Stage.make("speed", f"speed {name}", spec, local=local))

    def _architecture(self, teacher: TeacherSource, config: Mapping[str, Any]) -> str:
        # all rows of a student hold one and the same config; kept here, no other can come to lie where it lay
        key = (teacher.family.key, id(config))
        if key not in self._architectures:
            named = identity([teacher.family.key, teacher.family.version, config])
            self._architectures[key] = (config, named)
        return self._architectures[key][1]

    def _probe(self, subject: Subject, weights: str) -> str:
        trained = subject.trained
        # what a round trains is asked for at the entries of one grid only, so that a curve over t says nothing of it
        if not self.suite.probe.enabled or not trained.jobs or trained.rounds:
            return ""
        spec = {
            "points": self.suite.probe.points,
            "images": self.suite.probe.images,
            "edges": list(trained.edges),
            "weights": weights,
            "precision": self.suite.precision,
        }
        needs = {
            "data": (subject.source.trained_on,),
            "teacher": (subject.teacher.stage,),
            "students": trained.students,
        }
        return self.plan.add(Stage.make("probe", f"probe {subject.name} seed {subject.labels['seed']}", spec, needs))

    def _scoring(self, source: Source) -> tuple[Scoring, ...]:
        """How images of one dataset are scored, one entry a feature network."""
        if source.stage not in self._scorings:
            networks: dict[str, tuple[dict[str, Any], list[Use]]] = {}
            filled: dict[str, Use] = {}
            for use in self.suite.metrics:
                network = self._network(use, source)
                self._fill(filled, use, source)
                networks.setdefault(identity(network), (network, []))[1].append(use)
            self._scorings[source.stage] = tuple(
                self._with(network, uses, source) for network, uses in networks.values()
            )
        return self._scorings[source.stage]

    def _with(self, network: dict[str, Any], uses: list[Use], source: Source) -> Scoring:
        local = {
            "dataset": source.use.name,
            "options": [u.options.model_dump(mode="json") for u in uses],
            "base": str(self.suite.base),
        }
        basis = {"network": network, "metrics": [reference(u) for u in uses]}
        label = f"reference {source.use.label} {network['network']}"
        known = self.plan.add(Stage.make("reference", label, basis, {"data": (source.stage,)}, local))
        spec = {**basis, "images": self.suite.sampling.images}
        columns = tuple(column for use in uses for column in self._columns(use, source))
        return Scoring(spec, {"data": (source.stage,), "reference": (known,)}, local, columns)

    def _network(self, use: Use, source: Source) -> dict[str, Any]:
        """The feature network of a metric, what can be known of its failure checked."""
        traits = use.plugin.traits
        absent = [name for name in ("columns", "higher_is_better", "network_id") if name not in traits]
        if absent:
            raise PluginError(
                f"{at(self.suite, 'metrics')}: plugin metrics:{use.plugin.key} declares no {' and no '.join(absent)}; "
                "every metric does, see o2mkd_bench.core.hookspecs"
            )
        if not isinstance(traits["higher_is_better"], bool):
            raise PluginError(
                f"{at(self.suite, 'metrics')}: plugin metrics:{use.plugin.key} has higher_is_better "
                f"{traits['higher_is_better']!r}; make it True or False"
            )
        if "check_images" in traits:
            self._asked(use, "check_images", source.use.name, self.suite.sampling.images)
        if "check_network" in traits:
            self._asked(use, "check_network", source.use.name, self.suite.base)
        network: dict[str, Any] = self._asked(use, "network_id", source.use.name, self.suite.base)
        if not (isinstance(network, dict) and network.get("network")):
            raise PluginError(
                f"{at(self.suite, 'metrics')}: network_id of plugin metrics:{use.plugin.key} returned {network!r}; "
                "make it a dict with the network's name under 'network'"
            )
        try:
            plain(network)
        except ValueError as error:
            raise PluginError(
                f"{at(self.suite, 'metrics')}: network_id of plugin metrics:{use.plugin.key} returned what is no JSON "
                f"data ({error}); make it numbers, texts and lists"
            ) from error
        return network

    def _check_drawn_from_text(self, subject: Subject) -> None:
        """Raise UserError for a metric that compares images with captions where there are none."""
        for use in self.suite.metrics if subject.source.latent is None else ():
            if use.plugin.traits.get("needs_captions", False):
                raise UserError(
                    f"{at(self.suite, 'metrics')}: {use.label!r} compares images with their captions, and teacher "
                    f"{subject.teacher.name} of dataset {subject.source.use.label} draws from no text; leave it out"
                )

    def _fill(self, filled: dict[str, Use], use: Use, source: Source) -> None:
        """Note whose the columns of ``use`` are; a cell has one number for each."""
        for column in self._columns(use, source):
            other = filled.setdefault(column, use)
            if other is not use:
                raise UserError(
                    f"{at(self.suite, 'metrics')}: {other.label!r} and {use.label!r} both give the column {column} of "
                    f"dataset {source.use.label}; score them in two suites"
                )

    def _columns(self, use: Use, source: Source) -> Sequence[str]:
        found: Sequence[str] = self._asked(use, "columns", source.use.name)
        if not isinstance(found, tuple | list) or not all(isinstance(column, str) for column in found):
            raise PluginError(
                f"{at(self.suite, 'metrics')}: columns of plugin metrics:{use.plugin.key} returned {found!r}; "
                "make it a tuple of names"
            )
        for column in found:
            if not re.fullmatch(COLUMN, column) or column in (*LEADING_COLUMNS, *TIMING_COLUMNS):
                reason = "is a column of every table, or no word of a-z, 0-9 and _"
            elif column in INCEPTION_COLUMNS and use.plugin.distribution != BUILTIN:
                reason = "stands for the Inception network of 2015 alone"
            else:
                continue
            raise PluginError(
                f"{at(self.suite, 'metrics')}: plugin metrics:{use.plugin.key} gives the column {column!r}, which "
                f"{reason}; choose another name"
            )
        return found

    def _asked(self, use: Use, trait: str, *arguments: Any) -> Any:
        """What a trait of a metric says."""
        with use.plugin.calling(trait, at(self.suite, "metrics"), tell=lambda text: at(self.suite, text)):
            return use.plugin.traits[trait](use.options, *arguments)


def _wrong(program: Any, declared: int, clip: Clip, draw: Draw, schedule: NoiseSchedule) -> str:
    """What is wrong with a sampler's program, in words; empty where nothing is."""
    if not isinstance(program, Program):
        return f"returned {type(program).__name__} from program(), which is no o2mkd_bench.Program"
    outside = [line.t for line in program.lines if not 0 <= line.t < schedule.timesteps]
    if outside:
        return f"evaluates the network at timestep {outside[0]}, which is not in [0, {schedule.timesteps})"
    if program.nfe != declared:
        return f"declares {declared} evaluations for {draw.steps} steps, its program has {program.nfe}"
    if program.clip != clip:
        return f"was asked for clip {clip} and gives a program with clip {program.clip}, under which no row stands"
    return ""
