"""Parameters and multiply-accumulates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_models import CIFAR
from torch import nn

from o2mkd_bench.core.models import ModelFamily
from o2mkd_bench.engine.cost import network_cost
from o2mkd_bench.stages import train
from o2mkd_plugins.models.unet2d import UNet2D

FAMILY = UNet2D()


@pytest.mark.parametrize(
    ("student", "giga"),
    [({}, 6.22), ({"width": 0.75}, 3.53), ({"width": 0.5}, 1.60), ({"width": 0.25}, 0.42), ({"blocks": 1}, 4.20)],
)
def test_the_ddpm_of_cifar10_costs_what_is_known(student, giga):
    cost = network_cost(FAMILY, FAMILY.student_config(CIFAR, student, "s"), channels=3, size=32)
    assert round(cost["macs"] / 1e9, 2) == giga


class Toy(ModelFamily):
    """A convolution, a linear layer, attention: countable by hand."""

    def teacher_config(self, options, channels, size):
        return {}

    def student_config(self, teacher, student, where):
        return {}

    def build(self, config):
        network = nn.Module()
        network.conv = nn.Conv2d(2, 8, 3, padding=1)
        network.linear = nn.Linear(8, 8)
        network.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
        return network

    def forward(self, network, x, t, condition=None):
        h = network.linear(network.conv(x).flatten(2).transpose(1, 2))[:, None]
        return nn.functional.scaled_dot_product_attention(h, h, h)

    def roles(self, network):
        return {}


def test_every_product_is_counted_once():
    conv, linear, attention = 16 * 2 * 8 * 9, 16 * 8 * 8, 2 * 16 * 16 * 8
    assert network_cost(Toy(), {}, channels=2, size=4) == {
        "params": (2 * 8 * 9 + 8) + (8 * 8 + 8),
        "macs": conv + linear + attention,
    }


def test_counting_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    network_cost(FAMILY, FAMILY.student_config(CIFAR, {"width": 0.125}, "s"), channels=3, size=32)
    assert torch.equal(before, torch.get_rng_state())


def test_experts_of_one_architecture_are_counted_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        train, "network_cost", lambda family, config, *_: asked.append(config) or {"params": 1, "macs": 2}
    )
    train._counted.cache_clear()
    bench = SimpleNamespace(family=lambda about: FAMILY)
    config = {"in_channels": 3, "sample_size": 8}
    for width in (1, 1, 2, 1):
        assert train.cost(bench, {"config": {**config, "width": width}}) == {"params": 1, "macs": 2}
    train._counted.cache_clear()
    assert [found["width"] for found in asked] == [1, 2]
