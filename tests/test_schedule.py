"""Noise schedules against diffusers, and what a scheduler config may say."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from o2mkd_bench import NoiseSchedule, UserError


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_those_of_diffusers(kind):
    config = {"beta_schedule": kind, "beta_start": 1e-3, "beta_end": 0.015, "num_train_timesteps": 200}
    schedule = NoiseSchedule.from_scheduler_config(config)
    theirs = DDPMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=2e-5)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1)
    np.testing.assert_allclose(schedule.log_snr, 2 * np.log(schedule.alpha / schedule.sigma), atol=1e-9)
    assert NoiseSchedule.from_scheduler_config(schedule.scheduler_config()) == schedule


def test_trained_betas_take_the_place_of_a_formula():
    schedule = NoiseSchedule.from_scheduler_config({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2})
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72])
    assert NoiseSchedule.from_scheduler_config(schedule.scheduler_config()) == schedule


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "'sigmoid' is not known; use linear"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 entries and num_train_timesteps is 1000"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is not supported"),
    ],
)
def test_configs_that_cannot_be_are_refused(config, message):
    with pytest.raises(UserError, match=rf"^x\.json: .*{message}"):
        NoiseSchedule.from_scheduler_config(config, "x.json")
