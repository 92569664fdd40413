"""Where encoded images lie in a fixed order: a folder, an lmdb, a dataset of the Hugging Face Hub. One at a time."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.data import Split
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash, files_below

from .pictures import SUFFIXES, Square

Mask = NDArray[np.bool_]

# Seconds to wait for the Hub to say that it has a dataset.
PATIENCE = 1.5


class Archive(ABC):
    """Encoded images, numbered. ``key``: the dataset's in a suite, for errors."""

    key: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def chosen(self, mask: Mask) -> Iterator[tuple[bytes | Path, str]]:
        """Those that ``mask`` (N,) picks, in order, each with where it comes from."""

    def split(self, square: Square, mask: Mask | None = None) -> Split:
        """Those that ``mask`` picks, or all, decoded while they are read."""
        picked = np.ones(len(self), dtype=bool) if mask is None else mask
        return Split(int(picked.sum()), (square.array(data, where) for data, where in self.chosen(picked)))

    def halves(self, square: Square, test_fraction: float) -> dict[str, Split]:
        """``train`` and ``test``, the latter ``test_fraction`` of the images, evenly spread.

        Raises:
            UserError: when that is not one image.
        """
        test = held_out(len(self), test_fraction, self.key)
        return {"train": self.split(square, ~test), "test": self.split(square, test)}


def held_out(count: int, test_fraction: float, key: str) -> Mask:
    """Which of ``count`` images are held out, evenly spread; ``key``: the dataset's in a suite.

    Raises:
        UserError: when that is not one image.
    """
    steps = [math.floor(i * test_fraction) for i in range(count + 1)]
    test: Mask = np.diff(steps).astype(bool)
    if not test.any():
        raise UserError(f"{key}.test_fraction: {test_fraction} of {count} images is not one image; raise it")
    return test


@dataclass(frozen=True)
class Folder(Archive):
    """All images below ``root``, sorted by relative path."""

    root: Path
    key: str

    def is_empty(self) -> bool:
        return not self._found()

    def files(self) -> list[Path]:
        """Raises UserError when there are not two, or a folder cannot be read."""
        found = self._found()
        if len(found) < 2:
            raise UserError(
                f"{self.key}.root: {self.root} holds {len(found)} images ({', '.join(sorted(SUFFIXES))}); "
                "at least 2 are needed"
            )
        return found

    def _found(self) -> list[Path]:
        try:
            return [path for _, path in files_below(self.root) if path.suffix.lower() in SUFFIXES]
        except UserError as error:
            raise UserError(f"{self.key}.root: {error}") from error

    def __len__(self) -> int:
        return len(self.files())

    def chosen(self, mask: Mask) -> Iterator[tuple[bytes | Path, str]]:
        for path, wanted in zip(self.files(), mask, strict=True):
            if wanted:
                yield path, str(path)


@dataclass(frozen=True)
class Lmdb(Archive):
    """The values of an lmdb, sorted by key; only the database is read, no list of keys beside it."""

    path: Path
    key: str

    @staticmethod
    def at(path: Path) -> bool:
        """Whether ``path`` is the folder of an lmdb."""
        return (path / "data.mdb").is_file()

    def fingerprint(self) -> str:
        """The content hash of the database; its lock file is no part of it."""
        return content_hash(self.path / "data.mdb")

    def __len__(self) -> int:
        with self._open() as env, self._sound():
            return int(env.stat()["entries"])

    def chosen(self, mask: Mask) -> Iterator[tuple[bytes | Path, str]]:
        with self._open() as env, self._sound(), env.begin() as transaction:
            for (name, value), wanted in zip(transaction.cursor(), mask, strict=True):
                if wanted:
                    yield value, f"{self.path}:{name.decode(errors='replace')}"

    def _open(self) -> Any:
        lmdb = package("lmdb", "lsun", f"{self.key}.root: {self.path} is an lmdb")
        with self._sound():
            # no lock and no file is made, so that it may lie on a read-only disk
            return lmdb.open(str(self.path), readonly=True, lock=False, create=False, readahead=False)

    @contextmanager
    def _sound(self) -> Iterator[None]:
        lmdb = package("lmdb", "lsun", f"{self.key}.root: {self.path} is an lmdb")
        try:
            yield
        except lmdb.Error as error:
            raise UserError(
                f"{self.key}.root: {self.path} cannot be read as an lmdb ({error}); unpack it again"
            ) from error


@dataclass(frozen=True)
class Hub(Archive):
    """One split of a dataset of the Hugging Face Hub, in its order; ``datasets`` keeps what it downloads."""

    repo: str
    revision: str
    name: str
    column: str
    key: str

    def ready(self) -> None:
        """Raises UserError when the package is missing, or neither this machine nor the Hub has the dataset."""
        if importlib.util.find_spec("datasets") is None:
            package("datasets", "hub", self._asked())
        if self._is_cached():
            return
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(self.repo, revision=self.revision, timeout=PATIENCE)
        except Exception as error:  # the client lets through errors of its transport
            raise self._absent(error) from error

    def __len__(self) -> int:
        return len(self._rows())

    def chosen(self, mask: Mask) -> Iterator[tuple[bytes | Path, str]]:
        for number, (row, wanted) in enumerate(zip(self._rows(), mask, strict=True)):
            if wanted:
                image = row[self.column]
                data = image["bytes"] if image["bytes"] is not None else Path(image["path"])
                yield data, f"{self.repo} {self.name} {number}"

    def _rows(self) -> Any:
        datasets = package("datasets", "hub", self._asked())
        try:
            rows = datasets.load_dataset(self.repo, revision=self.revision, split=self.name)
        except Exception as error:  # as above, and errors of its own for each format
            raise self._absent(error) from error
        if self.column not in rows.column_names:
            raise UserError(
                f"{self.key}.column: {self.repo} has no column {self.column!r}; name one of "
                f"{', '.join(rows.column_names)}"
            )
        # encoded, so that one decoder serves all archives; the other columns are not read
        return rows.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))

    def _asked(self) -> str:
        return f"{self.key}.hub: {self.repo} is a dataset of the Hugging Face Hub"

    def _is_cached(self) -> bool:
        from huggingface_hub import constants

        # where the package keeps what it has prepared, without the second that it takes to import it
        cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
        return any((cache / self.repo.replace("/", "___")).glob(f"*/*/{self.revision}"))

    def _absent(self, error: Exception) -> UserError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(
            f"{self._asked()} that is not in the local cache and could not be fetched at {self.revision} ({reason}); "
            f"set {self.key}.root to a copy on this machine, or load it on one with a network and bring its cache "
            "here (HF_HOME)"
        )


def package(name: str, extra: str, why: str) -> Any:
    """The optional package ``name``.

    Raises:
        UserError: when it is not installed, beginning with ``why`` it is needed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{why}, which needs the package {name}; install it with pip install 'o2mkd-bench[{extra}]'"
        ) from error
