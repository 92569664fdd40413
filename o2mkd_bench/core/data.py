"""What a dataset plugin gives: a fingerprint at plan time, uint8 images at run time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .options import Options


@dataclass(frozen=True)
class Captions:
    """What a dataset has for models that draw from text, beside the images that scores compare with.

    Attributes:
        pairs: content hash of the images and captions that train, or a word for what is not on this machine yet.
        prompts: likewise of what is drawn from: which captions, in which order.
        count: how many prompts there are.
        size: of the images that train, and of those that are drawn, pixels.
        finish: what is done to a drawn image before it is scored, in order (:mod:`o2mkd_bench.engine.finish`).
    """

    pairs: str
    prompts: str
    count: int
    size: int
    finish: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetInfo:
    """Known without decoding anything.

    Attributes:
        fingerprint: content hash of the source, or the publisher's checksum of what would be downloaded.
        source: in words, for the record: ``scikit-learn digits``, ``tar of class folders`` …
        channels, size: of one image, pixels.
        flip: whether training mirrors images horizontally at random.
        captions: what there is for models that draw from text; None for a dataset of images alone.
    """

    fingerprint: str
    source: str
    channels: int
    size: int
    flip: bool
    captions: Captions | None = None


@dataclass(frozen=True)
class Images:
    """Decoded data: ``train`` and ``test`` are uint8, shape (N, channels, size, size)."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """One split, decoded while it is read.

    Attributes:
        count: how many images there are.
        images: each uint8 (channels, size, size), in their order; read once at most.
    """

    count: int
    images: Iterable[NDArray[np.uint8]]


class DatasetSource(ABC):
    """A dataset plugin. Its module is torch-free; heavy imports belong inside ``load``."""

    def __init__(self, options: Options, base: Path) -> None:
        """``base``: the folder that relative paths in the options are relative to (that of the suite file)."""
        self.options = options
        self.base = base

    @abstractmethod
    def info(self) -> DatasetInfo:
        """Raises UserError naming the path and the mend when the data are not there."""

    @abstractmethod
    def load(self) -> Images:
        """Decode everything, in a fixed order that does not depend on the file system."""

    def splits(self) -> dict[str, Split]:
        """``train`` and ``test`` as the run stores them, one image after another; by default those of :meth:`load`."""
        images = self.load()
        return {name: Split(len(array), array) for name, array in (("train", images.train), ("test", images.test))}

    def ready(self) -> None:  # noqa: B027 - most sources are, once info has spoken
        """Asked by a run before any work, where ``info`` promises what is not on this machine yet; quick.

        Raises:
            UserError: when it cannot be had here, naming what is missing, where it was sought, and the mend.
        """


@dataclass(frozen=True)
class Pairs:
    """Captioned images of one split, decoded while they are read.

    Attributes:
        count: how many there are.
        pairs: each uint8 (3, size, size) and its caption, in their order; read once at most.
    """

    count: int
    pairs: Iterable[tuple[NDArray[np.uint8], str]]


class StreamedSource(DatasetSource):
    """A dataset that may be larger than memory: it gives ``splits``, and ``load`` is for those that are small."""

    @abstractmethod
    def splits(self) -> dict[str, Split]:
        """``train`` and ``test``, decoded while they are read, in an order that does not depend on the file system."""

    def load(self) -> Images:
        arrays = {name: np.stack(list(split.images)) for name, split in self.splits().items()}
        return Images(arrays["train"], arrays["test"])


class CaptionedSource(StreamedSource):
    """A dataset of images with captions: its ``splits`` are what scores compare with, its ``pairs`` train."""

    @abstractmethod
    def pairs(self) -> dict[str, Pairs]:
        """``train`` and ``test``, images of the size that ``info().captions`` declares."""

    @abstractmethod
    def prompts(self) -> list[str]:
        """What is drawn from: image i is drawn from caption i."""
