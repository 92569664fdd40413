"""The suite: a YAML file, typed and strict. Every mistake is one sentence with file, line, key and mend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from . import plugins, source
from .blocks import (
    UNIQUE,
    Auto,
    Baseline,
    Block,
    Budget,
    Compile,
    Count,
    Device,
    Expect,
    FolderName,
    Name,
    Probe,
    Rule,
    Sampling,
    Schedule,
    Seed,
    Seeds,
    Speed,
    StudentEntry,
    Switch,
    Training,
    TrainingOverride,
)
from .complaints import near, wanted
from .disk import read_text
from .grid import Spacing
from .options import neutral
from .plugins import Registry
from .program import Clip
from .rules import stray_patterns
from .schedule import Prediction
from .source import Node, Origin
from .uses import PluginUse, Problems, Use, Uses

__all__ = [
    "Budget",
    "Expect",
    "MethodEntry",
    "Probe",
    "Rule",
    "SamplerEntry",
    "Sampling",
    "Schedule",
    "Speed",
    "StudentEntry",
    "Suite",
    "TeacherEntry",
    "TeacherTrain",
    "Training",
    "TrainingOverride",
    "Use",
    "WrapperEntry",
    "from_mapping",
    "load",
]

SOME = Field(min_length=1)


class TeacherTrain(Block):
    """A teacher trained from scratch by the run itself, on ``images`` images, with a seed of its own."""

    model: PluginUse
    images: Count
    seed: Seed = 1000
    training: TrainingOverride = Field(default_factory=TrainingOverride)


class TeacherEntry(Block):
    """A teacher: trained (``train``), a local diffusers folder (``path``) or one of the Hub (``hub``).

    Attributes:
        dataset: label of the dataset it belongs to; a suite may leave it out if there is only one.
        path: relative to the suite's folder.
        schedule: null is linear for ``train``, and the folder's own for ``path`` and ``hub``.
        expect: what it should score; a teacher that is far from it is not trained from.
    """

    name: Name
    dataset: str = ""
    train: TeacherTrain | None = None
    path: Annotated[str, SOME] | None = None
    hub: Annotated[str, SOME] | None = None
    revision: str | None = None
    schedule: Schedule | None = None
    prediction: Prediction = "epsilon"
    expect: Expect | None = neutral(None)

    @model_validator(mode="after")
    def _one_source(self) -> TeacherEntry:
        given = [key for key in ("train", "path", "hub") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of train, path and hub, not {' and '.join(given) or 'none'}")
        if self.revision is not None and self.hub is None:
            raise ValueError(f"revision goes with hub, not with {given[0]}; leave it out")
        if "prediction" in self.model_fields_set and self.train is None:
            raise ValueError(f"prediction goes with train, {given[0]} brings its own; leave it out")
        return self


class MethodEntry(Block):
    """A KD method, or the weighted sum of several."""

    uses: Annotated[tuple[PluginUse, ...], SOME]
    label: str


class WrapperEntry(Block):
    """A wrapper, with what its jobs train otherwise."""

    use: PluginUse
    label: str
    training: TrainingOverride = Field(default_factory=TrainingOverride)


class SamplerEntry(Block):
    """A sampler with its numbers of steps; ``training`` is for the rounds of a sampler that is trained."""

    use: PluginUse
    steps: tuple[int, ...]
    label: str
    spacing: Spacing | None = None
    clip: Clip | None = None
    training: TrainingOverride = Field(default_factory=TrainingOverride)


class Suite(Block):
    """The grid and everything that is the same in all its cells; made by :func:`load` or :func:`from_mapping`.

    Attributes:
        compile: torch.compile for networks: ``off``, ``on``, ``max``; ``auto`` is ``on`` on CUDA, ``off`` on the CPU.
        cuda_graphs: whether sampling replays a network's call as a CUDA graph; ``auto`` is wherever there is CUDA.
        cohort: students that train on one teacher pass; ``auto`` is as many as share a stream and fit into memory.
        checkpoint_activations: students compute activations twice instead of keeping them.
        baselines: which one student stands beside several: ``equal_total``, with as many images as they see in all;
            ``per_student``, with as many as the one of them that sees most; ``equal_batch``, with as many as in all, in
            steps of as many as one of them sees in a step.
        time_limit: seconds a stage may take before it is ended and has failed, n that train together n times as many.
    """

    name: FolderName
    description: str = neutral("")
    seeds: Seeds = (0,)
    device: Device = neutral("auto")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Compile = neutral("auto")
    cuda_graphs: Switch = neutral("auto")
    cohort: Auto = neutral("auto")
    checkpoint_activations: bool = neutral(False)
    store_dtype: Literal["fp32", "fp16"] = "fp32"
    datasets: Annotated[tuple[PluginUse, ...], SOME]
    teachers: Annotated[tuple[TeacherEntry, ...], SOME]
    students: Annotated[tuple[StudentEntry, ...], SOME]
    methods: Annotated[tuple[MethodEntry, ...], SOME]
    wrappers: Annotated[tuple[WrapperEntry, ...], SOME]
    samplers: Annotated[tuple[SamplerEntry, ...], SOME]
    metrics: Annotated[tuple[PluginUse, ...], SOME]
    budgets: Annotated[tuple[Budget, ...], SOME]
    training: Training = Field(default_factory=Training)
    sampling: Sampling = Field(default_factory=Sampling)
    speed: Speed = Field(default_factory=Speed)
    probe: Probe = Field(default_factory=Probe)
    baselines: Annotated[tuple[Baseline, ...], UNIQUE] = ("equal_total", "per_student")
    include: tuple[Rule, ...] = ()
    exclude: tuple[Rule, ...] = ()
    checkpoint_every: float = neutral(60.0, gt=0)
    time_limit: float | None = neutral(None, gt=0)

    _path: Path | None = PrivateAttr(default=None)
    _base: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def path(self) -> Path | None:
        """The file it was read from, if any."""
        return self._path

    @property
    def base(self) -> Path:
        """The folder that relative paths in the suite are relative to, also those in files it extends."""
        return self._base

    def labels(self) -> dict[str, tuple[str, ...]]:
        """The labels of every axis of the grid, by the axis' name in a rule."""
        return {
            "dataset": tuple(use.label for use in self.datasets),
            "teacher": tuple(entry.name for entry in self.teachers),
            "student": tuple(entry.name for entry in self.students),
            "method": tuple(entry.label for entry in self.methods),
            "wrapper": tuple(entry.label for entry in self.wrappers),
            "sampler": tuple(entry.label for entry in self.samplers),
            "steps": tuple(dict.fromkeys(map(str, self._steps()))),
            "budget": tuple(budget.label for budget in self.budgets),
            "seed": tuple(map(str, self.seeds)),
            "weights": self.sampling.weights,
        }

    def _steps(self) -> Iterator[int]:
        for entry in self.samplers:
            yield from entry.steps
        yield from self.sampling.teacher_steps
        yield from (teacher.expect.steps for teacher in self.teachers if teacher.expect is not None)

    def selects(self, cell: Mapping[str, Any]) -> bool:
        """Whether ``cell`` (axis to label) is in the grid: no rule excludes it, and one includes it if any do."""
        if any(rule.matches(cell) for rule in self.exclude):
            return False
        return not self.include or any(rule.matches(cell) for rule in self.include)


def load(
    path: Path,
    overrides: Sequence[str] = (),
    seed: int | None = None,
    device: str | None = None,
    registry: Registry | None = None,
) -> Suite:
    """The suite in the file at ``path``.

    ``overrides``: ``a.b=c`` as of ``--set``, done in order after ``extends``; ``seed`` and ``device`` come last.
    Every rule of ``include`` and ``exclude`` must match a label, unless something was overridden.

    Raises:
        UserError: for anything wrong with the file, as ``file:line: key: what is wrong; the mend``.
    """
    root = source.read(path)
    for assignment in overrides:
        root = source.override(root, assignment)
    if seed is not None:
        flag = Origin(f"--seed {seed}")
        root = source.put(root, ["seeds"], [Node(seed, flag)], flag)
    if device is not None:
        root = source.put(root, ["device"], device, Origin(f"--device {device}"))
    suite = _build(root, path.parent, registry, strict_rules=not overrides and seed is None)
    suite._path = path
    return suite


def from_mapping(mapping: Mapping[str, Any], base: Path | None = None, registry: Registry | None = None) -> Suite:
    """The suite in Python data of the same form as the file's.

    Raises:
        UserError: as :func:`load`, with ``suite`` in place of file and line.
    """
    base = base or Path.cwd()
    return _build(source.extend(source.from_data(mapping, Origin("suite")), base), base, registry, strict_rules=True)


def _build(root: Node, base: Path, registry: Registry | None, *, strict_rules: bool) -> Suite:
    problems = Problems(root)
    # a key without a value is a key not given: a suite that extends another so goes back to the default
    data = {key: value for key, value in root.plain().items() if value is not None}
    _Expansion(data, Uses(registry or plugins.registry(), problems), base).run()
    problems.check()
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        problems.invalid(error, Suite)
        raise problems.error() from error
    _check_labels(suite, problems)
    _check_expected(suite, problems)
    if strict_rules:
        _check_rules(suite, problems)
    problems.check()
    suite._base = base
    return suite


class _Expansion:
    """Replaces, in raw data, every mention of a plugin by its use, and every reference by what it means."""

    def __init__(self, data: dict[str, Any], uses: Uses, base: Path) -> None:
        self.data, self.uses, self.base = data, uses, base
        self.problems = uses.problems

    def run(self) -> None:
        self.data.setdefault("wrappers", ["single"])
        for axis in ("methods", "wrappers", "samplers", "datasets", "metrics"):
            self.axis(axis, self.plugin_entry(axis))
        self.axis("teachers", self.teacher)
        self.axis("students", self.student)

    def axis(self, key: str, expand: Callable[[Any, tuple[str, int]], Any]) -> None:
        raw = self.data.get(key)
        if isinstance(raw, list):
            self.data[key] = [expand(item, (key, number)) for number, item in enumerate(raw)]
        elif raw is not None:
            self.problems.add((key,), wanted("a list", raw))

    def plugin_entry(self, axis: str) -> Callable[[Any, tuple[str, int]], Any]:
        def expand(raw: Any, path: tuple[str, int]) -> Any:
            entry = self.uses.entry(axis, raw, path)
            if entry is None or axis == "methods" or not entry["uses"]:
                return entry
            use = entry.pop("uses")[0]
            return use if axis in ("datasets", "metrics") else {"use": use, **entry}

        return expand

    def teacher(self, raw: Any, path: tuple[str, int]) -> Any:
        if not isinstance(raw, dict):
            return raw
        found = dict(raw)
        train = found.get("train")
        if isinstance(train, dict) and "model" in train:
            found["train"] = {**train, "model": self.uses.model(train["model"], (*path, "train", "model"))}
        listed = self.data.get("datasets")
        uses = [use for use in listed if isinstance(use, Use)] if isinstance(listed, list) else []
        labels = [use.label for use in uses]
        named = found.get("dataset")
        if named is None:
            # of two that are called the same, that is what is said, later
            if len(labels) == 1 or len(set(labels)) < len(labels):
                found["dataset"] = labels[0]
            elif labels:
                self.problems.add((*path, "dataset"), f"this key is missing; add one of {', '.join(labels)}")
        elif named not in labels:
            same = [use.label for use in uses if use.name == named]
            if len(same) == 1:
                found["dataset"] = same[0]
            else:
                hint = near(str(named), labels)
                text = f"no dataset of this suite is called {named!r}{hint} (known: {', '.join(labels) or 'none'})"
                self.problems.add((*path, "dataset"), text)
        return found

    def student(self, raw: Any, path: tuple[str, int]) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("config"), str):
            return raw
        file = self.base / raw["config"]
        try:
            # identities hash the architecture itself, never where its file lies
            return {**raw, "config": json.loads(read_text(file))}
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
            self.problems.add((*path, "config"), f"{file} cannot be read: {reason}")
            return raw


def _check_labels(suite: Suite, problems: Problems) -> None:
    """Labels within one axis must differ, as they name the rows of the table."""
    labels = suite.labels()
    axes = ("dataset", "teacher", "student", "method", "wrapper", "sampler", "budget")
    found = {f"{axis}s": labels[axis] for axis in axes} | {"metrics": tuple(use.label for use in suite.metrics)}
    for key, names in found.items():
        mend = "give one another name" if key in ("teachers", "students", "budgets") else "add a label: to one of them"
        for number, name in enumerate(names):
            if name in names[:number]:
                problems.add((key, number), f"two {key} are called {name!r}; {mend}")


def _check_expected(suite: Suite, problems: Problems) -> None:
    """What a teacher should score can be measured: by a metric of the suite, on what a sampler of it draws."""
    samplers = {entry.label: entry.use for entry in suite.samplers}
    names = {use.label: use.name for use in suite.datasets}
    for number, teacher in enumerate(suite.teachers):
        if teacher.expect is None:
            continue
        path, expect = ("teachers", number, "expect"), teacher.expect
        columns = _columns(suite, names[teacher.dataset])
        if columns is not None and expect.column not in columns:
            text = f"no metric of this suite gives {expect.column!r}{near(expect.column, columns)}"
            problems.add((*path, "column"), f"{text} (known: {', '.join(columns)})")
        use = samplers.get(expect.sampler)
        if use is None:
            text = f"no sampler of this suite is called {expect.sampler!r}{near(expect.sampler, list(samplers))}"
            problems.add((*path, "sampler"), f"{text} (known: {', '.join(samplers)})")
        elif use.plugin.load().needs_rounds:
            text = f"{expect.sampler!r} trains students of its own; name a sampler that draws from the teacher"
            problems.add((*path, "sampler"), text)


def _columns(suite: Suite, dataset: str) -> list[str] | None:
    """The columns that the metrics fill; None where one does not say, which is refused when the suite is planned."""
    try:
        known = [use.plugin.traits["columns"](use.options, dataset) for use in suite.metrics]
        return [str(column) for columns in known for column in columns]
    except Exception:
        return None


def _check_rules(suite: Suite, problems: Problems) -> None:
    """A pattern that matches no label is a misspelt one: it would silently leave cells in or out."""
    for stray in stray_patterns(suite):
        problems.add((stray.key, stray.number, stray.axis), stray.text(most=len(stray.labels)))
