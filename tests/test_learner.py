"""The learner: course of the learning rate, average, clipping, and states that go on as if nothing had happened."""

import math
from fractions import Fraction

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from o2mkd_bench.core.blocks import Training
from o2mkd_bench.engine.learner import Course, Learner


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def learner(course: Course, seed: int = 0, precision: str = "fp32", adapters: bool = False, **training) -> Learner:
    settings = Training(**{"lr": 0.1, "warmup": 0.0, "clip": None, **training}).model_dump()
    net = network(seed)
    return Learner(net, settings, course, precision, nn.Linear(1, 1) if adapters else None)


def loss(one: Learner, step: int) -> torch.Tensor:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    out = one.network(x)
    for adapter in [one.adapters] if isinstance(one.adapters, nn.Linear) else []:
        out = adapter(out)
    return (out - x.sum(1, keepdim=True)).square().mean()


def learn(one: Learner, found: torch.Tensor) -> None:
    one.backward(found)
    one.update()


def train(one: Learner, steps: range) -> None:
    for step in steps:
        learn(one, loss(one, step))


def everything(one: Learner) -> dict[str, torch.Tensor]:
    found = {f"net/{k}": v for k, v in one.network.state_dict().items()}
    found |= {f"ema/{k}": v for k, v in one.ema.module.state_dict().items()}
    found |= {f"adapters/{k}": v for k, v in one.adapters.state_dict().items()}
    for index, state in one.optimizer.state_dict()["state"].items():
        found |= {f"opt/{index}/{k}": v for k, v in state.items()}
    return {k: v.clone() for k, v in found.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rates(one: Learner, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        learn(one, loss(one, step))
        found.append(one.optimizer.param_groups[0]["lr"])
    return found


COURSES = {
    "cosine": lambda p: 0.05 * (1 + math.cos(math.pi * p / 20)),
    "linear": lambda p: 0.1 * (1 - p / 20),
    "constant": lambda p: 0.1,
}


@pytest.mark.parametrize("schedule", COURSES)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rate_at_every_position(schedule, warmup):
    found = rates(learner(Course(20, horizon=20), schedule=schedule, warmup=warmup), 20)
    begin = round(20 * warmup)
    assert found == pytest.approx(
        [0.1 * p / begin if p < begin else COURSES[schedule](p) for p in range(20)], abs=1e-12
    )


def test_a_restart_rises_to_the_course_of_the_learning_rate():
    found = rates(learner(Course(6, offset=8, horizon=20, restart=4)), 6)
    rises = (0.25, 0.5, 0.75, 1, 1, 1)
    assert found == pytest.approx([COURSES["cosine"](8 + p) * r for p, r in enumerate(rises)], abs=1e-12)


def test_a_restart_takes_over_weights_and_average_but_no_moments(tmp_path):
    before = learner(Course(8, horizon=20))
    train(before, range(8))
    before.save(tmp_path / "state.safetensors", {})
    after = learner(Course(12, offset=8, horizon=20, restart=4), seed=1)
    after.load(tmp_path / "state.safetensors", resume=False)
    kept = {k: v for k, v in everything(before).items() if not k.startswith("opt/")}
    assert same(everything(after), kept)


def test_a_kill_in_a_restart_is_not_noticed(tmp_path):
    course = Course(6, offset=8, horizon=20, restart=4)
    whole, half, other = (learner(course) for _ in range(3))
    train(whole, range(6))
    train(half, range(2))
    half.save(tmp_path / "state.safetensors", {})
    other.load(tmp_path / "state.safetensors", resume=True)
    train(other, range(2, 6))
    assert same(everything(other), everything(whole))


def test_an_expert_runs_through_the_rest_of_the_course_at_its_pace():
    course = Course(4, offset=8, horizon=20, pace=Fraction(12, 4))
    assert rates(learner(course), 4) == pytest.approx([COURSES["cosine"](p) for p in (8, 11, 14, 17)], abs=1e-12)


def test_average_is_a_plain_mean_until_it_reaches_its_horizon():
    one = learner(Course(40, horizon=40), ema=0.25)
    mine = None
    for step in range(40):
        learn(one, loss(one, step))
        now = one.network[0].weight.detach().double().clone()
        keep = min(step / (step + 1), 1 - 1 / 10)
        mine = now if mine is None else keep * mine + (1 - keep) * now
    torch.testing.assert_close(one.ema.module[0].weight.double(), mine, rtol=0, atol=1e-6)
    assert not torch.equal(one.ema.module[0].weight, one.network[0].weight)


def test_average_of_a_hurried_expert_has_its_horizon_in_positions():
    one = learner(Course(10, offset=20, horizon=40, pace=Fraction(2)), ema=0.25)
    assert one.ema.decay == pytest.approx(1 - 1 / 5)
    before = one.ema.module[0].weight.clone()
    learn(one, loss(one, 0))
    expected = before + (one.network[0].weight - before) / 5
    torch.testing.assert_close(one.ema.module[0].weight, expected)


def test_skipped_steps_move_position_and_average():
    one = learner(Course(10, horizon=10), ema=1.0)
    train(one, range(2))
    raw, ema = one.network[0].weight.clone(), one.ema.module[0].weight.clone()
    one.skip()
    assert one.position == 3
    assert torch.equal(one.network[0].weight, raw)
    torch.testing.assert_close(one.ema.module[0].weight, ema + (raw - ema) / 3)


def test_clip_bounds_the_norm_over_network_and_adapters():
    one = learner(Course(4, horizon=4), clip=0.5, optimizer="sgd", betas=(0.0, 0.0), adapters=True)
    before = [p.detach().clone() for p in one.parameters]
    learn(one, 1e3 * loss(one, 0))
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, one.parameters, strict=True)])
    assert moved.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_resumed_run_is_the_run_without_a_break(tmp_path, optimizer):
    straight = learner(Course(10, horizon=10), optimizer=optimizer, clip=1.0, adapters=True, weight_decay=0.01)
    train(straight, range(10))
    first = learner(Course(10, horizon=10), optimizer=optimizer, clip=1.0, adapters=True, weight_decay=0.01)
    train(first, range(5))
    first.save(tmp_path / "state.safetensors", {"note": [1, 0.1]})
    second = learner(Course(10, horizon=10), 7, optimizer=optimizer, clip=1.0, adapters=True, weight_decay=0.01)
    assert second.load(tmp_path / "state.safetensors", resume=True) == {"note": [1, 0.1]}
    assert second.position == 5
    assert same(everything(first), everything(second))
    train(second, range(5, 10))
    assert same(everything(straight), everything(second))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_expert_continues_the_warm_up_as_if_it_were_one_run(tmp_path, optimizer):
    straight = learner(Course(10, horizon=10), optimizer=optimizer)
    train(straight, range(10))
    warmup = learner(Course(3, horizon=10), optimizer=optimizer)
    train(warmup, range(3))
    warmup.save(tmp_path / "state.safetensors", {})
    expert = learner(Course(7, offset=3, horizon=10), 7, optimizer=optimizer)
    expert.load(tmp_path / "state.safetensors", resume=False)
    assert expert.position == 0
    train(expert, range(3, 10))
    assert same(everything(straight), everything(expert))


class Convolutions(nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 3, 3, padding=1))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_channels_last_network_goes_on_as_if_nothing_had_happened(tmp_path, optimizer):
    def made(seed):
        settings = Training(lr=0.01, warmup=0.0, optimizer=optimizer, clip=1.0).model_dump()
        return Learner(Convolutions(seed).to(memory_format=torch.channels_last), settings, Course(6, horizon=6))

    def steps(one, which):
        for step in which:
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            learn(one, (one.network(x.to(memory_format=torch.channels_last)) - x.flip(1)).square().mean())

    straight, first, second = made(0), made(0), made(1)
    steps(straight, range(6))
    steps(first, range(3))
    first.save(tmp_path / "state.safetensors", {})
    second.load(tmp_path / "state.safetensors", resume=True)
    for one in (first, second):
        weight = one.network[0].weight
        assert weight.stride() != weight.contiguous().stride()
        # fused optimisers need what they work on to be strided alike
        for parameter, state in one.optimizer.state.items():
            assert {v.stride() for v in state.values() if v.dim()} == {parameter.stride()}
        assert one.ema.module[0].weight.stride() == weight.stride()
    steps(second, range(3, 6))
    assert same(everything(straight), everything(second))


@pytest.mark.parametrize("normalised", [False, True])
def test_average_covers_what_is_no_parameter(normalised):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if normalised else nn.Identity())
    one = Learner(net, Training(warmup=0.0, ema=1.0).model_dump(), Course(3, horizon=3))
    seen = []
    for step in range(3):
        learn(one, one.network(torch.randn(8, 3, generator=torch.Generator().manual_seed(step))).square().mean())
        seen.append({k: v.clone() for k, v in net.state_dict().items()})
    for name, value in one.ema.module.state_dict().items():
        mean = torch.stack([s[name] for s in seen]).double().mean(0) if value.is_floating_point() else seen[-1][name]
        torch.testing.assert_close(value.double(), mean.double(), rtol=0, atol=1e-6)


def test_fp16_scales_the_loss_and_passes_over_what_overflows(tmp_path):
    one = learner(Course(10, horizon=10), precision="fp16", clip=1.0)
    train(one, range(2))
    before, scale = one.network[0].weight.clone(), one.scaler.get_scale()
    learn(one, loss(one, 2) * math.inf)
    assert torch.equal(one.network[0].weight, before)
    assert one.scaler.get_scale() == scale / 2
    one.save(tmp_path / "state.safetensors", {})
    other = learner(Course(10, horizon=10), 7, precision="fp16", clip=1.0)
    other.load(tmp_path / "state.safetensors", resume=True)
    assert other.scaler.get_scale() == scale / 2
    train(one, range(3, 6))
    train(other, range(3, 6))
    assert same(everything(one), everything(other))


def test_a_file_that_is_no_state_leaves_the_learner_alone(tmp_path):
    one = learner(Course(10, horizon=10))
    train(one, range(1))
    before = everything(one)
    one.save(tmp_path / "state.safetensors", {})
    whole = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(whole[:-5])
    with pytest.raises(SafetensorError):
        one.load(tmp_path / "state.safetensors", resume=True)
    assert same(before, everything(one))


def test_weights_of_another_network_are_refused(tmp_path):
    one = learner(Course(1, horizon=1))
    one.save(tmp_path / "state.safetensors", {})
    other = Learner(nn.Linear(3, 1), Training().model_dump(), Course(1, horizon=1))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load(tmp_path / "state.safetensors", resume=False)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_never_waits_for_the_device(tmp_path, optimizer, precision):
    net = Convolutions(0).cuda().to(memory_format=torch.channels_last)
    settings = Training(warmup=0.0, optimizer=optimizer, clip=1.0).model_dump()
    one = Learner(net, settings, Course(4, horizon=4), precision)
    x = torch.randn(4, 3, 6, 6, device="cuda").to(memory_format=torch.channels_last)
    learn(one, net(x).square().mean())
    one.save(tmp_path / "state.safetensors", {})
    one.load(tmp_path / "state.safetensors", resume=True)
    learn(one, net(x).square().mean())
    torch.cuda.set_sync_debug_mode("error")
    try:
        learn(one, net(x).square().mean())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in net.parameters())
