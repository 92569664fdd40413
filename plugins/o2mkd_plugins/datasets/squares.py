"""What datasets of square RGB images share: where they are sought, and how they become arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from o2mkd_bench.core.data import DatasetInfo, Split, StreamedSource
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash

from .archives import Archive, Folder, Hub
from .options import SquareOptions
from .pictures import Square


class Squares(StreamedSource):
    """Images below ``root``, else of a pinned dataset of the Hub; ``key`` is the dataset's in a suite."""

    options: SquareOptions
    key: ClassVar[str]

    def info(self) -> DatasetInfo:
        fingerprint, source = self._known()
        return DatasetInfo(
            fingerprint, f"{source}; decoded by Pillow, {self._square()}", 3, self.options.size, self.options.flip
        )

    def splits(self) -> dict[str, Split]:
        self.ready()
        found, square = self._archives(), self._square()
        if "test" not in found:
            return found["train"].halves(square, self.options.test_fraction)
        return {name: archive.split(square) for name, archive in found.items()}

    def ready(self) -> None:
        if self.options.root:
            return
        if not self.options.hub:
            raise UserError(f"{self.key}.root is empty and {self.key}.hub names no dataset; {self.advice()}")
        self._hub(self.options.train_split).ready()

    @abstractmethod
    def advice(self) -> str:
        """How to get the images, an imperative without a full stop."""

    def local(self, root: Path) -> tuple[str, str, dict[str, Archive]]:
        """Fingerprint, the source in words, and ``train`` with ``test`` if there is one, of the folder ``root``."""
        folder = Folder(root, self.key)
        return content_hash(root), f"folder of {len(folder)} images", {"train": folder}

    def promised(self) -> tuple[str, str]:
        """Fingerprint and source in words of what a plan is made for while neither ``root`` nor ``hub`` is given."""
        raise UserError(f"{self.key}.root is empty and {self.key}.hub names no dataset; {self.advice()}")

    def _known(self) -> tuple[str, str]:
        o = self.options
        if o.root:
            fingerprint, source, _ = self.local(self._root())
            return fingerprint, source
        if o.hub:
            splits = f"{o.train_split}+{o.test_split}" if o.test_split else o.train_split
            return f"hub:{o.hub}@{o.revision}:{splits}:{o.column}", f"Hugging Face dataset {o.hub}, {splits}"
        return self.promised()

    def _archives(self) -> Mapping[str, Archive]:
        o = self.options
        if o.root:
            return self.local(self._root())[2]
        names = {"train": o.train_split} | ({"test": o.test_split} if o.test_split else {})
        return {split: self._hub(name) for split, name in names.items()}

    def _hub(self, split: str) -> Hub:
        o = self.options
        return Hub(o.hub, o.revision, split, o.column, self.key)

    def _root(self) -> Path:
        root = self.base / Path(self.options.root).expanduser()
        if not root.is_dir():
            raise UserError(f"{self.key}.root: there is no folder {root}; {self.advice()}")
        return root

    def _square(self) -> Square:
        return Square(self.options.size, 3, self.options.resample)
