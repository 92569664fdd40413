"""Convolutions of float32 images on tensor cores that lose nothing; a Triton kernel, imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles: pixels, filters, warps and the most registers of a thread. The one whose filters leave the least over is taken.
TILES: tuple[tuple[int, int, int, int | None], ...] = ((128, 128, 8, None), (128, 64, 8, 128))
# Channels of one step, and of images that are a multiple of the second alone.
CHANNELS = (32, 16)

_SIZES = ["total", "height", "across", "rows", "columns", "kernel_columns", "taps", "stride", "top", "left"]


@triton.jit(do_not_specialize=_SIZES)
def _conv_relu(
    x,
    high,
    low,
    bias,
    out,
    channels,
    filters,
    pitch,
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
    to = out + m.to(tl.int64)[:, None] * filters + f[None, :]
    tl.store(to, tl.maximum(result, 0.0), mask=(m < total)[:, None] & (f < filters)[None, :])


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` float32 as a number of 11 bits, which TF32 holds, and the rest of it; their sum is ``x`` exactly."""
    high = ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return high, x - high


def fits(channels: int) -> bool:
    """Whether :func:`conv_relu` takes images of so many channels."""
    return channels % CHANNELS[-1] == 0


def launch(
    x: Tensor, high: Tensor, low: Tensor, bias: Tensor, kernel: list[int], stride: int, padding: list[int]
) -> Tensor:
    """Run the kernel; see :func:`conv_relu`."""
    n, channels, height, across = x.shape
    pitch = x.stride(3)
    # some of the channels of a channels-last tensor are read where they lie
    if x.stride() != (height * across * pitch, 1, across * pitch, pitch):
        x, pitch = x.contiguous(memory_format=torch.channels_last), channels
    rows = (height + 2 * padding[0] - kernel[0]) // stride + 1
    columns = (across + 2 * padding[1] - kernel[1]) // stride + 1
    filters = len(bias)
    out = x.new_empty((n, rows, columns, filters)).permute(0, 3, 1, 2)
    total = n * rows * columns
    pixels, wide, warps, registers = min(TILES, key=lambda tile: triton.cdiv(filters, tile[1]) * tile[1])
    with torch.cuda.device_of(x):
        torch.library.wrap_triton(_conv_relu)[(triton.cdiv(total, pixels) * triton.cdiv(filters, wide),)](
            x,
            high,
            low,
            bias,
            out,
            channels,
            filters,
            pitch,
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
    return out


@torch.library.triton_op("o2mkd_bench::conv_relu", mutates_args={})
def conv_relu(
    x: Tensor, high: Tensor, low: Tensor, bias: Tensor, kernel: list[int], stride: int, padding: list[int]
) -> Tensor:
    """The positive part of a convolution plus ``bias``, to float32 rounding, on tensor cores by 3xTF32.

    ``x``: (N, C, H, W) float32, C as :func:`fits` says, fastest where its channels lie side by side; ``high``, ``low``:
    the :func:`halves` of the weights, (F, rows * columns * C) with channels last; ``bias``: (F,). ``kernel`` and
    ``padding`` are rows, columns. The result is channels-last.
    """
    return launch(x, high, low, bias, kernel, stride, padding)


@conv_relu.register_kernel("cpu")
def _conv_relu_cpu(
    x: Tensor, high: Tensor, low: Tensor, bias: Tensor, kernel: list[int], stride: int, padding: list[int]
) -> Tensor:
    coarse, rest = halves(x.contiguous())
    weights = [half.view(len(half), *kernel, -1).permute(0, 3, 1, 2) for half in (high, low, high)]
    joined = torch.cat([coarse, coarse, rest], 1)
    found = torch.nn.functional.conv2d(joined, torch.cat(weights, 1), bias, stride, padding)
    return found.relu_().contiguous(memory_format=torch.channels_last)
