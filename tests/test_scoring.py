"""The scoring engine, with a feature network of three lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from o2mkd_bench import Metric, Options, UserError
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.engine.scoring import (
    FeatureNetwork,
    _ahead,
    check_width,
    extract,
    extract_ahead,
)


class Means(FeatureExtractorBase):
    """``mean`` of each channel, and the ``corner`` pixel."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "mean", "corner"

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        assert input.dtype == torch.uint8
        found = {"mean": input.double().mean((2, 3)), "corner": input[:, :, 0, 0].float()}
        return tuple(found[layer] for layer in self.features_list)


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


def test_a_network_gives_a_row_an_image() -> None:
    class Joined(Means):
        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            return tuple(values.mean(0, keepdim=True) for values in super().forward(input))

    network = replace(means(["mean"]), extractor=Joined("joined", ["mean"]))
    with pytest.raises(PluginError, match=r"network means gives \(4, 3\) as mean of 10 images; give one row an image"):
        extract(network, images(10), batch=3)


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


class Sizes(Means):
    """Notes the batches it gets; one larger than ``room`` does not fit into memory."""

    def __init__(self, room: int = 99) -> None:
        super().__init__("sizes", ["mean", "corner"])
        self.room, self.seen = room, []

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        self.seen.append(len(input))
        if len(input) > self.room:
            raise torch.OutOfMemoryError
        return super().forward(input)


def ahead(module: Sizes, pixels: np.ndarray, batch: int, channels_last: bool = True) -> dict[str, Tensor]:
    return extract_ahead(module, torch.from_numpy(pixels), 3, batch, torch.device("cpu"), channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("n", "sizes"), [(10, [4, 4, 4]), (8, [4, 4]), (3, [3]), (1, [1])])
def test_batches_have_one_size_and_what_fills_the_last_is_cut(n: int, sizes: list[int], channels_last: bool) -> None:
    module, x = Sizes(), images(n, channels=1)
    found = ahead(module, x, 4, channels_last)
    assert module.seen == sizes
    plain = extract(means(["mean", "corner"]), x)
    assert list(found) == list(plain)
    for layer, value in plain.items():
        torch.testing.assert_close(found[layer], value, rtol=0, atol=0)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    module, x = Sizes(room=2), images(5)
    found = ahead(module, x, 8)
    assert module.seen == [5, 2, 2, 2]
    torch.testing.assert_close(found["mean"], extract(means(["mean"]), x)["mean"], rtol=0, atol=0)
    with pytest.raises(torch.OutOfMemoryError):
        ahead(Sizes(room=0), x, 8)


def test_the_next_batch_is_copied_while_this_one_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    working = SimpleNamespace(wait_stream=lambda other: told.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: working)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: told.append(f"copy {self[0]:d}") or self)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: told.append(f"keep {self[0]:d}"))
    for chunk in _ahead(torch.arange(3).split(1), torch.device("cpu")):
        told.append(f"work {chunk[0]:d}")
    first = ["copy 0", "wait", "keep 0", "copy 1", "work 0"]
    assert told == [*first, "wait", "keep 1", "copy 2", "work 1", "wait", "keep 2", "work 2"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_features_on_cuda_are_those_of_the_cpu(place: str) -> None:
    x = torch.from_numpy(images(1000))
    network = means(["mean", "corner"])
    expected = extract(network, x)
    network = replace(network, fast=lambda: Means("fast", ["mean", "corner"]))
    for layer, value in extract(network, x.to(place), batch=96, device="cuda").items():
        torch.testing.assert_close(value, expected[layer])


def test_features_may_be_a_tenth_of_the_images_and_no_more() -> None:
    check_width(64, 640)
    with pytest.raises(UserError, match=r"sampling\.images: 639 images .* width 64; sample at least 640"):
        check_width(64, 639)


def test_what_a_metric_is_made_of() -> None:
    class Shift(Metric):
        """The distance of the means."""

        def layers(self) -> tuple[str, ...]:
            return ("mean",)

        def load(self, layers: Sequence[str]) -> FeatureNetwork:
            return means(list(layers))

        def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
            gap = (generated["mean"].mean(0) - reference["mean"].mean(0)).norm()
            return {f"shift_{self.dataset}": gap.item()}

    metric = Shift(Options(), "toys")
    ours, theirs = images(30), images(40, seed=1)
    network = metric.load(metric.layers())
    found = metric.compute(extract(network, ours), extract(network, theirs))
    gap = np.linalg.norm(ours.mean((0, 2, 3)) - theirs.mean((0, 2, 3)))
    assert found == {"shift_toys": pytest.approx(gap, rel=1e-5)}
    with pytest.raises(TypeError, match="abstract"):
        Metric(Options(), "toys")


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
