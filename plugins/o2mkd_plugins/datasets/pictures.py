"""Decode image files to uint8 arrays."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# of one picture, before it is brought to its size: a small file can unpack to as much as memory holds
MOST_PIXELS = 64_000_000
_DEEP = ("I", "F")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def decode(data: bytes | Path, channels: int, where: str) -> Image.Image:
    """The image as RGB (``channels`` 3) or grey (1).

    Raises:
        UserError: naming ``where``, when the file is no whole image, or one of more than 8 bits a channel.
    """
    from PIL import Image

    source: BinaryIO | Path = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with Image.open(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, and at most {MOST_PIXELS} are read")
            if image.mode.startswith(_DEEP):
                # Pillow would cut their values off at 255
                raise UserError(
                    f"{where} has more than 8 bits a channel (mode {image.mode} of Pillow); convert it to 8 bits"
                )
            return image.convert("RGB" if channels == 3 else "L")
    except UserError:
        raise
    except Exception as error:  # a decoder raises whatever a broken file leads it to
        raise UserError(f"{where} is not a readable image ({error}); remove or replace it") from error


def shrink(image: Image.Image, size: int, resample: str) -> Image.Image:
    """The shorter side resized to ``size`` where it differs, then the central square cut out."""
    from PIL import Image

    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling[resample.upper()])
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def planes(image: Image.Image) -> NDArray[np.uint8]:
    """(C, H, W) from an RGB or grey image."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class Square:
    """How an encoded image becomes an array.

    Attributes:
        size: the shorter side is resized to this where it differs, and the central square cut out, pixels.
        channels: 3 for RGB, 1 for grey.
        resample: a filter of Pillow, which antialiases.
    """

    size: int
    channels: int
    resample: str

    def __str__(self) -> str:
        return f"shorter side to {self.size} by {self.resample}, centre crop"

    def array(self, data: bytes | Path, where: str) -> NDArray[np.uint8]:
        """uint8 (channels, size, size).

        Raises:
            UserError: naming ``where``, when the file is no whole image.
        """
        return planes(shrink(decode(data, self.channels, where), self.size, self.resample))
