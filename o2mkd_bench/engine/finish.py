"""What is done to a drawn image before it is scored, as a protocol says it: ``resize 256 bicubic``, ``jpeg 75``."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import UserError


def finished(images: Tensor, steps: Sequence[str]) -> Tensor:
    """``images``, uint8 (B, 3, H, W), on the CPU, after ``steps`` by Pillow, one after the other; (B, 3, h, w).

    ``resize S FILTER``: squashed to S x S; ``jpeg Q``: encoded at quality Q and decoded again.

    Raises:
        UserError: for a step that is neither.
    """
    images = images.cpu()
    if not steps:
        return images
    made = []
    for image in images.numpy():
        picture = Image.fromarray(image.transpose(1, 2, 0))
        for step in steps:
            picture = _one(picture, step)
        made.append(torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()))
    return torch.stack(made)


def _one(picture: Image.Image, step: str) -> Image.Image:
    match step.split():
        case ["resize", size, resample]:
            return picture.resize((int(size), int(size)), Image.Resampling[resample.upper()])
        case ["jpeg", quality]:
            encoded = io.BytesIO()
            picture.save(encoded, "JPEG", quality=int(quality))
            return Image.open(encoded).convert("RGB")
    raise UserError(f"a drawn image cannot be finished by {step!r}; known are 'resize S FILTER' and 'jpeg Q'")
