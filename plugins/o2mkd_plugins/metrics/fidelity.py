"""FID, KID, Inception score, precision and recall, by torch-fidelity's functions on features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.engine.scoring import FeatureNetwork, Metric

from .extractors import load_network
from .options import (
    InceptionScoreOptions,
    KernelOptions,
    MetricOptions,
    PrecisionRecallOptions,
    fid_columns,
    inception_score_columns,
    kid_columns,
    precision_recall_columns,
)

# fixed, as in torch-fidelity: which images fall together is part of the number
SEED = 2020
# rows of distances held at once
DISTANCE_BATCH = 2000


class _Fidelity(Metric):
    """A metric on the pooled features of the network its options name."""

    options: MetricOptions

    def layers(self) -> tuple[str, ...]:
        return ("2048",) if self.options.network == "inception" else ("features",)

    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        return load_network(self.options, self.dataset, layers, self.base)


class FrechetDistance(_Fidelity):
    """Fréchet distance between Gaussians fitted to the features (Heusel et al., arXiv 1706.08500), in float64."""

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        (layer,) = self.layers()
        ours, theirs = (fid_features_to_statistics(part[layer].double()) for part in (generated, reference))
        found = fid_statistics_to_metric(ours, theirs, verbose=False)
        return dict(zip(fid_columns(self.options, self.dataset), [found[KEY_METRIC_FID]], strict=True))


class KernelDistance(_Fidelity):
    """Unbiased squared MMD with a cubic polynomial kernel (Binkowski et al., arXiv 1801.01401)."""

    options: KernelOptions

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        (layer,) = self.layers()
        ours, theirs = generated[layer].double(), reference[layer].double()
        size = self.options.subset_size
        if min(len(ours), len(theirs)) < size:
            raise UserError(
                f"metrics.kid.subset_size: subsets of {size} do not fit into {len(ours)} generated and {len(theirs)} "
                "reference images; lower it or raise sampling.images"
            )
        found = kid_features_to_metric(
            ours, theirs, kid_subsets=self.options.subsets, kid_subset_size=size, rng_seed=SEED, verbose=False
        )
        return dict(zip(kid_columns(self.options, self.dataset), [found[KEY_METRIC_KID_MEAN]], strict=True))


class InceptionScore(_Fidelity):
    """Inception score (Salimans et al., arXiv 1606.03498), mean over the splits; the reference plays no part."""

    options: InceptionScoreOptions

    def layers(self) -> tuple[str, ...]:
        return ("logits_unbiased",) if self.options.network == "inception" else ("logits",)

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        (layer,) = self.layers()
        logits, splits = generated[layer], self.options.splits
        if len(logits) < splits:
            raise UserError(
                f"metrics.inception_score.splits: {len(logits)} images make no {splits} splits; "
                "lower it or raise sampling.images"
            )
        found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=SEED)
        return dict(zip(inception_score_columns(self.options, self.dataset), [found[KEY_METRIC_ISC_MEAN]], strict=True))


class PrecisionRecall(_Fidelity):
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991)."""

    options: PrecisionRecallOptions

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        (layer,) = self.layers()
        ours, theirs, neighbours = generated[layer], reference[layer], self.options.neighbours
        if min(len(ours), len(theirs)) <= neighbours:
            raise UserError(
                f"metrics.precision_recall.neighbours: {neighbours} neighbours need more than {len(ours)} generated "
                f"and {len(theirs)} reference images; lower it or raise sampling.images"
            )
        # in parts: the whole matrix of distances of 50,000 images would be 10 GB
        found = prc_features_to_metric(
            ours,
            theirs,
            prc_neighborhood=neighbours,
            prc_batch_size=DISTANCE_BATCH,
            save_cpu_ram=True,
            verbose=False,
        )
        values = [found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]]
        return dict(zip(precision_recall_columns(self.options, self.dataset), values, strict=True))
