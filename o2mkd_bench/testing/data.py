"""The contract of datasets."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from ..core.data import DatasetInfo, DatasetSource, Images
from .contract import Contract

_ELSEWHERE = """
import hashlib, json, pathlib, sys
from o2mkd_bench.core.plugins import registry
name, options, folder = json.loads(sys.argv[1])
plugin = registry().get("datasets", name)
source = plugin.load()(plugin.parse(options), pathlib.Path(folder))
images = source.load()
hashes = [hashlib.sha256(split.tobytes()).hexdigest() for split in (images.train, images.test)]
print(json.dumps([source.info().fingerprint, *hashes]))
"""


class DatasetContract(Contract):
    """Subclass with ``name`` and ``options`` of a dataset that is on this machine.

    Attributes:
        folder: what relative paths in ``options`` are relative to.
    """

    kind = "datasets"
    base = DatasetSource
    loaded_by_plan = True
    folder: ClassVar[Path] = Path.cwd()

    def planned(self) -> str:
        return f"import pathlib; target(parsed, pathlib.Path({str(self.folder)!r})).info()"

    @property
    def source(self) -> DatasetSource:
        made: DatasetSource = self.plugin.load()(self.parsed, self.folder)
        return made

    @pytest.fixture
    def images(self) -> Images:
        return self.source.load()

    def test_info_is_complete(self) -> None:
        info = self.source.info()
        assert isinstance(info, DatasetInfo)
        assert info.fingerprint
        assert info.source
        assert info.channels in (1, 3)
        assert info.size >= 4

    def test_splits_are_uint8_images_of_the_declared_shape(self, images: Images) -> None:
        info = self.source.info()
        for split in (images.train, images.test):
            assert split.dtype == np.uint8
            assert split.shape[1:] == (info.channels, info.size, info.size)
            assert len(split) > 0

    def test_levels_are_those_of_an_image(self, images: Images) -> None:
        """Black and white at 0 and 1 instead of 0 and 255 are a common slip."""
        assert int(images.train.max()) - int(images.train.min()) > 16

    def test_info_is_stable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = self.source.info()
        monkeypatch.chdir(tmp_path)
        assert self.source.info() == before

    def test_every_process_decodes_the_same(self, tmp_path: Path, images: Images) -> None:
        """In another folder and process: neither the order of a set nor that of a directory may show."""
        call = json.dumps([self.name, dict(self.options), str(self.folder)])
        done = subprocess.run(
            [sys.executable, "-c", _ELSEWHERE, call], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        hashes = [hashlib.sha256(split.tobytes()).hexdigest() for split in (images.train, images.test)]
        assert json.loads(done.stdout.splitlines()[-1]) == [self.source.info().fingerprint, *hashes]
