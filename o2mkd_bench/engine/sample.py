"""The one sampling loop: it runs any solver program with any denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.errors import PluginError
from ..core.program import Clip, Program
from ..core.schedule import NoiseSchedule

Denoise = Callable[[Tensor, int], Tensor]
"""x float32 (B, C, H, W) and one timestep for all of them to epsilon, float32 of the same shape."""

NoiseFor = Callable[[Tensor, int], Tensor]
"""Image indices int64 (B,) and k to standard normal float32 (B, C, H, W): the noise that enters ``states[k]``.

k = 0 is the initial noise, k = i + 1 the fresh noise of line i. Each image's noise depends on its own index only.
"""


class CountingDenoiser:
    """A denoiser that counts its calls."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self.calls = 0

    def __call__(self, x: Tensor, t: int) -> Tensor:
        self.calls += 1
        return self._denoise(x, t)

    def check(self, nfe: int, runs: int = 1) -> None:
        """Raise PluginError unless ``runs`` runs of a program made ``nfe`` calls each."""
        if self.calls != nfe * runs:
            raise PluginError(
                f"the sampler declares {nfe} network evaluations per image, but {runs} runs made {self.calls} calls"
            )


class _Known:
    """Tensors by line number, each dropped after the last line that refers to it."""

    def __init__(self, terms: list[Mapping[int, float]]) -> None:
        self._last = {j: i for i, line in enumerate(terms) for j in line}
        self._terms = terms
        self._values: dict[int, Tensor] = {}

    def keep(self, j: int, value: Tensor) -> None:
        """Note ``value`` as number ``j``, if any line refers to it."""
        if j in self._last:
            self._values[j] = value

    def add_to(self, total: Tensor, i: int) -> None:
        """Add line ``i``'s terms to ``total`` in place, and drop what no later line refers to."""
        for j, coefficient in self._terms[i].items():
            total.add_(self._values[j], alpha=coefficient)
            if self._last[j] == i:
                del self._values[j]


@torch.no_grad()
def run_program(
    program: Program, schedule: NoiseSchedule, denoise: Denoise, noise: Tensor, fresh: Callable[[int], Tensor]
) -> Tensor:
    """Run ``program`` from ``noise`` and give its last state, float32 (B, C, H, W), not clamped.

    All arithmetic is float32, whatever the precision of the network.

    Args:
        noise: ``states[0]``, standard normal (B, C, H, W).
        fresh: line number to standard normal float32 (B, C, H, W); called only for lines that add noise.
    """
    states = _Known([line.states for line in program.lines])
    epsilons = _Known([line.epsilon for line in program.lines])
    clean = _Known([line.x0 for line in program.lines])
    x = noise.float()
    for i, line in enumerate(program.lines):
        alpha, sigma = float(schedule.alpha[line.t]), float(schedule.sigma[line.t])
        epsilon = denoise(x, line.t).float()
        x0, epsilon = clipped(x, epsilon, alpha, sigma, program.clip)
        states.keep(i, x)
        epsilons.keep(i, epsilon)
        clean.keep(i, x0)
        total = torch.zeros_like(x)
        for known in (states, epsilons, clean):
            known.add_to(total, i)
        if line.noise:
            total.add_(fresh(i), alpha=line.noise)
        x = total
    return x


def clipped(
    x: Tensor, epsilon: Tensor, alpha: float | Tensor, sigma: float | Tensor, clip: Clip
) -> tuple[Tensor, Tensor]:
    """x0 and epsilon as a program's lines see them; see :class:`o2mkd_bench.core.program.Program` for ``clip``."""
    x0 = (x - sigma * epsilon) / alpha
    if clip != "none":
        x0 = x0.clamp(-1, 1)
    if clip == "x0+epsilon":
        epsilon = (x - alpha * x0) / sigma
    return x0, epsilon


def sample_images(
    program: Program,
    schedule: NoiseSchedule,
    denoise: Denoise,
    noise_for: NoiseFor,
    indices: Tensor,
    batch: int,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """The images of ``indices`` (int64 (N,), on the device of the network), uint8 (N, C, H, W) on the CPU.

    An image depends on its index alone: neither ``batch`` nor the other indices change it beyond float rounding. All N
    are held in memory; a caller with more asks for some at a time.

    Args:
        batch: images made at once.
        on_batch: told after every batch how many images are done.

    Raises:
        PluginError: when the network was not called ``program.nfe`` times per image.
    """
    counted = CountingDenoiser(denoise)
    made: list[Tensor] = []
    done = 0
    for some in torch.split(indices, batch):

        def fresh(i: int, some: Tensor = some) -> Tensor:
            return noise_for(some, i + 1)

        made.append(to_uint8(run_program(program, schedule, counted, noise_for(some, 0), fresh)).cpu())
        done += len(some)
        if on_batch is not None:
            on_batch(done)
    counted.check(program.nfe, len(made))
    return torch.cat(made)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped first) as uint8, rounded to the nearest level."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
