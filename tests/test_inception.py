"""Inception's convolutions on tensor cores: what they are made of, and that they count as float32 does."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import (
    FeatureExtractorInceptionV3,
    InceptionA,
    InceptionC,
    InceptionE_1,
    InceptionE_2,
)

from o2mkd_bench.engine.scoring import extract_ahead
from o2mkd_plugins.metrics import inception
from o2mkd_plugins.metrics.inception import ConvReLU, FoldedInception, Pool, SplitBlock, SplitConvReLU, fastest_form

pytest.importorskip("triton", reason="the kernel is Triton's")

from o2mkd_plugins.metrics.kernels import conv_relu, fits, halves, pool

# Every kind of convolution that Inception has, over tiles that are full and not, in both layouts, of some channels too
# and to some of another's; every third filter without ReLU.
CONVOLUTIONS = """
import torch
from o2mkd_plugins.metrics import kernels

torch.manual_seed(0)
for channels, filters, kernel, stride, padding, size in (
    (32, 8, [3, 3], 1, [0, 0], (7, 9)),
    (16, 136, [1, 1], 1, [0, 0], (5, 4)),
    (48, 70, [5, 5], 1, [2, 2], (6, 5)),
    (32, 64, [3, 3], 2, [0, 0], (7, 8)),
    (64, 128, [1, 7], 1, [0, 3], (3, 8)),
    (16, 20, [7, 1], 1, [3, 0], (8, 3)),
):
    whole = torch.randn(3, channels + 16, *size)
    weights, bias, limit = torch.randn(filters, *kernel, channels), torch.randn(filters), torch.zeros(filters)
    limit[::3] = -torch.inf
    rest = (torch.stack(kernels.halves(weights.flatten(1))), bias, limit, kernel, stride, padding)
    last = whole.contiguous(memory_format=torch.channels_last)
    exact = torch.nn.functional.conv2d(
        whole[:, 16:].double(), weights.permute(0, 3, 1, 2).double(), bias.double(), stride, padding
    )
    assert exact[:, ::3].min() < 0
    exact = exact.maximum(limit[:, None, None])
    for x in (last[:, 16:], last[:, 16:].contiguous(memory_format=torch.channels_last), whole[:, 16:]):
        room = torch.empty(3, filters + 8, *exact.shape[2:], memory_format=torch.channels_last).fill_(7)
        kernels.launch_conv_relu(x, *rest, room[:, 4:-4])
        assert (room[:, 4:-4] - exact).abs().max() < 1e-6 * exact.max(), (channels, filters, kernel)
        assert (room[:, :4] == 7).all() and (room[:, -4:] == 7).all()
"""
POOLS = """
import torch
from torch.nn.functional import avg_pool2d, max_pool2d
from o2mkd_plugins.metrics import kernels

torch.manual_seed(0)
for channels, size in ((32, (8, 9)), (40, (3, 4)), (6, (5, 5))):
    whole = torch.randn(3, channels + 8, *size).contiguous(memory_format=torch.channels_last)
    x = whole[:, 8:]
    for stride, padding, mean, exact in (
        (1, 1, True, avg_pool2d(x.double(), 3, 1, 1, count_include_pad=False).relu()),
        (1, 1, False, max_pool2d(x, 3, 1, 1)),
        (2, 0, False, max_pool2d(x, 3, 2)),
    ):
        for given in (x, x.contiguous()):
            room = torch.empty(3, channels + 8, *exact.shape[2:], memory_format=torch.channels_last).fill_(7)
            kernels.launch_pool(given, stride, padding, mean, room[:, 4:-4])
            assert (room[:, 4:-4] - exact).abs().max() < 1e-6 * mean + 1e-30, (channels, size, stride, mean)
            assert (room[:, :4] == 7).all() and (room[:, -4:] == 7).all()
"""


@pytest.mark.parametrize("script", [CONVOLUTIONS, POOLS], ids=["convolutions", "pools"])
def test_the_kernels_do_as_torch_does(script):
    # Triton's interpreter, which must be asked for before Triton is imported
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_halves_add_up_and_the_first_is_what_tf32_holds():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 10_000)
    high, low = halves(x)
    assert torch.equal(high.double() + low.double(), x.double())
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert (low.abs() <= 2**-11 * x.abs()).all()
    # to the nearest, not towards zero: the rests have both signs
    assert abs((low / x).mean()) < 1e-5


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def lively(module: torch.nn.Module, *x: Tensor) -> torch.nn.Module:
    """``module`` with statistics and scales that batch norm can be seen by."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 1.0
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(-0.5, 0.5)
    module.train()(*x)
    return module.eval()


@pytest.fixture(scope="module")
def network() -> FeatureExtractorInceptionV3:
    """Random weights."""
    with (
        mock.patch.object(torch_fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url"),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        made = FeatureExtractorInceptionV3("x", ["2048"])
    return lively(made, images(4))


def test_the_split_form_is_wired_as_the_plain_one(network):
    plain, split = (FoldedInception(network, form) for form in ("plain", "split"))
    kinds = [type(module) for module in split.modules()]
    # of the 94 convolutions the first reads three channels, and 35 become 9
    assert (kinds.count(ConvReLU), kinds.count(SplitConvReLU), kinds.count(SplitBlock)) == (1, 67, 9)
    # nine in blocks, two between them
    assert kinds.count(Pool) == 11
    assert torch.nn.MaxPool2d not in kinds
    with torch.inference_mode():
        (ours,), (theirs,) = split(images(2)), plain(images(2))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert not torch.equal(ours, theirs), "the split convolutions were not asked"
    assert theirs.std(dim=0).mean() > 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: InceptionA(16, pool_features=32),
        lambda: InceptionC(16, channels_7x7=16),
        lambda: InceptionE_1(16),
        lambda: InceptionE_2(16),
    ],
    ids=["A", "C", "E_1", "E_2"],
)
@torch.no_grad()
def test_blocks_give_what_torch_fidelitys_give(make):
    torch.manual_seed(0)
    block, x = make(), torch.randn(3, 16, 5, 6)
    expected = lively(block, x).double()(x.double())
    found = SplitBlock(block.float())(x.contiguous(memory_format=torch.channels_last))
    assert found.shape == expected.shape
    # of the pool too, whose ReLU comes behind the mean and not before it
    assert (found - expected).abs().max() < 3e-5 * expected.max()


@pytest.mark.parametrize(
    ("chips", "hip", "triton", "expected"),
    [
        ([(9, 0)], None, True, "split"),
        ([(8, 0), (9, 0)], None, True, "split"),
        ([(9, 0), (8, 6)], None, True, "fused"),
        ([(7, 5)], None, True, "fused"),
        ([(9, 0)], None, False, "fused"),
        ([(9, 0)], "6.4", True, "fused"),
        ([], None, True, "fused"),
    ],
)
def test_the_form_is_the_one_that_pays(monkeypatch, chips, hip, triton, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(chips))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: chips[place])
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: object() if triton else None)
    assert fastest_form() == expected


def test_images_of_a_few_channels_do_not_fit():
    assert [channels for channels in (3, 16, 24, 80, 2048) if fits(channels)] == [16, 80, 2048]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", [[1, 1], [3, 3]])
def test_long_sums_on_tensor_cores_lose_nothing(kernel):
    torch.manual_seed(0)
    x = torch.rand(2, 2048, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    weights = torch.rand(192, kernel[0] * kernel[1] * 2048, device="cuda")
    padding = [kernel[0] // 2, kernel[1] // 2]
    ours, none = torch.empty_like(x[:, :192]), torch.zeros(192, device="cuda")
    conv_relu(x, torch.stack(halves(weights)), none, none, kernel, 1, padding, ours)
    spread = weights.view(192, *kernel, 2048).permute(0, 3, 1, 2).double().cpu()
    exact = torch.nn.functional.conv2d(x.double().cpu(), spread, padding=padding)
    # a sum that never leaves the tensor cores would be 3e-5 and 3e-4 too small
    assert ((ours.cpu() - exact) / exact).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("stride", "padding", "mean"), [(1, 1, True), (1, 1, False), (2, 0, False)])
def test_pools_on_the_device_are_torchs(stride, padding, mean):
    torch.manual_seed(0)
    x = torch.randn(2, 160, 17, 18).contiguous(memory_format=torch.channels_last)[:, 64:]
    rows, columns = ((length + 2 * padding - 3) // stride + 1 for length in x.shape[2:])
    theirs, ours = (
        torch.empty(2, 128, rows, columns, device=place, memory_format=torch.channels_last)[:, 32:]
        for place in ("cpu", "cuda")
    )
    pool(x, stride, padding, mean, theirs)
    pool(x.cuda(), stride, padding, mean, ours)
    assert (ours.cpu() - theirs).abs().max() <= 1e-6 * mean


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
def test_features_from_tensor_cores_are_those_of_float32(network, channels_last):
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    place = torch.device("cuda")
    plain, split = (
        extract_ahead(FoldedInception(network, form).to(place), images(16), 3, 16, place, channels_last)[
            "2048"
        ].double()
        for form in ("plain", "split")
    )
    # two orders of the same float32 sums are as far apart
    assert (split - plain).norm() < 1e-4 * plain.norm()
    assert (split - plain).abs().max() < 2e-4 * plain.max()
    # what a Fréchet distance would show: all of them smaller
    assert abs((split * plain).sum() / plain.square().sum() - 1) < 3e-5
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
