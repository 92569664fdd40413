"""How a suite's words about compilation and CUDA graphs are read, and what of it enters an identity."""

from __future__ import annotations

import pytest
from toy import suite

from o2mkd_bench.core import mode as module
from o2mkd_bench.core.build import build
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.measures import Machine
from o2mkd_bench.core.mode import Mode, resolve_mode
from o2mkd_bench.core.suite import from_mapping


@pytest.fixture
def triton(monkeypatch):
    def present(there: bool) -> None:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if there else None)

    present(True)
    return present


@pytest.mark.parametrize(
    ("compile", "graphs", "device", "expected"),
    [
        ("auto", "auto", "cpu", Mode()),
        ("on", "auto", "cpu", Mode("on")),
        ("auto", "auto", "cuda:0", Mode("on", cuda_graphs=True)),
        ("max", "off", "cuda:0", Mode("max")),
        ("off", "on", "cuda:0", Mode(cuda_graphs=True)),
    ],
)
def test_auto_is_everything_on_cuda_and_nothing_on_the_cpu(triton, compile, graphs, device, expected):
    assert resolve_mode(compile, graphs, device) == expected


def test_without_triton_auto_is_off_and_a_wish_by_name_is_refused(triton):
    triton(False)
    assert resolve_mode("auto", "auto", "cuda:0") == Mode("off", cuda_graphs=True)
    assert resolve_mode("on", "auto", "cpu") == Mode("on")
    with pytest.raises(UserError, match="needs Triton on cuda:0; install triton"):
        resolve_mode("on", "auto", "cuda:0")


def test_cuda_graphs_need_cuda():
    with pytest.raises(UserError, match="needs a CUDA device, not cpu"):
        resolve_mode("off", "on", "cpu")


def test_a_suite_says_on_and_off_as_yaml_reads_them():
    found = from_mapping(suite(compile=True, cuda_graphs=False))
    assert (found.compile, found.cuda_graphs) == ("on", "off")
    with pytest.raises(UserError, match="compile"):
        from_mapping(suite(compile="fast"))
    with pytest.raises(UserError, match=r"sampling\.batch"):
        from_mapping(suite(sampling={**suite()["sampling"], "batch": "many"}))


def test_the_mode_decides_speed_readings_and_nothing_else(tmp_path):
    def kinds(mode: Mode, **changes: object) -> dict[str, set[str]]:
        machine = Machine("cpu", "some cpu", {"torch": "2"}, mode)
        plan = build(from_mapping(suite(**changes), tmp_path), machine, lambda repo, revision: None)
        found: dict[str, set[str]] = {}
        for stage in plan.stages.values():
            found.setdefault(stage.kind, set()).add(stage.identity)
        return found

    plain = kinds(Mode())
    for mode in (Mode("on"), Mode("off", cuda_graphs=True)):
        other = kinds(mode)
        assert {kind for kind in plain if plain[kind] != other[kind]} == {"speed"}
    assert kinds(Mode(), compile="on", cohort=3, checkpoint_activations=True) == plain
