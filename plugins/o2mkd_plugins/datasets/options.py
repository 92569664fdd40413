"""What a suite may say about the built-in datasets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from o2mkd_bench import Options, neutral


class DigitsOptions(Options):
    """None: the digits are what scikit-learn ships."""


class Cifar10Options(Options):
    """CIFAR-10 (Krizhevsky, 2009).

    Attributes:
        root: the original batches, class folders, or a tar of class folders; empty: download the original.
        cache: where a download is kept; empty: the cache folder of o2mkd-bench.
        limit: only the first so many training images, classes interleaved, and a fifth as many test images.
        flip: mirror training images at random.
    """

    root: str | None = neutral(None)
    cache: str | None = neutral(None)
    limit: int | None = Field(None, ge=10, le=50_000)
    flip: bool = True


class ImageFolderOptions(Options):
    """Any folder of images.

    Attributes:
        root: searched recursively for png, jpg, jpeg, webp and bmp.
        size: the shorter side is resized to this, then the centre is cut out, pixels.
        channels: 3 for RGB, 1 for grey.
        resample: the filter of that resize.
        test_fraction: this share of the images, evenly spread over the sorted names, is the test split.
        flip: mirror training images at random.
    """

    root: str = neutral()
    size: int = Field(ge=4)
    channels: Literal[1, 3] = 3
    resample: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    test_fraction: float = Field(0.1, gt=0, lt=1)
    flip: bool = True
