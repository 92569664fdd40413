"""Where a training set lives while networks train on it: on the device, or in a file that is read ahead.

Images, and just so latents and the conditions that belong to them: an array whose first axis is the number.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .stream import Stream, StreamBatch

# Of the device's free memory: a training set never takes more than this from networks and activations.
SHARE = 0.25
_WORKERS = 4
_AHEAD = 4
_STEPS = 1 << 31


class Images(ABC):
    """A training set, uint8 (N, C, H, W).

    Attributes:
        shape: (N, C, H, W).
        device: where batches are given.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape = torch.Size(shape)
        self.device = device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def take(self, stream: Stream, batch: StreamBatch, rows: Tensor | None = None) -> Tensor:
        """The images of ``batch``, a batch of ``stream``, or of ``rows`` (int64, on its device) of it.

        uint8 (B, C, H, W) on the device, as they are in the set: mirrored by nobody yet.
        """


class Resident(Images):
    """All of it in one tensor on the device, which on the CPU may be a mapped file."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(tuple(data.shape), data.device)
        self._data = data

    def take(self, stream: Stream, batch: StreamBatch, rows: Tensor | None = None) -> Tensor:
        return self._data[batch.index if rows is None else batch.index[rows]]


class Streamed(Images):
    """Read from a ``.npy`` file in the order of the stream, some batches ahead, by ``workers`` processes.

    A step may be asked for several times in a row. One that is neither this step nor the next, or another stream,
    begins the reading anew.
    """

    def __init__(self, path: Path, device: torch.device, workers: int | None = None) -> None:
        super().__init__(_mapped(path).shape, device)
        self._path = path
        self._workers = min(_WORKERS, os.cpu_count() or 1) if workers is None else workers
        self._stream: Stream | None = None
        self._step = -1
        self._ahead: Iterator[Tensor] = iter(())
        self._whole = torch.empty(0, dtype=torch.uint8)

    def take(self, stream: Stream, batch: StreamBatch, rows: Tensor | None = None) -> Tensor:
        if stream != self._stream or batch.step not in (self._step, self._step + 1):
            self._ahead = self._read_from(stream, batch.step)
            self._stream, self._step = stream, batch.step - 1
        if batch.step != self._step:
            self._whole = next(self._ahead).to(self.device, non_blocking=True)
            self._step = batch.step
        return self._whole if rows is None else self._whole[rows]

    def _read_from(self, stream: Stream, step: int) -> Iterator[Tensor]:
        loader = DataLoader(
            # a copy, for a stream that has been used holds tensors of the device, which no process may inherit
            _Batches(self._path, replace(stream)),
            batch_size=None,
            sampler=range(step, _STEPS),
            num_workers=self._workers,
            prefetch_factor=_AHEAD if self._workers else None,
            pin_memory=self.device.type == "cuda",
            # else it would draw a seed from torch's global generator, which is dropout's
            generator=torch.Generator(),
        )
        return iter(loader)


class _Batches(Dataset[Tensor]):
    """Step to the images of that step, uint8 (B, C, H, W)."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self._path = path
        self._stream = stream

    @cached_property
    def _file(self) -> np.ndarray:
        # opened by the process that reads
        return _mapped(self._path)

    def __getitem__(self, step: int) -> Tensor:
        return torch.from_numpy(self._file[self._stream.batch_at(step).index.numpy()])


def open_images(path: Path, device: torch.device | str, room: int | None = None) -> Images:
    """The training set in the ``.npy`` file ``path``, uint8 (N, C, H, W), for training on ``device``.

    It is copied to a device that has ``room`` bytes for it (default: a quarter of what is free there now), and read
    ahead for one that has not. On the CPU the file is mapped.
    """
    device = torch.device(device)
    array = _mapped(path)
    if device.type == "cpu":
        return Resident(torch.from_numpy(array))
    room = int(SHARE * torch.cuda.mem_get_info(device)[0]) if room is None else room
    return Resident(torch.from_numpy(array).to(device)) if array.nbytes <= room else Streamed(path, device)


def _mapped(path: Path) -> np.ndarray:
    # copy on write: torch takes no read-only arrays, and nothing here writes
    array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    return array
