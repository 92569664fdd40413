"""The objectives of progressive distillation (Salimans & Ho, arXiv 2202.00512)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import PluginError
from ..core.program import Clip
from .denoiser import Call, Experts
from .distil import Setting
from .kd import convert
from .sample import clipped
from .shared import Objective, Source, View


class Halve(Objective):
    """One student step learns two DDIM steps of the round before; the stream's t counts entries of the grid.

    ``grid`` and ``fine`` are training timesteps in any order; for a ``convert`` round ``fine`` is empty and the target
    is the round before itself. The loss is the x0 error weighted by max(SNR, 1).

    Raises:
        PluginError: unless ``fine`` is empty, or has every entry of ``grid`` and one more below each.
    """

    def __init__(
        self, setting: Setting, student: Call, before: Experts, grid: Sequence[int], fine: Sequence[int], clip: Clip
    ) -> None:
        if fine and sorted(fine)[1::2] != sorted(grid):
            raise PluginError(f"a round on {sorted(grid)} cannot halve steps on {sorted(fine)}: not every second entry")
        device = setting.data.device
        self.setting = setting
        self.student = student
        self.before = before
        self.clip = clip
        self.grid = torch.tensor(sorted(grid), device=device)
        self.fine = torch.tensor(sorted(fine), dtype=torch.int64, device=device)

    def source(self) -> Source:
        """What it learns from: the stream's t counts entries of the grid."""
        return self.setting.source(self.grid)

    def loss(self, view: View, rows: Tensor, step: int, part: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        s, seen = self.setting, view.take(rows)
        with torch.no_grad():
            target = self._target(seen)
        raw = self.student(seen.x_t, seen.t, seen.condition)
        x_hat = convert(raw, s.prediction, "sample", seen.x_t, seen.alpha, seen.sigma)
        error = (x_hat - target).square().flatten(1).mean(1)
        term = (s.tables.snr[seen.t].clamp(min=1) * error).mean()
        return term, {"x0": term}

    def _target(self, seen: View) -> Tensor:
        """The x0 from which one DDIM step lands where two steps of the round before do."""
        x_t, t, condition = seen.x_t, seen.t, seen.condition
        if len(self.fine) == 0:
            return self._x0(x_t, t, condition)[0]
        # entry i of the coarse grid is entry 2i + 1 of the fine one
        place = 2 * seen.place + 1
        middle = self._step(x_t, t, place - 1, condition)
        end = self._step(middle, self.fine[place - 1], place - 2, condition)
        a_end, s_end = self._level(place - 2)
        ratio = s_end / _wide(self.setting.tables.sigma[t])
        return (end - ratio * x_t) / (a_end - ratio * _wide(self.setting.tables.alpha[t]))

    def _x0(self, x: Tensor, t: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        tables = self.setting.tables
        epsilon = self.before.predict(x, t, "epsilon", condition)
        return clipped(x, epsilon, _wide(tables.alpha[t]), _wide(tables.sigma[t]), self.clip)

    def _level(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at entries of the fine grid; below its first entry stands the image itself, sigma 0."""
        tables, inside = self.setting.tables, place >= 0
        t = self.fine[place.clamp(min=0)]
        return _wide(torch.where(inside, tables.alpha[t], 1.0)), _wide(torch.where(inside, tables.sigma[t], 0.0))

    def _step(self, x: Tensor, t: Tensor, place: Tensor, condition: Tensor | None) -> Tensor:
        x0, epsilon = self._x0(x, t, condition)
        alpha, sigma = self._level(place)
        return alpha * x0 + sigma * epsilon


def _wide(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)
