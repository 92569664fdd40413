"""Decode a dataset once; everybody after reads arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.errors import StageFailed
from ..core.plan import Stage
from ..core.store import Draft
from .bench import Bench


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``train.npy`` and ``test.npy``: uint8, (N, C, H, W)."""
    plugin = bench.registry.get("datasets", stage.spec["name"])
    source = plugin.load()(plugin.parse(stage.local["options"]), Path(stage.local["base"]))
    if source.info().fingerprint != stage.spec["fingerprint"]:
        raise StageFailed(f"the data of {stage.label} changed while the run was going on; start it again")
    images = source.load()
    shape = (stage.spec["channels"], stage.spec["size"], stage.spec["size"])
    for name, array in (("train", images.train), ("test", images.test)):
        if array.dtype != np.uint8 or array.shape[1:] != shape:
            raise StageFailed(f"{stage.label}: {name} is {array.dtype} {array.shape}, declared are uint8 (N, {shape})")
        np.save(draft.dir / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    draft.meta |= {"source": stage.local["source"], "train": len(images.train), "test": len(images.test)}
