"""Decode a dataset once; everybody after reads arrays."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..core.data import Split
from ..core.errors import StageFailed, StoreError
from ..core.plan import Stage
from ..core.store import Draft
from .bench import Bench

# Images between two notes of progress.
_NOTED = 2000


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``train.npy`` and ``test.npy``: uint8, (N, C, H, W); one image at a time, so that memory holds no more of them.

    Raises:
        StageFailed: when the source has changed since the plan, or gives other images than it declares.
        StoreError: when the disk has no room for them.
    """
    plugin = bench.registry.get("datasets", stage.spec["name"])
    source = plugin.load()(plugin.parse(stage.local["options"]), Path(stage.local["base"]))
    if source.info().fingerprint != stage.spec["fingerprint"]:
        raise StageFailed(f"the data of {stage.label} changed while the run was going on; start it again")
    splits = source.splits()
    counts = {name: splits[name].count for name in ("train", "test")}
    total = sum(counts.values())
    _check_room(stage, draft.dir, total)
    done = 0
    for name in counts:
        with (draft.dir / f"{name}.npy").open("wb") as file:
            # written in order and not mapped: a mapped file on a full disk kills the process
            shape = (counts[name], *_shape(stage))
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in _checked(stage, name, splits[name]):
                file.write(np.ascontiguousarray(image).data)
                done += 1
                if done % _NOTED == 0:
                    bench.progress(stage, done, total)
    draft.meta |= {"source": stage.local["source"], **counts}


def _shape(stage: Stage) -> tuple[int, int, int]:
    return stage.spec["channels"], stage.spec["size"], stage.spec["size"]


def _checked(stage: Stage, name: str, split: Split) -> Iterator[np.ndarray]:
    """The images of ``split``, each and their number as declared."""
    found = 0
    for image in split.images:
        if image.dtype != np.uint8 or image.shape != _shape(stage):
            declared = f"declared are uint8 {_shape(stage)}"
            raise StageFailed(f"{stage.label}: image {found} of {name} is {image.dtype} {image.shape}, {declared}")
        found += 1
        yield image
    if found != split.count:
        raise StageFailed(f"{stage.label}: {name} has {found} images, declared are {split.count}")


def _check_room(stage: Stage, folder: Path, images: int) -> None:
    needed, free = images * math.prod(_shape(stage)), shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{stage.label}: {images} images take {needed / 1e9:.1f} GB as arrays and the store's disk has "
            f"{free / 1e9:.1f} GB left; free space there or choose another store with --store DIR"
        )
