"""Any folder of images, brought to one size."""

from __future__ import annotations

import hashlib
from pathlib import Path

from o2mkd_bench.core.data import DatasetInfo, Split, StreamedSource
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash

from .archives import Folder
from .options import ImageFolderOptions
from .pictures import Square

KEY = "datasets.image_folder"


HELD_OUT = ("test", "val", "validation")


class ImageFolder(StreamedSource):
    """All images below ``root``, sorted by relative path, shorter side resized and centre cropped.

    ``train`` beside one of :data:`HELD_OUT` are two splits, as for ``imagefolder`` of Hugging Face datasets.
    """

    options: ImageFolderOptions

    def info(self) -> DatasetInfo:
        square, found = self._square(), self._folders()
        several = len(found) > 1
        source = " and ".join(f"{len(one)} images{f' in {one.root.name}' if several else ''}" for one in found)
        fingerprint = " ".join(content_hash(folder.root) for folder in found)
        if several:
            fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
        return DatasetInfo(
            fingerprint, f"folder of {source}, {square}", square.channels, square.size, self.options.flip
        )

    def splits(self) -> dict[str, Split]:
        square, found = self._square(), self._folders()
        if len(found) == 1:
            return found[0].halves(square, self.options.test_fraction)
        return {name: folder.split(square) for name, folder in zip(("train", "test"), found, strict=True)}

    def _square(self) -> Square:
        return Square(self.options.size, self.options.channels, self.options.resample)

    def _folders(self) -> list[Folder]:
        """Of all images, or of those to train on and those held out."""
        root = self.base / Path(self.options.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{KEY}.root: {root} is not a folder; set it to the folder that holds the images")
        train, held_out = root / "train", [root / name for name in HELD_OUT if (root / name).is_dir()]
        found = [train, held_out[0]] if train.is_dir() and held_out else [root]
        return [Folder(path, KEY) for path in found]
