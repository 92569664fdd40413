"""Score images against real ones, with the protocol written beside every number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import PluginError, UserError
from ..core.plan import Stage
from ..core.store import Draft
from ..engine.sample import to_uint8
from ..engine.scoring import FeatureNetwork, Metric, Protocol, check_width, extract
from .bench import Bench, Stopwatch, write_json
from .samples import noise_source

BATCH = 256
HELD_OUT = "held-out real images"


def _metrics(stage: Stage, bench: Bench) -> list[Metric]:
    made = []
    for ref, options in zip(stage.spec["metrics"], stage.local["options"], strict=True):
        plugin = bench.registry.get("metrics", ref["name"])
        metric: Metric = plugin.load()(plugin.parse(options), stage.local["dataset"], Path(stage.local["base"]))
        metric.device = bench.device
        made.append(metric)
    return made


def _network(metrics: Sequence[Metric], bench: Bench) -> FeatureNetwork:
    network = metrics[0].load(list(dict.fromkeys(layer for metric in metrics for layer in metric.layers())))
    bench.place(network.extractor)
    return network


def make_reference(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``features.safetensors``: the train split's features by layer, float32 (N, F), made once per protocol."""
    clock = Stopwatch()
    network = _network(_metrics(stage, bench), bench)
    features = extract(network, bench.images(stage.needs["data"][0]), BATCH, bench.device)
    save_file(features, draft.dir / "features.safetensors")
    draft.meta["seconds"] = clock.seconds()


def make_score(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``scores.json``: ``scores`` by column, and the ``protocol`` they share."""
    clock = Stopwatch()
    metrics = _metrics(stage, bench)
    network = _network(metrics, bench)
    images = _images(stage, bench)
    ours = extract(network, images, BATCH, bench.device)
    # held-out images only mark the scale; there are as many as there are
    if network.width is not None and stage.spec.get("source") != HELD_OUT:
        check_width(network.width, len(images))
    theirs = load_file(bench.store.read(stage.needs["reference"][0], "features.safetensors"))
    if "prompts" in stage.needs:
        captions = bench.store.read_json(stage.needs["prompts"][0], "captions.json")[: len(images)]
        for metric in metrics:
            metric.captions = captions
    data = bench.store.manifest(stage.needs["data"][0])
    protocol = Protocol(
        network=network.name,
        sha256=network.sha256,
        reference="train",
        reference_fingerprint=data.spec["fingerprint"],
        reference_count=data.meta["train"],
        images=len(images),
        resize=network.resize,
        **_rounding(stage, bench),
    )
    scores: dict[str, Any] = {}
    untouched = _written(ours, theirs)
    for ref, metric in zip(stage.spec["metrics"], metrics, strict=True):
        plugin = bench.registry.get("metrics", ref["name"])
        try:
            found = metric.compute(dict(ours), dict(theirs))
        except UserError:
            if "samples" in stage.needs:
                raise
            continue
        if _written(ours, theirs) != untouched:
            raise PluginError(f"plugin metrics:{plugin.key} writes into features that others score; work on a copy")
        if wrong := _wrong(found, plugin.traits["columns"](metric.options, metric.dataset)):
            raise PluginError(f"plugin metrics:{plugin.key} {wrong}; correct the plugin")
        scores |= found
    write_json(draft.dir / "scores.json", {"scores": scores, "protocol": asdict(protocol)})
    draft.meta["seconds"] = clock.seconds()


def _written(*features: Mapping[str, Tensor]) -> list[str]:
    """What differs where features were written into, past torch's own count too."""
    # as text, in which NaN is NaN
    return [repr(float(values.sum(dtype=torch.float64))) for some in features for values in some.values()]


def _wrong(found: Any, declared: Sequence[str]) -> str:
    """What is wrong with the scores of a metric, in words; empty where nothing is."""
    if not isinstance(found, Mapping):
        return f"returned {type(found).__name__} from compute(), which is no dict of scores"
    for column in found:
        if column not in declared:
            return f"gives the column {column!r}, which is none of those it declares ({', '.join(declared)})"
    for column in declared:
        if column not in found:
            return f"gives no score for the column {column!r} that it declares"
        value = found[column]
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return f"gives {value!r} for the column {column!r}, which is no finite number"
    return ""


def _rounding(stage: Stage, bench: Bench) -> dict[str, str]:
    """How the samples became what is scored, where more was done than to round them."""
    if "samples" not in stage.needs:
        return {}
    finish = bench.store.manifest(stage.needs["samples"][0]).spec.get("finish")
    return {"rounding": "; ".join(["uint8 round", *finish])} if finish else {}


def _images(stage: Stage, bench: Bench) -> Tensor:
    """What is scored: drawn samples, or one of the two references that place them."""
    if "samples" in stage.needs:
        return torch.from_numpy(np.load(bench.store.read(stage.needs["samples"][0], "images.npy"), allow_pickle=False))
    if stage.spec["source"] == "noise":
        indices = torch.arange(stage.spec["images"])
        return to_uint8(noise_source(0, tuple(stage.spec["shape"]))(indices, 0))
    return bench.images(stage.needs["data"][0], "test")
