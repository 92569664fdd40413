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
class DatasetInfo:
    """Known without decoding anything.

    Attributes:
        fingerprint: content hash of the source, or the publisher's checksum of what would be downloaded.
        source: in words, for the record: ``scikit-learn digits``, ``tar of class folders`` …
        channels, size: of one image, pixels.
        flip: whether training mirrors images horizontally at random.
    """

    fingerprint: str
    source: str
    channels: int
    size: int
    flip: bool


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


class StreamedSource(DatasetSource):
    """A dataset that may be larger than memory: it gives ``splits``, and ``load`` is for those that are small."""

    @abstractmethod
    def splits(self) -> dict[str, Split]:
        """``train`` and ``test``, decoded while they are read, in an order that does not depend on the file system."""

    def load(self) -> Images:
        arrays = {name: np.stack(list(split.images)) for name, split in self.splits().items()}
        return Images(arrays["train"], arrays["test"])
