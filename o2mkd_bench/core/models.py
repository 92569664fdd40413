"""What a model plugin gives: architectures as data at plan time, networks at run time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .blocks import STUDENT_KEYS
from .errors import UserError
from .options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn


class Codec(ABC):
    """What stands between pixels, captions and a latent network; what it takes and gives is on its device."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Latents, float32 (B, C, h, w), of uint8 images (B, 3, H, W): the mean of the posterior, scaled."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 (B, 3, H, W), in [-1, 1] but for overshoot, of latents (B, C, h, w)."""

    @abstractmethod
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Conditions, float32 (B, L, D); the empty caption's is that of no condition."""

    def parts(self) -> Mapping[str, Any]:
        """``vae``, ``text_encoder`` and ``tokenizer`` as a diffusers pipeline has them.

        Raises:
            UserError: for a codec that is not made of these, which is the default.
        """
        raise UserError(f"{type(self).__name__} is no codec that diffusers knows; its cells are not exported")


class ModelFamily(ABC):
    """A family of denoisers. The module is torch-free; torch is imported inside the methods that compute.

    An architecture is a plain JSON dict in the form of diffusers' ``config.json``, complete: no key is left to a
    default that another diffusers version might change.

    Attributes:
        student_keys: what :meth:`student_config` reads of a student; a suite that gives another key is refused.
    """

    student_keys: ClassVar[tuple[str, ...]] = STUDENT_KEYS

    @abstractmethod
    def teacher_config(self, options: Options, channels: int, size: int) -> dict[str, Any]:
        """The architecture of a teacher trained from scratch on images of this shape."""

    @abstractmethod
    def student_config(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The architecture derived from the teacher's by what ``student_keys`` names.

        Raises:
            UserError: naming ``where``, when the width gives channels that the normalisation groups do not divide.
        """

    @abstractmethod
    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The network with freshly initialised weights, on the CPU in float32, from torch's global generator."""

    def built(self, config: Mapping[str, Any]) -> nn.Module:
        """:meth:`build` of a config of its own, which it may write into."""
        return self.build(deepcopy(dict(config)))

    @abstractmethod
    def forward(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw prediction for ``x`` (B, C, H, W) at timesteps ``t`` (B,), same shape and dtype as ``x``."""

    @abstractmethod
    def roles(self, network: nn.Module) -> dict[str, str]:
        """Role (``down.0`` … ``mid`` … ``up.3``) to module path."""

    def ready(self) -> None:  # noqa: B027 - most families need no more than the harness does
        """Asked by a run before any work; quick and torch-free.

        Raises:
            UserError: when a package that the family's codec needs is not installed.
        """

    def condition_shape(self, network: nn.Module) -> tuple[int, ...] | None:
        """The shape of one sample's ``condition`` in :meth:`forward`; None for a family that follows nothing."""
        return None

    def check_start(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> None:
        """Whether a student of one architecture can start from the weights of a teacher of another. Torch-free.

        By default the two must be the same but for dropout, which has no weights.

        Raises:
            UserError: naming ``where``, when it cannot.
        """
        # a published config.json leaves out what a student's config says
        whole = self.student_config(teacher, {}, where)
        if {**whole, "dropout": 0} != {**student, "dropout": 0}:
            raise UserError(
                f"{where}.init: a student of another shape cannot start from the weights of its teacher; use init: "
                "scratch, or give it width 1"
            )

    def inherited(self, network: nn.Module, teacher: Mapping[str, Any]) -> dict[str, str] | None:
        """For each tensor of a student's ``network``, by name, that of its teacher's which it starts from.

        None, the default: all of them from those of the same name. Asked where :meth:`check_start` has agreed.
        """
        return None

    def codec(self, folder: Path, place: Callable[[nn.Module], nn.Module]) -> Codec:
        """What stands between pixels, captions and the networks of a latent family, from a stored pipeline.

        ``place`` brings a frozen module to the device; modules that nobody asks for are not opened.

        Raises:
            UserError: for a family that works on pixels, which is the default.
        """
        raise UserError(f"{type(self).__name__} works on pixels and has no codec")

    def optimise(self, network: nn.Module) -> nn.Module:
        """An equivalent of a frozen network for inference on CUDA, perhaps with fused kernels; by default itself.

        Called with a network in eval mode, in the dtype and layout in which it will run, when the mode compiles. It may
        share weights with ``network``, which must go on working. A module path that both have gives the same output in
        both; :meth:`forward` calls either.
        """
        return network

    def checkpoint_activations(self, network: nn.Module) -> None:
        """Make ``network`` compute its activations again in the backward pass instead of keeping them.

        Raises:
            UserError: for a family that cannot, which is the default.
        """
        raise UserError(
            f"checkpoint_activations: networks of class {type(network).__name__} cannot; leave the key out of the suite"
        )
