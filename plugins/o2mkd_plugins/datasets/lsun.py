"""LSUN (Yu et al., arXiv 1506.03365): one category, from the official lmdb, a folder of images, or the Hub."""

from __future__ import annotations

from pathlib import Path

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.identity import identity

from .archives import Archive, Folder, Lmdb
from .options import LsunOptions
from .squares import Squares

URL = "http://dl.yf.io/lsun/scenes"
# SHA-256 of <category>_train_lmdb.zip as TensorFlow Datasets checks it
ARCHIVES = {
    "bedroom": "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e",
    "church_outdoor": "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
}


class Lsun(Squares):
    """The images of a category, sorted by key or by file name.

    A plan is made for the published archive while no images are named, so that it needs none; a run is refused.
    """

    options: LsunOptions
    key = "datasets.lsun"

    def advice(self) -> str:
        archive = f"{self.options.category}_train_lmdb"
        return f"fetch {URL}/{archive}.zip, unpack it, and set root to the folder that then holds {archive}"

    def local(self, root: Path) -> tuple[str, str, dict[str, Archive]]:
        category = self.options.category
        exported = {"train": root / f"{category}_train_lmdb", "test": root / f"{category}_val_lmdb"}
        found = {split: Lmdb(path, self.key) for split, path in exported.items() if Lmdb.at(path)}
        if Lmdb.at(root):
            found = {"train": Lmdb(root, self.key)}
        elif not found and Folder(root, self.key).is_empty():
            raise UserError(f"{self.key}.root: {root} holds neither {category}_train_lmdb nor images; {self.advice()}")
        elif not found:
            return super().local(root)
        elif "train" not in found:
            raise UserError(f"{self.key}.root: {root} holds {category}_val_lmdb alone; {self.advice()}")
        hashes = {split: archive.fingerprint() for split, archive in found.items()}
        counts = " and ".join(f"{len(archive)} {split}" for split, archive in found.items())
        fingerprint = hashes["train"] if len(hashes) == 1 else identity(hashes)
        return fingerprint, f"LSUN lmdb of {counts} images", dict(found)

    def promised(self) -> tuple[str, str]:
        category = self.options.category
        if category not in ARCHIVES:
            return super().promised()
        return f"sha256:{ARCHIVES[category]}", f"published {category}_train_lmdb.zip of LSUN, not on this machine"
