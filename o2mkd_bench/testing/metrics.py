"""The contract of metrics, on the digits that every installation has, or on a dataset of your own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.columns import COLUMN, LEADING_COLUMNS, TIMING_COLUMNS
from ..core.identity import canonical
from ..core.plugins import registry
from ..engine.scoring import FeatureNetwork, Metric, extract
from .contract import Contract

Features = Mapping[str, Tensor]


class MetricContract(Contract):
    """Subclass with ``name`` and ``options`` of a metric whose network is on this machine.

    Attributes:
        dataset, dataset_options: what is scored.
        images: how many of its training images, at most.
    """

    kind = "metrics"
    base = Metric
    dataset: ClassVar[str] = "digits"
    dataset_options: ClassVar[Mapping[str, Any]] = {}
    images: ClassVar[int] = 700

    def planned(self) -> str:
        asked = f"parsed, {self.dataset!r}"
        traits = (f"plugin.traits['columns']({asked})", f"plugin.traits['network_id']({asked}, pathlib.Path())")
        enough = f"plugin.traits.get('check_images', lambda *_: None)({asked}, 10**9)"
        found = f"plugin.traits.get('check_network', lambda *_: None)({asked}, pathlib.Path())"
        return "\n".join(("import pathlib", *traits, enough, found))

    @property
    def columns(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self.plugin.traits["columns"](self.parsed, self.dataset)
        return found

    @property
    def metric(self) -> Metric:
        made: Metric = self.plugin.load()(self.parsed, self.dataset)
        return made

    @pytest.fixture
    def real(self) -> NDArray[np.uint8]:
        plugin = registry().get("datasets", self.dataset)
        found: NDArray[np.uint8] = plugin.load()(plugin.parse(self.dataset_options), Path()).load().train
        return found[: self.images]

    @pytest.fixture
    def network(self) -> FeatureNetwork:
        return self.metric.load(self.metric.layers())

    @pytest.fixture
    def features(self, real: NDArray[np.uint8], network: FeatureNetwork) -> tuple[Features, Features]:
        """Of real images, and of noise."""
        noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
        return extract(network, real), extract(network, noise)

    def test_columns_are_declared(self) -> None:
        assert self.columns
        assert all(isinstance(column, str) and re.fullmatch(COLUMN, column) for column in self.columns)
        assert not {*LEADING_COLUMNS, *TIMING_COLUMNS} & set(self.columns)
        assert len(set(self.columns)) == len(self.columns)

    def test_better_is_declared(self) -> None:
        assert type(self.plugin.traits["higher_is_better"]) is bool

    def test_network_id_is_stable_data(self) -> None:
        found = [self.plugin.traits["network_id"](self.parsed, self.dataset, Path()) for _ in range(2)]
        assert canonical(found[0]) == canonical(found[1])
        assert found[0]["network"]

    def test_network_gives_the_layers(self, network: FeatureNetwork, features: tuple[Features, Features]) -> None:
        assert network.sha256
        for layer in self.metric.layers():
            value = features[0][layer]
            assert value.dtype == torch.float32
            assert value.dim() == 2
            assert bool(torch.isfinite(value).all())

    def test_scores_are_the_declared_columns(self, features: tuple[Features, Features]) -> None:
        real, noise = features
        scores = self.metric.compute(noise, real)
        assert tuple(scores) == self.columns
        assert all(type(value) is float and math.isfinite(value) for value in scores.values())

    def test_real_images_score_better_than_noise(self, features: tuple[Features, Features]) -> None:
        real, noise = features
        good, bad = self.metric.compute(real, real), self.metric.compute(noise, real)
        for column in self.columns:
            if self.plugin.traits["higher_is_better"]:
                assert good[column] > bad[column]
            else:
                assert good[column] < bad[column]

    def test_scoring_is_pure(self, features: tuple[Features, Features]) -> None:
        before = [{name: value.clone() for name, value in part.items()} for part in features]
        real, noise = features
        metric = self.metric
        assert metric.compute(noise, real) == metric.compute(noise, real) == self.metric.compute(noise, real)
        for part, kept in zip(features, before, strict=True):
            assert all(torch.equal(part[name], kept[name]) for name in kept)
