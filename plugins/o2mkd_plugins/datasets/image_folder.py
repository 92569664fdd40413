"""Any folder of images, brought to one size."""

from __future__ import annotations

from pathlib import Path

from o2mkd_bench.core.data import DatasetInfo, Split, StreamedSource
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash

from .archives import Folder
from .options import ImageFolderOptions
from .pictures import Square

KEY = "datasets.image_folder"


class ImageFolder(StreamedSource):
    """All images below ``root``, sorted by relative path, shorter side resized and centre cropped."""

    options: ImageFolderOptions

    def info(self) -> DatasetInfo:
        folder, square = self._folder(), self._square()
        source = f"folder of {len(folder)} images, {square}"
        return DatasetInfo(content_hash(folder.root), source, square.channels, square.size, self.options.flip)

    def splits(self) -> dict[str, Split]:
        return self._folder().halves(self._square(), self.options.test_fraction)

    def _square(self) -> Square:
        return Square(self.options.size, self.options.channels, self.options.resample)

    def _folder(self) -> Folder:
        root = self.base / Path(self.options.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{KEY}.root: {root} is not a folder; set it to the folder that holds the images")
        return Folder(root, KEY)
