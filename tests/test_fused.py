"""The U-Net with fused normalisations: the same network, and a kernel that counts right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel

from o2mkd_plugins.models.unet2d import UNet2D

pytest.importorskip("triton", reason="the kernel is Triton's")

from o2mkd_plugins.models import fused

# Every tile there is: whole and odd group widths, one and several programs an image, masked lanes.
KERNEL = """
import torch
from o2mkd_plugins.models import kernels

torch.manual_seed(0)
for n, channels, size, groups in ((2, 32, 8, 8), (1, 96, 4, 8), (2, 24, 16, 2), (1, 192, 4, 16), (1, 64, 32, 16)):
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
        x = (3 * torch.randn(n, channels, size, size) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
        add, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((n, channels), (channels,), (channels,)))
        assert kernels.norm_fits(x, torch.nn.GroupNorm(groups, channels))
        for extra in (None, add):
            for silu in (True, False):
                rest = (extra, weight, bias, groups, 1e-6, silu)
                ours, plain = kernels.launch(x, *rest), kernels.group_norm(x, *rest)
                assert ours.is_contiguous(memory_format=torch.channels_last) and ours.dtype == dtype
                assert (ours - plain).abs().max() < near * plain.abs().max(), (n, channels, size, groups, dtype)

# a mean of a thousand standard deviations costs the variance no digits
x = (torch.randn(1, 8, 16, 16, dtype=torch.float64) + 1000).float().contiguous(memory_format=torch.channels_last)
one, zero = torch.ones(8), torch.zeros(8)
exact = torch.nn.functional.group_norm(x.double(), 2, eps=1e-6)
assert (kernels.launch(x, None, one, zero, 2, 1e-6, False) - exact).abs().max() < 1e-3
for shape, groups in (((1, 8, 3, 5), 2), ((1, 512, 16, 16), 1), ((1, 32, 64, 64), 4)):
    assert not kernels.norm_fits(torch.empty(*shape), torch.nn.GroupNorm(groups, shape[1])), shape
"""


def test_the_kernel_normalises_as_torch_does():
    # Triton's interpreter, which must be asked for before Triton is imported
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def network() -> UNet2DModel:
    torch.manual_seed(0)
    made = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return made.eval().requires_grad_(False)


def outputs(network: UNet2DModel, size: int = 16) -> torch.Tensor:
    torch.manual_seed(1)
    return network(torch.randn(2, 3, size, size), torch.tensor([3, 500]), return_dict=False)[0]


def test_the_twin_shares_weights_and_gives_the_same(network):
    before, keys = outputs(network), list(network.state_dict())
    twin = fused.fuse(network)
    kinds = [type(module) for module in twin.modules()]
    assert kinds.count(fused.FusedResnet) == 8
    assert kinds.count(fused.FusedAttention) == 4
    assert kinds.count(fused.FusedNorm) == 1
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in network.parameters()}
    assert torch.allclose(outputs(twin), before, atol=1e-5)
    assert not torch.equal(outputs(twin), before), "the fused blocks were not asked"
    # the network it was made from is as it was
    assert list(network.state_dict()) == keys
    assert torch.equal(outputs(network), before)


def test_paths_that_both_have_give_the_same(network):
    twin = fused.fuse(network)
    shared = {path for path, _ in network.named_modules()} & {path for path, _ in twin.named_modules()}
    assert {"down_blocks.0.resnets.0", "mid_block.attentions.0", "conv_norm_out", "up_blocks.1"} <= shared
    assert "down_blocks.0.resnets.0.norm1" not in shared
    seen: dict[str, list[torch.Tensor]] = {}
    for side in (network, twin):
        for path in shared - {""}:

            def keep(module: object, inputs: object, output: object, path: str = path) -> None:
                if isinstance(output, torch.Tensor):
                    seen.setdefault(path, []).append(output)

            side.get_submodule(path).register_forward_hook(keep)
        outputs(side)
    for path, (ours, theirs) in seen.items():
        assert torch.allclose(ours, theirs, atol=1e-5), path


def test_what_has_no_tile_goes_the_old_way(network):
    twin = fused.fuse(network)
    # 6 x 6 and 3 x 3 pixels are no powers of two
    assert torch.equal(outputs(twin, 6), outputs(network, 6))


def test_float32_is_left_alone(network):
    family = UNet2D()
    assert family.optimise(network) is network
    half = network.to(torch.bfloat16)
    assert any(isinstance(module, fused.FusedResnet) for module in family.optimise(half).modules())
