"""The CLIP score keeps the contract of metrics, with a tiny CLIP that knows the images it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from o2mkd_bench.core.plugins import registry
from o2mkd_bench.engine.scoring import Metric
from o2mkd_bench.testing import MetricContract

pytest.importorskip("transformers")
from o2mkd_bench.testing import tiny_sd
from o2mkd_plugins.metrics.clip import ClipExtractor, ClipScore
from o2mkd_plugins.metrics.options import ClipOptions

PICTURES = 24


class Seen(nn.Module):
    """In place of a projection: what is projected."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled


def taught(folder: Path, images: torch.Tensor, captions: list[str]) -> None:
    """Lay the embedding of each image as near to that of its caption as least squares do."""
    metric = ClipScore(ClipOptions(weights=str(folder)), "coco")
    network = metric.load(metric.layers())
    assert isinstance(network.extractor, ClipExtractor)
    model = network.extractor.model
    projection, model.visual_projection = model.visual_projection, Seen()
    (pooled,) = network.extractor(images)
    texts = nn.functional.normalize(metric._clip.embed(captions))
    projection.weight.copy_(torch.linalg.lstsq(pooled, texts).solution.T)
    model.visual_projection = projection
    model.save_pretrained(folder)


class TestClipScore(MetricContract):
    name = "clip_score"
    dataset = "coco"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _files(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        root = tmp_path_factory.mktemp("clip")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_sd, "TRAIN", 10)
            patch.setattr(tiny_sd, "VAL", PICTURES)
            tiny_sd.coco(root / "coco")
        tiny_sd.clip(root / "clip")
        cls.options = {"weights": str(root / "clip")}
        sizes = {"size": 32, "scored": 32, "prompts": PICTURES, "test_fraction": 0.5}
        cls.dataset_options = {"root": str(root / "coco"), **sizes}
        cls.captions = [f"a photo of {tiny_sd.scene(10 + number)[1]}" for number in range(PICTURES)]
        plugin = registry().get("datasets", cls.dataset)
        source = plugin.load()(plugin.parse(cls.dataset_options), Path())
        taught(root / "clip", torch.from_numpy(source.load().train), cls.captions)

    @property
    def metric(self) -> Metric:
        made = super().metric
        made.captions = self.captions
        return made

    def test_an_image_fits_its_own_caption_best(self, features: tuple[dict[str, torch.Tensor], ...]) -> None:
        metric = self.metric
        own = metric.compute(features[0], {})["clip_score"]
        metric.captions = self.captions[1:] + self.captions[:1]
        assert own > metric.compute(features[0], {})["clip_score"]
