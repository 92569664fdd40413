"""What the harness itself costs: planning a large suite, asking a store about it, and starting up.

Not part of the tests: ``pytest benchmarks`` on a quiet machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from o2mkd_bench.core.build import build
from o2mkd_bench.core.measures import Machine
from o2mkd_bench.core.plan import Plan
from o2mkd_bench.core.status import Survey
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.suite import Suite, from_mapping


def grid(steps: list[int], seeds: int) -> Suite:
    """5 students x 5 methods x 4 wrappers x 4 samplers, for each of ``steps`` and seeds; without baselines."""
    return from_mapping(
        {
            "name": "large",
            "datasets": ["digits"],
            "teachers": [
                {"name": "small", "train": {"model": {"unet2d": {"block_out_channels": [16, 32]}}, "images": "3k"}}
            ],
            "students": [{"name": f"s{i}", "width": 0.5 + i / 2} for i in range(5)],
            "methods": ["none", "output", "feature", "relation", {"output": {"weight": 0.5}, "label": "half"}],
            "wrappers": ["single", *({"o2mkd": {"students": k}} for k in (2, 3, 4))],
            "samplers": [
                {"ddim": {"steps": steps}},
                {"ddpm": {"steps": steps}},
                {"dpm_solver": {"steps": steps}},
                {"dpm_solver": {"steps": steps, "order": 3}},
            ],
            "metrics": [{"fid": {"network": "embedded"}}],
            "budgets": ["16k"],
            "seeds": list(range(seeds)),
            "sampling": {"images": 640},
            "baselines": [],
        }
    )


def planned(suite: Suite) -> Plan:
    return build(suite, Machine("cpu", "some cpu", {"torch": "2"}), lambda repo, revision: None)


def test_plan_of_ten_thousand_cells(benchmark: BenchmarkFixture) -> None:
    suite = grid([5, 8, 10, 15, 20], seeds=5)
    plan = benchmark(planned, suite)
    assert len(plan.cells) == 10_000 + 4 * 5 * 5


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store]:
    """A thousand cells and more, all of whose artifacts are there."""
    plan = planned(grid([5, 10], seeds=2))
    store = Store(tmp_path_factory.mktemp("store"))
    for stage in plan.stages.values():
        with store.writing(stage.identity, stage.kind, stage.label, stage.spec, stage.needs):
            pass
    return plan, store


def test_survey_of_a_thousand_done_cells(benchmark: BenchmarkFixture, done: tuple[Plan, Store]) -> None:
    plan, store = done
    standings = benchmark(lambda: Survey(plan, store).standings())
    assert len(standings) >= 1_000
    assert {s.status for s in standings} == {"done"}


def test_what_a_finished_run_does_before_it_ends(benchmark: BenchmarkFixture, done: tuple[Plan, Store]) -> None:
    plan, store = done
    assert benchmark(lambda: Survey(plan, store).missing()) == {}


def test_survey_of_a_thousand_missing_cells(
    benchmark: BenchmarkFixture, done: tuple[Plan, Store], tmp_path: Path
) -> None:
    plan, empty = done[0], Store(tmp_path)
    standings = benchmark(lambda: Survey(plan, empty).standings())
    assert {s.status for s in standings} == {"missing"}


def test_help(benchmark: BenchmarkFixture) -> None:
    command = [sys.executable, "-c", "from o2mkd_bench.cli import main; main()", "--help"]
    result = benchmark.pedantic(lambda: subprocess.run(command, capture_output=True, check=True), rounds=5)
    assert b"Usage" in result.stdout
