"""A Triton kernel for what a small U-Net spends its time on beside convolutions; imported only where Triton is.

Group normalisation over channels-last images: a tile stays in registers from its mean to its result, so that memory is
read once and written once, and the bias, time embedding and activation around it cost nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Elements of the largest tile, and how many of them a thread should hold: the fastest of those tried on an H200.
LARGEST, PER_THREAD = 65_536, 64
# Channels of a tile, by whether a group is a power of two of them: lanes that are masked away are waited for all the
# same. Below the least, a pixel's part is shorter than what memory gives at once.
EVEN, ODD, LEAST = 32, 64, 16


@triton.jit
def _group_norm(
    x,
    add,
    weight,
    bias,
    out,
    eps,
    channels: tl.constexpr,
    width: tl.constexpr,
    pixels: tl.constexpr,
    used: tl.constexpr,
    lanes: tl.constexpr,
    has_add: tl.constexpr,
    silu: tl.constexpr,
):  # type: ignore[no-untyped-def]
    i = tl.arange(0, lanes)
    c = tl.program_id(1) * used + i
    inside = i < used
    place = tl.program_id(0).to(tl.int64) * pixels * channels + tl.arange(0, pixels)[:, None] * channels + c[None, :]
    tile = tl.load(x + place, mask=inside[None, :], other=0.0)
    added = tl.zeros((lanes,), tl.float32)
    if has_add:
        added += tl.load(add + tl.program_id(0) * channels + c, mask=inside, other=0.0).to(tl.float32)
    same = (i[:, None] // width) == (i[None, :] // width)
    total = tl.sum(tile.to(tl.float32), 0) + pixels * added
    shift = tl.sum(tl.where(same, total[None, :], 0.0), 1) / (pixels * width) - added
    # from the differences: a large mean then costs the variance no digits
    apart = tile.to(tl.float32) - shift[None, :]
    squares = tl.sum(apart * apart, 0)
    variance = tl.sum(tl.where(same, squares[None, :], 0.0), 1) / (pixels * width)
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    value = (tile.to(tl.float32) - shift[None, :]) * scale[None, :] + offset[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside[None, :])


def _power(n: int) -> int:
    return int(1 << (n - 1).bit_length())


def tile(pixels: int, channels: int, groups: int) -> tuple[int, int] | None:
    """Channels that one program takes, whole groups of them, and the power of two that holds them; None for no tile."""
    # plain integers, one loop: Dynamo reads this where a network is compiled, and knows neither Triton's helpers nor
    # max() with a default
    width = channels // groups
    most = EVEN if width & (width - 1) == 0 else ODD
    used = width
    for k in range(2, groups + 1):
        if groups % k == 0 and _power(k * width) <= most:
            used = k * width
    lanes = _power(used)
    if pixels & (pixels - 1) or pixels * lanes > LARGEST or lanes < min(LEAST, channels):
        return None
    return used, lanes


def norm_fits(x: Tensor, *norms: nn.GroupNorm) -> bool:
    """Whether :func:`group_norm` has a tile for each of ``norms`` over as many pixels as ``x`` (N, C, H, W) has."""
    pixels = x.shape[2] * x.shape[3]
    return all(tile(pixels, norm.num_channels, norm.num_groups) is not None for norm in norms)


def launch(x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    """Run the kernel; see :func:`group_norm`."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    n, channels, height, across = x.shape
    pixels = height * across
    found = tile(pixels, channels, groups)
    assert found is not None, "asked for where norm_fits says no"
    used, lanes = found
    # Triton launches on the current device
    with torch.cuda.device_of(x):
        _group_norm[(n, channels // used)](
            x,
            x if add is None else add,
            weight,
            bias,
            out,
            eps,
            channels=channels,
            width=channels // groups,
            pixels=pixels,
            used=used,
            lanes=lanes,
            has_add=add is not None,
            silu=silu,
            num_warps=min(16, max(1, pixels * lanes // (32 * PER_THREAD))),
        )
    return out


# opaque to the compiler, whose own launcher of this kernel (torch 2.11) took six times as long as Triton's
@torch.library.custom_op("o2mkd_bench::group_norm", mutates_args=(), device_types="cuda")
def group_norm(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Group normalisation of ``x + add`` over channels-last images, then SiLU if asked.

    ``x``: (N, C, H, W), half precision or float32; ``add``: (N, C) or None; ``weight``, ``bias``: (C,). Arithmetic in
    float32. The result has the dtype of ``x`` and is channels-last.
    """
    return launch(x, add, weight, bias, groups, eps, silu)


@group_norm.register_fake
def _group_norm_shape(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@group_norm.register_kernel("cpu")
def _group_norm_cpu(
    x: Tensor, add: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    whole = x.float() if add is None else x.float() + add.float()[:, :, None, None]
    value = torch.nn.functional.group_norm(whole, groups, weight.float(), bias.float(), eps)
    value = torch.nn.functional.silu(value) if silu else value
    return value.to(x.dtype).contiguous(memory_format=torch.channels_last)
