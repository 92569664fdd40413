"""The one sampling loop: it runs any solver program with any denoiser."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.errors import Diverged, PluginError
from ..core.program import Clip, Program
from ..core.schedule import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]
"""x float32 (B, C, H, W) and one timestep for all of them to epsilon, float32 of the same shape."""

NoiseFor = Callable[[Tensor, int], Tensor]
"""Image indices int64 (B,) and k to standard normal float32 (B, C, H, W): the noise that enters ``states[k]``.

k = 0 is the initial noise, k = i + 1 the fresh noise of line i. Each image's noise depends on its own index only.
"""

# Batches that may be under way on a GPU before the host waits for the first of them.
_AHEAD = 2

CPU_BATCH = 128
MOST = 1024


class CountingDenoiser:
    """A denoiser that counts its calls."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self.calls = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
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
        noise: standard normal (B, C, H, W), which the program's ``start`` makes ``states[0]``.
        fresh: line number to standard normal float32 (B, C, H, W); called only for lines that add noise.
    """
    states = _Known([line.states for line in program.lines])
    epsilons = _Known([line.epsilon for line in program.lines])
    clean = _Known([line.x0 for line in program.lines])
    x = noise.float()
    if program.start != 1:
        x = x * program.start
    for i, line in enumerate(program.lines):
        alpha, sigma = schedule.levels(line.t)
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
    render: Callable[[Tensor], Tensor] | None = None,
    prompt: Callable[[Tensor], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_halve: Callable[[int], None] | None = None,
) -> Tensor:
    """The images of ``indices`` (int64 (N,), on the device of the network), uint8 (N, C, H, W) on the CPU.

    An image depends on its index alone: neither ``batch`` nor the other indices change it beyond float rounding. All N
    are held in memory, pinned where the device is a GPU; a caller with more asks for some at a time. From a GPU they
    leave while the next batch runs.

    Args:
        batch: images made at once; halved whenever memory runs out, which loses no image that was made.
        render: makes of last states float32 (B, C, H, W) images uint8; :func:`to_uint8` by default.
        prompt: told the indices of every batch before it is drawn, for a denoiser that follows something.
        on_batch: told after every batch how many images have arrived.
        on_halve: told the new batch before it is tried; what was held for the old one is to be given back.

    Raises:
        OutOfMemoryError: when there is no memory for one image.
        PluginError: when the network was not called ``program.nfe`` times per image.
        Diverged: when a last state is NaN.
    """
    counted = CountingDenoiser(denoise)
    made = _Arrivals(len(indices), indices.device, on_batch)
    torn = torch.zeros((), dtype=torch.bool, device=indices.device)
    runs = 0
    while made.sent < len(indices):
        some = indices[made.sent : made.sent + batch]
        try:
            if prompt is not None:
                prompt(some)
            states = _draw(program, schedule, counted, noise_for, some)
            # told at the end: nothing waits for the device meanwhile
            torn |= states.isnan().any()
            made.send((render or to_uint8)(states))
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
            batch = len(some) // 2
        else:
            runs += 1
            counted.check(program.nfe, runs)
            continue
        # not in the handler: the error holds on to the tensors of the batch that failed
        counted.calls = program.nfe * runs
        if on_halve is not None:
            on_halve(batch)
        if indices.is_cuda:
            torch.cuda.empty_cache()
    images = made.wait()
    if torn:
        raise Diverged("the images are not numbers (NaN); look at the network and at the sampler's coefficients")
    return images


def _draw(program: Program, schedule: NoiseSchedule, denoise: Denoise, noise_for: NoiseFor, indices: Tensor) -> Tensor:
    """The last states of one batch, float32 on the device."""

    def fresh(i: int) -> Tensor:
        return noise_for(indices, i + 1)

    return run_program(program, schedule, denoise, noise_for(indices, 0), fresh)


class _Arrivals:
    """Images on their way into one tensor on the CPU."""

    def __init__(self, total: int, device: torch.device, on_batch: Callable[[int], None] | None) -> None:
        self.sent = 0
        self._total = total
        self._tell = on_batch or (lambda done: None)
        self._host = torch.empty(0, dtype=torch.uint8)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[torch.cuda.Event, int]] = deque()

    def send(self, images: Tensor) -> None:
        """Take the next images, uint8 (B, C, H, W); from a GPU without waiting for them.

        Those that ``render`` has brought to the CPU have arrived.
        """
        if self.sent == 0:
            shape = (self._total, *images.shape[1:])
            self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        rows = self._host[self.sent : self.sent + len(images)]
        self.sent += len(images)
        if self._stream is None or images.device != self._device:
            rows.copy_(images)
            self._tell(self.sent)
            return
        self._stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._stream):
            rows.copy_(images, non_blocking=True)
            # their memory goes to nobody else before the copy is done
            images.record_stream(self._stream)
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record()
        self._under_way.append((arrived, self.sent))
        while len(self._under_way) > _AHEAD:
            self._receive()

    def wait(self) -> Tensor:
        """All of them, when the last has arrived."""
        while self._under_way:
            self._receive()
        return self._host

    def _receive(self) -> None:
        arrived, done = self._under_way.popleft()
        arrived.synchronize()
        self._tell(done)


def auto_batch(ask: Callable[[int], object], device: torch.device) -> int:
    """How many images at a time to begin with: what free memory holds on CUDA, a fixed number on the CPU.

    ``ask`` evaluates the network once for as many images as it is told.
    """
    if device.type != "cuda":
        return CPU_BATCH
    few = 8
    ask(few)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    ask(few)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return batch_within(torch.cuda.mem_get_info(device)[0], peak / few)


def batch_within(free: int, each: float) -> int:
    """The largest power of two whose images, ``each`` bytes, fill at most half of ``free`` bytes; 1 to 1024.

    Half, because the states of a solver and whatever a compiler or a library puts aside need room too.
    """
    fitting = int(free / 2 / max(each, 1.0))
    return min(MOST, 1 << max(fitting, 1).bit_length() - 1)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clamped first) as uint8, rounded to the nearest level."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
