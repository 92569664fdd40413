"""What one evaluation of a network costs, counted and not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..core.models import ModelFamily


class Cost(TypedDict):
    """``params``: trainable parameters; ``macs``: multiply-accumulates of one evaluation of one image."""

    params: int
    macs: int


def network_cost(family: ModelFamily, config: Mapping[str, Any], channels: int, size: int) -> Cost:
    """Count for images (channels, size, size) at batch 1: convolutions, linear layers and attention's two products.

    Everything is on the meta device: no weights are made and nothing is computed. Normalisations, activations and
    additions are not counted, as is usual; google/ddpm-cifar10-32 has 6.222 GMACs.
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        network = family.built(config).eval()
        x, t = torch.empty(1, channels, size, size), torch.zeros(1, dtype=torch.int64)
        followed = family.condition_shape(network)
        condition = None if followed is None else torch.empty(1, *followed)
        with counter:
            family.forward(network, x, t, condition)
    params = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {"params": params, "macs": counter.get_total_flops() // 2}
