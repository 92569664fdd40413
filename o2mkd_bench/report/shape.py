"""What a results document must look like for tables to be made of it; others may have written it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

# what a terminal obeys is not text
Text = Annotated[str, Strict(), Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Lines = Annotated[str, Strict(), Field(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]
# what a column of integers holds
Int = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Number = Int | StrictFloat | None
Word = Text | Int | StrictFloat | StrictBool | None
Numbers = list[Number] | Number
Scores = dict[str, Number] | None


class Shape(BaseModel):
    """Keys beside those named here may hold anything: no table reads them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)


class Reading(Shape):
    batch: Word = None
    compile: Word = None
    device: Word = None
    images_per_second: Number = None
    latency_ms_median: Number = None
    latency_ms_p90: Number = None
    peak_memory_mb: Number = None


class Curve(Shape):
    t: list[Int | StrictFloat]
    error: list[Number]

    @model_validator(mode="after")
    def _an_error_for_each(self) -> Curve:
        if len(self.t) != len(self.error):
            raise ValueError("t and error must be equally long")
        return self


class Row(Shape):
    cell: Text
    status: Literal["done", "failed", "unresolved", "missing"]
    scores: Scores = None
    reason: Lines | None = None
    speed: Reading | None = None
    probe: Curve | None = None
    calls: Numbers = None
    edges: Numbers = None
    batch_per_student: Numbers = None
    steps_per_student: Numbers = None
    images_per_student: Numbers = None
    baseline_of: list[Text] | None = None
    role: Text | None = None
    dataset: Word = None
    teacher: Word = None
    student: Word = None
    method: Word = None
    wrapper: Word = None
    sampler: Word = None
    steps: Word = None
    spacing: Word = None
    clip: Word = None
    budget: Word = None
    weights: Word = None
    seed: Word = None
    nfe: Int | None = None
    images_total: Number = None
    params_total: Number = None
    params_active: Number = None
    macs_per_image: Number = None
    train_seconds: Number = None
    shared_with: Number = None
    run: Annotated[Int, Field(ge=0)] | None = None

    prediction: Word = None
    recipe: Text | None = None
    guidance: Word = None
    precision: Word = None
    device: Word = None
    samples: Word = None
    students: Number = None
    batch: Number = None
    rounds_images: Number = None
    device_seconds: Number = None


class Loss(Shape):
    t: list[Number]
    error: list[Number]


class Teacher(Shape):
    dataset: Word
    teacher: Word
    column: Text
    sampler: Word
    steps: Word
    seed: Word
    expected: Int | StrictFloat
    tolerance: Int | StrictFloat
    found: Number
    as_expected: StrictBool | None
    loss: Loss | None


class Metric(Shape):
    column: Text
    dataset: Text | None = None
    protocol: dict[str, Word] | None = None


class Reference(Shape):
    dataset: Text
    what: Text
    images: Number = None
    scores: dict[str, Number] = Field(default_factory=dict)


class Dataset(Shape):
    dataset: Text
    fingerprint: Word = None
    identity: Text | None = None
    source: Word = None


class Run(Shape):
    created: Text | None = None
    git_commit: Text | None = None
    machine: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    rows: Int | None = None


class Document(Shape):
    schema_version: Int
    suite: Text | None = None
    suite_path: Text | None = None
    rows: list[Row]
    axes: dict[str, list[Word]] = Field(default_factory=dict)
    datasets: list[Dataset] = Field(default_factory=list)
    networks: dict[str, Any] = Field(default_factory=dict)
    runs: list[Run] = Field(default_factory=list)
    metrics: list[Metric] = Field(default_factory=list)
    references: list[Reference] = Field(default_factory=list)
    created: Text | None = None
    git_commit: Text | None = None
    machine: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    teacher_steps: list[Int] | None = None
    teachers: list[Teacher] = Field(default_factory=list)

    @model_validator(mode="after")
    def _every_run_is_told(self) -> Document:
        if any((row.run or 0) >= len(self.runs) for row in self.rows) and self.runs:
            raise ValueError("rows name runs that are not in 'runs'")
        return self


def complaint(document: Any) -> str:
    """What is wrong with a document, in words; empty where nothing is."""
    try:
        Document.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ""
