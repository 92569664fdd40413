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
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

# A100 and H100: most others of compute capability 8 and more multiply TF32 at no three times the rate of float32
SPLIT_PAYS = {(8, 0), (9, 0)}

Form = Literal["plain", "fused", "split"]


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
      the images themselves, three channels, stays ``fused``; 1x1 convolutions of one input become one.
    """

    def __init__(self, extractor: FeatureExtractorInceptionV3, form: Form = "fused") -> None:
        super().__init__(extractor.get_name(), list(extractor.get_requested_features_list()))
        parts = dict(copy.deepcopy(extractor).named_children())
        # kept without its bias: its one product with the features is "unbiased"
        self.register_buffer("classes", parts.pop("fc").weight.detach())
        # registered in the order in which they are called
        blocks = parts.values() if form != "split" else [_joined(part) for part in parts.values()]
        self.trunk = nn.Sequential(*blocks)
        for module in list(self.trunk.modules()):
            for name, child in module.named_children():
                if isinstance(child, BasicConv2d):
                    setattr(module, name, _relu_of([child], form))
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


def _relu_of(blocks: Sequence[BasicConv2d], form: Form) -> nn.Module:
    """The convolutions of ``blocks``, equal but for their filters, as one, with their batch norms and ReLUs."""
    folded = [fuse_conv_bn_eval(block.conv.double(), block.bn.double()) for block in blocks]
    conv = folded[0]
    conv.weight = nn.Parameter(torch.cat([part.weight for part in folded]))
    conv.bias = nn.Parameter(torch.cat([part.bias for part in folded]))
    conv.float()
    if form == "split":
        from .kernels import fits

        if fits(conv.in_channels):
            return SplitConvReLU(conv)
    return ConvReLU(conv, form != "plain")


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


class SplitConvReLU(nn.Module):
    """A convolution by 3xTF32 and the ReLU behind it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        from .kernels import conv_relu, halves

        super().__init__()
        self.run = conv_relu
        self.kernel, self.stride, self.padding = list(conv.kernel_size), conv.stride[0], list(conv.padding)
        high, low = halves(conv.weight.detach().permute(0, 2, 3, 1).flatten(1).contiguous())
        self.register_buffer("high", high)
        self.register_buffer("low", low)
        self.register_buffer("bias", conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.run(x, self.high, self.low, self.bias, self.kernel, self.stride, self.padding)
        return found


def _joined(part: nn.Module) -> nn.Module:
    """``part`` with one convolution for those of size 1x1 that read its input, if it has several."""
    found = {
        name: child
        for name, child in part.named_children()
        # that one reads what was pooled
        if isinstance(child, BasicConv2d) and child.conv.kernel_size == (1, 1) and name != "branch_pool"
    }
    return Joined(part, found) if len(found) > 1 else part


class Joined(nn.Module):
    """An Inception block whose convolutions ``members``, by name, are computed as one before it begins."""

    def __init__(self, block: nn.Module, members: dict[str, BasicConv2d]) -> None:
        super().__init__()
        self.widths = [member.conv.out_channels for member in members.values()]
        self.conv = _relu_of(list(members.values()), "split")
        self.block = block
        self.given = nn.ModuleList(Given() for _ in members)
        for name, given in zip(members, self.given, strict=True):
            setattr(block, name, given)

    def forward(self, x: Tensor) -> Tensor:
        for given, value in zip(self.given, self.conv(x).split(self.widths, 1), strict=True):
            given.value = value
        try:
            found: Tensor = self.block(x)
            return found
        finally:
            for given in self.given:
                given.value = None


class Given(nn.Module):
    """Stands for a convolution whose result is known."""

    value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.value is not None, "called outside its block"
        return self.value
