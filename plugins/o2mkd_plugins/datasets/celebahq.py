"""CelebA-HQ (Karras et al., arXiv 1710.10196): 30,000 faces, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

from .options import CelebAHQOptions
from .squares import Squares


class CelebAHQ(Squares):
    """A folder of the images in any size, or a pinned dataset of the Hub."""

    options: CelebAHQOptions
    key = "datasets.celebahq"

    def advice(self) -> str:
        return "set it to a folder with the 30,000 images, or leave it empty and name a dataset of the Hub in hub"
