"""Features by role and path: collected, cast, forgotten, and never a hook left behind."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.engine.taps import Taps, resolve, shapes


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return x, (x, x)


class Wrapped(nn.Module):
    def forward(self, x):
        return OrderedDict(note="text", sample=x + 1)


class Silent(nn.Module):
    def forward(self, x):
        return None


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Down()])
        self.mid_block = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False).bfloat16(), nn.Dropout(0.5))
        self.wrapped = Wrapped()
        self.silent = Silent()
        self.unused = nn.Identity()

    def forward(self, x):
        x, _ = self.down_blocks[0](x)
        self.silent(x)
        return self.wrapped(self.mid_block(x.bfloat16()).float())["sample"]


ROLES = {"down.0": "down_blocks.0", "mid": "mid_block"}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_features_are_first_tensors_in_float32_with_gradient(network):
    network.eval()
    x = torch.randn(2, 1, 4, 4)
    paths = {"mid": "mid_block", "down.0": "down_blocks.0", "end": "wrapped"}
    with Taps(network, paths) as taps:
        out = network(x)
        features = taps.take()
    assert list(features) == list(paths)
    assert torch.equal(features["end"], out)
    assert torch.equal(features["down.0"], network.down_blocks[0].conv(x))
    assert features["mid"].dtype == torch.float32
    assert torch.equal(features["mid"], out - 1)
    features["mid"].sum().backward()
    assert network.down_blocks[0].conv.weight.grad.abs().sum() > 0


def test_take_forgets(network):
    with Taps(network, {"mid": "mid_block"}, "teacher") as taps:
        network(torch.randn(1, 1, 4, 4))
        first = taps.take()["mid"]
        with pytest.raises(UserError, match=r"teacher's feature 'mid' \(module 'mid_block'\) took no part"):
            taps.take()
        network(torch.randn(1, 1, 4, 4))
        assert not torch.equal(taps.take()["mid"], first)


def test_hooks_are_removed_also_after_an_error(network):
    with Taps(network, ROLES):
        assert hooks(network) == 2
    assert hooks(network) == 0
    with pytest.raises(ZeroDivisionError), Taps(network, ROLES):
        raise ZeroDivisionError
    assert hooks(network) == 0


def test_a_module_that_does_not_run(network):
    with Taps(network, {"unused": "unused"}) as taps:
        network(torch.randn(1, 1, 4, 4))
        with pytest.raises(UserError, match="choose another layer"):
            taps.take()


def test_a_module_without_a_tensor(network):
    with (
        Taps(network, {"silent": "silent"}, "student"),
        pytest.raises(UserError, match=r"student's feature 'silent' .* no tensor"),
    ):
        network(torch.randn(1, 1, 4, 4))
    assert hooks(network) == 0


def test_unknown_paths_are_errors_before_any_step(network):
    with pytest.raises(
        UserError, match=r"the student has no feature 'mid' \(module 'mid_blok'\); did you mean 'mid_bl"
    ):
        Taps(network, {"mid": "mid_blok"}, "student")
    with pytest.raises(UserError, match="no feature 'zzz'; name a module path"):
        Taps(network, {"zzz": "zzz"})
    assert hooks(network) == 0


def test_resolve(network):
    wanted = ["mid", "down_blocks.0.conv"]
    assert resolve(network, wanted, ROLES, "teacher") == {"mid": "mid_block", wanted[1]: wanted[1]}
    with pytest.raises(UserError, match=r"the teacher has no feature 'up.0'; .*its roles are down.0, mid$"):
        resolve(network, ["up.0"], ROLES, "teacher")
    with pytest.raises(UserError, match=r"did you mean 'down\.0'"):
        resolve(network, ["down.00"], ROLES, "teacher")


def test_shapes_leave_no_trace(network):
    network.mid_block[1].eval()
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    found = shapes(network, ROLES, lambda: network(torch.zeros(2, 1, 4, 4)))
    assert found == {"down.0": torch.Size([2, 2, 4, 4]), "mid": torch.Size([2, 3, 4, 4])}
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(network) == 0
