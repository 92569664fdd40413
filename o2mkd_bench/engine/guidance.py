"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) around any denoiser of one t a batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.program import passes
from .router import Router


class Guided:
    """A router that draws image i from condition i.

    One evaluation is one call of the network on twice the batch, without and with the condition:
    ``e_u + g (e_c - e_u)``, which is linear and therefore the same in every prediction type. With g of 1, or without
    guidance, it is the conditional call alone.
    """

    def __init__(
        self, router: Router, conditions: NDArray[np.float16], null: Tensor, guidance: float | None = None
    ) -> None:
        """``conditions``: (N, L, D), which may be a mapped file; ``null``: (L, D), that of no text, on the device."""
        self.router = router
        self.guidance = 1.0 if guidance is None else guidance
        self._conditions = conditions
        self._null = null
        self._given = null[:0]

    @property
    def passes(self) -> int:
        """How many rows of the network's batch an image takes."""
        return passes(self.guidance)

    def fit(self, batch: int) -> None:
        """From now on at most ``batch`` images come at once."""
        self.router.fit(batch * self.passes)

    def prompt(self, indices: Tensor) -> None:
        """From now on images ``indices``, int64 (B,), are drawn."""
        chosen = torch.from_numpy(np.ascontiguousarray(self._conditions[indices.cpu().numpy()]))
        given = chosen.to(self._null.device, self._null.dtype)
        self._given = given if self.passes == 1 else torch.cat([self._null.expand_as(given), given])

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The raw prediction for ``x`` float32 (B, C, H, W), the images that were prompted, at timestep ``t``."""
        if self.passes == 1:
            return self.router(x, t, self._given)
        free, bound = self.router(torch.cat([x, x]), t, self._given).chunk(2)
        return free + self.guidance * (bound - free)
