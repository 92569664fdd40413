"""Torch-fidelity's Inception rearranged for CUDA: the same features to float32 rounding, in less time."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    FeatureExtractorInceptionV3,
    InceptionA,
    InceptionC,
    InceptionE_1,
    InceptionE_2,
)

# A100 and H100: most others of compute capability 8 and more multiply TF32 at no three times the rate of float32
SPLIT_PAYS = {(8, 0), (9, 0)}

Form = Literal["plain", "fused", "split"]

_FORKS = (
    (("branch3x3_1",), ("branch3x3_2a", "branch3x3_2b")),
    (("branch3x3dbl_1", "branch3x3dbl_2"), ("branch3x3dbl_3a", "branch3x3dbl_3b")),
)
# Of the blocks of stride 1, the convolutions of each branch, one after the other, and those beside each other that end
# it, in the order of the result. ``branch1x1`` comes before all of these and ``branch_pool`` behind them.
BRANCHES: dict[type[nn.Module], tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    InceptionA: (
        (("branch5x5_1",), ("branch5x5_2",)),
        (("branch3x3dbl_1", "branch3x3dbl_2"), ("branch3x3dbl_3",)),
    ),
    InceptionC: (
        (("branch7x7_1", "branch7x7_2"), ("branch7x7_3",)),
        (("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4"), ("branch7x7dbl_5",)),
    ),
    InceptionE_1: _FORKS,
    InceptionE_2: _FORKS,
}


def fastest_form() -> Form:
    """The form of :class:`FoldedInception` for the CUDA devices here: ``split`` where it pays, and Triton is there."""
    chips = {torch.cuda.get_device_capability(place) for place in range(torch.cuda.device_count())}
    pays = bool(chips) and chips <= SPLIT_PAYS and not torch.version.hip
    return "split" if pays and importlib.util.find_spec("triton") else "fused"


class FoldedInception(FeatureExtractorBase):
    """``2048`` and ``logits_unbiased`` of a copy of ``extractor``, from uint8 images (B, 3, H, W).

    Each batch norm is folded, in float64, into the convolution before it; images are enlarged by two products with
    the matrices of that interpolation, where torch-fidelity gathers every pixel four times. What each convolution is:

    - ``plain``: torch's, its bias and ReLU behind it.
    - ``fused``: cuDNN's that adds the bias and cuts below zero inside.
    - ``split``: 3xTF32 on tensor cores. A float32 is the nearest number of 11 bits, which TF32 holds, and a rest of at
      most 2^-11 of it: x = X + r, w = W + s. Then ``x w = X W + r W + X s`` but for ``r s``, at most 2^-22 of ``x w``;
      what TF32 cannot hold of ``r`` and ``s`` is as small. Tensor cores add in float32 but cut off where float32
      rounds; over sums as long as these that would shrink features by 6e-4 (emulated, eight products at a time), so
      each sum leaves them every 16 or 32 channels and goes on in float32, as in Ootomo and Yokota, "Recovering single
      precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance" (arXiv 2203.03341);
      without that it is CUTLASS's 3xTF32. Features are then as far from float64's as those of float32: some 2e-5 of
      their norm, and shorter by less than 1e-5. Torch's TF32 switches are neither read nor set. The convolution of
      the images themselves, three channels, stays ``fused``; 1x1 convolutions of one input become one. Among them is
      that behind an average pool, which may as well come last and then has a quarter of the channels or fewer.
    """

    def __init__(self, extractor: FeatureExtractorInceptionV3, form: Form = "fused") -> None:
        super().__init__(extractor.get_name(), list(extractor.get_requested_features_list()))
        parts = dict(copy.deepcopy(extractor).named_children())
        # kept without its bias: its one product with the features is "unbiased"
        self.register_buffer("classes", parts.pop("fc").weight.detach())
        # registered in the order in which they are called
        blocks = parts.values() if form != "split" else [_rearranged(part) for part in parts.values()]
        self.trunk = nn.Sequential(*blocks)
        for module in list(self.trunk.modules()):
            for name, child in module.named_children():
                if isinstance(child, BasicConv2d):
                    setattr(module, name, _relu_of(child, form))
        self.size = extractor.INPUT_IMAGE_SIZE
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "2048", "logits_unbiased"

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        rows, columns = (self._enlarging(length, input.device) for length in input.shape[2:])
        # exact on whole numbers, and interpolation keeps it
        x = rows @ ((input.float() - 128) / 128) @ columns.T
        x = self.trunk(x).flatten(1)
        found = {"2048": x}
        if "logits_unbiased" in self.features_list:
            found["logits_unbiased"] = x @ self.classes.T
        return tuple(found[layer] for layer in self.features_list)

    def _enlarging(self, length: int, device: torch.device) -> Tensor:
        """(``size``, ``length``): bilinear interpolation of one axis as in TensorFlow 1, not from pixel centres."""
        place = torch.arange(self.size, dtype=torch.float32, device=device) * (length / self.size)
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        share = place - low
        pixels = torch.arange(length, device=device)
        return (low[:, None] == pixels) * (1 - share)[:, None] + (high[:, None] == pixels) * share[:, None]


def _folded(*blocks: BasicConv2d) -> nn.Conv2d:
    """The convolutions of ``blocks``, equal but for their filters, as one, with their batch norms."""
    folded = [fuse_conv_bn_eval(block.conv.double(), block.bn.double()) for block in blocks]
    conv = folded[0]
    conv.weight = nn.Parameter(torch.cat([part.weight for part in folded]))
    conv.bias = nn.Parameter(torch.cat([part.bias for part in folded]))
    return conv.float()


def _relu_of(block: BasicConv2d, form: Form) -> nn.Module:
    conv = _folded(block)
    if form == "split":
        from .kernels import fits

        if fits(conv.in_channels):
            return SplitConvReLU(conv)
    return ConvReLU(conv, form != "plain")


def _rearranged(part: nn.Module) -> nn.Module:
    """What computes ``part`` in the form ``split``, its single convolutions aside."""
    if type(part) in BRANCHES:
        return SplitBlock(part)
    return Pool(part.stride) if isinstance(part, nn.MaxPool2d) else part


class ConvReLU(nn.Module):
    """A convolution and the ReLU behind it."""

    def __init__(self, conv: nn.Conv2d, fused: bool) -> None:
        super().__init__()
        self.conv = conv
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if self.fused:
            try:
                fused: Tensor = torch.cudnn_convolution_relu(
                    x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
                )
                return fused
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # no cuDNN here, or none with such a kernel
                self.fused = False
        return torch.relu_(conv(x))


def _channels_last(x: Tensor, channels: int, rows: int, columns: int) -> Tensor:
    """An empty tensor of as many images as ``x``."""
    shape = (len(x), channels, rows, columns)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class SplitConvReLU(nn.Module):
    """A convolution by 3xTF32 and the ReLU behind it, which the filters ``uncut`` lack."""

    def __init__(self, conv: nn.Conv2d, uncut: slice = slice(0)) -> None:
        from .kernels import conv_relu, halves

        super().__init__()
        self.run = conv_relu
        self.kernel, self.stride, self.padding = list(conv.kernel_size), conv.stride[0], list(conv.padding)
        weights = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous()
        bias = conv.bias.detach()
        limit = torch.zeros_like(bias)
        limit[uncut] = -torch.inf
        self.register_buffer("weights", torch.stack(halves(weights)))
        self.register_buffer("bias", bias)
        self.register_buffer("limit", limit)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            rows, columns = (
                (length + 2 * edge - taps) // self.stride + 1
                for length, edge, taps in zip(x.shape[2:], self.padding, self.kernel, strict=True)
            )
            out = _channels_last(x, len(self.bias), rows, columns)
        self.run(x, self.weights, self.bias, self.limit, self.kernel, self.stride, self.padding, out)
        return out


class Pool(nn.Module):
    """The largest of 3x3 pixels, or the ReLU of their ``mean`` without the padding."""

    def __init__(self, stride: int, padding: int = 0, mean: bool = False) -> None:
        from .kernels import pool

        super().__init__()
        self.run = pool
        self.stride, self.padding, self.mean = stride, padding, mean

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            rows, columns = ((length + 2 * self.padding - 3) // self.stride + 1 for length in x.shape[2:])
            out = _channels_last(x, x.shape[1], rows, columns)
        self.run(x, self.stride, self.padding, self.mean, out)
        return out


class SplitBlock(nn.Module):
    """An Inception block of :data:`BRANCHES` by 3xTF32.

    One tensor holds what the 1x1 convolutions of the block's input give and behind it the result, which ``branch1x1``
    begins: the last of the joined convolutions is the first of the concatenated, and nothing is copied.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # the mean of a 1x1 convolution is the convolution of the mean, which of maxima is not true
        commutes = not isinstance(block, InceptionE_2)
        chains, ends = zip(*BRANCHES[type(block)], strict=True)
        heads = [getattr(block, chain[0]) for chain in chains]
        if commutes:
            heads.append(block.branch_pool)
        self.starts = [head.conv.out_channels for head in [*heads, block.branch1x1]]
        self.before = sum(self.starts[:-1])
        uncut = slice(self.before - self.starts[-2], self.before) if commutes else slice(0)
        self.joined = SplitConvReLU(_folded(*heads, block.branch1x1), uncut)

        def split(names: Sequence[str]) -> list[SplitConvReLU]:
            return [SplitConvReLU(_folded(getattr(block, name))) for name in names]

        self.chains = nn.ModuleList(nn.Sequential(*split(chain[1:])) for chain in chains)
        self.ends = nn.ModuleList(nn.ModuleList(split(final)) for final in ends)
        self.pool = Pool(1, 1, mean=commutes)
        self.last = None if commutes else split(["branch_pool"])[0]
        finals = [name for final in ends for name in final]
        self.finals = [getattr(block, name).conv.out_channels for name in [*finals, "branch_pool"]]

    def forward(self, x: Tensor) -> Tensor:
        whole = _channels_last(x, sum(self.starts + self.finals), *x.shape[2:])
        begun, rest = whole.split([sum(self.starts), sum(self.finals)], 1)
        starts = self.joined(x, begun).split(self.starts, 1)
        *finals, pooled = rest.split(self.finals, 1)
        free = iter(finals)
        # behind the starts of the chains are those of the pool and of branch1x1
        for start, chain, ends in zip(starts, self.chains, self.ends, strict=False):
            middle = chain(start)
            for end in ends:
                end(middle, next(free))
        if self.last is None:
            self.pool(starts[-2], pooled)
        else:
            self.last(self.pool(x), pooled)
        return whole[:, self.before :]
