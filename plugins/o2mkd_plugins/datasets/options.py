"""What a suite may say about the built-in datasets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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


Resample = Literal["lanczos", "bicubic", "bilinear", "box"]


class ImageFolderOptions(Options):
    """Any folder of images.

    Attributes:
        root: searched recursively for png, jpg, jpeg, webp and bmp. Where it holds a folder train beside one of test,
            val or validation, these are the two splits, and nothing else of it is read.
        size: the shorter side is resized to this, then the centre is cut out, pixels.
        channels: 3 for RGB, 1 for grey.
        resample: the filter of that resize.
        test_fraction: without such folders this share of the images, evenly spread over the sorted names, is the test
            split.
        flip: mirror training images at random.
    """

    root: str = neutral()
    size: int = Field(ge=4, le=4096)
    channels: Literal[1, 3] = 3
    resample: Resample = "lanczos"
    test_fraction: float = Field(0.1, gt=0, lt=1)
    flip: bool = True


class SquareOptions(Options):
    """RGB images from this machine or from the Hugging Face Hub, brought to one size.

    Attributes:
        root: where they are on this machine; empty: take them from the Hub.
        hub: a dataset of the Hub, ``owner/name``; read by the package ``datasets``.
        revision: the 40 digits of a commit of it.
        train_split, test_split: its splits; without ``test_split`` a ``test_fraction`` of the others is the test split.
        column: where its images are.
        size: the shorter side is resized to this where it differs, then the centre is cut out, pixels.
        resample: the filter of that resize, antialiased.
        test_fraction: this share of the images, evenly spread in their order, is the test split where none is given.
        flip: mirror training images at random.
    """

    root: str = neutral("")
    hub: str = neutral("", pattern=r"^$|^[\w.-]+/[\w.-]+$")
    revision: str = neutral("", pattern=r"^$|^[0-9a-f]{40}$")
    # neutral, as the fingerprint has them where they matter
    train_split: str = neutral("train", min_length=1)
    test_split: str = neutral("")
    column: str = neutral("image", min_length=1)
    size: int = Field(256, ge=4, le=4096)
    resample: Resample = "lanczos"
    test_fraction: float = Field(0.05, gt=0, lt=1)
    flip: bool = True

    @model_validator(mode="after")
    def _pinned(self) -> SquareOptions:
        if bool(self.hub) != bool(self.revision):
            raise ValueError("hub and revision go together: the 40 digits of a commit say which images those are")
        return self


class LsunOptions(SquareOptions):
    """One category of LSUN (Yu et al., arXiv 1506.03365), whose export has images of 256 pixels on the shorter side.

    Attributes:
        root: the folder with ``<category>_train_lmdb``, and ``<category>_val_lmdb`` as the test split if it is there;
            such an lmdb itself; or a folder of images.
        category: as the official export calls it.
    """

    category: str = neutral("church_outdoor", pattern=r"^[\w-]+$")


class CelebAHQOptions(SquareOptions):
    """CelebA-HQ (Karras et al., arXiv 1710.10196).

    Attributes:
        root: a folder of images, searched recursively.
        resample: ``box`` is how the published 256 pixels were made from 1024.
    """

    resample: Resample = "box"


class CocoOptions(Options):
    """MS-COCO (Lin et al., arXiv 1405.0312) for models that draw from text.

    Attributes:
        root: the folder with ``val2014``, ``train2014`` and ``annotations``; empty: only a plan can be made.
        train: a folder of captioned images with a metadata.csv or metadata.jsonl (file_name, text) to train on instead
            of ``train2014``, such as the 212,776 pairs of BK-SDM.
        metadata: a table with the prompts in a column ``text``, such as BK-SDM's metadata.csv; empty: one caption of
            each image, the images drawn by ``seed``.
        protocol: how drawn and real images are brought to the scored size.
        prompts: how many.
        size: of the images that train and that are drawn, pixels.
        scored: of the images that are compared, pixels.
        test_fraction: this share of the training images, evenly spread, is held out.
    """

    root: str = neutral("")
    # neutral, as the fingerprints have them where they matter
    train: str = neutral("")
    metadata: str = neutral("")
    protocol: Literal["bk_sdm", "clean"] = "bk_sdm"
    prompts: int = neutral(30_000, ge=1)
    seed: int = neutral(0, ge=0)
    size: int = neutral(512, ge=8)
    scored: int = Field(256, ge=4)
    test_fraction: float = neutral(0.02, gt=0, le=0.5)
