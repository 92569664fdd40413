"""The blocks of a suite that name no plugin: training, sampling, speed, budgets, rules … and their units."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from .complaints import not_allowed, wanted
from .grid import Spacing
from .options import Options, neutral
from .program import Clip
from .schedule import MOST_TIMESTEPS, Prediction

# sizes beyond which a suite is a mistake, and would be one that takes long to plan
MOST, MOST_STEPS = 10**12, 100
_COUNT = re.compile(r"(\d[\d_]{0,30}(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kKmM]?)")
_SCALE = {"": 1, "k": 1000, "m": 1_000_000}


def _count(value: Any) -> int:
    parts = _COUNT.fullmatch(str(value).strip())
    if parts is not None and not isinstance(value, bool):
        number = Fraction(parts[1]) * _SCALE[parts[2].lower()]
        if number > MOST:
            raise ValueError(wanted(f"at most {MOST}", value))
        if number.denominator == 1 and number > 0:
            return int(number)
    raise ValueError(wanted("a whole number above 0, such as 1500, 50k or 2M", value))


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{value!r} stands here twice; keep one")
        seen.add(value)
    return values


TEACHER = "teacher"
"""What tables, rules and ``--only`` have where a student's name stands, for the rows of a teacher itself."""


def printable(value: str) -> str:
    """``value``, or ValueError where it holds what a terminal or a table would obey, or is too long to read."""
    if not value.isprintable() or len(value) > 200:
        raise ValueError(wanted("one line of at most 200 letters that can be printed", value))
    return value


def _student(value: str) -> str:
    if value == TEACHER:
        raise ValueError(f"{TEACHER!r} is what tables call the teacher itself; give the student another name")
    return value


def _folder(value: str) -> str:
    if re.search(r"[/\\:]", value) or value.startswith(".") or len(os.fsencode(value)) > 200:
        raise ValueError(wanted("a name that a folder can have, without / \\ : and no dot at its start", value))
    return value


def _device(value: str) -> str:
    if value == "gpu":
        raise ValueError("a GPU is called 'cuda' here, as in torch; write cuda, cuda:0 or auto")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError(not_allowed(value, ["cpu", "cuda", "cuda:0", "auto"]))
    return value


def _patterns(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(str(item) for item in value)
    return value if value is None or isinstance(value, Mapping) else (str(value),)


def _switch(value: Any) -> Any:
    # YAML reads a bare on and off as truth values
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


_COUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)?([eE]\+?[0-9]+)?[kKmM]?$|\$\{"},
    ]
}
Count = Annotated[int, BeforeValidator(_count), WithJsonSchema(_COUNT_SCHEMA)]
Auto = Annotated[
    int | Literal["auto"],
    BeforeValidator(lambda value: value if value == "auto" else _count(value)),
    WithJsonSchema({"anyOf": [*_COUNT_SCHEMA["anyOf"], {"const": "auto"}]}),
]
Name = Annotated[str, Field(min_length=1), AfterValidator(printable)]
FolderName = Annotated[Name, AfterValidator(_folder)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Device = Annotated[str, AfterValidator(_device)]
Optimizer = Literal["adamw", "adam", "sgd"]
LearningRate = Literal["cosine", "constant", "linear"]
Weights = Literal["ema", "raw"]
_SWITCH_SCHEMA = {"enum": ["auto", "on", "off", True, False]}
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch), WithJsonSchema(_SWITCH_SCHEMA)]
Compile = Annotated[
    Literal["auto", "off", "on", "max"],
    BeforeValidator(_switch),
    WithJsonSchema({"enum": ["auto", "on", "off", "max", True, False]}),
]
Baseline = Literal["equal_total", "per_student", "equal_batch"]
UNIQUE = AfterValidator(_unique)
_LADDER_SCHEMA = {"anyOf": [*_COUNT_SCHEMA["anyOf"], {"type": "array", "items": _COUNT_SCHEMA}]}
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000), UNIQUE]
Steps = Annotated[
    tuple[Count, ...],
    BeforeValidator(_one_or_more),
    Field(min_length=1, max_length=MOST_STEPS),
    UNIQUE,
    WithJsonSchema({"anyOf": [_COUNT_SCHEMA, {"type": "array", "items": _COUNT_SCHEMA, "minItems": 1}]}),
]

Ladder = Annotated[
    tuple[Count, ...],
    BeforeValidator(_one_or_more),
    Field(max_length=MOST_STEPS),
    UNIQUE,
    WithJsonSchema(_LADDER_SCHEMA),
]


class Block(Options):
    """A part of a suite; its validator is built on first use, as most are only ever used inside that of the suite."""

    model_config = ConfigDict(defer_build=True)


class TrainingOverride(Block):
    """What an entry trains otherwise than the suite; null inherits, save that ``clip: null`` switches clipping off."""

    optimizer: Optimizer | None = None
    lr: Positive | None = None
    weight_decay: NotNegative | None = None
    betas: tuple[Decay, Decay] | None = None
    schedule: LearningRate | None = None
    warmup: Share | None = None
    batch: Count | None = None
    ema: Share | None = None
    clip: Positive | None = None
    group: Annotated[int, Field(ge=3, le=MOST)] | None = None
    micro_batch: Count | None = None


class Training(Block):
    """How a network is trained.

    Attributes:
        schedule: course of the learning rate after its linear ``warmup``, a share of the steps.
        batch: images a step.
        ema: horizon of the moving average of the weights, a share of the steps.
        clip: largest norm of the gradient, or null.
        group: samples with neighbouring timesteps that relational terms compare, at least 3.
        micro_batch: images that pass a student at once, their gradients added up; null is the whole batch. Parts end
            where a relational group does.
    """

    optimizer: Optimizer = "adamw"
    lr: Positive = 2e-4
    weight_decay: NotNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    schedule: LearningRate = "cosine"
    warmup: Share = 0.05
    batch: Count = 128
    ema: Share = 0.05
    clip: Positive | None = 1.0
    group: Annotated[int, Field(ge=3, le=MOST)] = 32
    micro_batch: Count | None = None

    def merged(self, *overrides: TrainingOverride) -> Training:
        """This training with what ``overrides`` give, the last one winning."""
        values = self.model_dump()
        for other in overrides:
            for name in other.model_fields_set:
                value = getattr(other, name)
                if value is not None or name == "clip":
                    values[name] = value
        return Training.model_validate(values)


class Schedule(Block):
    """A noise schedule; the fields are those of :class:`o2mkd_bench.core.schedule.NoiseSchedule`."""

    kind: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    timesteps: Annotated[int, Field(ge=2, le=MOST_TIMESTEPS)] = 1000


class Expect(Block):
    """What a teacher scores if it is what it says it is, under the suite's own protocol and its first seed.

    Attributes:
        column: of one of the suite's metrics.
        sampler: the label of one that is not trained.
        tolerance: how far away the score may lie, as a share of ``value``.
        refuse: whether nothing is trained from a teacher that lies further away; else it is only said.
    """

    column: Annotated[str, Field(min_length=1)]
    value: Positive
    sampler: Annotated[str, Field(min_length=1)]
    steps: Count
    tolerance: NotNegative = 0.15
    refuse: bool = True


STUDENT_KEYS = ("width", "blocks", "config", "variant")
"""The keys of a student's entry that say what its architecture is."""


class StudentEntry(Block):
    """A student's network, derived from the teacher's.

    Attributes:
        width: factor on the teacher's channels.
        blocks: residual blocks a resolution; null is the teacher's number.
        config: a whole architecture instead, as in diffusers' ``config.json``; a suite may give the path of one.
        variant: a smaller architecture that the teacher's family knows by name.
        init: ``teacher``: it starts from those of the teacher's weights that it has a place for.
        prediction: what it predicts; null is the teacher's.
    """

    name: Annotated[Name, AfterValidator(_student)]
    width: Annotated[Positive, Field(le=64)] = 1.0
    blocks: Annotated[int, Field(ge=1, le=64)] | None = None
    config: (
        Annotated[dict[str, Any], WithJsonSchema({"type": ["object", "string"], "description": "or a path"})] | None
    ) = None
    variant: Annotated[str, Field(min_length=1)] | None = None
    init: Literal["scratch", "teacher"] = "scratch"
    prediction: Prediction | None = None
    training: TrainingOverride = Field(default_factory=TrainingOverride)

    @model_validator(mode="after")
    def _one_source(self) -> StudentEntry:
        if self.variant is not None and (self.config is not None or self.blocks is not None):
            raise ValueError("variant names the architecture; leave config and blocks out, or variant")
        if self.config is not None and (self.width != 1.0 or self.blocks is not None):
            raise ValueError("config gives the whole architecture; leave width and blocks out, or config")
        return self


class Sampling(Block):
    """How every sampler is run, unless its entry says otherwise.

    Attributes:
        images: how many a cell generates for its scores.
        batch: how many at a time; ``auto`` is as many as memory holds, at most 1024. Halved when memory runs out.
        weights: which weights of a student are scored.
        teacher_steps: further rows of the teacher alone, for each sampler that is not trained.
        guidance: g of classifier-free guidance, epsilon = e_u + g (e_c - e_u), for models that draw from text; null is
            the conditional prediction alone.
    """

    images: Count = 1000
    batch: Auto = neutral(250)
    spacing: Spacing = "trailing"
    clip: Clip = "x0"
    weights: Annotated[tuple[Weights, ...], Field(min_length=1), UNIQUE] = ("ema",)
    teacher_steps: Ladder = ()
    guidance: NotNegative | None = None


class Speed(Block):
    """How speed is measured: images at a time, and readings of which the median counts."""

    batch: Count = 64
    repeats: Count = 3
    enabled: bool = True


class Probe(Block):
    """The curve of the error over t: at ``points`` timesteps, each a mean over ``images`` images."""

    points: Count = 25
    images: Count = 128
    enabled: bool = True


class Budget(Block):
    """How many images a job may see; ``50k`` is short for ``{images: 50k}``."""

    name: Name | None = None
    images: Count

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | Budget) else {"images": value}

    @property
    def label(self) -> str:
        """The given name, else the number in its shortest form."""
        if self.name is not None:
            return self.name
        for letter in "Mk":
            if self.images % _SCALE[letter.lower()] == 0:
                return f"{self.images // _SCALE[letter.lower()]}{letter}"
        return str(self.images)


_PATTERNS_SCHEMA = {"type": ["string", "number"]}
Patterns = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_patterns),
    WithJsonSchema({"anyOf": [_PATTERNS_SCHEMA, {"type": "array", "items": _PATTERNS_SCHEMA}]}),
]


class Rule(Block):
    """Cells by their labels: every axis given must match one of its patterns (``*``, ``?`` as in file names).

    The student ``teacher`` is a teacher itself: its own rows, drawn from its own weights.
    """

    dataset: Patterns = None
    teacher: Patterns = None
    student: Patterns = None
    method: Patterns = None
    wrapper: Patterns = None
    sampler: Patterns = None
    steps: Patterns = None
    budget: Patterns = None
    seed: Patterns = None
    weights: Patterns = None

    @model_validator(mode="after")
    def _some_axis(self) -> Rule:
        if not self.patterns():
            raise ValueError(f"a rule names at least one axis (known: {', '.join(type(self).model_fields)})")
        return self

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """The axes this rule speaks of."""
        return {axis: tuple(found) for axis, found in self if found is not None}

    def of_teacher(self) -> dict[str, tuple[str, ...]]:
        """What it asks of a teacher's rows: less, where it names them."""
        return {axis: found for axis, found in self.patterns().items() if axis != "student" or TEACHER not in found}

    def matches(self, cell: Mapping[str, Any]) -> bool:
        """Whether ``cell`` (axis to label) is one this rule means."""
        return all(any_match(found, cell.get(axis)) for axis, found in self.patterns().items())


def any_match(patterns: Sequence[str], label: Any) -> bool:
    """Whether a pattern is ``label``, or matches it; a label such as ``deis(order=[1, 2])`` always matches itself."""
    return any(str(label) == pattern or fnmatchcase(str(label), pattern) for pattern in patterns)
