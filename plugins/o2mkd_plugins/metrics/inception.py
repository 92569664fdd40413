"""Torch-fidelity's Inception rearranged for CUDA: the same features to float32 rounding, in less time."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3


class FoldedInception(FeatureExtractorBase):
    """``2048`` and ``logits_unbiased`` of a copy of ``extractor``, from uint8 images (B, 3, H, W).

    Each batch norm is folded, in float64, into the convolution before it; images are enlarged by two products with
    the matrices of that interpolation, where torch-fidelity gathers every pixel four times. ``fused`` lets cuDNN add
    the bias and cut below zero inside the convolution.
    """

    def __init__(self, extractor: FeatureExtractorInceptionV3, fused: bool = True) -> None:
        super().__init__(extractor.get_name(), list(extractor.get_requested_features_list()))
        parts = dict(copy.deepcopy(extractor).named_children())
        # kept without its bias: its one product with the features is "unbiased"
        self.register_buffer("classes", parts.pop("fc").weight.detach())
        # registered in the order in which they are called
        self.trunk = nn.Sequential(*parts.values())
        for module in list(self.trunk.modules()):
            for name, child in module.named_children():
                if isinstance(child, BasicConv2d):
                    setattr(module, name, ConvReLU(child, fused))
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


class ConvReLU(nn.Module):
    """A convolution with the batch norm behind it folded in, and the ReLU behind both."""

    def __init__(self, block: BasicConv2d, fused: bool) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv.double(), block.bn.double()).float()
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
