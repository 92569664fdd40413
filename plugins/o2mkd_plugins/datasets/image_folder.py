"""Any folder of images, brought to one size."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from o2mkd_bench.core.data import DatasetInfo, DatasetSource, Images
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash

from .options import ImageFolderOptions
from .pictures import SUFFIXES, decode, planes, shrink

KEY = "datasets.image_folder.root"


class ImageFolder(DatasetSource):
    """All images below ``root``, sorted by relative path, shorter side resized and centre cropped."""

    options: ImageFolderOptions

    def info(self) -> DatasetInfo:
        o = self.options
        source = f"folder of {len(self._files())} images, shorter side to {o.size} by {o.resample}, centre crop"
        return DatasetInfo(content_hash(self._root()), source, o.channels, o.size, o.flip)

    def load(self) -> Images:
        o = self.options
        files = self._files()
        pixels = np.empty((len(files), o.channels, o.size, o.size), np.uint8)
        for i, path in enumerate(files):
            pixels[i] = planes(shrink(decode(path, o.channels, str(path)), o.size, o.resample))
        test = [math.floor((i + 1) * o.test_fraction) > math.floor(i * o.test_fraction) for i in range(len(files))]
        chosen = np.array(test, dtype=bool)
        if not chosen.any():
            share = f"{o.test_fraction} of {len(files)} images"
            raise UserError(f"datasets.image_folder.test_fraction: {share} is not one image; raise it")
        return Images(pixels[~chosen], pixels[chosen])

    def _root(self) -> Path:
        root = self.base / Path(self.options.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{KEY}: {root} is not a folder; set it to the folder that holds the images")
        return root

    def _files(self) -> list[Path]:
        root = self._root()
        found = [p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        if len(found) < 2:
            raise UserError(
                f"{KEY}: {root} holds {len(found)} images ({', '.join(sorted(SUFFIXES))}); at least 2 are needed"
            )
        return sorted(found, key=lambda p: p.relative_to(root).as_posix())
