"""Every built-in plugin keeps the contract that third parties are held to."""

# ruff: noqa: RUF012 - a contract's attributes are never changed

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from o2mkd_bench import KDMethod, Line, ModelFamily, NoiseSchedule, Program, Sampler, Wrapper, hookimpl
from o2mkd_bench.core.intervals import cover
from o2mkd_bench.core.plugins import BUILTIN, Registry, registry
from o2mkd_bench.testing import (
    Contract,
    DatasetContract,
    IntervalRuleContract,
    KDMethodContract,
    MetricContract,
    ModelContract,
    SamplerContract,
    WrapperContract,
)

# What needs files that are not in the repository has tests of its own.
ELSEWHERE = {
    *(("datasets", name) for name in ("cifar10", "image_folder", "lsun", "celebahq", "coco")),
    ("models", "unet2d_condition"),
    ("metrics", "clip_score"),
    *(("trackers", name) for name in ("jsonl", "tensorboard", "wandb")),
    *(("executors", name) for name in ("local", "ray")),
}


class TestNone(KDMethodContract):
    name = "none"


class TestOutput(KDMethodContract):
    name = "output"
    options = {"weight": 2.0, "task": 0.5, "weighting": "min_snr"}


class TestHint(KDMethodContract):
    name = "feature"
    options = {"layers": ["down.0", "mid"]}


class TestAttention(KDMethodContract):
    name = "feature"
    options = {"kind": "attention", "task": 0.0}


class TestRkd(KDMethodContract):
    name = "relation"
    options = {"task": 0.5}


class TestSimilarity(KDMethodContract):
    name = "relation"
    options = {"kind": "similarity", "mixed_t": True}


class TestSingle(WrapperContract):
    name = "single"


class TestSingleOfExpertsLaw(WrapperContract):
    name = "single"
    options = {"scale": 1.5, "students": 4, "intervals": "snr"}
    scale = 1.5


class TestO2MKD(WrapperContract):
    name = "o2mkd"
    options = {"students": 4}
    students = 4


class TestO2MKDOfFullBatches(WrapperContract):
    name = "o2mkd"
    options = {"students": 3, "intervals": "snr", "allocation": "equal", "expert_batch": "full", "init": "scratch"}
    students = 3


class TestO2MKDOfOverlappingExperts(WrapperContract):
    name = "o2mkd"
    options = {"students": 2, "overlap": 0.2, "warmup": 0.5}
    students = 2


class TestO2MKDWithABudgetEach(WrapperContract):
    name = "o2mkd"
    options = {"students": 2, "budget": "per_student", "warmup": 0.0}
    students = 2
    scale = 2.0


class TestUniform(IntervalRuleContract):
    name = "uniform"


class TestSnr(IntervalRuleContract):
    name = "snr"


class TestDdim(SamplerContract):
    name = "ddim"


class TestDdimWithNoise(SamplerContract):
    name = "ddim"
    options = {"eta": 1.0}
    fine = 500


class TestDdpm(SamplerContract):
    name = "ddpm"
    fine = 500


class TestDdpmOfLargeVariance(SamplerContract):
    name = "ddpm"
    options = {"variance": "fixed_large"}
    fine = 1000


class TestDpmSolver(SamplerContract):
    name = "dpm_solver"
    accuracy = 0.002


class TestDpmSolverSinglestep(SamplerContract):
    name = "dpm_solver"
    options = {"kind": "singlestep", "order": 3, "history": "reset"}
    accuracy = 0.002


class TestDpmSolverInEpsilon(SamplerContract):
    name = "dpm_solver"
    options = {"algorithm": "dpmsolver", "final": "sigma_min"}


class TestEuler(SamplerContract):
    name = "euler"


class TestEulerFromSigma(SamplerContract):
    name = "euler"
    options = {"start": "sigma"}


class TestHeun(SamplerContract):
    name = "heun"


class TestPndm(SamplerContract):
    name = "pndm"


class TestPndmByRungeKutta(SamplerContract):
    name = "pndm"
    options = {"warmup": "prk", "final": "zero", "history": "reset"}
    steps = (4, 5, 10, 20)


class TestDeis(SamplerContract):
    name = "deis"


class TestDeisOfOrderThree(SamplerContract):
    name = "deis"
    options = {"order": 3, "final": "zero", "history": "reset"}


class TestUniPc(SamplerContract):
    name = "unipc"
    accuracy = 0.002


class TestUniPcInEpsilon(SamplerContract):
    name = "unipc"
    options = {"order": 3, "solver_type": "bh1", "predict_x0": False, "history": "reset"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
class TestDiffusers(SamplerContract):
    name = "diffusers"
    options = {"scheduler": "LMSDiscreteScheduler", "config": {"timestep_spacing": "trailing"}}

    def planned(self):
        """Who names a scheduler of diffusers has it imported by the plan, and nobody else has."""
        return ""


class TestProgressive(SamplerContract):
    name = "progressive"
    options = {"start": 32}
    steps = (1, 2, 4, 8, 16)


class TestUNet2D(ModelContract):
    name = "unet2d"
    options = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention": [4], "attention_head_dim": 4}
    students = ({}, {"width": 0.5}, {"blocks": 1}, {"config": {"dropout": 0.1}})


class TestDiT(ModelContract):
    name = "dit"
    options = {"num_layers": 3, "num_attention_heads": 2}
    channels = 3
    students = ({}, {"width": 0.5, "blocks": 1})


class TestDigits(DatasetContract):
    name = "digits"


class TestFrechetDistance(MetricContract):
    name = "fid"
    options = {"network": "embedded"}


class TestKernelDistance(MetricContract):
    name = "kid"
    options = {"network": "embedded", "subsets": 5, "subset_size": 200}


class TestInceptionScore(MetricContract):
    name = "inception_score"
    options = {"network": "embedded"}


class TestPrecisionRecall(MetricContract):
    name = "precision_recall"
    options = {"network": "embedded"}


def test_every_builtin_is_held_to_its_contract():
    classes = [c for c in globals().values() if isinstance(c, type) and issubclass(c, Contract)]
    held = {(c.kind, c.name) for c in classes if hasattr(c, "name")}
    assert held | ELSEWHERE >= {(p.kind, p.name) for p in registry().all() if p.distribution == BUILTIN}


def test_nothing_else_imports_the_contracts():
    """They need pytest, which an installation need not have."""
    root = Path(__file__).parents[1]
    sources = [f for folder in ("o2mkd_bench", "plugins/o2mkd_plugins") for f in (root / folder).rglob("*.py")]
    using = [f for f in sources if re.search(r"^\s*(from|import) .*(\btesting\b|\bpytest\b)", f.read_text(), re.M)]
    assert using
    assert {f.relative_to(root).parts[:2] for f in using} == {("o2mkd_bench", "testing")}


# --- what a contract must not let through


class Forgetful(KDMethod):
    """Keeps a running mean outside its adapters, which an expert that continues a warm-up does not get."""

    seen = 0.0

    def weights(self):
        return {"output": 1.0}

    def terms(self, ctx):
        error = (ctx.student - ctx.teacher).square().mean()
        self.seen = 0.5 * self.seen + 0.5 * float(error.detach())
        return {"output": error / self.seen}


class Spread(KDMethod):
    """A sample standard deviation, which one sample has not; in place, on what others see too."""

    def weights(self):
        return {"spread": 1.0}

    def terms(self, ctx):
        return {
            "spread": ctx.teacher.sub_(ctx.student.detach()).std(0).mean() + (ctx.student - ctx.teacher).std(0).mean()
        }


class Hasty(Sampler):
    """Overshoots, and makes one evaluation more than it says."""

    def program(self, schedule, grid, edges=(), clip="x0"):
        lines = [Line(t, x0={i: 1.1}, noise=0.1) for i, t in enumerate([*grid, 0])]
        return Program(tuple(lines), clip)


class Generous(Wrapper):
    """Two students that each see everything."""

    def wrap(self, job, lift):
        halves = cover([500], lift.schedule.timesteps)
        return tuple(replace(job, role=str(k), serves=half) for k, half in enumerate(halves))


class Vandal(ModelFamily):
    """Writes into whatever it is given."""

    def teacher_config(self, options, channels, size):
        return {"in_channels": channels, "sample_size": size, "width": 4}

    def student_config(self, teacher, student, where):
        teacher["width"] = 2
        return teacher

    def build(self, config):
        config["bias"] = True
        return torch.nn.Conv2d(config["in_channels"], config["in_channels"], 1)

    def forward(self, network, x, t, condition=None):
        return network(x.mul_(0.5)) - x.mean()

    def roles(self, network):
        return {"mid": "middle"}


class Declarations:
    api = 1

    @hookimpl
    def register_models(register):
        register("vandal", "test_contracts:Vandal")

    @hookimpl
    def register_kd_methods(register):
        register("forgetful", "test_contracts:Forgetful")
        register("spread", "test_contracts:Spread")

    @hookimpl
    def register_samplers(register):
        register("hasty", "test_contracts:Hasty")

    @hookimpl
    def register_wrappers(register):
        register("generous", "test_contracts:Generous")


@pytest.fixture
def bad(monkeypatch):
    """An instance of a contract for a bad plugin."""
    found = Registry()
    found.add(Declarations, "bad", "0", "bad")
    assert not found.broken
    monkeypatch.setattr("o2mkd_bench.testing.contract.registry", lambda: found)
    return lambda contract, **attributes: type("Bad", (contract,), attributes)()


def test_state_outside_the_adapters_is_found(bad, tmp_path):
    method = bad(KDMethodContract, name="forgetful")
    with pytest.raises(AssertionError):
        method.test_lifted_to_one_student_it_is_itself(tmp_path)
    with pytest.raises(AssertionError):
        method.test_same_step_gives_the_same_terms()


@pytest.mark.filterwarnings("ignore:std")
def test_nan_of_one_sample_and_changed_inputs_are_found(bad):
    method = bad(KDMethodContract, name="spread")
    with pytest.raises(AssertionError, match="spread is nan"):
        method.test_few_samples_are_enough(1)
    with pytest.raises(AssertionError):
        method.test_inputs_stay_as_they_are()


def test_wrong_length_and_wrong_law_are_found(bad):
    sampler = bad(SamplerContract, name="hasty")
    for check in (
        lambda: sampler.test_program_is_as_long_as_declared("trailing"),
        sampler.test_last_line_adds_no_noise,
        sampler.test_exact_denoiser_leads_to_the_data,
    ):
        with pytest.raises(AssertionError):
            check()


def test_images_beyond_the_budget_are_found(bad):
    wrapper = bad(WrapperContract, name="generous", students=2)
    with pytest.raises(AssertionError):
        wrapper.test_budget_is_accounted_for(NoiseSchedule())
    with pytest.raises(AssertionError):
        wrapper.test_several_students_are_declared()


def test_a_family_that_writes_into_what_it_is_given_is_found(bad):
    family = bad(ModelContract, name="vandal")
    for check in (
        family.test_a_student_leaves_what_it_is_derived_from,
        family.test_networks_are_float32_and_leave_their_config,
        family.test_forward_gives_the_shape_and_writes_into_nothing,
        family.test_an_image_does_not_depend_on_the_others,
        family.test_roles_are_modules,
    ):
        with pytest.raises(AssertionError):
            check()


def test_a_name_of_two_packages_is_tested_for_none(bad, monkeypatch):
    sampler = bad(SamplerContract, name="hasty")
    assert sampler.plugin.distribution == "bad"
    found = Registry()
    found.add(Declarations, "o2mkd-bench", "0", "built-in")
    found.add(Declarations, "bad", "0", "bad")
    monkeypatch.setattr("o2mkd_bench.testing.contract.registry", lambda: found)
    with pytest.raises(AssertionError, match=r"of o2mkd-bench would.*write name = 'o2mkd-bench:hasty' or 'bad:hasty'"):
        sampler.test_version_is_given()
    assert bad(SamplerContract, name="bad:hasty").plugin.load() is Hasty


def test_torch_at_plan_time_is_found(tmp_path, monkeypatch):
    """In a fresh interpreter, from a package that is installed there alone."""
    (tmp_path / "heavy.py").write_text(
        "import torch\nfrom o2mkd_bench import hookimpl\napi = 1\n"
        "@hookimpl\ndef register_kd_methods(register):\n    register('heavy', 'heavy:Heavy')\n"
    )
    info = tmp_path / "heavy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[o2mkd_bench]\nheavy = heavy\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    contract = type("Heavy", (KDMethodContract,), {"name": "heavy"})()
    with pytest.raises(AssertionError, match="torch"):
        contract.test_plan_needs_no_torch()
