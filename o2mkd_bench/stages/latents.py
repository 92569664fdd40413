"""What a latent model needs beside its network: the codec, and what it makes of images and captions, once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.data import CaptionedSource
from ..core.errors import StageFailed, StoreError
from ..core.fingerprint import file_sha256
from ..core.models import Codec
from ..core.plan import Stage
from ..core.store import Draft
from .bench import Bench, Stopwatch

# Images, and captions, that pass the codec at once.
CHUNK = 8
# Chunks between two notes of progress.
_NOTED = 50

T = TypeVar("T")


def make_codec(stage: Stage, bench: Bench, draft: Draft) -> None:
    """The files of a pipeline's autoencoder, text encoder and tokenizer, as they are.

    Raises:
        StageFailed: when one has changed since the plan.
    """
    for name, sha256 in stage.spec["files"].items():
        target = draft.dir / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(stage.local["path"]) / name, target)
        if file_sha256(target) != sha256:
            raise StageFailed(f"{name} of {stage.label} changed while the run was going on; start it again")
    (draft.dir / "family.json").write_text(json.dumps(stage.spec["family"]) + "\n", encoding="utf-8")


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``train.npy`` and ``test.npy``: latents float16 (N, C, h, w), and ``train.text.npy``, ``test.text.npy``.

    The latter are the conditions of the captions, float16 (N, L, D).

    Raises:
        StageFailed: when the source has changed since the plan. StoreError: when the disk has no room.
    """
    clock, source = Stopwatch(), _source(stage, bench)
    captions = source.info().captions
    if captions is None or captions.pairs != stage.spec["fingerprint"]:
        raise StageFailed(f"the data of {stage.label} changed while the run was going on; start it again")
    with torch.no_grad():
        codec, splits = open_codec(bench, stage), source.pairs()
        total = sum(split.count for split in splits.values())
        done = 0
        for name in ("train", "test"):
            with _Arrays(draft.dir, name, splits[name].count, stage.label) as arrays:
                for images, texts in _chunks(splits[name].pairs):
                    arrays.add(codec.encode(torch.from_numpy(np.stack(images)).to(bench.device)), codec.embed(texts))
                    done += len(images)
                    if done // CHUNK % _NOTED == 0:
                        bench.progress(stage, done, total)
    draft.meta |= {"seconds": clock.seconds(), **{name: split.count for name, split in splits.items()}}


def make_prompts(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``text.npy``: conditions float16 (N, L, D) of ``captions.json``; ``null.npy`` (1, L, D): that of no text.

    Raises:
        StageFailed: when the captions have changed since the plan.
    """
    clock, source = Stopwatch(), _source(stage, bench)
    captions = source.info().captions
    if captions is None or captions.prompts != stage.spec["fingerprint"]:
        raise StageFailed(f"the captions of {stage.label} changed while the run was going on; start it again")
    texts = source.prompts()
    (draft.dir / "captions.json").write_text(json.dumps(texts, indent=0) + "\n", encoding="utf-8")
    with torch.no_grad():
        codec = open_codec(bench, stage)
        np.save(draft.dir / "null.npy", _half(codec.embed([""])), allow_pickle=False)
        with _Arrays(draft.dir, "text", len(texts), stage.label) as arrays:
            for number, some in enumerate(_batches(texts)):
                arrays.add(codec.embed(some))
                if number % _NOTED == 0:
                    bench.progress(stage, number * CHUNK + len(some), len(texts))
    draft.meta |= {"seconds": clock.seconds(), "prompts": len(texts)}


def open_codec(bench: Bench, stage: Stage) -> Codec:
    """The codec that a stage needs, on the device, in float32, without gradients."""
    (artifact,) = stage.needs["codec"]
    files = [bench.store.read(artifact, name) for name in bench.store.manifest(artifact).files]
    folder = next(file.parent for file in files if file.name == "family.json")
    about = {"family": bench.store.read_json(artifact, "family.json")}
    return bench.family(about).codec(folder, lambda part: bench.place(part.eval().requires_grad_(False)))


def _source(stage: Stage, bench: Bench) -> CaptionedSource:
    plugin = bench.registry.get("datasets", stage.spec["name"])
    made = plugin.load()(plugin.parse(stage.local["options"]), Path(stage.local["base"]))
    if not isinstance(made, CaptionedSource):
        raise StageFailed(f"dataset {plugin.key} declares captions and is no CaptionedSource; correct the plugin")
    return made


def _batches(values: Iterable[T]) -> Iterator[list[T]]:
    waiting = iter(values)
    while some := list(islice(waiting, CHUNK)):
        yield some


def _chunks(pairs: Iterable[tuple[NDArray[np.uint8], str]]) -> Iterator[tuple[list[NDArray[np.uint8]], list[str]]]:
    for some in _batches(pairs):
        yield [image for image, _ in some], [text for _, text in some]


def _half(values: Tensor) -> NDArray[np.float16]:
    found: NDArray[np.float16] = values.to("cpu", torch.float16).numpy()
    if not np.isfinite(found).all():
        raise StageFailed("latents or conditions do not fit into float16; the codec is none that was trained")
    return found


class _Arrays:
    """Latents and conditions of one split on their way into files, written in order, as they may exceed memory."""

    def __init__(self, folder: Path, name: str, count: int, label: str) -> None:
        self._folder, self._name, self._count, self._label = folder, name, count, label
        self._files: list[IO[bytes]] = []
        self._found = 0

    def __enter__(self) -> _Arrays:
        return self

    def add(self, *values: Tensor) -> None:
        arrays = [_half(value) for value in values]
        if not self._files:
            self._begin(arrays)
        for file, array in zip(self._files, arrays, strict=True):
            file.write(np.ascontiguousarray(array).data)
        self._found += len(arrays[0])

    def _begin(self, arrays: Sequence[NDArray[np.float16]]) -> None:
        shapes = [(self._count, *array.shape[1:]) for array in arrays]
        needed, free = sum(2 * math.prod(shape) for shape in shapes), shutil.disk_usage(self._folder).free
        if needed > free:
            raise StoreError(
                f"{self._label}: {self._count} samples take {needed / 1e9:.1f} GB and the store's disk has "
                f"{free / 1e9:.1f} GB left; free space there or choose another store with --store DIR"
            )
        for suffix, shape in zip((".npy", ".text.npy"), shapes, strict=False):
            file = (self._folder / f"{self._name}{suffix}").open("wb")
            self._files.append(file)
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for file in self._files:
            file.close()
        if kind is None and (self._found != self._count or not self._files):
            text = f"{self._label}: {self._name} has {self._found} samples, declared are {self._count}"
            raise StageFailed(text)
