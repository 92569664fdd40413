"""The sampling loop and the router, with programs written by hand."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from o2mkd_bench import Line, NoiseSchedule, Program
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.engine.denoiser import Call
from o2mkd_bench.engine.kd import convert
from o2mkd_bench.engine.router import Router, as_epsilon
from o2mkd_bench.engine.sample import CountingDenoiser, auto_batch, batch_within, run_program, sample_images, to_uint8
from o2mkd_plugins.samplers.ddim import DDIM
from o2mkd_plugins.samplers.ddpm import DDPM
from o2mkd_plugins.samplers.dpm_solver import DPMSolver
from o2mkd_plugins.samplers.options import DDIMOptions, DDPMOptions, DPMSolverOptions

SCHEDULE = NoiseSchedule()
SHAPE = (1, 2, 3)


def noise_for(indices, k):
    """Every image's noise from its own index and the state it enters."""
    draws = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 * k + int(i))) for i in indices]
    return torch.stack(draws)


def no_noise(line):
    raise AssertionError(f"line {line} adds no noise")


def half(x, t):
    return 0.5 * x


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))


def scaled(network, x, t):
    assert t.dtype == torch.int64
    assert t.shape == (len(x),)
    return network.factor * x


class Family:
    """As much of a model family as a call needs."""

    def __init__(self, forward):
        self._forward = forward

    def forward(self, network, x, t, condition=None):
        return self._forward(network, x, t)


def route(networks, edges=(), forward=scaled, precision="fp32"):
    return Router([Call(Family(forward), network, precision) for network in networks], edges)


class TestRunProgram:
    def test_a_line_combines_states_predictions_and_noise(self):
        lines = (
            Line(500, states={0: 2.0}, epsilon={0: 3.0}, noise=0.25),
            Line(100, states={0: 1.0, 1: -1.0}, epsilon={0: 0.5, 1: 0.125}, x0={0: 4.0, 1: 7.0}),
        )
        x = noise_for([0, 1], 0)
        found = run_program(Program(lines, "none"), SCHEDULE, half, x, lambda i: noise_for([0, 1], i + 1))
        first = 2 * x + 3 * 0.5 * x + 0.25 * noise_for([0, 1], 1)
        clean = [
            (s - SCHEDULE.sigma[t] * 0.5 * s) / SCHEDULE.alpha[t] for s, t in ((x.double(), 500), (first.double(), 100))
        ]
        second = x - first + 0.5 * 0.5 * x + 0.125 * 0.5 * first + 4 * clean[0] + 7 * clean[1]
        torch.testing.assert_close(found.double(), second, rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32

    @pytest.mark.parametrize("clip", ["none", "x0", "x0+epsilon"])
    def test_clip(self, clip):
        x = torch.tensor([3.0, 0.01]).view(2, 1, 1, 1)
        alpha, sigma = SCHEDULE.alpha[400], SCHEDULE.sigma[400]
        x0, epsilon = (
            run_program(Program((line,), clip), SCHEDULE, half, x, no_noise).flatten()
            for line in (Line(400, x0={0: 1.0}), Line(400, epsilon={0: 1.0}))
        )
        raw = (3 - sigma * 1.5) / alpha
        assert raw > 1
        assert x0[0].item() == pytest.approx(raw if clip == "none" else 1)
        assert epsilon[0].item() == pytest.approx((3 - alpha) / sigma if clip == "x0+epsilon" else 1.5)
        assert epsilon[1].item() == pytest.approx(0.005)

    def test_noise_and_predictions_in_half_precision_become_float32(self):
        program = Program((Line(400, x0={0: 1.0}),))
        found = run_program(program, SCHEDULE, lambda x, t: half(x, t).half(), torch.zeros(1, *SHAPE).half(), no_noise)
        assert found.dtype == torch.float32

    def test_fresh_noise_is_asked_for_only_where_it_is_added(self):
        asked = []

        def fresh(line):
            asked.append(line)
            return torch.zeros(1, *SHAPE)

        program = DDPM(DDPMOptions()).program(SCHEDULE, time_grid("leading", 5))
        run_program(program, SCHEDULE, half, torch.zeros(1, *SHAPE), fresh)
        assert asked == [0, 1, 2, 3]

    def test_predictions_are_freed_after_their_last_use(self):
        made, alive = [], []

        def denoise(x, t):
            alive.append(sum(made_by() is not None for made_by in made))
            epsilon = half(x, t)
            made.append(weakref.ref(epsilon))
            return epsilon

        sampler = DPMSolver(DPMSolverOptions(algorithm="dpmsolver", final="sigma_min", lower_order_final=False))
        program = sampler.program(SCHEDULE, time_grid("trailing", 12), clip="none")
        run_program(program, SCHEDULE, denoise, torch.ones(1, *SHAPE), no_noise)
        # a second-order line needs one earlier prediction; the loop's own variable holds the same one
        assert alive == [0, *[1] * 11]

    def test_gradients_are_not_recorded(self):
        network = Scale(0.5)
        program = Program((Line(400, x0={0: 1.0}),))
        assert not run_program(program, SCHEDULE, route([network]), noise_for([0], 0), no_noise).requires_grad


class TestProgram:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (Line(1, states={1: 1.0}), r"refers to states\[1\]"),
            (Line(1, epsilon={-1: 1.0}), r"refers to epsilon\[-1\]"),
            (Line(1, x0={0: float("nan")}), r"multiplies x0\[0\] by nan"),
            (Line(1, noise=float("inf")), "noise by inf"),
        ],
    )
    def test_a_line_that_cannot_be_computed_is_refused(self, line, message):
        with pytest.raises(PluginError, match=message):
            Program((line,))

    def test_a_start_that_is_no_number_is_refused(self):
        with pytest.raises(PluginError, match="multiplies the initial noise by inf"):
            Program((Line(1),), start=float("inf"))

    def test_start_scales_the_first_state(self):
        noise = noise_for([0], 0)
        line = Line(400, states={0: 1.0})
        found = [run_program(Program((line,), start=start), SCHEDULE, half, noise, no_noise) for start in (1.0, 0.5)]
        assert torch.equal(found[0], noise)
        assert torch.equal(found[1], 0.5 * noise)


class TestSampleImages:
    @pytest.mark.parametrize("batch", [1, 2, 3, 7, 50])
    def test_batch_size_does_not_change_an_image(self, batch):
        program = DDIM(DDIMOptions(eta=1.0)).program(SCHEDULE, time_grid("leading", 4))
        whole = sample_images(program, SCHEDULE, half, noise_for, torch.arange(7), 7)
        done = []
        found = sample_images(program, SCHEDULE, half, noise_for, torch.arange(7), batch, on_batch=done.append)
        assert found.dtype == torch.uint8
        assert found.shape == (7, *SHAPE)
        assert (found.int() - whole.int()).abs().max() <= 1
        assert done == [*range(batch, 7, batch), 7]

    def test_an_image_depends_on_its_index_alone(self):
        program = DDIM(DDIMOptions(eta=1.0)).program(SCHEDULE, time_grid("leading", 4))
        whole = sample_images(program, SCHEDULE, half, noise_for, torch.arange(7), 7)
        some = sample_images(program, SCHEDULE, half, noise_for, torch.tensor([5, 2]), 2)
        assert (some.int() - whole[[5, 2]].int()).abs().max() <= 1
        assert not torch.equal(whole[5], whole[2])

    def test_uint8_is_clamped_and_rounded(self):
        levels = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 1 / 255, 2.9 / 255])
        assert to_uint8(levels).tolist() == [0, 0, 128, 255, 255, 128, 129]

    @pytest.mark.parametrize(
        ("batch", "room", "tried", "arrived"),
        [(16, 3, [3], [3, 6, 7]), (4, 2, [2], [2, 4, 6, 7]), (7, 1, [3, 1], [*range(1, 8)])],
    )
    def test_out_of_memory_halves_the_batch_and_changes_no_image(self, batch, room, tried, arrived):
        program = DDIM(DDIMOptions(eta=1.0)).program(SCHEDULE, time_grid("leading", 4))
        whole = sample_images(program, SCHEDULE, half, noise_for, torch.arange(7), 7)
        halved, done, calls = [], [], [0]

        def tight(x, t):
            calls[0] += 1
            if len(x) > room and calls[0] % 3 == 2:
                raise torch.OutOfMemoryError("no room")
            return half(x, t)

        found = sample_images(
            program, SCHEDULE, tight, noise_for, torch.arange(7), batch, on_batch=done.append, on_halve=halved.append
        )
        assert (found.int() - whole.int()).abs().max() <= 1
        assert (halved, done) == (tried, arrived)

    def test_no_memory_for_one_image_is_an_error(self):
        def never(x, t):
            raise torch.OutOfMemoryError("no room")

        program = DDIM(DDIMOptions()).program(SCHEDULE, time_grid("leading", 4))
        with pytest.raises(torch.OutOfMemoryError):
            sample_images(program, SCHEDULE, never, noise_for, torch.arange(3), 2)

    def test_batch_auto(self):
        assert auto_batch(lambda batch: pytest.fail("nothing to measure"), torch.device("cpu")) == 128
        found = {each: batch_within(1000, each) for each in (4, 3.9, 3.91, 250, 251, 501, 1e9)}
        assert found == {4: 64, 3.9: 128, 3.91: 64, 250: 2, 251: 1, 501: 1, 1e9: 1}
        assert batch_within(10**12, 0) == 1024

    def test_counter_must_agree_with_the_declared_nfe(self):
        counted = CountingDenoiser(half)
        program = DDIM(DDIMOptions()).program(SCHEDULE, time_grid("leading", 4))
        run_program(program, SCHEDULE, counted, noise_for([0], 0), no_noise)
        counted.check(4)
        with pytest.raises(PluginError, match="declares 5 network evaluations per image"):
            counted.check(5)
        with pytest.raises(PluginError, match="2 runs made 4 calls"):
            counted.check(4, runs=2)


class TestRouter:
    def test_edges_belong_to_the_noisier_interval(self):
        router = route([Scale(1.0), Scale(2.0), Scale(3.0)], (250, 600))
        assert [router.route(t) for t in (0, 249, 250, 599, 600, 999)] == [0, 0, 1, 1, 2, 2]
        x = torch.ones(2, *SHAPE)
        assert router(x, 249).unique().item() == 1
        assert router(x, 250).unique().item() == 2
        assert router(x, 999).unique().item() == 3

    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    def test_each_expert_is_called_as_often_as_the_program_says(self, spacing):
        edges = (100, 500, 990)
        calls = []

        def forward(network, x, t):
            calls.append(networks.index(network))
            return 0.5 * x

        networks = [Scale(1.0) for _ in range(4)]
        router = route(networks, edges, forward)
        seen = []

        def denoise(x, t):
            assert type(t) is int
            seen.append(t)
            return as_epsilon(router, SCHEDULE, "epsilon")(x, t)

        program = DPMSolver(DPMSolverOptions(order=3)).program(SCHEDULE, time_grid(spacing, 10), edges)
        counted = CountingDenoiser(denoise)
        run_program(program, SCHEDULE, counted, torch.ones(1, *SHAPE), no_noise)
        counted.check(program.nfe)
        assert [calls.count(k) for k in range(4)] == program.calls(edges)
        assert sum(program.calls(edges)) == program.nfe == 10
        assert seen == [line.t for line in program.lines]

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_epsilon_from_any_prediction(self, prediction):
        x0, noise = noise_for([0, 1], 0), noise_for([0, 1], 1)
        alpha, sigma = (torch.full((2,), float(table[400])) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
        x = alpha[0] * x0 + sigma[0] * noise
        answer = convert(noise, "epsilon", prediction, x, alpha, sigma)
        router = route([Scale(1.0)], forward=lambda network, x, t: answer)
        torch.testing.assert_close(as_epsilon(router, SCHEDULE, prediction)(x, 400), noise, rtol=0, atol=1e-5)

    def test_network_runs_in_its_dtype_and_the_result_is_float32(self):
        seen = []

        def forward(network, x, t):
            out = network(x)
            seen.append(out.dtype)
            return out

        network = nn.Conv2d(1, 1, 1)
        x = torch.ones(1, *SHAPE)
        for precision in ("fp32", "bf16"):
            assert route([network], (), forward, precision)(x, 5).dtype == torch.float32
        assert seen == [torch.float32, torch.bfloat16]

    def test_every_network_is_asked_to_see_what_it_takes(self):
        seen = []

        def forward(network, x, t):
            seen.append((network.factor.item(), tuple(x.shape), tuple(t.shape), torch.is_grad_enabled()))
            return x

        route([Scale(1.0), Scale(2.0)], (5,), forward).ask_all(SHAPE, torch.device("cpu"), 3)
        assert seen == [(factor, (3, *SHAPE), (3,), False) for factor in (1.0, 2.0)]

    @pytest.mark.parametrize(("count", "edges"), [(2, ()), (1, (5,)), (3, (5, 5)), (3, (7, 5))])
    def test_networks_that_do_not_fit_the_edges_are_refused(self, count, edges):
        with pytest.raises(ValueError, match="do not fit the inner edges"):
            route([Scale(1.0)] * count, edges)
