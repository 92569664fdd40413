"""Denoisers of a few parameters, and a stream to train them on."""

import numpy as np
import torch
from torch import nn

from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.engine.denoiser import Call, Tables
from o2mkd_bench.engine.distil import Setting
from o2mkd_bench.engine.stream import Stream

SCHEDULE = NoiseSchedule()
TABLES = Tables.of(SCHEDULE, torch.device("cpu"))
ALL = Interval(0, 1000)


class Family:
    """As much of a model family as a call needs."""

    def forward(self, network, x, t, condition=None):
        return network(x, t)

    def roles(self, network):
        return {"mid": "mid"}

    def condition_shape(self, network):
        return None


class Denoiser(nn.Module):
    def __init__(self, channels=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.mid = nn.Conv2d(1, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x, t):
        return self.out(torch.tanh(self.mid(x) + (t.view(-1, 1, 1, 1) / 1000).to(x.dtype)))


def call(network, precision="fp32"):
    return Call(Family(), network, precision)


def setting(batch=80, interval=ALL, entries=1000, prediction="epsilon", data=None, seed=0):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8) if data is None else data
    stream = Stream(seed, Law.uniform(Interval(0, entries)), batch, len(pixels), False, 4)
    return Setting(stream, torch.as_tensor(pixels), TABLES, prediction, interval, 100)


def learn(objective, step, rows, source=None):
    """Loss and terms of one step for a student that is alone with these rows."""
    source = source or objective.setting.source()
    view = source.at(source.stream.batch_at(step, source.data.device), [(objective, rows)])
    return objective.loss(view, rows, step)


def wide(value):
    return value.view(-1, 1, 1, 1)


def noised(setting, step, rows):
    """x0, noise, t, alpha, sigma and x_t of these rows, written out."""
    batch = setting.stream.batch_at(step)
    x0 = setting.stream.images(batch, setting.data)[rows]
    noise = setting.stream.noise(batch, x0.shape[1:])[rows]
    t = batch.t[rows]
    alpha, sigma = (torch.from_numpy(v)[t].float() for v in (SCHEDULE.alpha, SCHEDULE.sigma))
    return x0, noise, t, alpha, sigma, wide(alpha) * x0 + wide(sigma) * noise
