"""From images to scores: the metric contract, feature extraction, and the protocol that stands beside every number.

torch is imported on first use only, so that metric plugins can share the rules at plan time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.identity import identity
from ..core.options import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class FeatureNetwork:
    """A loaded feature network.

    Attributes:
        name: ``inception``, ``embedded:cifar10``, ``timm:…``.
        sha256: of the weights.
        extractor: a torch-fidelity ``FeatureExtractorBase``: uint8 (B, ``channels``, H, W) in, features (B, F) out.
        channels: of the images it takes.
        resize: what it does to images first, in words.
        width: its feature width, held to a tenth of the number of images; None for the 2015 Inception, where the
            number of images belongs to a published protocol.
    """

    name: str
    sha256: str
    extractor: Any
    channels: int
    resize: str
    width: int | None


@dataclass(frozen=True)
class Protocol:
    """Everything that must agree before two scores may stand in one table."""

    network: str
    sha256: str
    reference: str
    reference_fingerprint: str
    reference_count: int
    images: int
    rounding: str = "uint8 round"
    resize: str = "none"

    def identity(self) -> str:
        """20 hex digits."""
        return identity(asdict(self))


class Metric(ABC):
    """A metric plugin: named columns from the features of two sets of images.

    Metrics of one dataset whose ``network_id`` traits agree share one loaded network and its features.
    ``dataset`` is the dataset's name in the suite; ``base`` the folder that relative paths in options are relative to.
    """

    def __init__(self, options: Options, dataset: str, base: Path = Path()) -> None:
        self.options = options
        self.dataset = dataset
        self.base = base

    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """The network's layers that ``compute`` wants."""

    @abstractmethod
    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        """The network, on the CPU, giving ``layers``.

        Raises:
            NetworkUnavailable: when its weights cannot be had; the text says what was sought, where, and the mend.
            UserError: for wrong options.
        """

    @abstractmethod
    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        """Column to value, from features (N, F) float32 on the CPU by layer. Pure.

        The columns are those that the declaration's ``columns`` trait names.

        Raises:
            UserError: when there are too few images.
        """


def check_width(width: int, images: int) -> None:
    """The Fréchet distance of F features from fewer than 10 F images says more about the number than the images.

    Raises:
        UserError: naming ``sampling.images``.
    """
    if 10 * width > images:
        raise UserError(
            f"sampling.images: {images} images are too few for a feature network of width {width}; "
            f"sample at least {10 * width}"
        )


def extract(
    network: FeatureNetwork, images: NDArray[np.uint8] | Tensor, batch: int = 256, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Features by layer, float32 (N, F) on the CPU, of uint8 images (N, C, H, W).

    Grey images are repeated where the network takes RGB. Convolutions are true float32 on every device.

    Raises:
        UserError: when dtype or channels do not fit.
    """
    import torch

    pixels = torch.as_tensor(images)
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise UserError(f"images to be scored must be uint8 (N, C, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
    if pixels.shape[1] not in (1, network.channels):
        raise UserError(
            f"feature network {network.name} takes images of {network.channels} channels, not {pixels.shape[1]}; "
            "choose another network"
        )
    module = network.extractor.to(device).eval()
    parts: list[dict[str, Tensor]] = []
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for chunk in torch.split(pixels, batch):
            chunk = chunk.expand(-1, network.channels, -1, -1).to(device).contiguous()
            found = module.convert_features_tuple_to_dict(module(chunk))
            parts.append({layer: value.float().cpu() for layer, value in found.items()})
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
