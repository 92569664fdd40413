"""The scoring engine, with a feature network of three lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from o2mkd_bench import Metric, Options, UserError
from o2mkd_bench.engine.scoring import (
    FeatureNetwork,
    NetworkUnavailable,
    Protocol,
    Reference,
    check_width,
    extract,
    score,
)


class Means(FeatureExtractorBase):
    """``mean`` of each channel, and the ``corner`` pixel; counts the images it has seen."""

    seen = 0

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "mean", "corner"

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        assert input.dtype == torch.uint8
        Means.seen += len(input)
        found = {"mean": input.double().mean((2, 3)), "corner": input[:, :, 0, 0].float()}
        return tuple(found[layer] for layer in self.features_list)


class Shift(Metric):
    """The distance of the means of one layer."""

    layer = "mean"

    def network(self) -> str:
        return "means"

    def layers(self) -> tuple[str, ...]:
        return (self.layer,)

    def columns(self) -> tuple[str, ...]:
        return (f"{self.layer}_{self.dataset}",)

    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        return means(list(layers))

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        gap = (generated[self.layer].mean(0) - reference[self.layer].mean(0)).norm()
        return {self.columns()[0]: gap.item()}


class Corner(Shift):
    layer = "corner"


class Unavailable(Shift):
    def network(self) -> str:
        return "absent"

    def columns(self) -> tuple[str, ...]:
        return ("fid",)

    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        raise NetworkUnavailable("the weights are not here")


def means(layers: list[str]) -> FeatureNetwork:
    return FeatureNetwork("means", "ab" * 32, Means("means", layers), channels=3, resize="none", width=3)


def images(n: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, 4, 4), np.uint8)


def test_extract_is_float32_and_does_not_depend_on_the_batch() -> None:
    x = images(10)
    alone = extract(means(["mean", "corner"]), x, batch=3)
    assert alone["mean"].dtype == torch.float32
    np.testing.assert_allclose(alone["mean"], x.mean((2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(alone["corner"], x[:, :, 0, 0])
    torch.testing.assert_close(extract(means(["mean"]), torch.from_numpy(x))["mean"], alone["mean"], rtol=0, atol=0)


def test_grey_images_are_repeated_for_a_network_of_colours() -> None:
    x = images(4, channels=1)
    found = extract(means(["mean"]), x)["mean"]
    np.testing.assert_allclose(found, np.repeat(x.mean((2, 3)), 3, axis=1), rtol=1e-6)


def test_extract_refuses_what_the_network_does_not_take() -> None:
    with pytest.raises(UserError, match="uint8"):
        extract(means(["mean"]), images(2).astype(np.float32))
    with pytest.raises(UserError, match="uint8"):
        extract(means(["mean"]), images(2)[0])
    grey = replace(means(["mean"]), channels=1)
    with pytest.raises(UserError, match="takes images of 1 channels, not 3"):
        extract(grey, images(2))


def test_features_may_be_a_tenth_of_the_images_and_no_more() -> None:
    check_width(64, 640)
    with pytest.raises(UserError, match=r"sampling\.images: 639 images .* width 64; sample at least 640"):
        check_width(64, 639)


def test_score_passes_over_the_images_once_per_network() -> None:
    Means.seen = 0
    ours, theirs = images(30), images(40, seed=1)
    metrics = [Shift(Options(), "toys"), Corner(Options(), "toys")]
    scores = score(metrics, ours, Reference(theirs, "train", "f" * 64))
    gap = np.linalg.norm(ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3)))
    assert scores.values["mean_toys"] == pytest.approx(gap, rel=1e-5)
    assert set(scores.values) == set(scores.protocols) == {"mean_toys", "corner_toys"}
    assert scores.missing == {}
    assert Means.seen == 70
    assert scores.protocols["mean_toys"] == Protocol("means", "ab" * 32, "train", "f" * 64, 40, 30)


def test_reference_features_are_remembered(tmp_path: Path) -> None:
    metrics, ours, theirs = [Shift(Options(), "toys")], images(30), images(40, seed=1)
    reference = Reference(theirs, "train", "f" * 64)
    first = score(metrics, ours, reference, cache=tmp_path / "cache")
    Means.seen = 0
    assert score(metrics, ours, reference, cache=tmp_path / "cache").values == first.values
    assert Means.seen == 30
    (kept,) = (tmp_path / "cache").iterdir()
    for other in (replace(reference, split="test"), replace(reference, fingerprint="0" * 64)):
        Means.seen = 0
        score(metrics, ours, other, cache=tmp_path / "cache")
        assert Means.seen == 70
    kept.write_bytes(b"cut off")
    assert score(metrics, ours, reference, cache=tmp_path / "cache").values == first.values
    assert len(kept.read_bytes()) > 40 * 3 * 4


def test_a_network_that_is_not_there_leaves_its_columns_empty() -> None:
    metrics = [Unavailable(Options(), "toys"), Shift(Options(), "toys")]
    scores = score(metrics, images(30), Reference(images(30), "train", "f"))
    assert scores.missing == {"fid": "the weights are not here"}
    assert scores.values == {"mean_toys": 0.0}


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"sampling\.images: 29 images"):
        score([Shift(Options(), "toys")], images(29), Reference(images(30), "train", "f"))


def test_protocols_differ_by_every_field() -> None:
    one = Protocol("means", "ab", "train", "f", 40, 30)
    others = [
        replace(one, **{name: value})
        for name, value in [
            ("network", "x"),
            ("sha256", "x"),
            ("reference", "test"),
            ("reference_fingerprint", "x"),
            ("reference_count", 41),
            ("images", 31),
            ("rounding", "x"),
            ("resize", "x"),
        ]
    ]
    assert len({p.identity() for p in [one, *others]}) == 9
    assert one.identity() == replace(one).identity()


@pytest.mark.parametrize(
    "module",
    [
        "o2mkd_bench.core.fingerprint",
        "o2mkd_bench.engine.scoring",
        "o2mkd_plugins.metrics.options",
        "o2mkd_plugins.datasets.options",
        "o2mkd_plugins.datasets.digits",
        "o2mkd_plugins.datasets.cifar10",
        "o2mkd_plugins.datasets.image_folder",
    ],
)
def test_what_the_plan_reads_is_free_of_heavy_imports(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'sklearn', 'torchvision', 'PIL'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
