"""The wall time of a training loop, shared out among those who train in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class Account(Protocol):
    """Who pays."""

    seconds: float


class Ledger:
    """Each account gets what it took itself and an equal part of what was done for all present; nothing is lost.

    A clock can only be read rightly while the device is idle. On the CPU that is always; on CUDA only exact steps wait
    for the device, and the time between them is divided as the last exact step was.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._exact = False
        self._present: list[Account] = []
        self._taken: list[float] = []
        self._last = 0.0

    def open(self) -> None:
        """Time begins to count."""
        self._present, self._taken = [], []
        self._last = self._clock()

    def begin(self, present: Sequence[Account], exact: bool) -> None:
        """A step of the accounts ``present`` begins; its parts are measured if ``exact`` or if others were there."""
        same = len(present) == len(self._present) and all(a is b for a, b in zip(present, self._present, strict=True))
        self._exact = exact or not same or self._device.type != "cuda"
        if self._exact:
            self._settle()
            self._present, self._taken = list(present), [0.0] * len(present)

    def share(self) -> None:
        """What was done since the last call was done for all."""
        if self._exact:
            spent = self._lap() / len(self._present)
            for place in range(len(self._present)):
                self._pay(place, spent)

    def own(self, place: int) -> None:
        """What was done since the last call was done for the account at ``place`` of those present."""
        if self._exact:
            self._pay(place, self._lap())

    def close(self) -> None:
        """Nothing is counted any more, and nobody held on to."""
        self._settle()
        self._present, self._taken = [], []

    def _settle(self) -> None:
        """Divide the time since the last reading."""
        if not self._present:
            return
        spent, total = self._lap(), sum(self._taken)
        for place, taken in enumerate(list(self._taken)):
            self._present[place].seconds += spent * (taken / total if total > 0 else 1 / len(self._taken))

    def _pay(self, place: int, spent: float) -> None:
        self._taken[place] += spent
        self._present[place].seconds += spent

    def _lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._last = self._last, self._clock()
        return self._last - before
