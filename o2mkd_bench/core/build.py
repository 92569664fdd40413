"""From a suite to its plan: the grid of cells, their baselines, and the stages they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .blocks import Baseline, any_match
from .edges import Undecided
from .errors import UserError
from .identity import identity
from .inputs import Inputs, Locate
from .jobs import baseline_batch, baseline_steps
from .measures import Machine, Measures, Subject
from .plan import AXES, Cell, Plan, Trained
from .plugins import Registry
from .plugins import registry as default_registry
from .suite import Budget, MethodEntry, StudentEntry, Suite, TeacherEntry, WrapperEntry
from .training import Draw, Edges, Recipe, Source, TeacherSource, Trainer, at

__all__ = ["Builder", "Locate", "Machine", "build"]

MOST_CELLS = 25_000

# what a baseline has of the wrapper that it stands beside
_OF: Mapping[Baseline, str] = {"equal_total": "total", "per_student": "per student", "equal_batch": "batch"}

Labels = Mapping[str, Any]
Rows = tuple[tuple[Draw, Labels], ...]
Accept = Callable[[Labels], bool]


@dataclass(frozen=True, eq=False)
class Branch:
    """One combination of the training axes below a teacher, and how its students are drawn, each with its labels."""

    student: StudentEntry
    method: MethodEntry
    wrapper: WrapperEntry
    budget: Budget
    seed: int
    rows: Rows


@dataclass(frozen=True)
class Limb:
    """A teacher, the rows of its own, the branches of its students, and the row that shows what it is."""

    entry: TeacherEntry
    rows: Rows
    branches: tuple[Branch, ...]
    expected: tuple[Draw, Labels] | None = None


def build(
    suite: Suite,
    machine: Machine,
    locate: Locate,
    only: Sequence[Accept] = (),
    registry: Registry | None = None,
    edges: Edges = lambda stage: None,
) -> Plan:
    """The plan of ``suite``.

    Nothing is read, loaded or checked for cells that are not asked for. Cells that mean the same are one, with the
    labels of the first that is no baseline. Baselines go where their parent goes.

    Args:
        locate: where a hub teacher (its id and revision) lies, None while it is not on this machine.
        only: further predicates on a cell's labels, beside the suite's own include and exclude.
        edges: what ``edges`` stages have measured so far; cells whose intervals depend on others are unresolved, and
            of their stages the plan has those that measure.

    Raises:
        UserError: when the suite cannot be planned, or nothing is left of it.
    """
    _check_size(suite)
    plan = Builder(suite, machine, locate, registry or default_registry(), edges).build(only)
    if not plan.cells:
        raise UserError(f"{at(suite, 'include')}: no cell is left after include, exclude and --only; relax one of them")
    return plan


def _check_size(suite: Suite) -> None:
    """Raise UserError for a grid that nobody can run, and that takes long to plan."""
    axes = (suite.teachers, suite.students, suite.methods, suite.wrappers, suite.budgets, suite.seeds)
    draws = sum(len(entry.steps) for entry in suite.samplers) * len(suite.sampling.weights)
    if (cells := math.prod(map(len, axes)) * draws) > MOST_CELLS:
        raise UserError(
            f"{at(suite, 'the grid')} has {cells} cells before include and exclude, and at most {MOST_CELLS} can be "
            "planned; make several suites of it"
        )


class Builder:
    """Walks the axes and adds stages; see ``build``."""

    def __init__(self, suite: Suite, machine: Machine, locate: Locate, registry: Registry, edges: Edges) -> None:
        self.suite = suite
        self.plan = Plan()
        self.inputs = Inputs(suite, registry, self.plan, locate)
        self.trainer = Trainer(suite, registry, self.plan, edges)
        self.measures = Measures(suite, self.plan, machine)

    def build(self, only: Sequence[Accept]) -> Plan:
        """The plan's cells, each once, and the stages they need."""
        found: dict[str, Cell] = {}
        for cell in self._cells(only):
            key = cell.identity or cell.describe()
            known = found.get(key, cell)
            kept = cell if known.role == "baseline" else known
            baseline_of = tuple(dict.fromkeys((*known.baseline_of, *cell.baseline_of)))
            measured = tuple(dict.fromkeys((*known.measured, *cell.measured)))
            merged = (baseline_of, measured) != (kept.baseline_of, kept.measured)
            found[key] = replace(kept, baseline_of=baseline_of, measured=measured) if merged else kept
        self.plan.cells = list(found.values())
        # a teacher that is not what it should be is known before anything is made from it
        first = self.plan.closure(expectation.score for expectation in self.plan.expectations)
        self.plan.stages = {**first, **self.plan.closure(self.plan.wanted())}
        return self.plan

    def _cells(self, only: Sequence[Accept]) -> Iterator[Cell]:
        draws = self._draws()
        for use in self.suite.datasets:
            own = [entry for entry in self.suite.teachers if entry.dataset == use.label]
            limbs = [self._limb(entry, draws, only) for entry in own]
            limbs = [limb for limb in limbs if limb.rows or limb.branches]
            if not limbs:
                continue
            source = self.inputs.source(use)
            self.measures.references(source)
            for limb in limbs:
                teacher = self.inputs.teacher(limb.entry, source)
                if teacher is None:
                    yield from _unresolved(limb)
                    continue
                seen = self.inputs.encoded(source, teacher)
                yield from self._teacher(seen, teacher, limb)
                for branch in limb.branches:
                    yield from self._students(seen, teacher, branch)

    # which cells there are

    def _draws(self) -> list[Draw]:
        found = []
        for entry in self.suite.samplers:
            plugin = entry.use.plugin
            with plugin.calling("the class", at(self.suite, f"samplers.{entry.label}")):
                sampler = plugin.load()(entry.use.options)
            for steps, weights in itertools.product(entry.steps, self.suite.sampling.weights):
                found.append(Draw(entry, sampler, steps, weights))
        return found

    def _limb(self, entry: TeacherEntry, draws: Sequence[Draw], only: Sequence[Accept]) -> Limb:
        s = self.suite
        base = {**dict.fromkeys(AXES, ""), "dataset": entry.dataset, "teacher": entry.name}
        branches = []
        axes = (s.students, s.methods, s.wrappers, s.budgets, s.seeds)
        for student, method, wrapper, budget, seed in itertools.product(*axes):
            names = {"student": student.name, "method": method.label, "wrapper": wrapper.label, "budget": budget.label}
            asked = ((draw, {**base, **names, "seed": seed, **_labels(draw)}) for draw in draws)
            rows = tuple(row for row in asked if s.selects(row[1]) and all(accept(row[1]) for accept in only))
            if rows:
                branches.append(Branch(student, method, wrapper, budget, seed, rows))
        ladder = self._ladder(draws)
        own = ((draw, {**base, "seed": seed, **_labels(draw)}) for draw in ladder for seed in s.seeds)
        rows = tuple(row for row in own if self._teacher_row(row[1]) and all(accept(row[1]) for accept in only))
        if entry.expect is None or not (rows or branches):
            return Limb(entry, rows, tuple(branches))
        draw = next(replace(d, steps=entry.expect.steps) for d in ladder if d.entry.label == entry.expect.sampler)
        return Limb(entry, rows, tuple(branches), (draw, {**base, "seed": s.seeds[0], **_labels(draw)}))

    def _ladder(self, draws: Sequence[Draw]) -> list[Draw]:
        """How a teacher's images are drawn: from the one set of weights it has, also at steps that no student takes."""
        found = {}
        for draw in draws:
            for steps in () if draw.sampler.needs_rounds else (draw.steps, *self.suite.sampling.teacher_steps):
                found[draw.entry.label, steps] = replace(draw, steps=steps, weights="ema")
        return list(found.values())

    def _teacher_row(self, labels: Labels) -> bool:
        """Whether include and exclude leave a teacher's row, which stays whatever they say about axes it has not."""
        excluding = (rule.of_teacher() for rule in self.suite.exclude)
        if any(all(labels[a] != "" and any_match(p, labels[a]) for a, p in rule.items()) for rule in excluding):
            return False
        including = [rule.of_teacher() for rule in self.suite.include]
        return not including or any(
            all(labels[a] == "" or any_match(p, labels[a]) for a, p in rule.items()) for rule in including
        )

    # what they are made of

    def _teacher(self, source: Source, teacher: TeacherSource, limb: Limb) -> Iterator[Cell]:
        """The rows of a teacher, first the one that shows what it is."""
        trained = Trained((), (), (teacher.stage,), (teacher.config,), teacher.prediction)
        if limb.expected is not None:
            assert limb.entry.expect is not None
            draw, labels = limb.expected
            subject = Subject(source, teacher, trained, teacher.stage, labels)
            cell = self.measures.cell(subject, draw, "teacher")
            self.measures.expected(limb.entry.expect, subject, cell)
            yield cell
        for draw, labels in limb.rows:
            yield self.measures.cell(Subject(source, teacher, trained, teacher.stage, labels), draw, "teacher")

    def _students(self, source: Source, teacher: TeacherSource, branch: Branch) -> Iterator[Cell]:
        """The rows of one branch, and those of its baselines."""
        tag = f"{source.use.label}/{branch.student.name}/{branch.method.label}"
        recipe = Recipe(
            source=source,
            teacher=teacher,
            student=branch.student,
            method=branch.method,
            wrapper=branch.wrapper,
            seed=branch.seed,
            images=branch.budget.images,
            tag=f"{tag}/{branch.wrapper.label}",
        )
        try:
            jobs, measured = self.trainer.lifted(recipe)
        except Undecided as why:
            yield from self._undecided(branch, why)
            return
        way = self.trainer.way(recipe)
        for cell in self._rows(recipe, way, self.trainer.train(recipe, jobs), branch.rows, "student"):
            yield replace(cell, measured=measured) if measured else cell
        for rule, name, rows in self._baselines(branch):
            batch = baseline_batch(jobs, rule, self.trainer.training(recipe).batch)
            training = branch.wrapper.training.model_copy(update={"batch": batch})
            wrapper = branch.wrapper.model_copy(update={"training": training})
            plain = replace(recipe, tag=f"{tag}/{name}", wrapper=wrapper)
            job = self.trainer.plain(plain, baseline_steps(jobs, rule, batch))
            of = (f"{rule} of {branch.wrapper.label}",)
            # its steps and batch follow from those of the wrapper, by seed where edges are measured
            yield from self._rows(plain, identity([rule, way]), self.trainer.train(plain, (job,)), rows, "baseline", of)

    def _baselines(self, branch: Branch) -> Iterator[tuple[str, str, Rows]]:
        """The rule, the name and the rows of each single student that stands beside a wrapper's several."""
        for rule in self.suite.baselines if branch.wrapper.use.plugin.load().lifts else ():
            name = f"single ({_OF[rule]} of {branch.wrapper.label})"
            yield rule, name, tuple((draw, {**labels, "wrapper": name}) for draw, labels in branch.rows)

    def _undecided(self, branch: Branch, why: Undecided) -> Iterator[Cell]:
        """The rows of a branch whose intervals are not known, and those of its baselines, whose budgets are not."""
        unresolved, refused = ("", str(why)) if why.refused else (str(why), "")
        for _, labels in branch.rows:
            yield Cell(labels, "student", measured=why.stages, unresolved=unresolved, refused=refused)
        for rule, _, rows in self._baselines(branch):
            of = (f"{rule} of {branch.wrapper.label}",)
            for _, labels in rows:
                cell = Cell(labels, "baseline", baseline_of=of, measured=why.stages)
                yield replace(cell, unresolved=unresolved, refused=refused)

    def _rows(
        self,
        recipe: Recipe,
        way: str,
        trained: Trained,
        rows: Sequence[tuple[Draw, Labels]],
        role: str,
        baseline_of: tuple[str, ...] = (),
    ) -> Iterator[Cell]:
        for draw, labels in rows:
            drawn = self.trainer.rounds(recipe, trained, draw) if draw.sampler.needs_rounds else trained
            subject = Subject(recipe.source, recipe.teacher, drawn, way, labels)
            yield self.measures.cell(subject, draw, role, baseline_of)


def _labels(draw: Draw) -> dict[str, Any]:
    return {"sampler": draw.entry.label, "steps": draw.steps, "weights": draw.weights}


def _unresolved(limb: Limb) -> Iterator[Cell]:
    reason = f"hub teacher {limb.entry.hub} is not on this machine yet; `run` downloads it"
    for _, labels in (limb.expected, *limb.rows) if limb.expected is not None else limb.rows:
        yield Cell(labels, "teacher", unresolved=reason)
    for branch in limb.branches:
        for _, labels in branch.rows:
            yield Cell(labels, "student", unresolved=reason)
