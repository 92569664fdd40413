"""The 1,797 handwritten digits that scikit-learn ships (Alpaydin & Kaynak, 1998): real data without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.data import DatasetInfo, DatasetSource, Images
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash

TEST_EVERY = 6


class Digits(DatasetSource):
    """8x8 grey images; every sixth image is test (299), the others train (1,498)."""

    def info(self) -> DatasetInfo:
        return DatasetInfo(content_hash(_file()), "scikit-learn digits", channels=1, size=8, flip=False)

    def load(self) -> Images:
        return self.labelled()[0]

    def labelled(self) -> tuple[Images, dict[str, NDArray[np.int64]]]:
        """The images, and the digit (N,) of each by split."""
        table = np.loadtxt(_file(), delimiter=",")
        pixels = np.round(table[:, :64] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        labels = table[:, 64].astype(np.int64)
        test = np.arange(len(table)) % TEST_EVERY == TEST_EVERY - 1
        return Images(pixels[~test], pixels[test]), {"train": labels[~test], "test": labels[test]}


def _file() -> Path:
    # find_spec locates the package without the second it takes to import it
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError("datasets.digits: digits.csv.gz of scikit-learn was not found; install scikit-learn>=1.4")
    return path
