"""Seconds that it takes to score images against others: this harness beside torch-fidelity.

    python benchmarks/scoring.py --images 50000 --device cuda --json out.json

Both get the same 32x32 uint8 images in memory, the same batch size, true float32 and one file of Inception weights,
which are random: the number, ``fd_random``, is no FID. ``--explore`` times the ways that the harness could run the
network on this device, which is how the one it takes was chosen.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch_fidelity
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3, metric_fid
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from o2mkd_bench.core.fingerprint import file_sha256
from o2mkd_bench.engine.scoring import FeatureNetwork, extract, extract_ahead
from o2mkd_plugins.metrics.extractors import load_inception
from o2mkd_plugins.metrics.fidelity import FrechetDistance
from o2mkd_plugins.metrics.inception import FoldedInception, Form
from o2mkd_plugins.metrics.options import MetricOptions

# what else the tile of the split form could be; see its kernels.py
TILES = ((128, 128, 8, None), (128, 64, 4, None), (128, 64, 8, None), (64, 128, 4, None), (256, 64, 8, None))
# the 5.7 G multiply-adds of Inception at 299x299
OPERATIONS = 2 * 5.7e9


class InMemory(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(count: int, seed: int, noise: float) -> Tensor:
    """uint8 (count, 3, 32, 32): coarse random squares under this share of noise."""
    draw = np.random.default_rng(seed)
    squares = draw.integers(0, 256, (count, 3, 4, 4), np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    grains = draw.integers(0, 256, (count, 3, 32, 32), np.uint8)
    mixed = (1 - noise) * squares.astype(np.float32) + noise * grains
    return torch.from_numpy(mixed.round().astype(np.uint8))


def random_weights(path: Path) -> Path:
    """Random weights in the form of the published file, normalised so that features vary from image to image."""
    with (
        mock.patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url"),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(pictures(16, 0, 0.3))
    torch.save(network.state_dict(), path)
    return path


class Clock:
    """Seconds by part, in all and of the last call."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def time(self, part: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        self.last[part] = time.perf_counter() - start
        self.parts[part] = self.parts.get(part, 0) + self.last[part]
        return found

    def inside(self, owner: Any, name: str, part: str) -> Any:
        """A patch of ``owner.name`` by itself, timed."""
        original = getattr(owner, name)
        return mock.patch.object(owner, name, lambda *a, **k: self.time(part, lambda: original(*a, **k)))


def theirs(samples: Tensor, reference: Tensor, weights: Path, batch: int, cuda: bool) -> dict[str, Any]:
    """torch-fidelity from nothing; ``cached`` is that less what the reference took, which its cache would save."""
    clock = Clock()
    with (
        clock.inside(metric_fid, "fid_input_id_to_statistics_cached", "features and statistics"),
        clock.inside(metric_fid, "fid_features_to_statistics", "statistics"),
        clock.inside(metric_fid, "fid_statistics_to_metric", "number"),
    ):
        found = clock.time(
            "from nothing",
            lambda: torch_fidelity.calculate_metrics(
                input1=InMemory(samples),
                input2=InMemory(reference),
                fid=True,
                feature_extractor_weights_path=str(weights),
                batch_size=batch,
                cuda=cuda,
                cache=False,
                verbose=False,
            ),
        )
    # called for the samples first and for the reference last
    clock.parts["cached"] = clock.parts["from nothing"] - clock.last["features and statistics"]
    return {"seconds": clock.parts, "fd_random": float(found[metric_fid.KEY_METRIC_FID])}


def ours(samples: Tensor, reference: Tensor, weights: Path, batch: int, device: str) -> dict[str, Any]:
    """The harness: the reference's features made and stored, then samples scored against what was stored."""
    sha256, clock = file_sha256(weights), Clock()
    metric = FrechetDistance(MetricOptions(), "random")
    metric.device = device

    def load() -> FeatureNetwork:
        return load_inception(weights, metric.layers(), sha256)

    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "features.safetensors"

        def make_reference() -> None:
            network = clock.time("reference: load", load)
            features = clock.time("reference: features", lambda: extract(network, reference, batch, device))
            save_file(features, stored)

        def score() -> float:
            network = clock.time("cached: load", load)
            features = clock.time("cached: features", lambda: extract(network, samples, batch, device))
            known = clock.time("cached: reference", lambda: (file_sha256(stored), load_file(stored))[1])
            (value,) = clock.time("cached: number", lambda: metric.compute(features, known)).values()
            return float(value)

        clock.time("reference", make_reference)
        number = clock.time("cached", score)
    clock.parts["from nothing"] = clock.parts["reference"] + clock.parts["cached"]
    return {"seconds": clock.parts, "fd_random": number}


def explore(samples: Tensor, weights: Path, batch: int, device: str, asked: list[str]) -> list[dict[str, Any]]:
    """Images a second of the same network in several forms, those asked for or all; the first pass holds searches.

    ``off`` and ``scale`` compare features with torch-fidelity's: the largest difference over the largest of them, and
    by how much they are longer in all.
    """
    network = load_inception(weights, ["2048"], file_sha256(weights))
    place, few = torch.device(device), samples[:512]
    expected = extract_ahead(network.extractor.to(place), few, 3, batch, place)["2048"]
    found = []
    for name, last, make in forms(network.extractor):
        if asked and not name.startswith(tuple(asked)):
            continue
        with make() as module:
            clock = Clock()
            for part in ("first", "second"):
                features = clock.time(part, lambda: extract_ahead(module, samples, 3, batch, place, last)["2048"])  # noqa: B023
        features, rate = features[: len(few)], len(samples) / clock.parts["second"]
        found.append(
            {
                "network": name,
                "layout": "channels_last" if last else "contiguous",
                "first_seconds": clock.parts["first"],
                "seconds": clock.parts["second"],
                "images_per_second": rate,
                "tflops": rate * OPERATIONS / 1e12,
                "off": float((features - expected).abs().max() / expected.max()),
                "scale": float((features * expected).sum(dtype=torch.float64) / expected.double().square().sum() - 1),
                "fused_convolutions": sum(m.fused for m in module.modules() if hasattr(m, "fused")),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def forms(extractor: Any) -> Iterator[tuple[str, bool, Callable[[], AbstractContextManager[Any]]]]:
    """Name, whether channels lie last, and a context in which the network has that form."""

    @contextmanager
    def made(form: Form, tile: Any = None) -> Iterator[Any]:
        with mock.patch.object(kernels, "TILE", tile) if tile else nullcontext():
            yield FoldedInception(extractor, form).to(next(extractor.parameters()).device)

    for last in (False, True):
        yield "torch-fidelity's", last, lambda: nullcontext(extractor)
        yield "folded", last, lambda: made("plain")
        yield "folded, fused", last, lambda: made("fused")
    if importlib.util.find_spec("triton"):
        from o2mkd_plugins.metrics import kernels

        for last in (False, True):
            yield "split", last, lambda: made("split")
        for tile in TILES:
            yield f"split, tile {tile}", False, lambda tile=tile: made("split", tile)


def warm(samples: Tensor, weights: Path, batch: int, device: str) -> None:
    """One batch through both networks, so that neither side pays for the start of the device."""
    network = load_inception(weights, ["2048"], file_sha256(weights))
    extract(network, samples[:batch], batch, device)
    place = torch.device(device)
    extract_ahead(network.extractor.to(place), samples[:batch], 3, batch, place, channels_last=False)


def compared(us: dict[str, Any], them: dict[str, Any]) -> dict[str, Any]:
    """The ratios of both, and how far apart the numbers are."""
    gap = abs(us["fd_random"] - them["fd_random"])
    return {
        "ratio_from_nothing": them["seconds"]["from nothing"] / us["seconds"]["from nothing"],
        "ratio_cached": them["seconds"]["cached"] / us["seconds"]["cached"],
        "difference": gap,
        "relative_difference": gap / abs(them["fd_random"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--explore", nargs="*", metavar="FORM", help="time forms of the network instead; all, or these")
    asked = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cuda = torch.device(asked.device).type == "cuda"
    samples, reference = pictures(asked.images, 1, 0.35), pictures(asked.images, 2, 0.3)
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(asked.device) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "images": asked.images,
        "batch": asked.batch,
    }
    with tempfile.TemporaryDirectory() as folder, torch.cuda.device(asked.device) if cuda else nullcontext():
        weights = random_weights(Path(folder) / "inception.pth")
        if asked.explore is not None:
            about["forms"] = explore(samples, weights, asked.batch, asked.device, asked.explore)
        else:
            warm(samples, weights, asked.batch, asked.device)
            us = ours(samples, reference, weights, asked.batch, asked.device)
            rate = asked.images / us["seconds"]["cached: features"]
            about |= {"ours": us, "images_per_second": rate, "tflops": rate * OPERATIONS / 1e12}
            # whoever stops it here has our half
            write(about, asked.json)
            about["torch_fidelity"] = them = theirs(samples, reference, weights, asked.batch, cuda)
            about |= compared(us, them)
        write(about, asked.json)


def write(about: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(about, indent=1)
    print(text, flush=True)
    if path:
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
