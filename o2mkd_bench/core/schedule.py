"""Noise schedules in float64 numpy: known at plan time, one source for samplers, losses and interval rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

MOST_TIMESTEPS = 100_000
Prediction = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving schedule, ``x_t = alpha_t * x0 + sigma_t * noise`` (Ho et al., arXiv 2006.11239).

    Attributes:
        kind: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``, with the meaning they have in diffusers.
        beta_start, beta_end: of the first and the last timestep; without meaning for ``squaredcos_cap_v2``.
        timesteps: T, the number of training timesteps.
        trained_betas: T betas that take the place of the above.
    """

    kind: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], where: str = "scheduler_config.json") -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``.

        Raises:
            UserError: for a beta schedule that is not one of the three known ones, a number of trained betas that is
                not the number of timesteps, and for betas rescaled to zero terminal SNR.
        """
        betas = config.get("trained_betas")
        kind = config.get("beta_schedule", "linear")
        if betas is None and kind not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            raise UserError(
                f"{where}: beta_schedule {kind!r} is not known; use linear, scaled_linear or squaredcos_cap_v2"
            )
        timesteps = config.get("num_train_timesteps", 1000)
        if not isinstance(timesteps, int) or not 2 <= timesteps <= MOST_TIMESTEPS:
            raise UserError(
                f"{where}: num_train_timesteps is {str(timesteps)[:40]}; give a whole number from 2 to {MOST_TIMESTEPS}"
            )
        ends = [config.get(key, default) for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))]
        if not all(_is_beta(value) for value in (*ends, *(betas if isinstance(betas, list | tuple) else ()))):
            raise UserError(
                f"{where}: beta_start, beta_end and trained_betas are numbers between 0 and 1; correct them"
            )
        if betas is not None and not isinstance(betas, list | tuple):
            raise UserError(f"{where}: trained_betas must be a list of numbers; correct it")
        if betas is not None and len(betas) != timesteps:
            raise UserError(
                f"{where}: trained_betas has {len(betas)} entries and num_train_timesteps is {timesteps}; correct one"
            )
        if config.get("rescale_betas_zero_snr"):
            raise UserError(f"{where}: rescale_betas_zero_snr is not supported; set it to false")
        return cls(
            kind=kind,
            beta_start=float(ends[0]),
            beta_end=float(ends[1]),
            timesteps=timesteps,
            trained_betas=None if betas is None else tuple(float(b) for b in betas),
        )

    def scheduler_config(self) -> dict[str, Any]:
        """The keys by which diffusers builds the same schedule."""
        return {
            "beta_schedule": self.kind,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "num_train_timesteps": self.timesteps,
            "trained_betas": None if self.trained_betas is None else list(self.trained_betas),
        }

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """alpha_t squared, shape (T,), float64, strictly decreasing."""
        n = self.timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, dtype=np.float64)
        elif self.kind == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, n, dtype=np.float64)
        elif self.kind == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n, dtype=np.float64) ** 2
        else:
            bar = np.cos((np.arange(n + 1, dtype=np.float64) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        return np.cumprod(1 - betas, dtype=np.float64)

    @cached_property
    def alpha(self) -> NDArray[np.float64]:
        """Signal scale, shape (T,)."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def sigma(self) -> NDArray[np.float64]:
        """Noise scale, shape (T,)."""
        return np.sqrt(1 - self.alphas_cumprod)

    def levels(self, t: float) -> tuple[float, float]:
        """Signal and noise scale at ``t``; between timesteps sigma / alpha is linear, as in diffusers."""
        if isinstance(t, int):
            return float(self.alpha[t]), float(self.sigma[t])
        ratio = float(np.interp(t, np.arange(self.timesteps), self.sigma / self.alpha))
        alpha = 1 / (1 + ratio**2) ** 0.5
        return alpha, ratio * alpha

    @cached_property
    def log_snr(self) -> NDArray[np.float64]:
        """log(alpha^2 / sigma^2), shape (T,), natural logarithm, strictly decreasing."""
        return np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
