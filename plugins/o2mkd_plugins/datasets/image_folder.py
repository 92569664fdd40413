"""Any folder of images, brought to one size."""

from __future__ import annotations

from pathlib import Path

from o2mkd_bench.core.data import DatasetInfo, Split, StreamedSource
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash
from o2mkd_bench.core.identity import identity

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
        where = {split: f" in {folder.root.name}" if len(found) > 1 else "" for split, folder in found.items()}
        # before the hashes: it names the key where a folder cannot be read
        counts = " and ".join(f"{len(folder)} images{where[split]}" for split, folder in found.items())
        hashes = {split: content_hash(folder.root) for split, folder in found.items()}
        fingerprint = hashes["train"] if len(hashes) == 1 else identity(hashes)
        return DatasetInfo(
            fingerprint, f"folder of {counts}, {square}", square.channels, square.size, self.options.flip
        )

    def splits(self) -> dict[str, Split]:
        square, found = self._square(), self._folders()
        if "test" not in found:
            return found["train"].halves(square, self.options.test_fraction)
        return {split: folder.split(square) for split, folder in found.items()}

    def _square(self) -> Square:
        return Square(self.options.size, self.options.channels, self.options.resample)

    def _folders(self) -> dict[str, Folder]:
        """``train``, with ``test`` if that is a folder of its own."""
        root = self.base / Path(self.options.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{KEY}.root: {root} is not a folder; set it to the folder that holds the images")
        train = root / "train"
        held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
        if held_out is None or not train.is_dir():
            return {"train": Folder(root, KEY)}
        return {"train": Folder(train, KEY), "test": Folder(held_out, KEY)}
