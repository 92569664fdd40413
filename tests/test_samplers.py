"""Every sampler against the scheduler of the same name in diffusers, with the exact denoiser of a Gaussian."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler
from diffusers.schedulers import scheduling_ddpm
from pydantic import ValidationError

from o2mkd_bench import NoiseSchedule, Program, UserError
from o2mkd_bench.core.grid import noise_levels, time_grid
from o2mkd_bench.engine.sample import run_program
from o2mkd_plugins.samplers.ddim import DDIM
from o2mkd_plugins.samplers.ddpm import DDPM
from o2mkd_plugins.samplers.dpm_solver import DPMSolver
from o2mkd_plugins.samplers.options import DDIMOptions, DDPMOptions, DPMSolverOptions

MEAN, STD = 0.2, 0.4
TOLERANCE = 1e-4
SPACINGS = ["leading", "trailing", "linspace", "quadratic"]
NOISE = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dpmsolver.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
]


def schedule_of(scheduler):
    """The schedule whose alphas_cumprod are, to float64 rounding, the float32 ones that ``scheduler`` computes with."""
    product = scheduler.alphas_cumprod.double().numpy()
    return NoiseSchedule(trained_betas=tuple(1 - product / np.append(1.0, product[:-1])))


SCHEDULE = schedule_of(DDPMScheduler())


def gaussian(x, t, mean=MEAN, std=STD):
    """E[noise | x_t] where every pixel is N(mean, std**2)."""
    alpha, sigma = float(SCHEDULE.alpha[t]), float(SCHEDULE.sigma[t])
    return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def draw(i):
    return torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(100 + i))


def ours(program, denoise=gaussian):
    return run_program(program, SCHEDULE, denoise, NOISE, draw)


def theirs(scheduler, denoise=gaussian, **step):
    x = NOISE
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(denoise(x, t), t, x, **step).prev_sample
    return x


def theirs_ddpm(monkeypatch, grid, variance, clip=False, noise=draw):
    count = iter(range(len(grid)))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise(next(count)))
    scheduler = DDPMScheduler(variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(timesteps=list(grid))
    return theirs(scheduler)


def ddim(grid, eta=0.0, clip="none"):
    return DDIM(DDIMOptions(eta=eta)).program(SCHEDULE, grid, clip=clip)


def solver(grid, edges=(), **options):
    return DPMSolver(DPMSolverOptions(**options)).program(SCHEDULE, grid, edges, clip="none")


def close(a, b):
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def in_float64(program, schedule, x, mean=MEAN, std=STD):
    """A second reading of what a program means, without clip and noise, in numpy."""
    states, epsilon, x0 = [x], [], []
    for line in program.lines:
        a, s = schedule.alpha[line.t], schedule.sigma[line.t]
        epsilon.append(s * (states[-1] - a * mean) / (a**2 * std**2 + s**2))
        x0.append((states[-1] - s * epsilon[-1]) / a)
        known = ((states, line.states), (epsilon, line.epsilon), (x0, line.x0))
        states.append(sum(c * values[j] for values, terms in known for j, c in terms.items()))
    return states[-1]


class TestDDIM:
    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_without_noise_is_first_order_dpm_solver_on_every_grid(self, spacing):
        scheduler = DPMSolverMultistepScheduler(solver_order=1)
        for steps in (*range(1, 22), 25, 28, 37, 64, 100):
            if spacing == "quadratic" and steps > 28:
                continue
            grid = time_grid(spacing, steps)
            scheduler.set_timesteps(timesteps=list(grid))
            close(ours(ddim(grid)), theirs(scheduler))

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_is_ddim_of_diffusers_on_leading_grids(self, eta):
        for steps in (1, 2, 3, 7, 10, 16, 20, 50):
            scheduler = DDIMScheduler(clip_sample=False)
            scheduler.set_timesteps(steps)
            x = NOISE
            for i, t in enumerate(scheduler.timesteps.tolist()):
                x = scheduler.step(gaussian(x, t), t, x, eta=eta, variance_noise=draw(i)).prev_sample
            close(ours(ddim(time_grid("leading", steps), eta)), x)

    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_eta_one_is_ddpm_with_fixed_small(self, spacing, monkeypatch):
        for steps in (1, 2, 5, 13, 20, 28):
            grid = time_grid(spacing, steps)
            close(ours(ddim(grid, eta=1.0)), theirs_ddpm(monkeypatch, grid, "fixed_small"))

    @pytest.mark.parametrize(("clip", "clipped_model_output"), [("x0", False), ("x0+epsilon", True)])
    def test_clip_is_that_of_diffusers(self, clip, clipped_model_output):
        def wide(x, t):
            return gaussian(x, t, mean=0.9, std=0.5)

        for steps in (1, 4, 10, 20):
            grid = time_grid("leading", steps)
            scheduler = DDIMScheduler(clip_sample=True)
            scheduler.set_timesteps(steps)
            result = ours(ddim(grid, clip=clip), wide)
            close(result, theirs(scheduler, wide, use_clipped_model_output=clipped_model_output))
            assert (result - ours(ddim(grid), wide)).abs().max() > 0.01

    def test_last_step_ends_at_sigma_zero_without_noise(self):
        last = ddim((900, 500, 100), eta=1.0).lines[-1]
        assert (last.t, last.noise, last.epsilon, last.x0) == (100, 0.0, {2: 0.0}, {2: 1.0})

    @pytest.mark.parametrize("eta", [-0.1, 1.1])
    def test_eta_outside_zero_to_one_is_refused(self, eta):
        with pytest.raises(ValidationError, match="eta"):
            DDIMOptions(eta=eta)


class TestDDPM:
    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_is_ddpm_of_diffusers(self, spacing, variance, monkeypatch):
        sampler = DDPM(DDPMOptions(variance=variance))
        for steps in (1, 2, 7, 20, 28):
            grid = time_grid(spacing, steps)

            # diffusers adds fixed_large noise in a last step that starts above t = 0; no step to sigma 0 does here
            def noise(i, steps=steps):
                return draw(i) if i < steps - 1 else torch.zeros_like(NOISE)

            for clip in ("none", "x0"):
                program = sampler.program(SCHEDULE, grid, clip=clip)
                assert program.lines[-1].noise == 0
                close(ours(program), theirs_ddpm(monkeypatch, grid, variance, clip == "x0", noise))

    def test_thousand_steps_visit_every_timestep(self):
        program = DDPM(DDPMOptions()).program(SCHEDULE, time_grid("leading", 1000))
        assert [line.t for line in program.lines] == list(range(999, -1, -1))
        assert sum(line.noise == 0 for line in program.lines) == 1
        assert np.isclose(program.lines[0].noise, 0.02**0.5, rtol=1e-3)


ORDERS = [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]
SCHEDULERS = {"multistep": DPMSolverMultistepScheduler, "singlestep": DPMSolverSinglestepScheduler}


def reference(kind="multistep", algorithm="dpmsolver++", order=2, solver_type="midpoint", final="zero", lower=True):
    return SCHEDULERS[kind](
        algorithm_type=algorithm,
        solver_order=order,
        solver_type=solver_type,
        final_sigmas_type=final,
        lower_order_final=lower,
    )


def agree(steps, scheduler, grid_of, **options):
    for n in steps:
        grid = grid_of(n)
        scheduler.set_timesteps(timesteps=list(grid))
        close(ours(solver(grid, **options)), theirs(scheduler))


class TestDPMSolver:
    @pytest.mark.parametrize("kind", ["multistep", "singlestep"])
    @pytest.mark.parametrize(("order", "solver_type"), ORDERS)
    @pytest.mark.parametrize("final", ["zero", "sigma_min"])
    def test_plus_plus_is_that_of_diffusers(self, kind, order, solver_type, final):
        agree(
            range(1, 22),
            reference(kind, "dpmsolver++", order, solver_type, final),
            lambda n: time_grid("trailing", n),
            kind=kind,
            order=order,
            solver_type=solver_type,
            final=final,
        )

    @pytest.mark.parametrize("kind", ["multistep", "singlestep"])
    @pytest.mark.parametrize(("order", "solver_type"), ORDERS)
    def test_epsilon_solver_is_that_of_diffusers(self, kind, order, solver_type):
        # 2, 4 and 5 singlestep lines of order 3 multiply rounding by 200, so that float32 cannot hold 1e-4; the test
        # in float64 below covers them
        rough = (2, 4, 5) if (kind, order) == ("singlestep", 3) else ()
        agree(
            [n for n in range(1, 22) if n not in rough],
            reference(kind, "dpmsolver", order, solver_type, "sigma_min"),
            lambda n: time_grid("trailing", n),
            kind=kind,
            order=order,
            solver_type=solver_type,
            algorithm="dpmsolver",
            final="sigma_min",
        )

    # the multistep scheduler casts to float32 inside
    @pytest.mark.parametrize(
        ("algorithm", "final"), [("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min")]
    )
    @pytest.mark.parametrize(("order", "solver_type"), ORDERS)
    def test_singlestep_is_that_of_diffusers_in_float64(self, algorithm, final, order, solver_type):
        scheduler = reference("singlestep", algorithm, order, solver_type, final)
        options = {"algorithm": algorithm, "final": final, "order": order, "solver_type": solver_type}
        for steps in range(1, 22):
            grid = time_grid("trailing", steps)
            scheduler.set_timesteps(timesteps=list(grid))
            alpha, sigma = noise_levels(SCHEDULE, grid, final)
            scheduler.sigmas = torch.from_numpy(sigma / alpha)
            x = NOISE.double()
            for t in grid:
                x = scheduler.step(gaussian(x, t), t, x).prev_sample
            found = in_float64(solver(grid, kind="singlestep", **options), SCHEDULE, NOISE.double().numpy())
            np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("spacing", ["leading", "linspace", "quadratic"])
    @pytest.mark.parametrize("kind", ["multistep", "singlestep"])
    def test_other_grids_down_to_sigma_zero(self, spacing, kind):
        for order in (2, 3):
            agree(
                (1, 2, 3, 5, 9, 14, 15, 21),
                reference(kind, order=order),
                lambda n: time_grid(spacing, n),
                kind=kind,
                order=order,
            )

    @pytest.mark.parametrize("order", [2, 3])
    @pytest.mark.parametrize("final", ["zero", "sigma_min"])
    def test_multistep_without_lower_order_final(self, order, final):
        agree(
            range(1, 22),
            reference(order=order, final=final, lower=False),
            lambda n: time_grid("trailing", n),
            order=order,
            final=final,
            lower_order_final=False,
        )

    @pytest.mark.parametrize("order", [2, 3])
    def test_singlestep_without_lower_order_final(self, order):
        agree(
            range(order, 22, order),
            reference("singlestep", order=order, final="sigma_min", lower=False),
            lambda n: time_grid("trailing", n),
            kind="singlestep",
            order=order,
            final="sigma_min",
            lower_order_final=False,
        )

    @pytest.mark.parametrize("order", [1, 2, 3])
    @pytest.mark.parametrize("final", ["zero", "sigma_min"])
    def test_singlestep_order_lists_are_those_of_diffusers(self, order, final):
        scheduler = reference("singlestep", order=order, final=final)
        sampler = DPMSolver(DPMSolverOptions(kind="singlestep", order=order, final=final))
        for steps in range(1, 22):
            assert list(sampler.orders(time_grid("trailing", steps))) == scheduler.get_order_list(steps)

    @pytest.mark.parametrize(
        ("options", "steps", "orders"),
        [
            ({"order": 3}, 1, [1]),
            ({"order": 3}, 5, [1, 2, 3, 2, 1]),
            ({"order": 3}, 15, [1, 2, *[3] * 12, 1]),
            ({"order": 3, "final": "sigma_min"}, 15, [1, 2, *[3] * 13]),
            ({"order": 3, "final": "sigma_min"}, 14, [1, 2, *[3] * 10, 2, 1]),
            ({"order": 2, "final": "sigma_min", "lower_order_final": False}, 4, [1, 2, 2, 2]),
        ],
    )
    def test_multistep_order_lists(self, options, steps, orders):
        assert list(DPMSolver(DPMSolverOptions(**options)).orders(time_grid("trailing", steps))) == orders

    # diffusers gives NaN here for order 3 and heun: it divides by the width of the last step, which is 0
    @pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
    @pytest.mark.parametrize(("order", "solver_type"), ORDERS)
    def test_last_step_of_no_width_copies_its_state(self, algorithm, order, solver_type):
        grid = time_grid("leading", 20)
        program = solver(grid, algorithm=algorithm, order=order, solver_type=solver_type, final="sigma_min")
        last = program.lines[-1]
        assert last.states == {19: 1.0}
        assert set({**last.x0, **last.epsilon}.values()) == {0.0}
        assert torch.equal(ours(program), ours(Program(program.lines[:-1], "none")))

    @pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
    @pytest.mark.parametrize("kind", ["multistep", "singlestep"])
    @pytest.mark.parametrize(("order", "solver_type"), ORDERS)
    def test_converges_to_the_exact_flow_of_a_gaussian(self, algorithm, kind, order, solver_type):
        log_ratio = np.linspace(4, -4, 961)
        product = 1 / (1 + np.exp(-2 * log_ratio))
        schedule = NoiseSchedule(timesteps=961, trained_betas=tuple(1 - product / np.append(1.0, product[:-1])))
        spread = np.sqrt(schedule.alpha**2 * STD**2 + schedule.sigma**2)
        start = 1.3
        end = schedule.alpha[0] * MEAN + spread[0] / spread[960] * (start - schedule.alpha[960] * MEAN)
        shape = {"algorithm": algorithm, "kind": kind, "order": order, "solver_type": solver_type}
        options = DPMSolverOptions(**shape, final="sigma_min", lower_order_final=False)
        errors = []
        for steps in (48, 96):
            program = DPMSolver(options).program(schedule, range(960, 0, -960 // steps))
            errors.append(abs(in_float64(program, schedule, start) - end))
        # the published multistep third order has half the second derivative it needs, so it is of second order
        rate = 2 if (kind, order) == ("multistep", 3) else order
        assert math.log2(errors[0] / errors[1]) == pytest.approx(rate, abs=0.15)

    def test_reset_uses_no_prediction_of_another_expert(self):
        grid, edges = time_grid("trailing", 20), (300, 700)
        owner = [sum(t >= edge for edge in edges) for t in grid]
        for kind in ("multistep", "singlestep"):
            kept, reset = (solver(grid, edges, kind=kind, order=3, history=h) for h in ("keep", "reset"))
            used = [{*line.states, *line.x0} for line in reset.lines]
            assert all(owner[j] == owner[i] for i, known in enumerate(used) for j in known)
            assert any(owner[j] != owner[i] for i, line in enumerate(kept.lines) for j in line.x0)
            assert (ours(kept) - ours(reset)).abs().max() > 1e-5

    def test_reset_begins_anew_as_on_the_rest_of_the_grid(self):
        grid = time_grid("trailing", 20)
        change = next(i for i, t in enumerate(grid) if t < 500)
        whole = solver(grid, (500,), order=3, history="reset", lower_order_final=False)
        rest = solver(grid[change:], order=3, lower_order_final=False)
        for late, line in zip(whole.lines[change:], rest.lines, strict=True):
            for seen, alone in ((late.states, line.states), (late.x0, line.x0)):
                assert {j - change: c for j, c in seen.items()} == alone
        assert whole.lines[:change] == solver(grid, order=3, lower_order_final=False).lines[:change]

    @pytest.mark.parametrize(
        ("kind", "orders"), [("multistep", [1, 2, 3, 1, 2, 3, 3, 1]), ("singlestep", [1, 2, 3, 1, 2, 1, 1, 1])]
    )
    def test_reset_order_lists(self, kind, orders):
        # the multistep change falls on its fourth line, the singlestep one on the third of a step
        edge = 600 if kind == "multistep" else 350
        options = DPMSolverOptions(kind=kind, order=3, history="reset", lower_order_final=kind == "singlestep")
        assert list(DPMSolver(options).orders((900, 800, 700, 500, 400, 300, 200, 100), (edge,))) == orders

    @pytest.mark.parametrize("kind", ["multistep", "singlestep"])
    def test_reset_without_a_change_of_expert_is_keep(self, kind):
        grid = time_grid("trailing", 11)
        assert solver(grid, (40,), kind=kind, order=3, history="reset") == solver(grid, (), kind=kind, order=3)

    def test_clip_x0_leaves_the_epsilon_solver_alone(self):
        def wide(x, t):
            return gaussian(x, t, mean=0.9, std=0.5)

        sampler = DPMSolver(DPMSolverOptions(algorithm="dpmsolver", final="sigma_min"))
        none, x0, both = (
            ours(sampler.program(SCHEDULE, time_grid("trailing", 8), clip=clip), wide)
            for clip in ("none", "x0", "x0+epsilon")
        )
        assert torch.equal(none, x0)
        assert (none - both).abs().max() > 0.01

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"algorithm": "dpmsolver"}, "set final: sigma_min"),
            ({"kind": "singlestep", "lower_order_final": False}, "set lower_order_final: true"),
            ({"order": 4}, "order"),
        ],
    )
    def test_options_that_cannot_be_together_are_refused(self, options, message):
        with pytest.raises(ValidationError, match=message):
            DPMSolverOptions(**options)

    def test_singlestep_that_cannot_end_on_the_grid_is_refused(self):
        # diffusers turns lower_order_final on behind one's back
        with pytest.raises(UserError, match="order 3 cannot end on 10 steps"):
            solver(time_grid("trailing", 10), kind="singlestep", order=3, final="sigma_min", lower_order_final=False)


def test_training_free_samplers_need_no_rounds():
    for sampler in (DDIM(DDIMOptions()), DDPM(DDPMOptions()), DPMSolver(DPMSolverOptions())):
        assert not sampler.needs_rounds
        assert sampler.rounds(SCHEDULE, 4) == ()
