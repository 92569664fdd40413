"""Memory is reckoned as it is used: storages of a real pass, with and without activations computed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from o2mkd_bench.cli import main
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.suite import from_mapping
from o2mkd_bench.engine import memory
from o2mkd_bench.engine.memory import Live, Network, Step, sampling, training
from o2mkd_bench.runner import check_memory
from o2mkd_bench.stages.memory import Memory, check
from o2mkd_plugins.models.options import UNet2DOptions
from o2mkd_plugins.models.unet2d import UNet2D

FAMILY = UNet2D()
OPTIONS = UNet2DOptions(block_out_channels=(16, 32), norm_num_groups=4, attention=(8,))
CONFIG = FAMILY.student_config(FAMILY.teacher_config(OPTIONS, channels=3, size=16), {}, "s")
HALF = FAMILY.student_config(CONFIG, {"width": 0.5}, "s")
PLAIN = Step(Network(FAMILY, CONFIG), [], batch=8, micro_batch=8, precision="fp32")
TAUGHT = replace(PLAIN, student=Network(FAMILY, HALF, ["mid"]), teachers=[Network(FAMILY, CONFIG, ["mid"])])


def saved_bytes(batch: int) -> int:
    """What autograd keeps of a real forward pass beside the weights."""
    network = FAMILY.build(CONFIG).train()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = FAMILY.forward(network, torch.randn(batch, 3, 16, 16), torch.zeros(batch, dtype=torch.int64))
        out.square().mean()
        return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_those_that_autograd_keeps() -> None:
    saved = saved_bytes(64)
    estimate = training(replace(PLAIN, batch=64, micro_batch=64))
    gradients = 4 * sum(p.numel() for p in FAMILY.build(CONFIG).parameters())
    # beside them the images, and what the backward pass is just at
    assert saved < estimate.learning < 1.25 * saved + gradients


@pytest.mark.parametrize("step", [PLAIN, TAUGHT, replace(TAUGHT, checkpoint=True), replace(TAUGHT, micro_batch=2)])
def test_fake_tensors_take_what_real_ones_do(monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    fake = training(step)
    monkeypatch.setattr(memory, "FakeTensorMode", nullcontext)
    assert training(step) == fake


def test_what_makes_it_less() -> None:
    whole = training(TAUGHT)
    parts, again = (training(replace(TAUGHT, **change)) for change in ({"micro_batch": 2}, {"checkpoint": True}))
    assert parts.learning < whole.learning
    assert again.learning < whole.learning
    assert (parts.teaching, parts.resident) == (whole.teaching, whole.resident)
    narrow = training(replace(TAUGHT, precision="bf16"))
    assert narrow.teaching < whole.teaching
    weights = sum(p.numel() for p in FAMILY.build(CONFIG).parameters())
    # a frozen teacher is held in the narrow type
    assert whole.resident - narrow.resident == 2 * weights
    assert training(replace(PLAIN, optimizer="sgd")).resident == 12 * weights
    assert whole.total == whole.resident + max(whole.teaching, whole.learning)


def test_drawing_holds_every_expert_and_asks_one() -> None:
    one, four = (sampling([Network(FAMILY, CONFIG)] * k, 8, "fp32") for k in (1, 4))
    assert four.resident == 4 * one.resident
    assert four.learning == one.learning < sampling([Network(FAMILY, CONFIG)], 16, "fp32").learning


def test_what_is_let_go_counts_no_more() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        view = kept[:10]
        gone = torch.ones(500)
        del gone
    assert (live.now, live.peak) == (4000, 6000)
    assert len(view) == 10


def suite(**changes: object) -> dict[str, object]:
    mapping: dict[str, object] = {
        "name": "m",
        "device": "cpu",
        "datasets": ["digits"],
        "teachers": [{"name": "t", "train": {"model": {"unet2d": {"block_out_channels": [16]}}, "images": 64}}],
        "students": [{"name": "half", "width": 0.5}],
        "methods": ["feature"],
        "wrappers": ["single", {"o2mkd": {"students": 2}}],
        "samplers": [{"ddim": {"steps": 2}}, {"progressive": {"steps": 2, "start": 4}}],
        "metrics": [{"fid": {"network": "embedded"}}],
        "budgets": [640],
        "training": {"batch": 32, "micro_batch": 16, "group": 8},
        "sampling": {"images": 640, "batch": 64},
        "probe": {"enabled": False},
    }
    return mapping | changes


def test_every_stage_with_networks_is_reckoned(tmp_path: Path) -> None:
    session = prepare(from_mapping(suite()), tmp_path)
    found = Memory(session.plan, session.registry)
    kinds = {stage.kind for stage in session.plan.stages.values() if found.of(stage) is not None}
    assert kinds == {"teacher", "state", "student", "round", "samples", "speed"}
    totals = [estimate.total for stage in session.plan.stages.values() if (estimate := found.of(stage))]
    assert min(totals) > 0


def refused(tmp_path: Path, free: Callable[[int], float], kind: str = "student", **changes: object) -> str:
    session = prepare(from_mapping(suite(**changes)), tmp_path)
    found = Memory(session.plan, session.registry)
    stages = [stage for stage in session.plan.stages.values() if stage.kind == kind]
    estimate = found.of(stages[0])
    assert estimate is not None
    check(stages, found, estimate.total + 1)
    with pytest.raises(UserError) as error:
        check(stages, found, free(estimate.total))
    return str(error.value)


def test_too_little_memory_is_one_sentence_with_the_key(tmp_path: Path) -> None:
    def less(total: int) -> float:
        return total - 1

    text = refused(tmp_path, less)
    assert "memory" in text
    assert "training.batch" in text or "checkpoint_activations" in text
    small = {"batch": 8, "micro_batch": 8, "group": 8}
    assert "checkpoint_activations" in refused(tmp_path, less, training=small, methods=["none"])
    again = {"training": small, "methods": ["none"], "checkpoint_activations": True}
    assert "training.micro_batch (now 8)" in refused(tmp_path, less, **again)
    whole = {**again, "training": {"batch": 8, "group": 8}}
    assert "training.micro_batch (now as large as training.batch, 8)" in refused(tmp_path, less, **whole)
    assert "speed.batch" in refused(tmp_path, less, kind="speed")
    assert "smaller" in refused(tmp_path, lambda total: 1.0)


def test_what_cannot_be_reckoned_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Step) -> None:
        raise RuntimeError("depends on data")

    monkeypatch.setattr("o2mkd_bench.stages.memory.training", fail)
    session = prepare(from_mapping(suite()), tmp_path)
    found = Memory(session.plan, session.registry)
    stages = [stage for stage in session.plan.stages.values() if stage.kind == "student"]
    assert found.of(stages[0]) is None
    check(stages, found, 0.0)


def test_plan_tells_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(suite(wrappers=["single"])), encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(path), "--store", str(tmp_path / "store"), "--memory"])
    assert "peak GB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(path), "--store", str(tmp_path / "store"), "--memory", "--json"])
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {stage["kind"] for stage in stages if stage.get("memory_bytes", 0) > 0} >= {"student", "samples"}


def test_of_a_teacher_that_is_not_here_nothing_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(suite(teachers=[{"name": "t", "hub": "acme/gone"}])), encoding="utf-8")
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(path), "--store", str(tmp_path / "store"), "--memory"])
    assert "no stage with networks is known yet" in capsys.readouterr().out


def test_a_run_asks_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("o2mkd_bench.stages.cohort.free_memory", lambda device: 1.0)
    with pytest.raises(UserError, match="needs about"):
        check_memory(prepare(from_mapping(suite()), tmp_path))
