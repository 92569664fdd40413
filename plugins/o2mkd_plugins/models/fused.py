"""diffusers' U-Net blocks with fewer trips to memory, for inference in half precision on CUDA.

A residual or attention block keeps its place and its output; the modules inside it are not called any more. Whatever
the kernel has no tile for goes through diffusers' own forward.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from .kernels import group_norm, norm_fits


def fuse(network: nn.Module) -> nn.Module:
    """A twin of a frozen ``UNet2DModel`` that shares its weights, with the blocks below in place of diffusers' own."""
    twin = copy.deepcopy(network, {id(value): value for value in (*network.parameters(), *network.buffers())})
    for path, module in list(twin.named_modules()):
        if type(module) is ResnetBlock2D and _plain_resnet(module):
            twin.set_submodule(path, FusedResnet(module))
        elif type(module) is Attention and _plain_attention(module):
            twin.set_submodule(path, FusedAttention(module))
        elif path == "conv_norm_out" and isinstance(module, nn.GroupNorm):
            twin.set_submodule(path, FusedNorm(module))
    return twin


class FusedNorm(nn.Module):
    """Group normalisation."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, x: Tensor) -> Tensor:
        if not norm_fits(x, self.inner):
            return cast(Tensor, self.inner(x))
        return _norm(x, None, self.inner, silu=False)


class FusedResnet(nn.Module):
    """A residual block whose normalisations take bias, time embedding and activation along."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.inner = block

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        block = self.inner
        if not norm_fits(x, block.norm1, block.norm2):
            return cast(Tensor, block(x, temb))
        hidden = _norm(x, None, block.norm1, silu=True)
        # the bias goes into the sum that the second normalisation makes anyway
        hidden = functional.conv2d(hidden, block.conv1.weight, None, block.conv1.stride, block.conv1.padding)
        shift = block.time_emb_proj(functional.silu(temb)) + block.conv1.bias
        hidden = block.conv2(_norm(hidden, shift, block.norm2, silu=True))
        x = x if block.conv_shortcut is None else block.conv_shortcut(x)
        return cast(Tensor, (x + hidden) / block.output_scale_factor)


class FusedAttention(nn.Module):
    """Self-attention over pixels that never leaves the channels-last layout, with one joined projection."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.inner = block
        parts = (block.to_q, block.to_k, block.to_v)
        self.register_buffer("weight", torch.cat([part.weight.detach() for part in parts]))
        self.register_buffer("bias", torch.cat([part.bias.detach() for part in parts]))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        block = self.inner
        if not norm_fits(x, block.group_norm):
            return cast(Tensor, block(x, temb=temb))
        n, channels, height, width = x.shape
        tokens = _norm(x, None, block.group_norm, silu=False).permute(0, 2, 3, 1).reshape(n, -1, channels)
        joined = functional.linear(tokens, cast(Tensor, self.weight), cast(Tensor, self.bias))
        q, k, v = joined.view(n, height * width, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1, channels)
        found = block.to_out[0](found).view(n, height, width, channels).permute(0, 3, 1, 2)
        return cast(Tensor, (found + x if block.residual_connection else found) / block.rescale_output_factor)


def _norm(x: Tensor, add: Tensor | None, norm: Any, silu: bool) -> Tensor:
    found: Tensor = group_norm(x, add, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return found


def _plain_resnet(block: Any) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_emb_proj is not None
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _plain_attention(block: Any) -> bool:
    return (
        isinstance(block.group_norm, nn.GroupNorm)
        and block.spatial_norm is None
        and block.to_q.weight.shape == block.to_k.weight.shape == block.to_v.weight.shape
        and block.to_q.bias is not None
    )
