"""From images to scores: the metric contract, feature extraction, and the protocol that stands beside every number.

torch is imported on first use only, so that metric plugins can share the rules at plan time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import PluginError, UserError
from ..core.options import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# images from which on cuDNN's search for the fastest algorithms pays
LONG = 10_000


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
        fast: makes a copy of ``extractor`` for CUDA whose features are the same to rounding; None where there is none.
    """

    name: str
    sha256: str
    extractor: Any
    channels: int
    resize: str
    width: int | None
    fast: Callable[[], Any] | None = None


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


class Metric(ABC):
    """A metric plugin: named columns from the features of two sets of images.

    Metrics of one dataset whose ``network_id`` traits agree share one loaded network and its features.
    ``dataset`` is the dataset's name in the suite; ``base`` the folder that relative paths in options are relative to.

    Attributes:
        device: the torch device on which ``compute`` may calculate; a score's stage sets it.
        captions: what the generated images were drawn from, in their order, where they were; likewise set.
    """

    device: str = "cpu"
    captions: Sequence[str] = ()

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

    Grey images are repeated where the network takes RGB. Convolutions are true float32 on every device. On CUDA the
    network's ``fast`` copy is used, the features leave the device once, at the end, and a batch that does not fit into
    its memory is halved. Never compiled: that takes longer than 50,000 images do.

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
    cuda = torch.device(device).type == "cuda"
    module = (network.fast() if cuda and network.fast else network.extractor).to(device).eval()
    features = (
        extract_ahead(module, pixels, network.channels, batch, torch.device(device))
        if cuda
        else _extract_here(module, pixels, network.channels, batch, device)
    )
    for layer, values in features.items():
        if values.dim() != 2 or len(values) != len(pixels):
            raise PluginError(
                f"feature network {network.name} gives {tuple(values.shape)} as {layer} of {len(pixels)} images; give "
                "one row an image"
            )
    return features


def _extract_here(
    module: Any, pixels: Tensor, channels: int, batch: int, device: torch.device | str
) -> dict[str, Tensor]:
    import torch

    parts: list[dict[str, Tensor]] = []
    with torch.inference_mode():
        for chunk in torch.split(pixels, batch):
            chunk = chunk.expand(-1, channels, -1, -1).to(device).contiguous()
            found = module.convert_features_tuple_to_dict(module(chunk))
            parts.append({layer: value.float().cpu() for layer, value in found.items()})
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def extract_ahead(
    module: Any, pixels: Tensor, channels: int, batch: int, device: torch.device, channels_last: bool = False
) -> dict[str, Tensor]:
    """``extract`` by a ``module`` that is on ``device``, whose kernels run one after the other without the host.

    All batches have one size, so that cuDNN searches its algorithms once.
    """
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=layout)
    while True:
        size = max(1, min(batch, len(pixels)))
        parts: list[tuple[Tensor, ...]] = []
        try:
            with (
                torch.inference_mode(),
                torch.backends.cudnn.flags(enabled=True, benchmark=len(pixels) >= LONG, allow_tf32=False),
            ):
                for chunk in _batches(pixels, size, device):
                    parts.append(module(chunk.expand(-1, channels, -1, -1).contiguous(memory_format=layout)))
                layers = tuple(torch.cat(layer)[: len(pixels)].float().cpu() for layer in zip(*parts, strict=True))
            found: dict[str, Tensor] = module.convert_features_tuple_to_dict(layers)
            return found
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        batch = size // 2
        del parts
        torch.cuda.empty_cache()


def _batches(pixels: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """``pixels`` on the device in batches of ``size``, the last filled up with copies of its first image."""
    import torch

    chunks = list(torch.split(pixels, size))
    missing = size - len(chunks[-1])
    chunks[-1] = torch.cat([chunks[-1], chunks[-1][:1].expand(missing, -1, -1, -1)])
    return iter(chunks) if pixels.device.type == device.type else _ahead(chunks, device)


def _ahead(chunks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each chunk on the CUDA device, copied while the one before it is worked on."""
    import torch

    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    working = torch.cuda.current_stream(device)

    def copy(chunk: Tensor) -> Tensor:
        with torch.cuda.stream(copying):
            return chunk.pin_memory().to(device, non_blocking=True)

    coming = copy(chunks[0])
    for later in [*chunks[1:], None]:
        here = coming
        working.wait_stream(copying)
        # or the allocator would give its memory to the next copy while it is still being read
        here.record_stream(working)
        if later is not None:
            coming = copy(later)
        yield here
