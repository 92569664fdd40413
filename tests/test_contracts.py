"""Every built-in plugin keeps the contract that third parties are held to."""

# ruff: noqa: RUF012 - a contract's attributes are never changed

import re
from pathlib import Path

from o2mkd_bench.core.plugins import BUILTIN, registry
from o2mkd_bench.testing import (
    Contract,
    DatasetContract,
    IntervalRuleContract,
    KDMethodContract,
    MetricContract,
    SamplerContract,
    WrapperContract,
)

# What needs files that are not in the repository has tests of its own.
ELSEWHERE = {("datasets", "cifar10"), ("datasets", "image_folder"), ("models", "unet2d"), ("trackers", "jsonl")}


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


class TestProgressive(SamplerContract):
    name = "progressive"
    options = {"start": 32}
    steps = (1, 2, 4, 8, 16)


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
