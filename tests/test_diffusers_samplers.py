"""Samplers that diffusers has too, and schedulers of diffusers as programs: images against its own loop."""

from __future__ import annotations

import inspect
import sys
from bisect import bisect_right
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from o2mkd_bench import NoiseSchedule, UserError
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.suite import from_mapping
from o2mkd_bench.engine.kd import convert
from o2mkd_bench.engine.router import Router, as_epsilon
from o2mkd_bench.engine.sample import CountingDenoiser, run_program
from o2mkd_plugins.samplers.orders import changes

TOLERANCE = 1e-4
# solvers in epsilon divide by the alpha of T, 0.006; with so few steps that magnifies the rounding of float32, in which
# diffusers computes, beyond the above
FEW, FEW_TOLERANCE = 5, 2e-3
EDGES = (400,)
NOISE = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0))
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:.*dpmsolver.*deprecated:FutureWarning"),
]


def schedule_of(betas):
    """The schedule whose alphas_cumprod are, to float64 rounding, the float32 ones that diffusers computes with."""
    product = diffusers.DDPMScheduler(**BETAS[betas]).alphas_cumprod.double().numpy()
    return NoiseSchedule(trained_betas=tuple(1 - product / np.append(1.0, product[:-1])))


SCHEDULES = {betas: schedule_of(betas) for betas in BETAS}


class TwoExperts:
    """Exact denoisers of two mixtures of Gaussians around -place and place, one below the edge and one above it."""

    def __init__(self, betas, prediction="epsilon"):
        self.betas = betas
        self.levels = SCHEDULES[betas].levels
        self.prediction = prediction
        self.router = Router([lambda x, t: self.answer(0.5, x, t), lambda x, t: self.answer(0.4, x, t)], EDGES)

    def answer(self, place, x, times, std=0.3):
        whole = not times.is_floating_point()
        alpha, sigma = self.levels(int(times[0]) if whole else float(times[0]))
        variance = (alpha * std) ** 2 + sigma**2
        epsilon = sigma * (x - alpha * place * torch.tanh(alpha * place * x / variance)) / variance
        a, s = (x.new_full((len(x),), value) for value in (alpha, sigma))
        return convert(epsilon, "epsilon", self.prediction, x, a, s)


def draw(i):
    return torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(100 + i))


def theirs(scheduler, steps, networks, monkeypatch):
    """The plain loop of a diffusers pipeline; a scheduler that asks for epsilon gets it from whatever is predicted."""
    asked = scheduler.config.prediction_type == networks.prediction
    predict = networks.router if asked else as_epsilon(networks.router, SCHEDULES[networks.betas], networks.prediction)
    scheduler.set_timesteps(steps)
    line = 0
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: draw(line), raising=False
    )
    x = NOISE * scheduler.init_noise_sigma
    for line, t in enumerate(scheduler.timesteps):  # noqa: B007 - the noise asks for it
        x = scheduler.step(
            predict(scheduler.scale_model_input(x, t), int(t) if float(t).is_integer() else float(t)), t, x
        ).prev_sample
    return x


def ours(program, schedule, networks):
    counted = CountingDenoiser(as_epsilon(networks.router, schedule, networks.prediction))
    x = run_program(program, schedule, counted, NOISE, draw)
    counted.check(program.nfe)
    return x


def sampler(name, **options):
    plugin = registry().get("samplers", name)
    return plugin.load()(plugin.parse(options))


def close(a, b, tolerance=TOLERANCE):
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


NATIVE = [
    ("euler", {}, "EulerDiscreteScheduler", {}),
    ("heun", {}, "HeunDiscreteScheduler", {}),
    ("pndm", {}, "PNDMScheduler", {"skip_prk_steps": True}),
    ("pndm", {"final": "zero"}, "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("pndm", {"warmup": "prk"}, "PNDMScheduler", {}),
    *(("deis", {"order": order}, "DEISMultistepScheduler", {"solver_order": order}) for order in (1, 2, 3)),
    (
        "deis",
        {"order": 3, "lower_order_final": False},
        "DEISMultistepScheduler",
        {"solver_order": 3, "lower_order_final": False},
    ),
    *(
        (
            "unipc",
            {"order": order, "solver_type": kind, "predict_x0": plus, "final": final},
            "UniPCMultistepScheduler",
            {"solver_order": order, "solver_type": kind, "predict_x0": plus, "final_sigmas_type": final},
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        # bh1 of diffusers gives NaN in a step to sigma 0
        for plus, final in ((True, "zero" if kind == "bh2" else "sigma_min"), (False, "sigma_min"))
    ),
]


@pytest.mark.parametrize(("name", "options", "reference", "config"), NATIVE)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
class TestNative:
    @pytest.mark.parametrize(("betas", "prediction"), [("linear", "epsilon"), ("scaled_linear", "v_prediction")])
    def test_images_are_those_of_diffusers(
        self, name, options, reference, config, spacing, betas, prediction, monkeypatch
    ):
        schedule = SCHEDULES[betas]
        networks = TwoExperts(betas, prediction)
        # PNDM of diffusers adds up v of several timesteps, and turns the sum into epsilon at one of them
        asked = "epsilon" if name == "pndm" else prediction
        scheduler = getattr(diffusers, reference)(
            **BETAS[betas], **config, timestep_spacing=spacing, prediction_type=asked
        )
        if name in ("euler", "heun") and spacing == "trailing":
            options = {**options, "start": "sigma"}
        for steps in (4, 5, 10, 20) if options.get("warmup") == "prk" else (1, 2, 5, 10, 20):
            expected = theirs(scheduler, steps, networks, monkeypatch)
            # DEIS and UniPC of diffusers lay other leading grids than everybody else
            own = name in ("deis", "unipc") and spacing == "leading"
            grid = scheduler.timesteps.tolist() if own else time_grid(spacing, steps)
            program = sampler(name, **options).program(schedule, grid, EDGES, "none")
            assert [line.t for line in program.lines] == scheduler.timesteps.tolist()
            assert program.nfe == sampler(name, **options).nfe(steps) == len(scheduler.timesteps)
            rough = steps <= FEW and any(line.epsilon for line in program.lines)
            close(ours(program, schedule, networks), expected, FEW_TOLERANCE if rough else TOLERANCE)

    def test_traced_is_native(self, name, options, reference, config, spacing):
        """The adapter and the sampler of its own say the same, on one grid and in float32's digits."""
        options = {**options, "start": "sigma"} if name in ("euler", "heun") and spacing == "trailing" else options
        traced = sampler("diffusers", scheduler=reference, config={**config, "timestep_spacing": spacing})
        schedule = SCHEDULES["linear"]
        networks = TwoExperts("linear")
        for clip in ("none", "x0+epsilon"):
            asked = time_grid(spacing, 20)
            found = traced.program(schedule, asked, (), clip)
            # Runge-Kutta steps visit timesteps between those of the grid
            own = sorted({line.t for line in found.lines}, reverse=True)
            grid = asked if options.get("warmup") == "prk" else own
            program = sampler(name, **options).program(schedule, grid, (), clip)
            close(ours(found, schedule, networks), ours(program, schedule, networks))


class TestHistory:
    @pytest.mark.parametrize(
        ("name", "options"),
        [("pndm", {}), ("deis", {"order": 3}), ("unipc", {"order": 3}), ("unipc", {"predict_x0": False})],
    )
    def test_reset_uses_no_prediction_of_another_expert(self, name, options):
        schedule, edges = SCHEDULES["linear"], (300, 700, 960)
        grid = time_grid("trailing", 20)
        reset = sampler(name, history="reset", **options).program(schedule, grid, edges)
        keep = sampler(name, **options).program(schedule, grid, edges)
        owners = [bisect_right(edges, line.t) for line in reset.lines]

        def mixed(program):
            terms = [{**line.epsilon, **line.x0} for line in program.lines]
            return [i for i, row in enumerate(terms) if {owners[j] for j, c in row.items() if c} - {owners[i]}]

        # the second evaluation of PNDM's warm-up falls to another expert, and repeats the step of the first one alone
        assert mixed(reset) == ([1] if name == "pndm" else [])
        assert len(mixed(keep)) > 3
        assert reset.lines[0] == keep.lines[0]
        assert sampler(name, history="reset", **options).program(schedule, grid) == sampler(name, **options).program(
            schedule, grid
        )

    def test_pndm_repeats_the_step_of_the_first_expert(self):
        first, second, *_ = (
            sampler("pndm", history="reset").program(SCHEDULES["linear"], time_grid("trailing", 10), (950,)).lines
        )
        assert (first.t, second.t) == (999, 899)
        assert (first.states, first.epsilon) == (second.states, second.epsilon)

    def test_change_of_expert_is_at_the_edge(self):
        assert changes([900, 700, 699, 10], (700,)) == [False, False, True, False]


class TestOptions:
    def test_offset_is_that_of_stable_diffusion(self, monkeypatch):
        schedule = SCHEDULES["scaled_linear"]
        networks = TwoExperts("scaled_linear")
        scheduler = diffusers.PNDMScheduler(**BETAS["scaled_linear"], skip_prk_steps=True, steps_offset=1)
        program = sampler("pndm", offset=1).program(schedule, time_grid("leading", 25), clip="none")
        assert (program.nfe, program.lines[0].t, program.lines[-1].t) == (26, 961, 1)
        close(ours(program, schedule, networks), theirs(scheduler, 25, networks, monkeypatch))

    def test_offset_beyond_the_training_is_refused(self):
        with pytest.raises(UserError, match="must descend strictly within"):
            sampler("pndm", offset=1).program(NoiseSchedule(), time_grid("trailing", 5))

    def test_runge_kutta_needs_four_steps(self):
        with pytest.raises(UserError, match="needs more than 3 steps and has 3; take more steps or set warmup: plms"):
            sampler("pndm", warmup="prk").program(NoiseSchedule(), time_grid("trailing", 3))

    def test_start_is_one_or_sigma(self):
        schedule = SCHEDULES["scaled_linear"]
        for name in ("euler", "heun"):
            programs = [sampler(name, start=start).program(schedule, (999, 500)) for start in ("one", "sigma")]
            assert [program.start for program in programs] == [1.0, float(schedule.sigma[999])]
            assert programs[0] == replace(programs[1], start=1.0)

    @pytest.mark.parametrize("name", ["deis", "pndm"])
    def test_last_line_of_no_width_copies_its_state(self, name):
        last = sampler(name).program(NoiseSchedule(), time_grid("leading", 20)).lines[-1]
        assert list(last.states.values()) == [1.0]
        assert set(last.epsilon.values()) == {0.0}

    @pytest.mark.parametrize("name", ["deis", "unipc"])
    def test_epsilon_reaches_sigma_zero_by_order_one(self, name):
        options = {"predict_x0": False} if name == "unipc" else {}
        schedule = NoiseSchedule()
        last = sampler(name, final="zero", **options).program(schedule, (900, 500, 100)).lines[-1]
        assert last.states == {2: pytest.approx(1 / schedule.alpha[100])}
        # the image is the last x0, read from the corrected state where there is a corrector
        assert last.epsilon[2] < 0

    def test_clip_reaches_the_image(self):
        schedule = SCHEDULES["linear"]
        networks = TwoExperts("linear")
        networks.answer = lambda place, x, times: torch.full_like(x, -1.0)
        for name in ("euler", "heun", "unipc"):
            program = sampler(name).program(schedule, time_grid("trailing", 5), (), "x0")
            assert ours(program, schedule, networks).abs().max() <= 1
            assert ours(replace(program, clip="none"), schedule, networks).abs().max() > 2


TRACED = [
    ("EulerAncestralDiscreteScheduler", {}, "none"),
    ("LMSDiscreteScheduler", {}, "none"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "none"),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, "none"),
    ("DDPMScheduler", {}, "x0"),
    ("DDPMScheduler", {"variance_type": "fixed_large"}, "none"),
    ("DDIMScheduler", {}, "x0"),
    ("LCMScheduler", {}, "x0"),
    ("TCDScheduler", {}, "none"),
]


class TestTraced:
    @pytest.mark.parametrize(("name", "config", "clip"), TRACED)
    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_images_are_those_of_diffusers(self, name, config, clip, spacing, prediction, monkeypatch):
        kind = getattr(diffusers, name)
        known = inspect.signature(kind.__init__).parameters
        given = {"timestep_spacing": spacing, "clip_sample": clip == "x0", "prediction_type": prediction}
        scheduler = kind(**BETAS["linear"], **{key: value for key, value in given.items() if key in known}, **config)
        schedule = SCHEDULES["linear"]
        networks = TwoExperts("linear", prediction)
        traced = sampler("diffusers", scheduler=name, config=config)
        for steps in (3, 10):
            program = traced.program(NoiseSchedule(), time_grid(spacing, steps), EDGES, clip)
            assert traced.nfe(steps) == program.nfe
            assert program.clip == clip
            expected = theirs(scheduler, steps, networks, monkeypatch)
            assert [line.t for line in program.lines] == scheduler.timesteps.tolist()
            close(ours(program, schedule, networks), expected)

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("KDPM2DiscreteScheduler", {"timestep_spacing": "trailing"}),
            ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
            ("LMSDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
        ],
    )
    def test_timesteps_between_those_of_the_training(self, name, config, monkeypatch):
        schedule = SCHEDULES["linear"]
        networks = TwoExperts("linear")
        scheduler = getattr(diffusers, name)(**BETAS["linear"], **config)
        program = sampler("diffusers", scheduler=name, config=config).program(
            schedule, time_grid("trailing", 8), EDGES, "none"
        )
        times = [line.t for line in program.lines]
        assert {type(t) for t in times} == {float}
        assert not all(t.is_integer() for t in times)
        close(ours(program, schedule, networks), theirs(scheduler, 8, networks, monkeypatch))
        assert sum(program.calls(EDGES)) == program.nfe

    def test_sigmas_of_karras(self, monkeypatch):
        config = {"use_karras_sigmas": True}
        schedule = SCHEDULES["linear"]
        networks = TwoExperts("linear")
        scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS["linear"], **config, timestep_spacing="trailing")
        program = sampler("diffusers", scheduler="DPMSolverMultistepScheduler", config=config).program(
            schedule, time_grid("trailing", 10), clip="none"
        )
        close(ours(program, schedule, networks), theirs(scheduler, 10, networks, monkeypatch))

    def test_spacing_is_that_of_the_suite_unless_the_config_gives_one(self):
        def times(spacing, **config):
            traced = sampler("diffusers", scheduler="EulerDiscreteScheduler", config=config)
            return [line.t for line in traced.program(NoiseSchedule(), time_grid(spacing, 4)).lines]

        assert times("leading") == times("quadratic", timestep_spacing="leading") == [750, 500, 250, 0]
        assert times("trailing") == times("leading", timestep_spacing="trailing") == [999, 749, 499, 249]

    @pytest.mark.parametrize(
        ("name", "config", "said"),
        [
            ("DPMSolverSDEScheduler", {}, "draws its noise from a Brownian tree of its own"),
            (
                "LMSDiscreteSheduler",
                {},
                r"has no scheduler 'LMSDiscreteSheduler'; did you mean 'LMSDiscreteScheduler'\?",
            ),
            ("UNet2DModel", {}, "has no scheduler 'UNet2DModel'"),
            ("FlowMatchEulerDiscreteScheduler", {}, "has no beta_schedule, so it cannot follow the teacher's"),
            (
                "EulerDiscreteScheduler",
                {"karras": True},
                "has no 'karras' in its config; it knows num_train_timesteps,",
            ),
            (
                "LMSDiscreteScheduler",
                {"timestep_spacing": "even"},
                "cannot be set up for 5 steps: even is not supported",
            ),
            ("DDIMInverseScheduler", {}, "leads from t = 199 to t = 999, and not from noise to an image"),
            (
                "DPMSolverMultistepScheduler",
                {"thresholding": True},
                "does not combine states, predictions and fresh noise",
            ),
            ("SASolverScheduler", {}, "uses the noise of an earlier step again"),
            ("RePaintScheduler", {}, "cannot make its step at t = 800: .*original_image"),
            ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 300}, "leads from t = 1100 to t = 300"),
        ],
    )
    def test_what_no_program_can_say_is_refused(self, name, config, said):
        with pytest.raises(UserError, match=said) as caught:
            sampler("diffusers", scheduler=name, config=config).program(NoiseSchedule(), time_grid("trailing", 5))
        assert "\n" not in str(caught.value)

    def test_grids_that_diffusers_has_not_are_refused(self):
        with pytest.raises(UserError, match="set spacing to one of these, or timestep_spacing in its config"):
            sampler("diffusers", scheduler="EulerDiscreteScheduler").program(NoiseSchedule(), (900, 17, 3))

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"beta_start": 0.1}, "beta_start is decided by the teacher's noise schedule; leave it out of config"),
            ({"clip_sample": True}, "clip_sample is decided by clip of the sampler or the suite"),
            ({"prediction_type": "epsilon"}, "prediction_type is decided by the network"),
            ({"use_flow_sigmas": True}, "use_flow_sigmas is decided by the teacher's noise schedule"),
        ],
    )
    def test_config_decides_nothing_that_others_do(self, config, said):
        with pytest.raises(ValidationError, match=said):
            sampler("diffusers", scheduler="UniPCMultistepScheduler", config=config)


class Odd(diffusers.DDIMScheduler):
    """Does what ``mend`` makes of a step of DDIM."""

    mend = staticmethod(lambda x: x)

    def step(self, *args, **kwargs):
        return (self.mend(super().step(*args, **kwargs)[0]),)


class TestOdd:
    @pytest.mark.parametrize(
        ("mend", "said"),
        [
            (lambda x: x + 1, "does not combine states"),
            (lambda x: x.abs(), "does not combine states"),
            (lambda x: x / 0, "gives no finite number in its step from t = 999"),
            (lambda x: x + torch.randn(x.shape) + torch.randn_like(x), "draws noise twice in a step"),
            (lambda x: x.clamp(-2, 2), r"clips to \[-2, 2\], and a solver program to \[-1, 1\] only"),
        ],
    )
    def test_scheduler_is_tried(self, mend, said, monkeypatch):
        monkeypatch.setattr(diffusers, "OddScheduler", Odd, raising=False)
        monkeypatch.setattr(Odd, "mend", staticmethod(mend))
        with pytest.raises(UserError, match=said):
            sampler("diffusers", scheduler="OddScheduler").program(NoiseSchedule(), time_grid("trailing", 5))


SUITE = {
    "name": "toy",
    "device": "cpu",
    "datasets": ["digits"],
    "teachers": [
        {
            "name": "t",
            "train": {"model": {"unet2d": {"block_out_channels": [8, 16], "norm_num_groups": 4}}, "images": 1024},
        }
    ],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["output"],
    "wrappers": ["single", {"o2mkd": {"students": 2}}],
    "metrics": [{"fid": {"network": "embedded"}}],
    "budgets": [12800],
    "sampling": {"images": 640},
}


def planned(folder, *samplers):
    return prepare(from_mapping({**SUITE, "samplers": list(samplers)}), folder / "store").plan


class TestSuite:
    def test_schedulers_stand_in_a_suite(self, tmp_path):
        found = planned(
            tmp_path,
            {"diffusers": {"scheduler": "LMSDiscreteScheduler", "steps": [4]}},
            {"diffusers": {"scheduler": "HeunDiscreteScheduler", "steps": [4]}, "label": "heun of diffusers"},
            {"heun": {"steps": [4]}},
        )
        nfe = {cell.labels["sampler"]: cell.nfe for cell in found.cells}
        assert nfe == {"diffusers(scheduler=LMSDiscreteScheduler)": 4, "heun of diffusers": 7, "heun": 7}

    def test_refusal_says_where(self, tmp_path):
        with pytest.raises(UserError, match=r"^samplers\.diffusers\(scheduler=DPMSolverSDEScheduler\): DPMSolverSDE"):
            planned(tmp_path, {"diffusers": {"scheduler": "DPMSolverSDEScheduler", "steps": [4]}})
