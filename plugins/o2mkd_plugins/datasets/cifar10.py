"""CIFAR-10 from the original batches, from class folders, or from a tar of class folders."""

from __future__ import annotations

import hashlib
import lzma
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.data import DatasetInfo, DatasetSource, Images
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import cache_folder, content_hash

from .options import Cifar10Options
from .pictures import decode, planes

KEY = "datasets.cifar10.root"
SPLITS = ("train", "test")
# published at https://www.cs.toronto.edu/~kriz/cifar.html and, per batch, in torchvision
# of one image in a tar, bytes
LARGEST = 1 << 20
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_MEMBER = re.compile(r"(?:^|/)(train|test)/([^/]+)/([^/]+\.(?:png|jpe?g))$", re.IGNORECASE)

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class _Record:
    """One image: ``data`` is a file, its bytes, or pixels (3, 32, 32); decoded only when it is chosen."""

    split: str
    label: str
    name: str
    data: Path | bytes | NDArray[np.uint8]
    where: str

    def pixels(self) -> NDArray[np.uint8]:
        if isinstance(self.data, np.ndarray):
            return self.data
        image = decode(self.data, 3, self.where)
        if image.size != (32, 32):
            raise UserError(
                f"{KEY}: {self.where} is {image.width}x{image.height} and CIFAR-10 is 32x32; "
                "use the dataset image_folder for other sizes"
            )
        return planes(image)


class Cifar10(DatasetSource):
    """60,000 RGB images of 32x32, ordered by (class, file name) whatever they are read from."""

    options: Cifar10Options

    def info(self) -> DatasetInfo:
        root = self._root()
        if root is None or _batches(root) is not None:
            fingerprint, source = f"md5:{ARCHIVE_MD5}", "original CIFAR-10 batches"
        else:
            fingerprint = content_hash(root)
            source = "class folders of images" if root.is_dir() else "tar of class folders of images"
        return DatasetInfo(fingerprint, source, channels=3, size=32, flip=self.options.flip)

    def load(self) -> Images:
        return self.labelled()[0]

    def labelled(self) -> tuple[Images, dict[str, Labels]]:
        """The images, and the class (N,) of each by split, counted in alphabetical order of class names."""
        root = self._root() or self._download()
        batches = _batches(root)
        if batches is not None:
            records = _from_batches(batches)
        else:
            records = _from_folders(root) if root.is_dir() else _from_tar(root)
        found: dict[str, list[_Record]] = {split: [] for split in SPLITS}
        for record in records:
            found[record.split].append(record)
        images, labels = {}, {}
        for split in SPLITS:
            if not found[split]:
                raise UserError(f"{KEY}: {root} holds no {split}/<class>/*.png or *.jpg; it needs both train and test")
            images[split], labels[split] = self._ordered(split, found[split])
        return Images(images["train"], images["test"]), labels

    def _ordered(self, split: str, records: list[_Record]) -> tuple[NDArray[np.uint8], Labels]:
        records.sort(key=lambda record: (record.label, record.name))
        classes = sorted({record.label for record in records})
        labels = np.array([classes.index(record.label) for record in records], np.int64)
        chosen = np.arange(len(records))
        if self.options.limit is not None:
            # by rank within the class first, so that any prefix has the classes in equal number
            ranks = chosen - np.searchsorted(labels, labels)
            chosen = np.lexsort((labels, ranks))[: self.options.limit if split == "train" else self.options.limit // 5]
        return np.stack([records[i].pixels() for i in chosen]), labels[chosen]

    def _root(self) -> Path | None:
        """None when the images are to be downloaded."""
        if not self.options.root:
            return None
        root = self.base / Path(self.options.root).expanduser()
        if not root.exists():
            raise UserError(f"{KEY}: {root} does not exist; correct it, or leave it empty to download CIFAR-10")
        if root.is_file() and not tarfile.is_tarfile(root):
            raise UserError(f"{KEY}: {root} is no tar file; give a tar, class folders or the original batches")
        if root.is_dir() and _batches(root) is None and not all((root / split).is_dir() for split in SPLITS):
            raise UserError(f"{KEY}: {root} holds neither {FOLDER} nor the folders train and test; correct it")
        return root

    def _download(self) -> Path:
        from torchvision.datasets.utils import download_and_extract_archive

        cache = self.base / Path(self.options.cache).expanduser() if self.options.cache else cache_folder() / "cifar10"
        if _batches(cache) is None:
            try:
                download_and_extract_archive(URL, str(cache), md5=ARCHIVE_MD5)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{KEY} is empty and {URL} could not be downloaded to {cache} ({error}); "
                    "set it to a copy of CIFAR-10 on this machine"
                ) from error
        return cache


def _batches(root: Path) -> Path | None:
    """The folder of the original batches that ``root`` is or holds."""
    for folder in (root, root / FOLDER):
        if (folder / "data_batch_1").is_file():
            return folder
    return None


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # where this numpy keeps it
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _from_batches(folder: Path) -> Iterator[_Record]:
    for name, md5 in BATCH_MD5.items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise UserError(
                f"{KEY}: {path} is not the published batch (md5 {md5}) and is not read, because it is a pickle; "
                "download CIFAR-10 anew"
            )
        batch = _ArraysOnly(BytesIO(data), encoding="bytes").load()
        split = "test" if name == "test_batch" else "train"
        pixels = batch[b"data"].reshape(-1, 3, 32, 32)
        for image, label, file in zip(pixels, batch[b"labels"], batch[b"filenames"], strict=True):
            # the class numbers of the original are in alphabetical order of the names
            yield _Record(split, str(label), file.decode(), image, str(path))


def _from_folders(root: Path) -> Iterator[_Record]:
    for path in root.rglob("*"):
        match = _MEMBER.search(path.relative_to(root).as_posix())
        if match and path.is_file():
            yield _Record(match[1].lower(), match[2], match[3], path, str(path))


def _from_tar(root: Path) -> Iterator[_Record]:
    """Nothing is unpacked to the disk, whatever the names and links in it say."""
    try:
        with tarfile.open(root, "r|*") as archive:  # a stream: a compressed tar cannot seek cheaply
            for member in archive:
                match = _MEMBER.search(member.name)
                if not match or not member.isfile():
                    continue
                if member.size > LARGEST:
                    raise UserError(f"{KEY}: {root}:{member.name} has {member.size} bytes, too many for 32x32 pixels")
                file = archive.extractfile(member)
                if file is not None:
                    yield _Record(match[1].lower(), match[2], match[3], file.read(), f"{root}:{member.name}")
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{KEY}: {root} cannot be read as a tar ({error}); copy it again") from error
