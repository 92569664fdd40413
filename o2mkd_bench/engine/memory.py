"""How much memory a training step or a sampling pass takes on a GPU, reckoned without one and without weights.

The networks run as fake tensors, which have shapes and no content, while every storage is counted from where it is made
to where nobody holds it any more: forward, backward and what is computed again in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.models import ModelFamily
from .denoiser import DTYPES, forward, tapped_forward
from .taps import Taps, resolve

# Moments of each optimiser, in float32.
MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}


@dataclass(frozen=True)
class Network:
    """An architecture: what a family builds from ``config``; ``features``: roles or paths that a method looks at."""

    family: ModelFamily
    config: Mapping[str, Any]
    features: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        teachers: whoever is asked, each of them resident; none for plain training.
        batch: samples that the teachers see at once; ``micro_batch``: those that the student does.
        checkpoint: whether activations are computed again in the backward pass.
    """

    student: Network
    teachers: Sequence[Network]
    batch: int
    micro_batch: int
    precision: str
    optimizer: str = "adamw"
    checkpoint: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes. Neither CUDA's own half gigabyte is in it, nor what libraries put aside, nor a training set.

    Attributes:
        resident: weights, moments and averages, there all the time.
        teaching: most that the teachers' pass takes beside them.
        learning: most that the student's passes take beside them: activations, gradients, what the teachers said.
    """

    resident: int
    teaching: int
    learning: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.resident + max(self.teaching, self.learning)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages made while it is on, real or fake: ``now``, and the most so far, ``peak``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def training(step: Step) -> Estimate:
    """What ``step`` takes. The terms of KD methods are taken to be squared differences."""
    with FakeTensorMode():
        student, parameters = _built(step.student)
        if step.precision != "fp32":
            _normalised_in_float32(student)
        resident = parameters * 4 * (2 + MOMENTS[step.optimizer])
        teachers = [_frozen(one, step.precision) for one in step.teachers]
        resident += sum(size for _, size in teachers)
        with Live() as live:
            # x0, noise and x_t
            inputs = [_inputs(step.student, student, step.batch) for _ in range(3)]
            told = [_ask(one, network, step) for one, (network, _) in zip(step.teachers, teachers, strict=True)]
            teaching, live.peak = live.peak, live.now
            if step.checkpoint:
                step.student.family.checkpoint_activations(student)
            # the second pass meets the gradients of the first
            for _ in range(min(2, -(-step.batch // step.micro_batch))):
                _learn(step, student)
        del inputs, told
    return Estimate(resident, teaching, live.peak)


def sampling(networks: Sequence[Network], batch: int, precision: str) -> Estimate:
    """What one evaluation takes where ``networks`` are all resident and one answers for ``batch`` rows."""
    with FakeTensorMode(), torch.no_grad():
        opened = [_frozen(one, precision) for one in networks]
        with Live() as live:
            x, t, *condition = _inputs(networks[0], opened[0][0], batch)
            forward(networks[0].family, opened[0][0], x, t, _one(condition), DTYPES[precision])
    return Estimate(sum(size for _, size in opened), 0, live.peak)


def _built(network: Network) -> tuple[nn.Module, int]:
    """A network of fake tensors in training, and its number of parameters."""
    made = network.family.built(network.config).train()
    return made, sum(p.numel() for p in made.parameters())


def _frozen(network: Network, precision: str) -> tuple[nn.Module, int]:
    """A network of fake tensors for evaluation, and the bytes of its weights, which are held in ``precision``."""
    made, parameters = _built(network)
    dtype = DTYPES[precision]
    # a module of fake tensors cannot be moved
    for module in made.eval().modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
    return made, parameters * dtype.itemsize


def _normalised_in_float32(network: nn.Module) -> None:
    """As autocast has it on CUDA, and not on the CPU, which this runs on."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _inputs(network: Network, module: nn.Module, batch: int) -> list[Tensor]:
    size = network.config["sample_size"]
    followed = network.family.condition_shape(module)
    found = [torch.empty(batch, network.config["in_channels"], size, size), torch.zeros(batch, dtype=torch.int64)]
    return found if followed is None else [*found, torch.empty(batch, *followed, dtype=torch.float16)]


def _one(condition: Sequence[Tensor]) -> Tensor | None:
    return condition[0] if condition else None


def _taps(network: Network, module: nn.Module, who: str) -> Taps:
    return Taps(module, resolve(module, network.features, network.family.roles(module), who), who)


@torch.no_grad()
def _ask(network: Network, module: nn.Module, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    x, t, *condition = _inputs(network, module, step.batch)
    with _taps(network, module, "teacher") as taps:
        return tapped_forward(network.family, module, x, t, _one(condition), DTYPES[step.precision], taps)


def _learn(step: Step, module: nn.Module) -> None:
    """One pass of the student, forward and backward."""
    x, t, *condition = _inputs(step.student, module, step.micro_batch)
    family = step.student.family
    narrow = step.precision != "fp32"
    # float16 takes what bfloat16 does, and not every version has it on the CPU
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow), _taps(step.student, module, "student") as taps:
        told, features = tapped_forward(family, module, x, t, _one(condition), torch.float32, taps)
        loss = sum(
            (value.square().mean() for value in features.values()), (told - x[:, : told.shape[1]]).square().mean()
        )
        # what is computed again must come out as before
        loss.backward()  # type: ignore[no-untyped-call]
