"""FID, KID, Inception score, precision and recall of features: torch-fidelity's functions, on CUDA their equals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.engine.scoring import FeatureNetwork, Metric

from .distances import ROWS, frechet_distance, kernel_distance, precision_recall
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


class _Fidelity(Metric):
    """A metric on the pooled features of the network its options name."""

    options: MetricOptions

    def layers(self) -> tuple[str, ...]:
        return ("2048",) if self.options.network == "inception" else ("features",)

    def load(self, layers: Sequence[str]) -> FeatureNetwork:
        return load_network(self.options, self.dataset, layers, self.base)

    def features(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The one layer of both, on the device that numbers are taken on."""
        (layer,) = self.layers()
        return generated[layer].to(self.device), reference[layer].to(self.device)


class FrechetDistance(_Fidelity):
    """Fréchet distance between Gaussians fitted to the features (Heusel et al., arXiv 1706.08500), in float64."""

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        ours, theirs = self.features(generated, reference)
        if ours.is_cuda:
            value = frechet_distance(ours, theirs)
        else:
            statistics = (fid_features_to_statistics(part.double()) for part in (ours, theirs))
            value = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
        return dict(zip(fid_columns(self.options, self.dataset), [value], strict=True))


class KernelDistance(_Fidelity):
    """Unbiased squared MMD with a cubic polynomial kernel (Binkowski et al., arXiv 1801.01401)."""

    options: KernelOptions

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        ours, theirs = self.features(generated, reference)
        size, subsets = self.options.subset_size, self.options.subsets
        if min(len(ours), len(theirs)) < size:
            raise UserError(
                f"metrics.kid.subset_size: subsets of {size} do not fit into {len(ours)} generated and {len(theirs)} "
                "reference images; lower it or raise sampling.images"
            )
        if ours.is_cuda:
            value = kernel_distance(ours, theirs, subsets, size, SEED)
        else:
            drawn = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SEED}
            value = kid_features_to_metric(ours.double(), theirs.double(), **drawn, verbose=False)[KEY_METRIC_KID_MEAN]
        return dict(zip(kid_columns(self.options, self.dataset), [value], strict=True))


class InceptionScore(_Fidelity):
    """Inception score (Salimans et al., arXiv 1606.03498), mean over the splits; the reference plays no part."""

    options: InceptionScoreOptions

    def layers(self) -> tuple[str, ...]:
        return ("logits_unbiased",) if self.options.network == "inception" else ("logits",)

    def compute(self, generated: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
        (layer,) = self.layers()
        logits, splits = generated[layer].to(self.device), self.options.splits
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
        (ours, theirs), neighbours = self.features(generated, reference), self.options.neighbours
        if min(len(ours), len(theirs)) <= neighbours:
            raise UserError(
                f"metrics.precision_recall.neighbours: {neighbours} neighbours need more than {len(ours)} generated "
                f"and {len(theirs)} reference images; lower it or raise sampling.images"
            )
        values: tuple[float, float]
        if ours.is_cuda:
            values = precision_recall(ours, theirs, neighbours)
        else:
            # in parts: the whole matrix of distances of 50,000 images would be 10 GB
            parts = {"prc_neighborhood": neighbours, "prc_batch_size": ROWS, "save_cpu_ram": True}
            found = prc_features_to_metric(ours, theirs, **parts, verbose=False)
            values = found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
        return dict(zip(precision_recall_columns(self.options, self.dataset), values, strict=True))
