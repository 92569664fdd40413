"""Load the feature network that a metric names: embedded, the 2015 Inception, or one of timm's."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from o2mkd_bench.core.errors import NetworkUnavailable
from o2mkd_bench.core.fingerprint import cache_folder, file_sha256
from o2mkd_bench.engine.scoring import FeatureNetwork

from .architectures import check_timm
from .inception import FoldedInception, fastest_form
from .networks import EXTRACTORS
from .options import (
    INCEPTION_SHA256,
    INCEPTION_VARIABLE,
    WEIGHTS,
    MetricOptions,
    embedded_record,
    weights_path,
)


def load_network(options: MetricOptions, dataset: str, layers: Sequence[str], base: Path = Path()) -> FeatureNetwork:
    """The network that ``options`` name, on the CPU, in ``eval``, giving ``layers``.

    Raises:
        NetworkUnavailable: when its weights cannot be had, or are not the right ones.
        UserError: when there is no such network.
    """
    if options.network == "embedded":
        return load_embedded(dataset, layers)
    path = weights_path(options, base)
    if options.network == "inception":
        return load_inception(path or download_inception(), layers)
    return load_timm(options.network.removeprefix("timm:"), layers, path)


def load_embedded(dataset: str, layers: Sequence[str]) -> FeatureNetwork:
    """The network that ships for ``dataset``; its weights must be those of the record beside them."""
    record = embedded_record(dataset)
    path = WEIGHTS / f"{dataset}.safetensors"
    if not path.is_file() or file_sha256(path) != record["sha256"]:
        raise NetworkUnavailable(f"{path} is missing or not what its record says; install o2mkd-bench anew")
    name = f"embedded:{dataset}"
    extractor = EXTRACTORS[dataset](name, list(layers))
    return FeatureNetwork(name, record["sha256"], extractor, extractor.channels, "none", record["width"])


def download_inception() -> Path:
    """The 2015 Inception's weights in this machine's cache, downloaded by torch-fidelity's address if need be."""
    path = cache_folder() / Path(URL_INCEPTION_V3).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise NetworkUnavailable(
            f"the Inception weights were not found at {path} and {URL_INCEPTION_V3} could not be downloaded ({error}); "
            f"fetch that file elsewhere and name its path in {INCEPTION_VARIABLE} or metrics.weights"
        ) from error
    return path


def load_inception(path: Path, layers: Sequence[str], sha256: str = INCEPTION_SHA256) -> FeatureNetwork:
    """torch-fidelity's Inception with the weights at ``path``, a PyTorch state dict whose hash must be ``sha256``.

    Raises:
        NetworkUnavailable: when the file has another hash, or holds more than tensors.
    """
    found = file_sha256(path)
    if found != sha256:
        raise NetworkUnavailable(
            f"{path} has sha256 {found[:12]}… and not {sha256[:12]}…, so it is not the 2015-12-05 Inception; "
            f"fetch {URL_INCEPTION_V3}"
        )
    # torch-fidelity would unpickle the file; it gets a copy that holds nothing but the tensors read from it
    tensors = io.BytesIO()
    torch.save(_state_dict(path), tensors)
    tensors.seek(0)
    extractor = FeatureExtractorInceptionV3("inception", list(layers), feature_extractor_weights_path=tensors)
    resize = "bilinear 299, as TensorFlow 1"

    def fast() -> FoldedInception:
        return FoldedInception(extractor, fastest_form())

    return FeatureNetwork("inception", found, extractor, 3, resize, width=None, fast=fast)


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise NetworkUnavailable(f"{path} is no PyTorch state dict of tensors alone; fetch it anew") from error
    return state


class TimmExtractor(FeatureExtractorBase):
    """``features``, what the classifier sees, and ``logits`` of a network of timm.

    Images are resized to the network's own input size, no crop, and normalised with its own mean and deviation.
    """

    def __init__(self, name: str, features_list: list[str], model: nn.Module) -> None:
        import timm

        super().__init__(name, features_list)
        config = timm.data.resolve_model_data_config(model)
        self.model = model
        self.size = tuple(config["input_size"][-2:])
        self.channels = config["input_size"][0]
        # torch has no Lanczos
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, -1, 1, 1))
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

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        x = nn.functional.interpolate(input.float() / 255, self.size, mode=self.mode, antialias=True)
        maps = self.model.forward_features((x.clamp(0, 1) - self.mean) / self.std)
        found = {
            "features": self.model.forward_head(maps, pre_logits=True),
            "logits": self.model.forward_head(maps),
        }
        return tuple(found[layer] for layer in self.features_list)


def load_timm(model_name: str, layers: Sequence[str], weights: Path | None = None) -> FeatureNetwork:
    """A network of timm by name, with pretrained weights from the hub, or with those of a local file.

    Raises:
        UserError: when timm knows no such model.
        NetworkUnavailable: when the weights cannot be downloaded or do not fit.
    """
    import timm

    check_timm(model_name)
    try:
        model: Any = timm.create_model(model_name, pretrained=weights is None)
        if weights is not None:
            timm.models.load_checkpoint(model, str(weights), strict=True, weights_only=True)
    except Exception as error:  # the hub's clients raise whatever their transport raises
        sought = weights or "the Hugging Face hub"
        raise NetworkUnavailable(
            f"the weights of timm's {model_name} could not be loaded from {sought} ({type(error).__name__}: {error}); "
            "fetch them where there is a network and name the file in metrics.weights"
        ) from error
    name = f"timm:{model_name}"
    sha256 = _tensors_sha256(model) if weights is None else file_sha256(weights)
    extractor = TimmExtractor(name, list(layers), model)
    resize = f"{extractor.mode} {extractor.size[0]}"
    return FeatureNetwork(name, sha256, extractor, extractor.channels, resize, model.head_hidden_size)


def _tensors_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
