"""The suite: what it means, and what it says when it is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, field_validator

from o2mkd_bench import Options, UserError, hookimpl, neutral
from o2mkd_bench.core import schema
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.plugins import BUILTIN, Registry
from o2mkd_bench.core.suite import Suite, Training, TrainingOverride, from_mapping, load


class Output(Options):
    weight: float = 1.0
    task: float = 0.0


class Pair(Options):
    teacher: str = "mid"


class Feature(Options):
    weight: float = 1.0
    roles: tuple[str, ...] = ("mid",)
    pairs: dict[str, Pair] = Field(default_factory=dict)


class Cifar(Options):
    root: str = neutral("")
    flip: bool = True


class Lift(Options):
    students: int = Field(2, ge=1)
    init: Literal["shared", "teacher"] = "shared"
    intervals: Literal["uniform", "auto"] | list[int] = "uniform"
    edges: int | list[int] | None = None


class Ddim(Options):
    eta: float = Field(0.0, ge=0, le=1)


class Deis(Options):
    order: int

    @field_validator("order")
    @classmethod
    def _known(cls, order: int) -> int:
        if order > 3:
            raise UserError("order above 3 is not made; use 1, 2 or 3")
        return order


class Unet(Options):
    block_out_channels: tuple[int, ...] = (32, 64)


class Fid(Options):
    network: Literal["inception", "embedded"] = "inception"


PLUGINS = {
    "kd_methods": {"output": Output, "feature": Feature},
    "wrappers": {"single": Options, "o2mkd": Lift},
    "samplers": {"ddim": Ddim, "deis": Deis},
    "datasets": {"digits": Options, "cifar10": Cifar},
    "models": {"unet2d": Unet},
    "metrics": {"fid": Fid},
}


def plugin_module(plugins: dict[str, dict[str, type[Options]]]) -> ModuleType:
    module = ModuleType("fake")
    module.api = 1  # type: ignore[attr-defined]

    def hook(kind: str) -> Callable[[Any], None]:
        def declare(register: Any) -> None:
            for name, options in plugins[kind].items():
                register(name, "fake:Thing", options=options, summary=f"the {name}")

        return hookimpl(declare, specname=f"register_{kind}")

    for kind in plugins:
        setattr(module, f"register_{kind}", hook(kind))
    return module


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry()
    found.add(plugin_module(PLUGINS), BUILTIN, "1", "fake")
    found.add(plugin_module({"kd_methods": {"output": Output, "huber": Options}}), "acme", "1", "acme")
    found.add(plugin_module({"kd_methods": {"huber": Options}}), "other", "1", "other")
    assert not found.broken
    return found


FULL = """\
# yaml-language-server: $schema=../o2mkd_bench/schema/suite.json
name: quickstart
seeds: [0, 1]
device: cpu
precision: fp32
store_dtype: fp16
datasets: [digits, {cifar10: {root: "${SUITE_TEST_ROOT:-}"}}]
teachers:
  - name: small
    dataset: digits
    train: {model: {unet2d: {block_out_channels: [8, 16]}}, images: 200k, seed: 1000, training: {lr: 1e-3}}
    schedule: {kind: scaled_linear, timesteps: 100}
    prediction: v_prediction
  - {name: local, dataset: cifar10, path: ../some/folder}
  - {name: hub, dataset: cifar10, hub: google/ddpm-cifar10-32, revision: abc}
students:
  - {name: half, width: 0.5, blocks: 1, config: null, prediction: null, training: {clip: null}}
methods:
  - output
  - {output: {weight: 2}, feature: {weight: .5, roles: [down.0]}}
  - {output: {weight: 1}, feature: {weight: .5}, label: mix}
wrappers:
  - single
  - {o2mkd: {students: 2, init: teacher}, training: {batch: 64}}
  - {o2mkd: {students: 4}, label: four}
samplers:
  - {ddim: {steps: [10, 20], eta: 0}}
  - {deis: {steps: 5, order: 2}, spacing: linspace, clip: none, training: {lr: 2e-5}}
metrics: [{fid: {network: embedded}}]
budgets: [50k, 2M, 1500, {name: short, images: 1e3}]
training: {optimizer: adamw, lr: 1e-4, weight_decay: 0.01, betas: [0.9, 0.95], schedule: cosine, warmup: 0.1,
           batch: 32, ema: 0.05, clip: 1.0, group: 8}
sampling: {images: 1000, batch: 250, spacing: trailing, clip: x0+epsilon, weights: [ema, raw]}
speed: {batch: 64, repeats: 3, enabled: true}
probe: {points: 25, images: 128, enabled: false}
baselines: [equal_total]
include: [{method: [output, mix]}, {wrapper: "o2mkd*", steps: 10}]
exclude: [{seed: 1, budget: short}]
checkpoint_every: 60
description: free text
"""

SMALL = """\
name: small
datasets: [digits]
teachers:
  - name: t
    train:
      model: unet2d
      images: 1k
students: [{name: s}]
methods:
  - output:
      weight: 2
samplers:
  - ddim:
      steps: [10]
metrics: [fid]
budgets: [1k]
"""

Read = Callable[..., Suite]


@pytest.fixture
def read(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Read:
    monkeypatch.chdir(tmp_path)

    def run(text: str = SMALL, *overrides: str, **flags: Any) -> Suite:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return load(Path("x.yaml"), overrides, registry=registry, **flags)

    return run


@pytest.fixture
def said(read: Read) -> Callable[..., str]:
    def run(text: str = SMALL, *overrides: str, **flags: Any) -> str:
        with pytest.raises(UserError) as caught:
            read(text, *overrides, **flags)
        return str(caught.value)

    return run


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new, 1)


def test_the_whole_format(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_TEST_ROOT", "/data")
    suite = read(FULL)
    assert suite.path == Path("x.yaml")
    assert suite.base == Path()
    assert [use.label for use in suite.datasets] == ["digits", "cifar10"]
    assert suite.datasets[1].options == Cifar(root="/data")
    small, local, hub = suite.teachers
    assert small.train is not None
    assert small.train.model.options == Unet(block_out_channels=(8, 16))
    assert (small.train.images, small.train.seed, small.prediction) == (200_000, 1000, "v_prediction")
    assert small.train.training.lr == 1e-3
    assert small.schedule is not None
    assert (small.schedule.kind, small.schedule.timesteps) == ("scaled_linear", 100)
    assert (local.path, local.dataset, hub.hub, hub.revision) == (
        "../some/folder",
        "cifar10",
        "google/ddpm-cifar10-32",
        "abc",
    )
    assert [entry.label for entry in suite.methods] == [
        "output",
        'output(weight=2.0)+feature(weight=0.5, roles=["down.0"])',
        "mix",
    ]
    assert [use.name for use in suite.methods[2].uses] == ["output", "feature"]
    assert [entry.label for entry in suite.wrappers] == ["single", "o2mkd(init=teacher)", "four"]
    assert suite.wrappers[1].training.batch == 64
    assert suite.wrappers[2].use.plugin.kind == "wrappers"
    ddim, deis = suite.samplers
    assert (ddim.steps, ddim.label, ddim.spacing, ddim.clip) == ((10, 20), "ddim", None, None)
    assert (deis.steps, deis.label, deis.spacing, deis.clip) == ((5,), "deis(order=2)", "linspace", "none")
    assert deis.training.lr == 2e-5
    assert suite.metrics[0].label == "fid(network=embedded)"
    assert [(b.label, b.images) for b in suite.budgets] == [
        ("50k", 50_000),
        ("2M", 2_000_000),
        ("1500", 1500),
        ("short", 1000),
    ]
    assert (suite.training.lr, suite.training.betas, suite.training.group) == (1e-4, (0.9, 0.95), 8)
    assert (suite.sampling.weights, suite.probe.enabled, suite.baselines) == (("ema", "raw"), False, ("equal_total",))


def test_defaults(read: Read) -> None:
    suite = read()
    assert [entry.label for entry in suite.wrappers] == ["single"]
    assert (suite.seeds, suite.device, suite.baselines) == ((0,), "auto", ("equal_total", "per_student"))
    assert suite.teachers[0].dataset == "digits"
    assert suite.training == Training()
    assert suite.students[0].width == 1.0


def test_training_merges_what_was_given_and_nothing_else() -> None:
    base = Training(lr=1e-3, clip=0.5)
    override = TrainingOverride.model_validate({"lr": "1e-4", "batch": None, "clip": None})
    merged = base.merged(TrainingOverride(lr=1.0, batch=64), override)
    assert (merged.lr, merged.batch, merged.clip) == (1e-4, 64, None)
    assert base.merged() == base
    assert set(TrainingOverride.model_fields) == set(Training.model_fields)


def test_flags_come_last(read: Read) -> None:
    suite = read(SMALL, "seeds=[4]", "training.lr=1e-4", "samplers.ddim.steps=[4]", seed=7, device="cuda:1")
    assert (suite.seeds, suite.device, suite.training.lr, suite.samplers[0].steps) == ((7,), "cuda:1", 1e-4, (4,))


def test_rules_select_cells(read: Read) -> None:
    suite = read(FULL)
    cell = {"method": "mix", "wrapper": "single", "steps": 20, "seed": 1, "budget": "50k"}
    assert suite.selects(cell)
    assert not suite.selects({**cell, "budget": "short"})
    assert not suite.selects({**cell, "method": "other"})
    assert suite.selects({**cell, "method": "other", "wrapper": "o2mkd(init=teacher)", "steps": 10})
    assert read().selects(cell)


def test_labels_with_brackets_match_themselves(read: Read) -> None:
    text = changed("weight: 2\n", "weight: 2\n    feature: {roles: [a, b]}\n    label: two[1]\n")
    suite = read(text + 'include: [{method: "two[1]"}]\n')
    assert suite.selects({"method": "two[1]"})
    assert suite.methods[0].uses[1].label == 'feature(roles=["a", "b"])'


def test_null_goes_back_to_the_default(read: Read, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(SMALL + "training: {lr: 1}\nseeds: [5]\n")
    suite = read("extends: base.yaml\nseeds:\nname: child\ntraining: {batch: 2}\n")
    assert (suite.name, suite.seeds, suite.training.lr, suite.training.batch) == ("child", (0,), 1.0, 2)


def test_student_config_is_read_from_its_file(read: Read, said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"layers": 1}')
    assert read(changed("{name: s}", "{name: s, config: c.json}")).students[0].config == {"layers": 1}
    assert read(changed("{name: s}", "{name: s, config: {layers: 2}}")).students[0].config == {"layers": 2}
    assert said(changed("{name: s}", "{name: s, config: d.json}")) == (
        "x.yaml:8: students.s.config: d.json cannot be read: No such file or directory"
    )
    (tmp_path / "c.json").write_text("{")
    assert "students.s.config: c.json cannot be read: it is not JSON" in said(
        changed("{name: s}", "{name: s, config: c.json}")
    )


# What it says. The left column is replaced by the middle one in SMALL.
ERRORS = [
    (
        "weight: 2",
        "wieght: 2",
        "x.yaml:11: methods.output.wieght: unknown key; did you mean 'weight'? (known: weight, task)",
    ),
    (
        "name: small",
        "nmae: small",
        "x.yaml:1: nmae: unknown key; did you mean 'name'? (known: name, description, seeds, device,",
    ),
    ("name: small\n", "", "x.yaml:1: name: this key is missing; add it"),
    ("samplers:", "sampler:", "x.yaml:12: sampler: unknown key; did you mean 'samplers'?"),
    ("- ddim:", "- ddmi:", "x.yaml:13: samplers.ddmi: no samplers plugin is called 'ddmi'; did you mean 'ddim'?"),
    ("unet2d", "unet", "x.yaml:6: teachers.t.train.model: no models plugin is called 'unet'; did you mean 'unet2d'?"),
    (
        "unet2d",
        "{unet2d: {layers: 3}}",
        "x.yaml:6: teachers.t.train.model.unet2d.layers: unknown key (known: block_out_channels)",
    ),
    ("unet2d", "[a]", "x.yaml:6: teachers.t.train.model: expected one of unet2d, or {name: {options}}, got ['a']"),
    ("model: unet2d\n", "seed: 1\n", "x.yaml:5: teachers.t.train.model: this key is missing; add it"),
    ("images: 1k", "images: 1z", "x.yaml:7: teachers.t.train.images: expected a whole number above 0, such as 1500,"),
    ("budgets: [1k]", "budgets: [0]", "x.yaml:16: budgets.0: expected a whole number above 0"),
    ("budgets: [1k]", "budgets: [1.5]", "x.yaml:16: budgets.0: expected a whole number above 0"),
    ("budgets: [1k]", "budgets: [true]", "x.yaml:16: budgets.0: expected a whole number above 0"),
    ("budgets: [1k]", "budgets: 1k", "x.yaml:16: budgets: expected a list, got '1k'"),
    ("[digits]", "[digits, digits]", "x.yaml:2: datasets.digits: two datasets are called 'digits'; add a label"),
    ("budgets: [1k]", "budgets: []", "x.yaml:16: budgets: expected 1 or more entries, got []"),
    ("methods:\n", "methods: output\nx:\n", "x.yaml:9: methods: expected a list, got 'output'"),
    ("budgets: [1k]", "budgets: [1k, 1000]", "x.yaml:16: budgets.1: two budgets are called '1k'; give one another"),
    ("steps: [10]", "steps: [ten]", "x.yaml:14: samplers.ddim.steps.ten: expected a whole number above 0"),
    ("steps: [10]", "steps: [10, 10]", "x.yaml:14: samplers.ddim.steps: 10 stands here twice; keep one"),
    ("steps: [10]", "eta: 0", "x.yaml:13: samplers.ddim.steps: this key is missing; write {ddim: {steps: [10, 20]}}"),
    (
        "- ddim:\n      steps: [10]",
        "- ddim",
        "x.yaml:13: samplers.ddim.steps: this key is missing; write {ddim: {steps: [10, 20]}}",
    ),
    ("steps: [10]", "{steps: 1, eta: 3}", "x.yaml:14: samplers.ddim.eta: expected at most 1, got 3"),
    ("ddim:\n      steps: [10]", "ddim: 10", "x.yaml:13: samplers.ddim.steps: this key is missing"),
    ("output:\n      weight: 2", "output: 2", "x.yaml:10: methods.output: expected a mapping of options, got 2"),
    (
        "steps: [10]\n",
        "steps: [10]\n    lable: x\n",
        "x.yaml:15: samplers.lable: unknown key; did you mean 'label'? (known: label, spacing, clip, training)",
    ),
    (
        "weight: 2\n",
        "weight: 2\n    feauture: {}\n",
        "x.yaml:12: methods.feauture: unknown key; did you mean 'feature'?",
    ),
    (
        "steps: [10]\n",
        "steps: [10]\n    eta: 0\n",
        "x.yaml:15: samplers.eta: unknown key (known: label, spacing, clip, training); a plugin's options go inside",
    ),
    (
        "steps: [10]\n",
        "steps: [10]\n    deis: {}\n",
        "x.yaml:13: samplers.ddim: one entry names one plugin, this one ddim and deis; make an entry of each",
    ),
    ("steps: [10]\n", "steps: [10]\n    label: 3\n", "x.yaml:15: samplers.0.label: expected text (put it in quotes)"),
    (
        "steps: [10]\n",
        "steps: [10]\n    spacing: trail\n",
        "x.yaml:15: samplers.0.spacing: 'trail' is not allowed; did you mean 'trailing'? (allowed: leading, trailing,",
    ),
    ("[fid]", "[{label: x}]", "x.yaml:15: metrics.x: expected the name of a plugin (fid), or {name: {options}}, got"),
    ("[fid]", "[3]", "x.yaml:15: metrics.0: expected the name of a plugin (fid)"),
    ("[fid]", "[fid, fid]", "x.yaml:15: metrics.fid: two metrics are called 'fid'; add a label: to one of them"),
    ("[{name: s}]", "[{name: teacher}]", "x.yaml:8: students.teacher.name: 'teacher' is what tables call"),
    ("[{name: s}]", "[{name: s}, {name: s}]", "x.yaml:8: students.s: two students are called 's'; give one another"),
    ("[{name: s}]", "[s]", "x.yaml:8: students.s: expected a mapping, got 's'"),
    ("[{name: s}]", "[{name: 3}]", "x.yaml:8: students.3.name: expected text (put it in quotes), got 3"),
    ("[{name: s}]", "[{width: 1}]", "x.yaml:8: students.0.name: this key is missing; add it"),
    (
        "[{name: s}]",
        "[{name: s, width: .5, config: {}}]",
        "x.yaml:8: students.s: config gives the whole architecture; leave width and blocks out, or config",
    ),
    (
        "- name: t",
        "- path: x\n    name: t",
        "x.yaml:4: teachers.t: give one of train, path and hub, not train and path",
    ),
    ("- name: t", "- revision: x\n    name: t", "x.yaml:4: teachers.t: revision goes with hub, not with train"),
    (
        "    train:\n      model: unet2d\n      images: 1k\n",
        "    prediction: epsilon\n    path: x\n",
        "x.yaml:4: teachers.t: prediction goes with train, path brings its own",
    ),
    ("- name: t", "- t\n  - name: u", "x.yaml:4: teachers.t: expected a mapping, got 't'"),
    (
        "- name: t",
        "- dataset: digit\n    name: t",
        "x.yaml:4: teachers.t.dataset: no dataset of this suite is called 'digit'; did you mean 'digits'?",
    ),
    ("[digits]", "[digits, cifar10]", "x.yaml:4: teachers.t.dataset: this key is missing; add one of digits, cifar10"),
    (
        "name: small",
        "name: small\nprecision: fp23",
        "x.yaml:2: precision: 'fp23' is not allowed; did you mean 'fp32'? (allowed: fp32, bf16, fp16)",
    ),
    (
        "name: small",
        "name: small\ndevice: gpu",
        "x.yaml:2: device: a GPU is called 'cuda' here, as in torch; write cuda, cuda:0 or auto",
    ),
    (
        "name: small",
        "name: small\ndevice: cdua",
        "x.yaml:2: device: 'cdua' is not allowed; did you mean 'cuda'? (allowed: cpu, cuda, cuda:0",
    ),
    (
        "name: small",
        "name: small\ntraining: {lr: fast, lrr: 1}",
        "x.yaml:2: training.lrr: unknown key; did you mean 'lr'?",
    ),
    ("name: small", "name: small\ntraining: {lr: .inf}", "x.yaml:2: training.lr: expected a finite number, got inf"),
    ("name: small", "name: small\ntraining: {group: 2}", "x.yaml:2: training.group: expected at least 3, got 2"),
    ("name: small", "name: small\nspeed: {enabled: 7}", "x.yaml:2: speed.enabled: expected true or false, got 7"),
    ("name: small", "name: small\nspeed: fast", "x.yaml:2: speed: expected a mapping, got 'fast'"),
    ("name: small", "name: small\nseeds: [0, 0]", "x.yaml:2: seeds: 0 stands here twice; keep one"),
    ("name: small", "name: small\nseeds: [1.5]", "x.yaml:2: seeds.0: expected a whole number, got 1.5"),
    (
        "name: small",
        "name: small\nexclude: [{metod: x}]",
        "x.yaml:2: exclude.metod: unknown key; did you mean 'method'?",
    ),
    ("name: small", "name: small\nexclude: [{}]", "x.yaml:2: exclude.0: a rule names at least one axis"),
    (
        "name: small",
        "name: small\ninclude: [{method: outptu}]",
        "x.yaml:2: include.method: 'outptu' matches no method of this suite (known: output(weight=2.0))",
    ),
    (
        "name: small",
        "name: small\nwrappers: [{o2mkd: {intervals: 5}}]",
        "x.yaml:2: wrappers.o2mkd.intervals: 5 is not allowed (allowed: uniform, auto), or expected a list, got 5",
    ),
    (
        "name: small",
        "name: small\nwrappers: [{o2mkd: {edges: a}}]",
        "x.yaml:2: wrappers.o2mkd.edges: expected a whole number or a list, got 'a'",
    ),
    ("name: small", "name: small\nwrappers: [{o2mkd: {students: 0}}]", "x.yaml:2: wrappers.o2mkd.students: expected"),
    (
        "weight: 2\n",
        "weight: 2\n    feature: {pairs: {a: {techer: x}}}\n",
        "x.yaml:12: methods.feature.pairs.a.techer: unknown key; did you mean 'teacher'? (known: teacher)",
    ),
    ("ddim:\n      steps: [10]", "deis: {steps: 1, order: 4}", "x.yaml:13: samplers.deis: order above 3 is not made"),
    ("ddim:\n      steps: [10]", "deis: {steps: 1}", "x.yaml:13: samplers.deis.order: this key is missing; add it"),
    ("output:\n      weight: 2", "huber: {}", "x.yaml:10: methods.huber: kd_methods 'huber' is claimed by two plugins"),
]


@pytest.mark.parametrize(("old", "new", "words"), ERRORS, ids=[words[:60] for _, _, words in ERRORS])
def test_errors_name_file_line_key_and_mend(said: Callable[..., str], old: str, new: str, words: str) -> None:
    text = said(changed(old, new))
    assert text.startswith(words)
    assert "\n" not in text


def test_further_errors_are_counted(said: Callable[..., str]) -> None:
    assert said(changed("weight: 2", "{wieght: 2, tsak: 1, foo: 2}")).endswith("(and 2 more)")


def test_unknown_plugins_are_plugin_errors(read: Read) -> None:
    with pytest.raises(PluginError, match=r"^x.yaml:13: samplers.ddmi: "):
        read(changed("- ddim:", "- ddmi:"))


def test_errors_through_extends_and_overrides_name_their_origin(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(SMALL + "training: {lrr: 1}\n")
    assert said("extends: base.yaml\n").startswith("base.yaml:17: training.lrr: unknown key; did you mean 'lr'?")
    assert said(SMALL, "training.lrr=1").startswith("--set training.lrr=1: training.lrr: unknown key; did you mean")
    assert said(SMALL, "samplers.ddim.steps=[x]").startswith("--set samplers.ddim.steps=[x]: samplers.ddim.steps.x: ")
    assert said(SMALL, "samplers.dim.steps=[4]").startswith(
        "--set samplers.dim.steps=[4]: samplers has no item 'dim'; did you mean 'ddim'?"
    )
    assert said(SMALL, device="tpu").startswith("--device tpu: device: 'tpu' is not allowed")
    assert said(SMALL, seed=-1).startswith("--seed -1: seeds.0: expected at least 0, got -1")


def test_rules_may_match_nothing_after_an_override(read: Read) -> None:
    text = changed("weight: 2\n", "weight: 2\n  - feature\n") + "exclude: [{method: feature}]\n"
    assert read(text, "methods=[output]").methods[0].label == "output"


@pytest.mark.parametrize("change", ["seeds=[-1]", "budgets=[0]", "students=[{name: a, width: 0}]"])
def test_one_mistake_in_a_list_is_one(read: Read, change: str) -> None:
    with pytest.raises(UserError) as caught:
        read(SMALL, change)
    assert "more)" not in str(caught.value)


def test_dataset_may_be_named_by_its_plugin(read: Read, said: Callable[..., str]) -> None:
    text = changed("[digits]", "[{digits: {}, label: d}, {cifar10: {flip: false}}]")
    assert read(text.replace("- name: t", "- dataset: cifar10\n    name: t")).teachers[0].dataset == (
        "cifar10(flip=false)"
    )
    twice = text.replace("- name: t", "- dataset: cifar10\n    name: t").replace("digits: {}", "cifar10: {}")
    assert "no dataset of this suite is called 'cifar10'" in said(twice)


def test_plugins_of_others_are_written_with_their_distribution(read: Read) -> None:
    suite = read(changed("output:\n      weight: 2", "acme:huber"))
    assert (suite.methods[0].uses[0].plugin.distribution, suite.methods[0].label) == ("acme", "acme:huber")


def test_from_mapping(registry: Registry, tmp_path: Path) -> None:
    data = yaml.safe_load(SMALL)
    suite = from_mapping({**data, "seeds": (3,)}, base=tmp_path, registry=registry)
    assert (suite.path, suite.base, suite.seeds) == (None, tmp_path, (3,))
    assert from_mapping(data, registry=registry).base == Path.cwd()
    with pytest.raises(UserError, match=r"^suite: lr: unknown key"):
        from_mapping({**data, "lr": 3}, registry=registry)
    with pytest.raises(ValidationError, match="frozen"):
        suite.name = "other"  # type: ignore[misc]


def test_suites_need_no_torch() -> None:
    code = "import sys, o2mkd_bench.core.suite, o2mkd_bench.core.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# JSON schema: as much of the standard as ours uses.


def accepts(rule: Any, value: Any, root: dict[str, Any]) -> bool:
    if "$ref" in rule and not accepts(root["$defs"][rule["$ref"].removeprefix("#/$defs/")], value, root):
        return False
    if any(key in rule and not test(rule[key], value) for key, test in CHECKS.items()):
        return False
    some = [accepts(part, value, root) for part in rule.get("anyOf", ())]
    one = [accepts(part, value, root) for part in rule.get("oneOf", ())]
    if (some and not any(some)) or (one and sum(one) != 1):
        return False
    if isinstance(value, dict):
        properties, rest = rule.get("properties", {}), rule.get("additionalProperties", {})
        rest = {} if rest is True else rest
        return all(
            accepts(properties[k], v, root) if k in properties else rest is not False and accepts(rest, v, root)
            for k, v in value.items()
        )
    if isinstance(value, list):
        prefix = rule.get("prefixItems", [])
        items = [*prefix, *[rule.get("items", {})] * (len(value) - len(prefix))]
        return all(accepts(item, v, root) for item, v in zip(items, value, strict=False))
    return True


def _is(kind: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "string": isinstance(value, str),
        "integer": number and value == int(value),
        "number": number,
        "boolean": isinstance(value, bool),
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "null": value is None,
    }[kind]


def _number(value: Any) -> bool:
    return _is("number", value)


CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": lambda kinds, v: any(_is(kind, v) for kind in ([kinds] if isinstance(kinds, str) else kinds)),
    "const": lambda const, v: bool(v == const),
    "enum": lambda allowed, v: v in allowed,
    "pattern": lambda pattern, v: not isinstance(v, str) or re.search(pattern, v) is not None,
    "minimum": lambda bound, v: not _number(v) or v >= bound,
    "exclusiveMinimum": lambda bound, v: not _number(v) or v > bound,
    "maximum": lambda bound, v: not _number(v) or v <= bound,
    "exclusiveMaximum": lambda bound, v: not _number(v) or v < bound,
    "minLength": lambda bound, v: not isinstance(v, str) or len(v) >= bound,
    "minItems": lambda bound, v: not isinstance(v, list) or len(v) >= bound,
    "maxItems": lambda bound, v: not isinstance(v, list) or len(v) <= bound,
    "required": lambda keys, v: not isinstance(v, dict) or all(key in v for key in keys),
}


def editor(text: str) -> Any:
    """The YAML as editors read it: YAML 1.2, where 1e-3 is a number."""
    return yaml.safe_load(re.sub(r"\b(\d)e(-?\d)", r"\1.0e\2", text).replace("e3", "e+3"))


def test_schema_accepts_suites_and_refuses_typos(registry: Registry) -> None:
    rules = json.loads(schema.render(schema.suite_schema(registry)))
    assert accepts(rules, editor(FULL), rules)
    assert accepts(rules, editor(SMALL), rules)
    assert accepts(rules, {"extends": "other.yaml", "seeds": [1]}, rules)
    assert not accepts(rules, {"name": "x"}, rules)
    refused = [
        ("weight: 2", "wieght: 2"),
        ("- ddim:", "- ddmi:"),
        ("steps: [10]", "eta: 0"),
        ("[fid]", "[fdi]"),
        ("images: 1k", "images: many"),
        ("name: small", "nmae: small"),
        ("- name: t", "- path: x\n    name: t"),
        ("unet2d", "{unet2d: {channels: 3}}"),
        ("budgets: [1k]", "budgets: []"),
        ("weight: 2\n", "weight: 2\n    feature: {pairs: {a: {techer: x}}}\n"),
        ("- ddim:\n      steps: [10]", "- ddim"),
    ]
    for old, new in refused:
        assert not accepts(rules, editor(changed(old, new)), rules), new


def test_schema_names_plugins_as_a_suite_must(registry: Registry) -> None:
    names = schema.suite_schema(registry)["$defs"]["methods"]["anyOf"][-1]["properties"]
    assert {"output", "feature", "acme:output", "acme:huber", "other:huber", "label"} == set(names)
    builtin = schema.suite_schema(registry, builtin_only=True)
    assert "acme:huber" not in builtin["$defs"]["methods"]["anyOf"][-1]["properties"]
    assert builtin["$defs"]["methods"]["anyOf"][0] == {"const": "feature", "description": "the feature"}


def test_every_reference_of_the_schema_is_defined(registry: Registry) -> None:
    rules = schema.suite_schema(registry)
    named = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(rules)))
    assert named <= set(rules["$defs"])


def test_options_schemas(registry: Registry) -> None:
    found = schema.options_schemas(registry, "wrappers")
    assert set(found) == {"single", "o2mkd"}
    assert found["o2mkd"]["properties"]["students"]["minimum"] == 1
