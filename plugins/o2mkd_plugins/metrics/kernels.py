"""Convolutions of float32 images on tensor cores that lose nothing, and pools: in Triton, imported only where it is.

Both read some of the channels of a channels-last tensor where they lie and write some of those of another, so that
what a network would split and concatenate is never copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a convolution's tile: pixels, filters, warps and the most registers of a thread.
TILE: tuple[int, int, int, int | None] = (128, 64, 8, 128)
# Channels of one step, and of images that are a multiple of the second alone.
CHANNELS = (32, 16)
# Of a pool's tile: pixels and channels.
POOL_TILE = (64, 32)

_SIZES = ["total", "height", "across", "rows", "columns", "kernel_columns", "taps", "stride", "top", "left"]


@triton.jit(do_not_specialize=_SIZES)
def _conv_relu(
    x,
    high,
    low,
    bias,
    limit,
    out,
    channels,
    filters,
    pitch,
    out_pitch,
    total,
    height,
    across,
    rows,
    columns,
    kernel_columns,
    taps,
    stride,
    top,
    left,
    pixels: tl.constexpr,
    wide: tl.constexpr,
    deep: tl.constexpr,
):  # type: ignore[no-untyped-def]
    # neighbours share their pixels, which are more than the weights
    tiles = tl.cdiv(filters, wide)
    m = tl.program_id(0) // tiles * pixels + tl.arange(0, pixels)
    f = tl.program_id(0) % tiles * wide + tl.arange(0, wide)
    place = m % (rows * columns)
    y = place // columns * stride - top
    z = place % columns * stride - left
    image = x + (m // (rows * columns)).to(tl.int64) * height * across * pitch
    c = tl.arange(0, deep)
    weights = f[None, :] * taps * channels + c[:, None]
    blocks = channels // deep
    result = tl.zeros((pixels, wide), tl.float32)
    for k in range(0, taps * blocks):
        v = y + k // blocks // kernel_columns
        u = z + k // blocks % kernel_columns
        inside = (m < total) & (v >= 0) & (v < height) & (u >= 0) & (u < across)
        pixel = (v * across + u) * pitch + k % blocks * deep
        a = tl.load(image[:, None] + pixel[:, None] + c[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(high + weights + k * deep, mask=f[None, :] < filters, other=0.0)
        fine = tl.load(low + weights + k * deep, mask=f[None, :] < filters, other=0.0)
        # the nearest number of 11 bits; 0x1000 is half of its last one, -0x2000 leaves it and all above
        coarse = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        part = tl.dot(a - coarse, b, input_precision="tf32")
        part = tl.dot(coarse, fine, part, input_precision="tf32")
        part = tl.dot(coarse, b, part, input_precision="tf32")
        # outside the tensor cores, which would cut the long sum off where this rounds it
        result += part
    result += tl.load(bias + f, mask=f < filters, other=0.0)[None, :]
    result = tl.maximum(result, tl.load(limit + f, mask=f < filters, other=0.0)[None, :])
    to = out + m.to(tl.int64)[:, None] * out_pitch + f[None, :]
    tl.store(to, result, mask=(m < total)[:, None] & (f < filters)[None, :])


@triton.jit(do_not_specialize=["total", "height", "across", "rows", "columns", "stride", "edge"])
def _pool(
    x,
    out,
    channels,
    pitch,
    out_pitch,
    total,
    height,
    across,
    rows,
    columns,
    stride,
    edge,
    mean: tl.constexpr,
    pixels: tl.constexpr,
    wide: tl.constexpr,
):  # type: ignore[no-untyped-def]
    m = tl.program_id(0) * pixels + tl.arange(0, pixels)
    c = tl.program_id(1) * wide + tl.arange(0, wide)
    live = (m < total)[:, None] & (c < channels)[None, :]
    place = m % (rows * columns)
    y = place // columns * stride - edge
    z = place % columns * stride - edge
    image = x + (m // (rows * columns)).to(tl.int64) * height * across * pitch
    count = tl.zeros((pixels,), tl.float32)
    nothing = 0.0 if mean else float("-inf")
    result = tl.full((pixels, wide), nothing, tl.float32)
    for k in tl.static_range(9):
        v = y + k // 3
        u = z + k % 3
        inside = (v >= 0) & (v < height) & (u >= 0) & (u < across)
        pixel = (v * across + u) * pitch
        a = tl.load(image[:, None] + pixel[:, None] + c[None, :], mask=inside[:, None] & live, other=nothing)
        if mean:
            result += a
            count += inside.to(tl.float32)
        else:
            result = tl.maximum(result, a)
    if mean:
        result = tl.maximum(result / count[:, None], 0.0)
    tl.store(out + m.to(tl.int64)[:, None] * out_pitch + c[None, :], result, mask=live)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` float32 as a number of 11 bits, which TF32 holds, and the rest of it; their sum is ``x`` exactly."""
    high = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return high, x - high


def fits(channels: int) -> bool:
    """Whether :func:`conv_relu` takes images of so many channels."""
    return channels % CHANNELS[-1] == 0


def _side_by_side(x: Tensor) -> tuple[Tensor, int]:
    """``x``, or a copy if it is no part or whole of a channels-last tensor, and how far apart its pixels lie."""
    channels, height, across = x.shape[1:]
    pitch = x.stride(3)
    if x.stride() == (height * across * pitch, 1, across * pitch, pitch):
        return x, pitch
    return x.contiguous(memory_format=torch.channels_last), channels


def launch_conv_relu(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    limit: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    out: Tensor,
) -> None:
    """Run the kernel; see :func:`conv_relu`."""
    x, pitch = _side_by_side(x)
    channels, height, across = x.shape[1:]
    n, filters, rows, columns = out.shape
    total = n * rows * columns
    pixels, wide, warps, registers = TILE
    with torch.cuda.device_of(x):
        _conv_relu[(triton.cdiv(total, pixels) * triton.cdiv(filters, wide),)](
            x,
            weights[0],
            weights[1],
            bias,
            limit,
            out,
            channels,
            filters,
            pitch,
            out.stride(3),
            total,
            height,
            across,
            rows,
            columns,
            kernel[1],
            kernel[0] * kernel[1],
            stride,
            *padding,
            pixels=pixels,
            wide=wide,
            deep=next(deep for deep in CHANNELS if channels % deep == 0),
            num_warps=warps,
            num_stages=3,
            maxnreg=registers,
        )


@torch.library.custom_op("o2mkd_bench::conv_relu", mutates_args=("out",), device_types="cuda")
def conv_relu(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    limit: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    out: Tensor,
) -> None:
    """A convolution plus ``bias``, at least ``limit``, to float32 rounding, on tensor cores by 3xTF32.

    ``x``: (N, C, H, W) float32, C as :func:`fits` says, fastest where its channels lie side by side; ``weights``:
    (2, F, rows * columns * C), the :func:`halves` of weights with channels last; ``bias``, ``limit``: (F,), zero for
    ReLU and -inf for none. ``kernel`` and ``padding`` are rows, columns. ``out``: (N, F, H', W'), some or all of the
    channels of a channels-last tensor.
    """
    launch_conv_relu(x, weights, bias, limit, kernel, stride, padding, out)


@conv_relu.register_kernel("cpu")
def _conv_relu_cpu(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    limit: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    out: Tensor,
) -> None:
    coarse, rest = halves(x.contiguous())
    high, low = weights.view(2, len(bias), *kernel, -1).permute(0, 1, 4, 2, 3)
    joined = torch.cat([coarse, coarse, rest], 1)
    found = torch.nn.functional.conv2d(joined, torch.cat([high, low, high], 1), bias, stride, padding)
    torch.maximum(found, limit[:, None, None], out=found)
    out.copy_(found)


def launch_pool(x: Tensor, stride: int, padding: int, mean: bool, out: Tensor) -> None:
    """Run the kernel; see :func:`pool`."""
    x, pitch = _side_by_side(x)
    height, across = x.shape[2:]
    n, channels, rows, columns = out.shape
    total = n * rows * columns
    pixels, wide = POOL_TILE
    with torch.cuda.device_of(x):
        _pool[(triton.cdiv(total, pixels), triton.cdiv(channels, wide))](
            x,
            out,
            channels,
            pitch,
            out.stride(3),
            total,
            height,
            across,
            rows,
            columns,
            stride,
            padding,
            mean=mean,
            pixels=pixels,
            wide=wide,
        )


@torch.library.custom_op("o2mkd_bench::pool", mutates_args=("out",), device_types="cuda")
def pool(x: Tensor, stride: int, padding: int, mean: bool, out: Tensor) -> None:
    """The largest of each 3x3 pixels, or the positive part of their ``mean``; those of the padding do not count.

    ``x``: (N, C, H, W) float32, fastest where its channels lie side by side; ``out``: (N, C, H', W'), some or all of
    the channels of a channels-last tensor.
    """
    launch_pool(x, stride, padding, mean, out)


@pool.register_kernel("cpu")
def _pool_cpu(x: Tensor, stride: int, padding: int, mean: bool, out: Tensor) -> None:
    if mean:
        out.copy_(torch.nn.functional.avg_pool2d(x, 3, stride, padding, count_include_pad=False).relu_())
    else:
        out.copy_(torch.nn.functional.max_pool2d(x, 3, stride, padding))
