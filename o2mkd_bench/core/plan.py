"""The plan: stages that make artifacts, and the cells that need them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .identity import identity
from .jobs import Job
from .program import Round

if TYPE_CHECKING:
    from .store import Store

# One number per kind of engine stage; raise it when the same spec gives another result.
SEMANTICS = {
    "data": 1,
    "codec": 1,
    "latents": 1,
    "prompts": 1,
    "teacher": 1,
    "state": 1,
    "edges": 1,
    "student": 1,
    "round": 1,
    "samples": 1,
    "reference": 1,
    "score": 1,
    "speed": 1,
    "probe": 1,
    "loss": 1,
}

AXES = ("dataset", "teacher", "student", "method", "wrapper", "sampler", "steps", "budget", "weights", "seed")


@dataclass(frozen=True)
class Stage:
    """One unit of work that makes one artifact.

    Attributes:
        spec: JSON data that decides the artifact, with ``needs`` and the kind's semantics number its whole identity.
        needs: slot to the identities it is made from.
        local: JSON data that cannot change the artifact: paths, batch sizes of sampling, checkpoint intervals.
    """

    identity: str
    kind: str
    label: str
    spec: Mapping[str, Any]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        kind: str,
        label: str,
        spec: Mapping[str, Any],
        needs: Mapping[str, tuple[str, ...]] | None = None,
        local: Mapping[str, Any] | None = None,
    ) -> Stage:
        needs = needs or {}
        name = identity({"kind": kind, "semantics": SEMANTICS[kind], "spec": spec, "needs": needs})
        return cls(name, kind, label, spec, needs, local or {})

    def inputs(self) -> Iterator[str]:
        for ids in self.needs.values():
            yield from ids


@dataclass(frozen=True)
class Trained:
    """What training makes for a cell: the jobs, and the artifacts that serve each interval."""

    jobs: tuple[Job, ...]
    edges: tuple[int, ...]
    students: tuple[str, ...]
    configs: tuple[Mapping[str, Any], ...]
    prediction: str
    rounds: tuple[Round, ...] = ()
    rounds_images: int = 0


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        recipe: the hash of how it is trained and drawn, whatever its seed and the edges that are measured with it.
        measured: the stages whose edges decide its intervals.
        unresolved: not empty when the stages cannot be named yet (a hub teacher that is not downloaded, edges that are
            not measured).
        refused: not empty when its wrapper refuses the edges that were measured.
    """

    labels: Mapping[str, Any]
    role: str
    identity: str = ""
    recipe: str = ""
    samples: str = ""
    scores: tuple[str, ...] = ()
    speed: str = ""
    probe: str = ""
    nfe: int = 0
    calls: tuple[int, ...] = ()
    trained: Trained | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    baseline_of: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()
    unresolved: str = ""
    refused: str = ""

    def stages(self) -> tuple[str, ...]:
        return tuple(i for i in (*self.measured, self.samples, *self.scores, self.speed, self.probe) if i)

    def describe(self) -> str:
        return " / ".join(str(self.labels[a]) for a in AXES if self.labels.get(a) not in ("", None))


@dataclass(frozen=True)
class Expectation:
    """What a teacher should score.

    Attributes:
        where: file and key, for the start of a sentence.
        stage, score, loss: the artifacts of the teacher, of its score, and of its epsilon loss.
        tolerance: how far from ``value`` the score may lie, as a share of it.
        refuse: whether nothing is trained from a teacher that lies further away.
    """

    where: str
    dataset: str
    teacher: str
    sampler: str
    steps: int
    seed: int
    column: str
    value: float
    tolerance: float
    refuse: bool
    stage: str
    score: str
    loss: str

    def concerns(self, stage: Stage) -> bool:
        """Whether ``stage`` uses the teacher for more than to measure it."""
        return self.stage in stage.inputs() and stage.kind not in ("samples", "loss")

    def found(self, store: Store) -> float | None:
        """What it scores; None where that is not known.

        Raises:
            CorruptArtifact: when the stored score is damaged.
        """
        if not store.has(self.score):
            return None
        value = store.read_json(self.score, "scores.json")["scores"].get(self.column)
        return None if value is None else float(value)

    def complaint(self, found: float) -> str:
        """One sentence when ``found`` lies further away than the tolerance, else nothing; NaN is always far away."""
        if abs(found - self.value) <= self.tolerance * self.value:
            return ""
        mend = "name the right teacher, mend the value, or train from it anyway with expect.refuse: false"
        return (
            f"{self.where}: {self.column} of {self.sampler} {self.steps} is {found:.4g}, expected {self.value:.4g} "
            f"within {self.tolerance:.0%}; {mend if self.refuse else 'trained from all the same, as refuse is false'}"
        )


@dataclass
class Plan:
    """Stages by identity, each after those it needs, and the cells."""

    stages: dict[str, Stage] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    references: list[dict[str, Any]] = field(default_factory=list)
    expectations: list[Expectation] = field(default_factory=list)

    def add(self, stage: Stage) -> str:
        self.stages.setdefault(stage.identity, stage)
        return stage.identity

    def closure(self, wanted: Iterable[str]) -> dict[str, Stage]:
        """``wanted`` and everything they are made from, in the plan's order."""
        need: set[str] = set()
        queue = list(wanted)
        while queue:
            name = queue.pop()
            if name not in need:
                need.add(name)
                queue.extend(self.stages[name].inputs())
        return {name: stage for name, stage in self.stages.items() if name in need}

    def awaited(self) -> list[str]:
        """The stages that must be made before all cells can be planned."""
        return list(dict.fromkeys(name for cell in self.cells if cell.unresolved for name in cell.measured))

    def wanted(self) -> list[str]:
        """The stages that cells, references and expectations ask for by name."""
        ends = [i for cell in self.cells for i in cell.stages()]
        # what networks cost stands in the rows, also of those that have drawn all their images
        ends += [i for cell in self.cells if cell.trained is not None for i in cell.trained.students]
        return [*(r["score"] for r in self.references), *(e.loss for e in self.expectations), *ends]
