"""Contracts of plugins as test classes: subclass the one of your kind, name your plugin, and run pytest.

    from o2mkd_bench.testing import KDMethodContract

    class TestHuber(KDMethodContract):
        name = "huber"
        options = {"delta": 0.05}

The plugin must be installed, since the tests find it as a suite does: by its entry point. Options that matter get a
class each. Needs pytest, which nothing else of this package imports.
"""

# ruff: noqa: E402 - pytest explains a failed assert only in modules that it knows before they are imported

import pytest

_PARTS = ("contract", "data", "executors", "kd", "metrics", "models", "plans", "samplers")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in _PARTS))

from .contract import Contract
from .data import DatasetContract
from .executors import ExecutorContract
from .kd import KDMethodContract
from .metrics import MetricContract
from .models import ModelContract
from .plans import IntervalRuleContract, WrapperContract
from .samplers import SamplerContract

__all__ = [
    "Contract",
    "DatasetContract",
    "ExecutorContract",
    "IntervalRuleContract",
    "KDMethodContract",
    "MetricContract",
    "ModelContract",
    "SamplerContract",
    "WrapperContract",
]
