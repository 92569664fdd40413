"""CLIP score (Hessel et al., arXiv 2104.08718): how well an image fits the text that it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from o2mkd_bench.core.errors import NetworkUnavailable, UserError
from o2mkd_bench.core.fingerprint import file_sha256
from o2mkd_bench.engine.scoring import FeatureNetwork, Metric
from o2mkd_plugins.models.codec import opened, transformers

from .options import CLIP_WEIGHTS, ClipOptions, clip_columns, clip_folder

# What all CLIPs were trained with (arXiv 2103.00020).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 64


class ClipScore(Metric):
    """The mean cosine of the embeddings of image i and of its caption, neither clipped at 0 nor times 100."""

    options: ClipOptions

    @cached_property
    def _clip(self) -> Clip:
        return Clip(clip_folder(self.options, self.base) or _download(self.options.network))

    def layers(self) -> tuple[str, ...]:
        return ("image",)

    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        name = f"clip:{self.options.network}"
        extractor = ClipExtractor(name, list(layers), self._clip.model)
        sha256, resize = file_sha256(self._clip.folder / CLIP_WEIGHTS), f"bicubic {extractor.size}"
        return FeatureNetwork(name, sha256, extractor, 3, resize, width=None)

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        """Raises UserError for images that were drawn from no captions."""
        images = generated["image"].double()
        if len(self.captions) != len(images):
            raise UserError(f"metrics.clip_score: {len(images)} images have {len(self.captions)} captions")
        unique = list(dict.fromkeys(self.captions))
        place = {caption: number for number, caption in enumerate(unique)}
        texts = self._clip.embed(unique).double()[[place[caption] for caption in self.captions]]
        cosine = nn.functional.cosine_similarity(images, texts)
        return dict(zip(clip_columns(self.options, self.dataset), [float(cosine.mean())], strict=True))


class ClipExtractor(FeatureExtractorBase):
    """Image embeddings of a CLIP: squashed to its input size, normalised as all CLIPs are."""

    def __init__(self, name: str, features_list: list[str], model: Any) -> None:
        super().__init__(name, features_list)
        self.model = model
        self.size = int(model.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, -1, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("image",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "image"

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        side = (self.size, self.size)
        x = nn.functional.interpolate(input.float() / 255, side, mode="bicubic", antialias=True)
        vision = self.model.vision_model(pixel_values=(x.clamp(0, 1) - self.mean) / self.std)
        return (self.model.visual_projection(vision.pooler_output),)


class Clip:
    """Both towers of a CLIP in a folder of transformers.

    Raises:
        NetworkUnavailable: when it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            package = transformers()
            self.model = opened(package.CLIPModel, folder)
            self._tokenizer = package.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (UserError, OSError, ValueError) as error:
            raise NetworkUnavailable(f"the CLIP of clip_score: {error}") from error

    @torch.inference_mode()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of ``captions``, cut at the network's length, float32 (N, D) on the CPU."""
        length, found = self.model.config.text_config.max_position_embeddings, []
        for start in range(0, len(captions), BATCH):
            some = list(captions[start : start + BATCH])
            tokens = self._tokenizer(
                some, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            states = self.model.text_model(**tokens.to(self.model.device))
            found.append(self.model.text_projection(states.pooler_output).float().cpu())
        return torch.cat(found)


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    names = ["config.json", CLIP_WEIGHTS, "vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
    try:
        folder = Path(snapshot_download(repo, allow_patterns=names))
    except Exception as error:  # the client lets through errors of its transport
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NetworkUnavailable(
            f"the CLIP {repo} is not in the local Hugging Face cache and could not be fetched ({reason}); name a copy "
            "of it in metrics.weights"
        ) from error
    if not (folder / CLIP_WEIGHTS).is_file():
        raise NetworkUnavailable(f"{repo} has no {CLIP_WEIGHTS}; name a copy saved by transformers in metrics.weights")
    return folder
